"""The published split of Caltech-101 as class folders.

    python -m data.split_caltech101 DIR    # DIR/101_ObjectCategories -> DIR/{train,test}/<class>/

`get_dataset("caltech101")` splits by itself; these are links, for other programs or to leave train images behind.
"""

import argparse
import os
import sys
from pathlib import Path

from data.sources import read_caltech101
from data.splits import DataError, one_line


def main(root: Path) -> None:
    """Makes the links below ``root``. Raises DataError, or OSError where they cannot be made."""
    found = read_caltech101(root, ("train", "test"))
    for split in ("train", "test"):
        files = getattr(found, split)
        for path, label in zip(files.paths, files.labels.tolist(), strict=True):
            target = root / split / found.class_names[label] / path.name
            target.parent.mkdir(parents=True, exist_ok=True)
            if not target.exists():
                os.link(path, target)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m data.split_caltech101", description=__doc__.splitlines()[0])
    parser.add_argument("DIR", type=Path, help="the folder that holds 101_ObjectCategories/")
    try:
        main(parser.parse_args().DIR)
    except (DataError, OSError) as error:
        text = one_line(error)
        if isinstance(error, OSError):
            text += f" {error.filename2 or error.filename}: choose a folder where links can be made"
        print(text, file=sys.stderr)
        sys.exit(2)
