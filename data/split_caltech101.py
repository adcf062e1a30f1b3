"""The published split of Caltech-101 as class folders.

    python -m data.split_caltech101 DIR    # DIR/101_ObjectCategories -> DIR/{train,test}/<class>/

`get_dataset("caltech101")` splits by itself; the command makes the same split as class folders of
links, for other programs.
"""

import os
import sys
from pathlib import Path

from data.sources import split_class


def main(root: Path) -> None:
    classes = root / "101_ObjectCategories"
    if not classes.is_dir():
        sys.exit(f"no folder {classes}: unpack the original archive there")
    for folder in sorted(p for p in classes.iterdir() if p.is_dir()):
        parts = split_class([p.name for p in folder.glob("*.jpg")])
        for part, names in zip(("train", "test"), parts, strict=True):
            target = root / part / folder.name
            target.mkdir(parents=True, exist_ok=True)
            for name in names:
                if not (target / name).exists():
                    os.link(folder / name, target / name)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m data.split_caltech101 DIR")
    main(Path(sys.argv[1]))
