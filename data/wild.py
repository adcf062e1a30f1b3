"""Unlabelled images in the wild: the files of a folder or of a zip, at any depth."""

import functools
import hashlib
import os
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np
import torch

from .folder import HIDDEN, SUFFIXES, walk
from .splits import DataError, FileSplit, check_memory, one_line, regular, unreadable

PICTURE_LIMIT = 2**28  # bytes of a file in a zip, unpacked


@dataclass
class WildSplit(FileSplit):
    """Image files below ``root``, a folder, or in the zip ``root``; their labels mean nothing.

    ``paths``: names below root as a numpy array of bytes; strings would take ten times the memory, in each worker.
    """

    root: Path | None = None
    stamp: str = ""  # of the files' times, or a zip's checksums

    def source(self, row: int) -> Path | IO[bytes]:
        name = os.fsdecode(self.paths[row])
        if self.root.is_dir():
            return self.root / name
        archive = _archive(self.root, os.getpid())
        if (size := archive.getinfo(name).file_size) > PICTURE_LIMIT:
            raise ValueError(f"{size:,} bytes unpacked")
        return archive.open(name)

    def name(self, row: int) -> str:
        return f"{self.root}/{os.fsdecode(self.paths[row])}"


@functools.lru_cache(maxsize=1)
def _archive(root: Path, process: int) -> zipfile.ZipFile:
    """The open zip, one for each process: those that share a file share its position."""
    return zipfile.ZipFile(root)


def open_wild(root: Path, img_size: int, channels: int) -> tuple[WildSplit, str]:
    """The images of a folder or zip, not decoded yet, sorted by name, and a fingerprint of their names and sizes.

    Only what is named like one counts, and is not hidden. Raises DataError if it is neither, or has no image in it.
    """
    check_memory(1, channels, img_size)
    cure = "name a folder, a zip or a data set"
    try:
        if root.is_dir():
            files = _in_folder(root)
        else:
            regular(root)
            with zipfile.ZipFile(root) as archive:
                found = [i for i in archive.infolist() if _is_image(i.filename)]
                files = [(os.fsencode(i.filename), i.file_size, i.CRC) for i in found]
    except OSError as error:
        raise unreadable(f"image set {error.filename or root}", error, cure) from None
    except Exception as error:  # zipfile raises nearly anything on damaged files
        raise DataError(f"image set {root} is damaged or no zip file ({one_line(error)}): {cure}") from None
    files.sort()
    if not files:
        raise DataError(f"no images in {root}: it needs files such as " + " ".join(SUFFIXES))
    digest, stamp, unpacked = hashlib.sha256(), hashlib.sha256(), root.is_dir()
    for name, size, more in files:
        # A copy's times are others; what a zip says of its content stays.
        digest.update(repr((name, size) if unpacked else (name, size, more)).encode())
        stamp.update(repr(more).encode())
    names = np.array([name for name, _, _ in files])
    labels = torch.zeros(1, dtype=torch.int64).expand(len(names))
    split = WildSplit(names, labels, img_size, channels, root=root, stamp=stamp.hexdigest())
    return split, digest.hexdigest()[:16]


def _is_image(name: str) -> bool:
    return name.lower().endswith(SUFFIXES) and not any(part.startswith(HIDDEN) for part in name.split("/"))


def _in_folder(root: Path) -> list[tuple[bytes, int, int]]:
    """Name below root, size and modification time of every regular file that `walk` finds."""
    prefix, files = len(os.fsencode(root).rstrip(b"/")) + 1, []
    for entry in walk(root):
        if entry.is_file():
            stat = entry.stat()
            files.append((os.fsencode(entry.path)[prefix:], stat.st_size, stat.st_mtime_ns))
    return files
