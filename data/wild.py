"""Unlabelled images in the wild: the files of a folder or of a zip, at any depth."""

import functools
import hashlib
import os
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from .folder import SUFFIXES
from .splits import DataError, FileSplit, one_line


@dataclass
class WildSplit(FileSplit):
    """Image files below ``root``, a folder, or in the zip ``root``; their labels mean nothing.

    ``paths`` holds the names below root as a numpy array of bytes: millions of Python strings
    would take ten times the memory, in each worker process again.
    """

    root: Path | None = None

    def source(self, row):
        name = os.fsdecode(self.paths[row])
        return self.root / name if self.root.is_dir() else _archive(self.root, os.getpid()).open(name)

    def name(self, row):
        return f"{self.root}/{os.fsdecode(self.paths[row])}"


@functools.lru_cache(maxsize=1)
def _archive(root, process):
    """The open zip, one for each process: those that share a file share its position."""
    return zipfile.ZipFile(root)


def open_wild(root: Path, img_size: int, channels: int) -> tuple[WildSplit, str]:
    """The images of a folder or zip, sorted by name, and a fingerprint of their names and sizes.

    Nothing is decoded yet. Files without an image's ending and hidden ones are left out. Raises
    DataError if it is neither, or there is no image in it.
    """
    try:
        if root.is_dir():
            files = _in_folder(root)
        elif zipfile.is_zipfile(root):
            with zipfile.ZipFile(root) as archive:
                files = [(os.fsencode(i.filename), i.file_size, i.CRC) for i in archive.infolist()]
        else:
            raise DataError(f"image set {root} is damaged or no zip file: name a folder, a zip or a data set")
    except (OSError, zipfile.BadZipFile) as error:
        raise DataError(f"cannot read image set {root} ({one_line(error)}): check it") from None
    endings = tuple(os.fsencode(suffix) for suffix in SUFFIXES)
    files = sorted(file for file in files if file[0].lower().endswith(endings) and not _hidden(file[0]))
    if not files:
        raise DataError(f"no images in {root}: it needs files such as " + " ".join(SUFFIXES))
    digest = hashlib.sha256()
    for file in files:
        digest.update(repr(file).encode())
    names = np.array([name for name, _, _ in files])
    labels = torch.zeros(1, dtype=torch.int64).expand(len(names))
    return WildSplit(names, labels, img_size, channels, root=root), digest.hexdigest()[:16]


def _hidden(name: bytes) -> bool:
    return any(part.startswith((b".", b"__MACOSX")) for part in name.split(b"/"))


def _in_folder(root: Path) -> list[tuple[bytes, int, int]]:
    """Name below root, size and modification time of every file; links to folders are not followed."""
    files, folders = [], [os.fsencode(root)]
    prefix = len(folders[0].rstrip(b"/")) + 1
    while folders:
        with os.scandir(folders.pop()) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    folders.append(entry.path)
                elif entry.is_file():
                    stat = entry.stat()
                    files.append((entry.path[prefix:], stat.st_size, stat.st_mtime_ns))
    return files
