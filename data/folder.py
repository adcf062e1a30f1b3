"""Class folders: listing them, reading them into memory or streaming them, and the cache."""

import contextlib
import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from .splits import DataError, FileSplit, TensorSplit, channel_statistics, expand, open_image, regular, unreadable

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
_ENDINGS = " ".join(SUFFIXES)
# Finders and notebooks leave .DS_Store, ._name.jpg, __MACOSX/ and .ipynb_checkpoints/ behind.
HIDDEN = (".", "__MACOSX")
# Part of the cache's key: to be raised when the same file decodes to other pixels than before.
DECODER_VERSION = 1


@dataclass
class Raw:
    """What a loader found: class names, splits in native size or as files, and the root of these, for their cache."""

    class_names: tuple[str, ...]
    test: TensorSplit | FileSplit
    train: TensorSplit | FileSplit | None = None
    root: Path | None = None


def load_folder(root: Path, splits: Sequence[str], *_) -> Raw:
    """Lists ``<root>/<split>/<class>/**``. Raises DataError if images are missing or the splits' classes differ."""
    names = {split: class_folders(root / split) for split in splits}
    for split in splits:
        if not names[split]:
            wanted = " and ".join(f"{root / split}/<class>/" for split in splits)
            raise DataError(f"no class folders in {root / split}: put the images into {wanted}")
        odd = sorted(set(names[split]) ^ set(names["test"]))
        if odd:
            has, lacks = (split, "test") if odd[0] in names[split] else ("test", split)
            text = f"class '{odd[0]}' is in {root / has} but not in {root / lacks}"
            raise DataError(f"{text}: both splits need the same class folders")
    found = {split: list_split(root / split, names["test"]) for split in splits}
    return Raw(tuple(names["test"]), **found, root=root)


def class_folders(split: Path) -> list[str]:
    """Sorted names of the class folders in a split's folder; empty if there is no such folder."""
    if not split.is_dir():
        return []
    return sorted(p.name for p in split.iterdir() if p.is_dir() and not p.name.startswith("."))


def get_images(root: str | Path, img_size: int, channels: int) -> torch.Tensor:
    """All images below a folder by path: uint8 (N, channels, img_size, img_size). Raises DataError if there is none."""
    root = expand(root)
    try:
        paths = images_below(root) if root.is_dir() else []
    except OSError as error:
        raise unreadable(error.filename or root, error, "name a folder that holds images") from None
    if not paths:
        raise DataError(f"no images below {root}: name a folder that holds some ({_ENDINGS})")
    split = FileSplit(paths, torch.zeros(len(paths), dtype=torch.int64), img_size, channels)
    return split.decode().images


def images_below(folder: Path) -> list[Path]:
    """Sorted paths of what `walk` finds."""
    return sorted(Path(entry.path) for entry in walk(folder))


def walk(folder: Path) -> Iterator[os.DirEntry]:
    """What is named like an image, at any depth; no hidden ones, nor what links to folders hold. Raises OSError."""
    folders = [folder]
    while folders:
        with os.scandir(folders.pop()) as entries:
            for entry in entries:
                if entry.name.startswith(HIDDEN):
                    continue
                if entry.is_dir(follow_symlinks=False):
                    folders.append(entry.path)
                elif entry.name.lower().endswith(SUFFIXES):
                    yield entry


def list_split(split: Path, names: Sequence[str]) -> FileSplit:
    """The files of these class folders, labelled by their order. Raises DataError where a class has no images."""
    paths, labels = [], []
    for label, name in enumerate(names):
        found = images_below(split / name)
        if not found:
            raise DataError(f"no images in {split / name}: add some ({_ENDINGS}), or delete the folder")
        paths += found
        labels += [label] * len(found)
    return FileSplit(paths, torch.tensor(labels))


def side_of(path: Path) -> int:
    """Side of a square image. Raises DataError if it is not square or cannot be read."""
    try:
        with open_image(path) as image:
            width, height = image.size
    except Exception as error:  # decoders raise nearly anything on damaged files
        raise unreadable(f"image {path}", error, "replace or delete it") from None
    if width != height:
        cure = "choose a size with img_size, to which the central square of every image is resized"
        raise DataError(f"{path} is {width}x{height}, not square: {cure}")
    return width


def open_files(
    splits: Mapping[str, FileSplit], root: Path, img_size: int, channels: int, limit: int, statistics: bool
) -> tuple[dict[str, TensorSplit | FileSplit], tuple[list[float], list[float]] | None, str]:
    """Turns file splits into what batches come from: in memory up to ``limit`` bytes.

    Decoded images and statistics are kept in ``<root>/.datafree-<size>x<channels>.pt`` (test alone: ``..-test.pt``)
    until a file appears, vanishes or changes. Returns the splits, (mean, std) or None, and the fingerprint. Raises
    OSError or DataError if a file cannot be read (streamed: only where statistics are computed).
    """
    splits = {name: replace(s, img_size=img_size, channels=channels) for name, s in splits.items()}
    files = _describe(splits.values(), root)
    stamps = [(name, size, modified) for name, size, modified, _ in files]
    key = hashlib.sha256(repr((DECODER_VERSION, stamps)).encode()).hexdigest()
    path = root / f".datafree-{img_size}x{channels}{'' if 'train' in splits else '-test'}.pt"
    cache = _load_cache(path, key, splits, channels)
    known = len(cache)
    if sum(map(len, splits.values())) * channels * img_size**2 <= limit:
        if "test" not in cache:
            cache |= {name: split.decode().images for name, split in splits.items()}
        splits = {name: TensorSplit(cache[name], split.labels) for name, split in splits.items()}
        digest = fingerprint(splits.values())
    else:
        listing = [(name, size, label) for name, size, _, label in files]
        digest = hashlib.sha256(repr(listing).encode()).hexdigest()[:16]
    if statistics and "statistics" not in cache:
        cache["statistics"] = channel_statistics(splits["train"])
    if len(cache) > known:
        _save_cache(path, cache)
    return splits, cache.get("statistics") if statistics else None, digest


def fingerprint(splits: Iterable[TensorSplit]) -> str:
    """The first 16 hex digits of SHA-256 over shapes, labels and pixels of the splits."""
    digest = hashlib.sha256()
    for split in splits:
        digest.update(repr(tuple(split.images.shape)).encode())
        digest.update(split.labels.numpy())
        digest.update(split.images.contiguous().numpy())
    return digest.hexdigest()[:16]


def _describe(splits: Iterable[FileSplit], root: Path) -> list[tuple[str, int, int, int]]:
    """Relative path, size, modification time and label of every file. Raises OSError."""
    rows = []
    for split in splits:
        for path, label in zip(split.paths, split.labels.tolist(), strict=True):
            stat = regular(path)
            rows.append((path.relative_to(root).as_posix(), stat.st_size, stat.st_mtime_ns, label))
    return rows


def _load_cache(path: Path, key: str, splits: Mapping[str, FileSplit], channels: int) -> dict:
    try:
        regular(path)
        cache = torch.load(path, map_location="cpu", weights_only=True)
        shapes = {name: (torch.uint8, len(s), channels, s.img_size, s.img_size) for name, s in splits.items()}
        images = {name: (cache[name].dtype, *cache[name].shape) for name in shapes if "test" in cache}
        mean, std = torch.tensor(cache.get("statistics", [[0.5] * channels] * 2))
        if cache["key"] == key and images in ({}, shapes) and len(mean) == channels and (mean + std).isfinite().all():
            return cache
    except Exception:  # missing, cut off or not ours: in every case it is built again
        pass
    return {"key": key}


def _save_cache(path: Path, cache: dict) -> None:
    """Writes under another name and renames. A folder that cannot be written to has no cache."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            torch.save(cache, file)
        temporary.replace(path)
    except (OSError, RuntimeError):  # torch reports a full disk as RuntimeError
        with contextlib.suppress(OSError):
            temporary.unlink()
