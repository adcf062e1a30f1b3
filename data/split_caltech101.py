"""The published split of Caltech-101 as class folders.

    python -m data.split_caltech101 DIR    # DIR/101_ObjectCategories -> DIR/{train,test}/<class>/

`get_dataset("caltech101")` splits by itself; these are links, for other programs or to leave train images behind.
"""

import os
import sys
from pathlib import Path

from data.sources import read_caltech101
from data.splits import DataError


def main(root: Path) -> None:
    try:
        found = read_caltech101(root, ("train", "test"))
    except DataError as error:
        sys.exit(str(error))
    for split in ("train", "test"):
        files = getattr(found, split)
        for path, label in zip(files.paths, files.labels.tolist(), strict=True):
            target = root / split / found.class_names[label] / path.name
            target.parent.mkdir(parents=True, exist_ok=True)
            if not target.exists():
                os.link(path, target)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m data.split_caltech101 DIR")
    main(Path(sys.argv[1]))
