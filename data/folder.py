"""Class folders: listing them, reading them into memory or streaming them, and the cache."""

import contextlib
import hashlib
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from PIL import Image

from .splits import DataError, FileSplit, TensorSplit, channel_statistics, one_line

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
_ENDINGS = " ".join(SUFFIXES)
# Part of the cache's key: to be raised when the same file decodes to other pixels than before.
DECODER_VERSION = 1


@dataclass
class Raw:
    """What a loader found: class names, and splits in their native size (or as files).

    ``root`` is the folder that file splits lie in: their cache goes there.
    """

    class_names: tuple[str, ...]
    test: TensorSplit | FileSplit
    train: TensorSplit | FileSplit | None = None
    root: Path | None = None


def load_folder(root: Path, splits: Sequence[str], *_) -> Raw:
    """Lists ``<root>/<split>/<class>/**`` (any depth below the class), classes sorted.

    Raises DataError where a split or its images are missing, or the splits' classes differ.
    """
    names = {split: class_folders(root / split) for split in splits}
    for split in splits:
        if not names[split]:
            wanted = " and ".join(f"{root / split}/<class>/" for split in splits)
            raise DataError(f"no class folders in {root / split}: put the images into {wanted}")
        odd = sorted(set(names[split]) ^ set(names["test"]))
        if odd:
            has, lacks = (split, "test") if odd[0] in names[split] else ("test", split)
            text = "both splits need the same class folders"
            raise DataError(f"class '{odd[0]}' is in {root / has} but not in {root / lacks}: {text}")
    found = {split: list_split(root / split, names["test"]) for split in splits}
    return Raw(tuple(names["test"]), **found, root=root)


def class_folders(split: Path) -> list[str]:
    """Sorted names of the class folders in a split's folder; empty if there is no such folder."""
    if not split.is_dir():
        return []
    return sorted(p.name for p in split.iterdir() if p.is_dir() and not p.name.startswith("."))


def get_images(root: str | Path, img_size: int, channels: int) -> torch.Tensor:
    """All images below a folder, at any depth and sorted by path, without labels.

    Returns uint8 (N, channels, img_size, img_size), decoded as ``get_dataset`` does. Raises
    DataError where there are none or a file cannot be read.
    """
    root = Path(root).expanduser()
    paths = images_below(root) if root.is_dir() else []
    if not paths:
        raise DataError(f"no images below {root}: name a folder that holds some ({_ENDINGS})")
    split = FileSplit(paths, torch.zeros(len(paths), dtype=torch.int64), img_size, channels)
    return split.decode().images


def images_below(folder: Path) -> list[Path]:
    """Paths of the image files at any depth, sorted, without hidden ones."""
    # Finders and notebooks leave .DS_Store, ._name.jpg and .ipynb_checkpoints/ behind.
    paths = (path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)
    return sorted(p for p in paths if not any(part.startswith(".") for part in p.relative_to(folder).parts))


def list_split(split: Path, names: Sequence[str]) -> FileSplit:
    """The files of these class folders of a split's folder, labelled by their order.

    Raises DataError where a class has no images.
    """
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
        with Image.open(path) as image:
            width, height = image.size
    except Exception as error:  # decoders raise nearly anything on damaged files
        raise DataError(f"cannot read image {path} ({one_line(error)}): replace or delete it") from None
    if width != height:
        cure = "choose a size with img_size, to which the central square of every image is resized"
        raise DataError(f"{path} is {width}x{height}, not square: {cure}")
    return width


def open_files(splits: Mapping[str, FileSplit], root: Path, img_size: int, channels: int, limit: int, statistics: bool):
    """Turns file splits into what batches come from: in memory up to ``limit`` bytes.

    Decoded images and statistics are kept in ``<root>/.datafree-<size>x<channels>.pt`` (``..-test.pt`` for the test
    split alone) until a file appears, vanishes or changes. Returns the splits by name, (mean, std) or None, and the
    fingerprint. Raises DataError if a file cannot be read (streamed: only where statistics are computed).
    """
    splits = {name: replace(s, img_size=img_size, channels=channels) for name, s in splits.items()}
    files = _describe(splits.values(), root)
    stamps = [(name, size, modified) for name, size, modified, _ in files]
    key = hashlib.sha256(repr((DECODER_VERSION, stamps)).encode()).hexdigest()
    path = root / f".datafree-{img_size}x{channels}{'' if 'train' in splits else '-test'}.pt"
    cache = _load_cache(path, key)
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
    return splits, cache.get("statistics"), digest


def fingerprint(splits: Iterable[TensorSplit]) -> str:
    """The first 16 hex digits of SHA-256 over shapes, labels and pixels of the splits."""
    digest = hashlib.sha256()
    for split in splits:
        digest.update(repr(tuple(split.images.shape)).encode())
        digest.update(split.labels.numpy())
        digest.update(split.images.contiguous().numpy())
    return digest.hexdigest()[:16]


def _describe(splits: Iterable[FileSplit], root: Path) -> list[tuple[str, int, int, int]]:
    """Relative path, size, modification time and label of every file."""
    rows = []
    for split in splits:
        for path, label in zip(split.paths, split.labels.tolist(), strict=True):
            try:
                stat = path.stat()
            except OSError as error:
                raise DataError(f"cannot read image {path} ({error.strerror}): replace or delete it") from None
            rows.append((path.relative_to(root).as_posix(), stat.st_size, stat.st_mtime_ns, label))
    return rows


def _load_cache(path: Path, key: str) -> dict:
    try:
        cache = torch.load(path, map_location="cpu", weights_only=True)
        if cache["key"] == key:
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
