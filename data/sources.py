"""Where named datasets come from: scikit-learn, files already on disk, torchvision's downloads.

Every loader takes (root, download, attribute) and returns ``Raw`` or raises DataError.
"""

import contextlib
import gzip
import io
import random
import shutil
import socket
import tempfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torchvision import datasets

from .folder import Raw, class_folders, images_below, list_split, load_folder
from .splits import DataError, FileSplit, TensorSplit, one_line

DIGITS_TEST_PER_CLASS = 50
DOWNLOAD_TIMEOUT = 20  # seconds without a byte
ARCHIVES = (".gz", ".zip", ".tgz", ".tar")
CIFAR10_CLASSES = (
    "airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck",
)  # fmt: skip


def load_digits(root: Path, download: bool, attribute: str | None) -> Raw:
    """scikit-learn's 1,797 digits, 8x8 (E. Alpaydin, C. Kaynak, UCI 1998): nothing to download.

    Test: 50 images of each class by a fixed permutation; train: the other 1,297.
    """
    try:
        from sklearn.datasets import load_digits as sklearn_digits
    except ImportError:
        raise DataError("digits needs scikit-learn: pip install scikit-learn") from None
    found = sklearn_digits()
    images = np.rint(found.images * (255 / 16)).astype(np.uint8)[:, None]  # values are 0..16
    labels = found.target.astype(np.int64)
    # NumPy promises that RandomState's streams never change, and this one disturbs no other.
    order = np.random.RandomState(0).permutation(len(labels))
    test = np.zeros(len(labels), bool)
    for label in range(10):
        test[order[labels[order] == label][:DIGITS_TEST_PER_CLASS]] = True
    train, test = (_tensors(images[rows], labels[rows]) for rows in (~test, test))
    return Raw(train, test, tuple("0123456789"))


def load_mnist(root: Path, download: bool, attribute: str | None) -> Raw:
    """Y. LeCun, C. Cortes, C. Burges: 60,000 + 10,000 digits, 28x28, from IDX files."""
    return _load_idx("mnist", datasets.MNIST, tuple("0123456789"), root, download)


def load_fashion_mnist(root: Path, download: bool, attribute: str | None) -> Raw:
    """H. Xiao, K. Rasul, R. Vollgraf 2017: 60,000 + 10,000 garments, 28x28, from IDX files."""
    cls = datasets.FashionMNIST
    return _load_idx("fashion-mnist", cls, tuple(cls.classes), root, download)


def load_cifar10(root: Path, download: bool, attribute: str | None) -> Raw:
    """A. Krizhevsky 2009: 50,000 + 10,000 images, 32x32, 10 classes.

    The original batches win over class folders (``{train,test}/<class>/``), which are
    usually lossy JPEGs and give other accuracies.
    """
    places = [root, root / "cifar10"]

    def find() -> Raw | None:
        found = _find_cifar(datasets.CIFAR10, places)
        for place in places[::-1]:
            names = tuple(class_folders(place / "train"))
            if not found and names == CIFAR10_CLASSES:
                found = load_folder(place, download, attribute)
        return found

    wanted = "cifar-10-batches-py or {train,test}/<class> folders"
    return _find_or_download("cifar10", find, datasets.CIFAR10, wanted, places, root, download)


def load_cifar100(root: Path, download: bool, attribute: str | None) -> Raw:
    """A. Krizhevsky 2009: 50,000 + 10,000 images, 32x32, 100 classes."""
    places = [root, root / "cifar100"]

    def find() -> Raw | None:
        return _find_cifar(datasets.CIFAR100, places)

    wanted = "cifar-100-python"
    return _find_or_download("cifar100", find, datasets.CIFAR100, wanted, places, root, download)


def load_svhn(root: Path, download: bool, attribute: str | None) -> Raw:
    """Y. Netzer et al. 2011: 73,257 + 26,032 house-number digits, 32x32."""
    places = [root, root / "svhn"]
    files = ("train_32x32.mat", "test_32x32.mat")

    def find() -> Raw | None:
        for place in places:
            if all((place / file).exists() for file in files):
                with _damage_is_reported(place / "*_32x32.mat"):
                    found = [datasets.SVHN(place, split) for split in ("train", "test")]
                return Raw(*(_tensors(s.data, s.labels) for s in found), tuple("0123456789"))
        return None

    def fetch(folder: Path, download: bool) -> None:
        for split in ("train", "test"):
            datasets.SVHN(folder, split, download=download)

    return _find_or_download("svhn", find, fetch, " and ".join(files), places, root, download)


def load_usps(root: Path, download: bool, attribute: str | None) -> Raw:
    """J. Hull 1994: 7,291 + 2,007 handwritten digits of envelopes, 16x16, grey."""
    places = [root, root / "usps"]
    files = ("usps.bz2", "usps.t.bz2")

    def find() -> Raw | None:
        for place in places:
            if all((place / file).exists() for file in files):
                with _damage_is_reported(place / "usps*.bz2"):
                    found = [datasets.USPS(place, train) for train in (True, False)]
                pairs = (_tensors(s.data[:, None], s.targets) for s in found)
                return Raw(*pairs, tuple("0123456789"))
        return None

    def fetch(folder: Path, download: bool) -> None:
        for train in (True, False):
            datasets.USPS(folder, train, download=download)

    return _find_or_download("usps", find, fetch, " and ".join(files), places, root, download)


def load_celeba(root: Path, download: bool, attribute: str | None) -> Raw:
    """Z. Liu et al. 2015: 162,770 + 19,962 aligned faces (the validation part is not used).

    One of the 40 attributes is the label; by default the one nearest to half of the train
    split, since accuracies on unbalanced ones, or averaged over all, say little.
    """
    places = [root / "celeba", root]
    files = ("list_attr_celeba.txt", "list_eval_partition.txt", "img_align_celeba")

    def find() -> Raw | None:
        for place in places:
            if all((place / file).exists() for file in files):
                with _damage_is_reported(place / "*.txt"):
                    return _read_celeba(place, attribute)
        return None

    wanted = ", ".join(files)
    return _find_or_download("celeba", find, datasets.CelebA, wanted, places, root, download)


def load_caltech101(root: Path, download: bool, attribute: str | None) -> Raw:
    """L. Fei-Fei et al. 2004: 8,677 images of 101 classes, without the background's.

    Split as published, see `split_class`.
    """
    places = [root / "caltech101", root]

    def find() -> Raw | None:
        for place in places:
            if (place / "101_ObjectCategories").is_dir():
                return _read_caltech101(place)
        return None

    wanted = "101_ObjectCategories"
    return _find_or_download("caltech101", find, datasets.Caltech101, wanted, places, root, download)


def split_class(names: list[str]) -> tuple[list[str], list[str]]:
    """Train and test images of a class of Caltech-101: max(int(0.2 n), 2) for testing, seed 1.

    Sorted, and the same whatever the order of ``names``; the published script shuffles what the
    file system happens to list.
    """
    test = set(random.Random(1).sample(sorted(names), min(max(len(names) // 5, 2), len(names))))
    return sorted(set(names) - test), sorted(test)


def _read_caltech101(place: Path) -> Raw:
    folder = place / "101_ObjectCategories"
    names = tuple(n for n in class_folders(folder) if n != "BACKGROUND_Google")
    if not names:
        raise DataError(f"no class folders in {folder}: unpack the original archive there")
    paths, labels = ([], []), ([], [])
    for label, name in enumerate(names):
        images = images_below(folder / name)
        if len(images) < 3:
            raise DataError(
                f"{len(images)} image(s) in {folder / name}: unpack the original "
                "archive again, every class has 31 or more"
            )
        by_name = {path.name: path for path in images}
        for part, found in enumerate(split_class(list(by_name))):
            paths[part].extend(by_name[n] for n in found)
            labels[part].extend([label] * len(found))
    splits = (FileSplit(p, torch.tensor(n)) for p, n in zip(paths, labels, strict=True))
    return Raw(*splits, names, place)


def load_imagenet(root: Path, download: bool, attribute: str | None) -> Raw:
    """O. Russakovsky et al. 2015, ILSVRC 2012: 1,281,167 + 50,000 images of 1,000 classes.

    From ``{train,val}/<class>/`` (or ``test`` for ``val``), never downloaded. The classes are the
    folders that both splits have, sorted by name, which is the published order of the labels.
    """
    places = [root / "imagenet", root]
    for place in places:
        for folder in (place / "val", place / "test"):
            names = sorted({*class_folders(place / "train")} & {*class_folders(folder)})
            if names:
                splits = (list_split(split, names) for split in (place / "train", folder))
                return Raw(*splits, tuple(names), place)
    raise DataError(
        f"no imagenet: looked for train/<class>/ and val/<class>/ in {places[0]} and {places[1]}; "
        "it is not downloaded: register at image-net.org and put the images there, those for "
        "validation into class folders of the same names, too"
    )


def _read_celeba(place: Path, attribute: str | None) -> Raw:
    _, header, *lines = (place / "list_attr_celeba.txt").read_text().splitlines()
    names, rows = header.split(), [line.split() for line in lines]
    if attribute and attribute not in names:
        raise DataError(f"celeba has no attribute '{attribute}'; choose one of: {' '.join(names)}")
    partition = dict(line.split() for line in (place / "list_eval_partition.txt").read_text().splitlines())
    part = np.array([int(partition[row[0]]) for row in rows])
    values = np.array([row[1:] for row in rows]) == "1"
    if attribute:
        column = names.index(attribute)
    else:
        column = int(np.abs(values[part == 0].mean(0) - 0.5).argmin())
    splits = []
    for number in (0, 2):  # 0 train, 1 validation, 2 test
        members = np.flatnonzero(part == number)
        paths = [place / "img_align_celeba" / rows[i][0] for i in members]
        splits.append(FileSplit(paths, torch.from_numpy(values[members, column].astype(np.int64))))
    return Raw(*splits, (f"not {names[column]}", names[column]), place)


def _load_idx(name: str, cls, class_names: tuple[str, ...], root: Path, download: bool) -> Raw:
    # The bare root last: another dataset's files, which have the same names, may lie there.
    places = [root / name, root / cls.__name__ / "raw", root]
    files = [
        f"{split}-{kind}-ubyte" for split in ("train", "t10k") for kind in ("images-idx3", "labels-idx1")
    ]

    def find() -> Raw | None:
        for place in places:
            found = [_plain_or_gz(place / file) for file in files]
            if all(found):
                arrays = [read_idx(path) for path in found]
                for i in (0, 2):
                    images, labels = arrays[i : i + 2]
                    if len(images) != len(labels) or labels.max(initial=0) >= len(class_names):
                        raise DataError(f"{found[i + 1]} does not fit its images: {_fresh_copy(place)}")
                return Raw(_tensors(*arrays[:2]), _tensors(*arrays[2:]), class_names)
        return None

    wanted = f"{', '.join(files)} (plain or .gz)"
    return _find_or_download(name, find, cls, wanted, places, root, download)


def _plain_or_gz(path: Path) -> Path | None:
    found = [p for p in (path, path.with_name(f"{path.name}.gz")) if p.is_file()]
    return found[0] if found else None


def read_idx(path: Path) -> np.ndarray:
    """Reads an IDX file of unsigned bytes, plain or .gz: (N,) labels or (N, 1, H, W) images.

    Format: two zero bytes, type 8, number of dimensions, big-endian 32-bit sizes, values
    (yann.lecun.com/exdb/mnist). Raises DataError if header and length disagree.
    """
    try:
        content = path.read_bytes()
        if path.suffix == ".gz":
            content = gzip.decompress(content)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} cannot be read ({one_line(error)}): {_fresh_copy(path.parent)}") from None
    dimensions = 3 if "idx3" in path.name else 1
    start = 4 + 4 * dimensions
    shape = np.frombuffer(content[4:start], ">u4").tolist() if len(content) >= start else []
    if content[:4] != bytes([0, 0, 8, dimensions]) or len(content) - start != np.prod(shape):
        raise DataError(
            f"{path} is no IDX file or is cut off ({len(content)} bytes): {_fresh_copy(path.parent)}"
        )
    values = np.frombuffer(content, np.uint8, offset=start)
    return values.reshape(shape[0], 1, *shape[1:]) if dimensions == 3 else values


def _find_cifar(cls, places: list[Path]) -> Raw | None:
    for place in places:
        if (place / cls.base_folder).is_dir():
            with _damage_is_reported(place / cls.base_folder):
                train, test = cls(place, train=True), cls(place, train=False)
            splits = (_tensors(s.data.transpose(0, 3, 1, 2), s.targets) for s in (train, test))
            return Raw(*splits, tuple(train.classes))
    return None


def _tensors(images: np.ndarray, labels) -> TensorSplit:
    return TensorSplit(
        torch.from_numpy(np.array(images, np.uint8, order="C")), torch.from_numpy(np.array(labels, np.int64))
    )


def _fresh_copy(path: Path) -> str:
    return f"delete it in {path} and run again to download it, or put a good copy there"


@contextlib.contextmanager
def _damage_is_reported(path: Path):
    try:
        yield
    except DataError:
        raise
    except ImportError as error:  # scipy reads SVHN
        raise DataError(f"{one_line(error)}: install it with pip") from None
    except Exception as error:  # pickle, scipy and text parsers raise nearly anything
        raise DataError(
            f"{path} is incomplete or damaged ({one_line(error)}): delete it and run again to "
            "download it, or put a good copy there"
        ) from None


def _find_or_download(
    name: str,
    find: Callable[[], Raw | None],
    fetch: Callable,
    wanted: str,
    places: list[Path],
    root: Path,
    download: bool,
) -> Raw:
    """What ``find()`` finds, if need be after ``fetch(folder, download=True)``."""
    found = find()
    reason = "was not asked for"
    if not found and download:
        reason = _download(fetch, root)
        found = find()
    if not found:
        folders = ", ".join(str(place) for place in places)
        raise DataError(
            f"no {name}: looked for {wanted} in {folders}, and a download {reason}; put the files "
            "into one of these folders, or run once with a network"
        )
    return found


def _download(fetch: Callable, root: Path) -> str:
    """Fetches into a temporary folder in root and then moves the files; returns what went wrong.

    A failed or interrupted download therefore leaves nothing behind.
    """
    existed = root.exists()
    timeout = socket.getdefaulttimeout()
    temporary = None
    try:
        root.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=".download-", dir=root))
        socket.setdefaulttimeout(DOWNLOAD_TIMEOUT)
        with contextlib.redirect_stdout(io.StringIO()):  # the progress bar goes to stderr
            fetch(temporary, download=True)
        for path in temporary.rglob("*"):
            if path.is_file() and path.suffix not in ARCHIVES:
                target = root / path.relative_to(temporary)
                target.parent.mkdir(parents=True, exist_ok=True)
                path.replace(target)
        return "found nothing"
    except Exception as error:  # URLError, a missing gdown, a bad archive, a read-only root, ...
        return f"failed ({type(error).__name__}: {one_line(error)})"
    finally:
        socket.setdefaulttimeout(timeout)
        if temporary:
            shutil.rmtree(temporary, ignore_errors=True)
        if not existed:
            with contextlib.suppress(OSError):  # root holds a dataset now, or never came to be
                root.rmdir()
