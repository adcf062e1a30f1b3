"""Where named datasets come from: scikit-learn, files already on disk, torchvision's downloads.

Every loader takes (root, splits, download, attribute), where splits are ("train", "test") or ("test",), touches no
file that only another split needs, and returns ``Raw`` or raises DataError, or OSError of the system.
"""

import bz2
import contextlib
import errno
import functools
import gzip
import io
import itertools
import math
import random
import socket
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torchvision import datasets

from .folder import Raw, class_folders, images_below, list_split, load_folder
from .splits import FILE_LIMIT, DataError, FileSplit, TensorSplit, no_package, one_line, open_image, regular

DIGITS_TEST_PER_CLASS = 50
DOWNLOAD_TIMEOUT = 20  # seconds without a byte
ARCHIVES = (".gz", ".zip", ".tgz", ".tar")
# Bytes, unpacked: of MNIST's images (47 MB), USPS' text (20 MB) and a sheet of CIFAR-10 (3 MB as plain pixels).
IDX_LIMIT, TEXT_LIMIT, SHEET_LIMIT = 2**28, 2**26, 2**24
DIGITS = tuple("0123456789")
Arrays = tuple[np.ndarray, Sequence[int]]  # images (N, C, H, W) or grey (N, H, W), and labels
CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


@dataclass(frozen=True)
class Files:
    """A loader of files that lie in ``<root>/<name>``, ``<root>/<also>`` or ``<root>``.

    kinds: (files, read) in order of preference. ``files(split)`` names what must exist in the folder (or with the
        ending .gz); ``read(folder, splits, attribute)`` returns ``Raw``, or None if it is another data set after all.
    fetch: downloads into a folder what the splits need. bare: whether they may lie in ``<root>`` itself.
    """

    name: str
    kinds: tuple[tuple[Callable, Callable], ...]
    fetch: Callable[[Path, Sequence[str]], object]
    also: tuple[str, ...] = ()
    bare: bool = True

    def __call__(self, root: Path, splits: Sequence[str], download: bool, attribute: str | None) -> Raw:
        places = [root / folder for folder in (self.name, *self.also, *[""] * self.bare)]
        kinds = [(list(dict.fromkeys(itertools.chain(*map(files, splits)))), read) for files, read in self.kinds]

        def find() -> Raw | None:
            for (files, read), place in itertools.product(kinds, places):
                if not all(_plain_or_gz(place / file) for file in files):
                    continue
                try:
                    if found := read(place, splits, attribute):
                        return found
                except DataError:
                    raise
                except ImportError as error:  # scipy reads SVHN
                    raise no_package("scipy", "scipy", error) from None
                except Exception as error:  # pickle, scipy and text parsers raise nearly anything
                    if isinstance(error, OSError) and error.errno not in (None, errno.ENOENT):
                        raise  # what is locked is not damaged
                    text = f"{', '.join(files)} in {place} is incomplete or damaged ({one_line(error)}): delete it and "
                    raise DataError(f"{text}run again to download it, or put a good copy there") from None
            return None

        found, reason = find(), "was not asked for"
        if not found and download:
            reason = _download(self.fetch, root, splits)
            found = find()
        if not found:
            wanted = " or ".join(", ".join(files) for files, _ in kinds)
            text = f"no {self.name}: looked for {wanted} in {', '.join(map(str, places))}, and a download {reason}"
            raise DataError(f"{text}; put the files into one of these folders, or run once with a network")
        return found


def _tensors(images: np.ndarray, labels: Sequence[int]) -> TensorSplit:
    """A split of images (N, C, H, W) or grey (N, H, W)."""
    images = torch.from_numpy(np.array(images, np.uint8, order="C"))
    return TensorSplit(images[:, None] if images.ndim == 3 else images, torch.from_numpy(np.array(labels, np.int64)))


def _arrays(class_names: tuple[str, ...], read: Callable[[Path, str], Arrays]) -> Callable[..., Raw]:
    """A kind's ``read`` from one of (folder, split) -> (images, labels)."""

    def checked(place: Path, split: str) -> TensorSplit:
        images, labels = read(place, split)
        if len(images) != len(labels) or not 0 <= min(labels, default=-1) <= max(labels) < len(class_names):
            raise ValueError(f"the file of labels to {split} does not fit its images")
        return _tensors(images, labels)

    return lambda place, splits, _: Raw(class_names, **{split: checked(place, split) for split in splits})


def load_digits(root: Path, splits: Sequence[str], *_) -> Raw:
    """scikit-learn's 1,797 digits, 8x8 (E. Alpaydin, C. Kaynak, UCI 1998), 50 of each class for testing."""
    try:
        from sklearn.datasets import load_digits as sklearn_digits
    except Exception as error:  # compiled parts of another version raise nearly anything
        raise no_package("sklearn", "scikit-learn", error) from None
    found = sklearn_digits()
    images, labels = np.rint(found.images * (255 / 16)).astype(np.uint8), found.target  # values are 0..16
    # NumPy promises that RandomState's streams never change, and this one disturbs no other.
    order = np.random.RandomState(0).permutation(len(labels))
    test = np.zeros(len(labels), bool)
    for label in range(10):
        test[order[labels[order] == label][:DIGITS_TEST_PER_CLASS]] = True
    rows = {"train": ~test, "test": test}
    return Raw(DIGITS, **{split: _tensors(images[rows[split]], labels[rows[split]]) for split in splits})


def _idx(name: str, cls: type, class_names: tuple[str, ...]) -> Files:
    """60,000 + 10,000 grey images, 28x28, as four IDX files."""

    def files(split: str) -> tuple[str, str]:
        stem = "t10k" if split == "test" else split
        return f"{stem}-images-idx3-ubyte", f"{stem}-labels-idx1-ubyte"

    def read(place: Path, split: str) -> Arrays:
        return tuple(read_idx(_plain_or_gz(place / file)) for file in files(split))

    def fetch(folder: Path, splits: Sequence[str]) -> None:
        part = cls if "train" in splits else type(cls.__name__, (cls,), {"resources": cls.resources[2:]})
        part(folder, False, download=True)

    # In the bare root lie MNIST's, whose names all the others have.
    return Files(name, ((files, _arrays(class_names, read)),), fetch, (f"{cls.__name__}/raw",), bare=name == "mnist")


# Y. LeCun, C. Cortes, C. Burges: digits.
load_mnist = _idx("mnist", datasets.MNIST, DIGITS)
# H. Xiao, K. Rasul, R. Vollgraf 2017: garments.
load_fashion_mnist = _idx("fashion-mnist", datasets.FashionMNIST, tuple(datasets.FashionMNIST.classes))


def read_idx(path: Path) -> np.ndarray:
    """Labels (N,) or images (N, H, W), bytes, of an IDX file, plain or .gz (yann.lecun.com/exdb/mnist).

    Two zero bytes, type 8, number of dimensions, big-endian 32-bit sizes, values. Raises ValueError if they disagree.
    """
    dimensions = 3 if "idx3" in path.name else 1
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            if file.read(4) != bytes([0, 0, 8, dimensions]):
                raise ValueError("no IDX file")
            sizes = np.frombuffer(file.read(4 * dimensions), ">u4").tolist()
            if not 0 < (n := math.prod(sizes)) <= IDX_LIMIT:
                raise ValueError(f"its header says {' x '.join(map(str, sizes))} values")
            content = file.read(n + 1)  # and no more: little that is packed can be much
        if len(content) != n:
            raise ValueError(f"{'more' if len(content) > n else 'fewer'} than the {n:,} values of its header")
        return np.frombuffer(content, np.uint8).reshape(sizes)
    except (gzip.BadGzipFile, EOFError, zlib.error, ValueError) as error:
        raise ValueError(f"{path}: {one_line(error)}") from None


def _plain_or_gz(path: Path) -> Path | None:
    found = next((p for p in (path, path.with_name(f"{path.name}.gz")) if p.exists()), None)
    if found and not found.is_dir():
        regular(found, FILE_LIMIT)
    return found


def _cifar(cls: type, *others: tuple[Callable, Callable], also: tuple[str, ...] = ()) -> Files:
    """A. Krizhevsky 2009: 50,000 + 10,000 images, 32x32; the original batches, or other kinds of files."""

    def read(place: Path, splits: Sequence[str], attribute: str | None) -> Raw:
        # torchvision wants all batches, whichever it reads.
        part = cls if "train" in splits else type(cls.__name__, (cls,), {"train_list": []})
        for file, _ in (*part.train_list, *part.test_list):
            regular(place / cls.base_folder / file, FILE_LIMIT)
        found = {split: part(place, split == "train") for split in splits}
        images = {split: _tensors(f.data.transpose(0, 3, 1, 2), f.targets) for split, f in found.items()}
        return Raw(tuple(found["test"].classes), **images)

    kinds = (lambda split: (cls.base_folder,), read), *others
    return Files(cls.__name__.lower(), kinds, lambda folder, _: cls(folder, False, download=True), also)


def _read_sheets(place: Path, split: str) -> Arrays:
    """Lossless WebP sheets of 40 images a row, the last row filled with black ones, in a zip; labels are bytes."""
    with zipfile.ZipFile(place / "cifar10_lossless.zip") as archive:
        names = sorted(n for n in archive.namelist() if n.startswith(f"{split}/") and n[-1] != "/")
        if names != [f"{split}/{i:02}.webp" for i in range(len(names) or 1)]:
            raise ValueError(f"sheets of {split} are missing")
        if any(archive.getinfo(name).file_size > SHEET_LIMIT for name in (*names, f"{split}_labels.bin")):
            raise ValueError(f"a file of {split} is too large")
        sheets = [_read_sheet(archive.read(name)) for name in names]
        labels = np.frombuffer(archive.read(f"{split}_labels.bin"), np.uint8)
    rows = np.concatenate(sheets).reshape(-1, 32, 40, 32, 3)
    images = rows.transpose(0, 2, 4, 1, 3).reshape(-1, 3, 32, 32)
    n = np.flatnonzero(images.any((1, 2, 3)))[-1] + 1
    return images[:n], labels[:n]


def _read_sheet(content: bytes) -> np.ndarray:
    with open_image(io.BytesIO(content)) as image:
        if image.width != 1280 or image.height > 1280:
            raise ValueError(f"a sheet is {image.width}x{image.height}")
        return np.asarray(image.convert("RGB"))


def _read_cifar10_folders(place: Path, splits: Sequence[str], attribute: str | None) -> Raw | None:
    if tuple(class_folders(place / splits[0])) != CIFAR10_CLASSES:
        return None
    raw = load_folder(place, splits)
    paths = itertools.chain(*(getattr(raw, split).paths for split in splits))
    if any(path.suffix.lower() in (".jpg", ".jpeg") for path in paths):
        _notice("cifar10: JPEG copies, on which networks trained on the original pixels lose 10 to 13 points")
    return raw


@functools.cache  # said once
def _notice(text: str) -> None:
    print(text, file=sys.stderr)


# Lossless copies stand before class folders, usually lossy JPEGs.
load_cifar10 = _cifar(
    datasets.CIFAR10,
    (lambda _: ("cifar10_lossless.zip",), _arrays(CIFAR10_CLASSES, _read_sheets)),
    (lambda split: (f"{split}/airplane",), _read_cifar10_folders),
    also=("cifar10_lossless",),
)
load_cifar100 = _cifar(datasets.CIFAR100)


def _torchvision_digits(cls: type, labels: str, parts: dict[str, tuple[str, object]]) -> Files:
    """Digits that torchvision reads, labels from that attribute; parts: split -> (file, what torchvision calls it)."""

    def read(place: Path, split: str) -> Arrays:
        if parts[split][0].endswith(".bz2"):
            with bz2.open(place / parts[split][0]) as file:
                if len(file.read(TEXT_LIMIT + 1)) > TEXT_LIMIT:
                    raise ValueError("it unpacks to too much")
        found = cls(place, parts[split][1])
        return found.data, getattr(found, labels)

    def fetch(folder: Path, splits: Sequence[str]) -> None:
        for split in splits:
            cls(folder, parts[split][1], download=True)

    return Files(cls.__name__.lower(), ((lambda split: parts[split][:1], _arrays(DIGITS, read)),), fetch)


# Y. Netzer et al. 2011: 73,257 + 26,032 house-number digits, 32x32.
SVHN_PARTS = {"train": ("train_32x32.mat", "train"), "test": ("test_32x32.mat", "test")}
load_svhn = _torchvision_digits(datasets.SVHN, "labels", SVHN_PARTS)
# J. Hull 1994: 7,291 + 2,007 handwritten digits of envelopes, 16x16, grey.
load_usps = _torchvision_digits(datasets.USPS, "targets", {"train": ("usps.bz2", True), "test": ("usps.t.bz2", False)})


def _read_celeba(place: Path, splits: Sequence[str], attribute: str | None) -> Raw:
    """One of the 40 attributes is the label; by default the one nearest to half of the train split (or the lists' first
    one): accuracies on unbalanced attributes, or averaged over all, say little."""
    _, header, *lines = (place / "list_attr_celeba.txt").read_text().splitlines()
    names, rows = header.split(), [line.split() for line in lines]
    if attribute and attribute not in names:
        raise DataError(f"celeba has no attribute '{attribute}'; choose one of: {' '.join(names)}")
    partition = dict(line.split() for line in (place / "list_eval_partition.txt").read_text().splitlines())
    part = np.array([int(partition[row[0]]) for row in rows])  # 0 train, 1 validation, 2 test
    values = np.array([row[1:] for row in rows]) == "1"
    balance = np.abs(values[part == part.min()].mean(0) - 0.5)
    column = names.index(attribute) if attribute else int(balance.argmin())
    found = {}
    for split in splits:
        members = np.flatnonzero(part == (2 if split == "test" else 0))
        paths = [place / "img_align_celeba" / Path(rows[i][0]).name for i in members]
        found[split] = FileSplit(paths, torch.from_numpy(values[members, column].astype(np.int64)))
    return Raw((f"not {names[column]}", names[column]), **found, root=place)


# Z. Liu et al. 2015: 162,770 + 19,962 aligned faces (the validation part is not used).
load_celeba = Files(
    "celeba",
    ((lambda _: ("list_attr_celeba.txt", "list_eval_partition.txt", "img_align_celeba"), _read_celeba),),
    lambda folder, _: datasets.CelebA(folder, "test", download=True),
)


def split_class(names: list[str]) -> tuple[list[str], list[str]]:
    """A class of Caltech-101, sorted: train, and max(int(0.2 n), 2) for testing by seed 1. (The published script
    shuffles what the file system happens to list.)"""
    test = set(random.Random(1).sample(sorted(names), min(max(len(names) // 5, 2), len(names))))
    return sorted(set(names) - test), sorted(test)


def read_caltech101(place: Path, splits: Sequence[str], *_) -> Raw:
    """``<place>/101_ObjectCategories/<class>/`` without the background's class, see `split_class`."""
    folder = place / "101_ObjectCategories"
    names = tuple(n for n in class_folders(folder) if n != "BACKGROUND_Google")
    if not names:
        raise DataError(f"no class folders in {folder}: unpack the original archive there")
    paths, labels = {"train": [], "test": []}, {"train": [], "test": []}
    for label, name in enumerate(names):
        by_name = {path.name: path for path in images_below(folder / name)}
        if len(by_name) < 3:
            raise DataError(f"{len(by_name)} image(s) in {folder / name}, not 31 or more: unpack the archive again")
        for split, found in zip(paths, split_class(list(by_name)), strict=True):
            paths[split] += [by_name[n] for n in found]
            labels[split] += [label] * len(found)
    return Raw(names, **{s: FileSplit(paths[s], torch.tensor(labels[s])) for s in splits}, root=place)


# L. Fei-Fei et al. 2004: 8,677 images of 101 classes; as it is, or as split_caltech101.py divides it.
load_caltech101 = Files(
    "caltech101",
    ((lambda _: ("101_ObjectCategories",), read_caltech101), (lambda split: (f"{split}/accordion",), load_folder)),
    lambda folder, _: datasets.Caltech101(folder, download=True),
)


def load_imagenet(root: Path, splits: Sequence[str], *_) -> Raw:
    """O. Russakovsky et al. 2015, ILSVRC 2012: 1,281,167 + 50,000 images of 1,000 classes: the folders that all splits
    have, ``{train,val}/<class>/`` (or ``test`` for ``val``), by name, which is the published order of the labels."""
    places = [root / "imagenet", root]
    for place, second in itertools.product(places, ("val", "test")):
        folders = {split: place / (second if split == "test" else split) for split in splits}
        names = sorted(set.intersection(*(set(class_folders(folder)) for folder in folders.values())))
        if names:
            found = {split: list_split(folder, names) for split, folder in folders.items()}
            return Raw(tuple(names), **found, root=place)
    wanted = " and ".join(f"{'val' if split == 'test' else split}/<class>/" for split in splits)
    cure = "register at image-net.org and put the images there, those for validation into the same class folders"
    raise DataError(f"no imagenet: looked for {wanted} in {places[0]} and {places[1]}; it is not downloaded: {cure}")


def load_tiny_imagenet(root: Path, splits: Sequence[str], *_) -> Raw:
    """Y. Le and X. Yang 2015, Tiny ImageNet: 100,000 + 10,000 images of 200 classes: the folder tiny-imagenet-200 as it
    is unpacked. The test images are those of ``val``, in class folders or by its list; labels by the names' order."""
    place = next((p for p in (root / "tiny-imagenet-200", root) if (p / "wnids.txt").is_file()), None)
    if place is None:
        text = f"no tiny-imagenet: looked for wnids.txt, train/ and val/ in {root / 'tiny-imagenet-200'} and {root}"
        raise DataError(f"{text}; it is not downloaded: unpack tiny-imagenet-200.zip of cs231n.stanford.edu there")
    names = tuple(sorted((place / "wnids.txt").read_text(errors="replace").split()))
    found = {"train": list_split(place / "train", names)} if "train" in splits else {}
    table = place / "val" / "val_annotations.txt"
    if not table.is_file() or set(names) <= set(class_folders(place / "val")):
        return Raw(names, list_split(place / "val", names), **found, root=place)
    lines = [line.split("\t") for line in table.read_text(errors="replace").splitlines()]
    if not lines or any(len(line) < 2 or line[1] not in names for line in lines):
        raise DataError(f"{table} is damaged: a line of it names no class of wnids.txt; unpack the archive again")
    labels = torch.tensor([names.index(line[1]) for line in lines])
    return Raw(names, FileSplit([place / "val" / "images" / line[0] for line in lines], labels), **found, root=place)


def _move(source: Path, target: Path) -> None:
    """Moves what a folder holds: folders whole where there is none yet, so that none is seen in parts; lists last."""
    for path in sorted(source.iterdir(), key=lambda path: path.is_file()):
        if path.is_dir() and (target / path.name).is_dir():
            _move(path, target / path.name)
        else:
            path.replace(target / path.name)


def _download(fetch: Callable, root: Path, splits: Sequence[str]) -> str:
    """Fetches into a temporary folder, so that failure leaves nothing, and moves it to root; what went wrong."""
    existed, timeout = root.exists(), socket.getdefaulttimeout()
    try:
        root.mkdir(parents=True, exist_ok=True)
        socket.setdefaulttimeout(DOWNLOAD_TIMEOUT)
        with tempfile.TemporaryDirectory(prefix=".download-", dir=root, ignore_cleanup_errors=True) as temporary:
            with contextlib.redirect_stdout(io.StringIO()):  # the progress bar goes to stderr
                fetch(Path(temporary), splits)
            for path in list(Path(temporary).rglob("*")):
                if path.is_file() and path.suffix in ARCHIVES:
                    path.unlink()
            _move(Path(temporary), root)
        return "found nothing"
    except Exception as error:  # URLError, a missing gdown, a bad archive, a read-only root, ...
        return f"failed ({type(error).__name__}: {one_line(error)})"
    finally:
        socket.setdefaulttimeout(timeout)
        if not existed:
            with contextlib.suppress(OSError):  # root holds a dataset now, or never came to be
                root.rmdir()
