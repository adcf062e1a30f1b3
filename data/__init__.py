"""Datasets as uint8 batches on a device: ``get_dataset(name)`` is the way in.

Images come out unaugmented and unnormalised; ``mean``, ``std``, ``padding`` and ``flip`` say what to do with them. To
add a dataset, write a loader (see sources.py) and a row of ``SOURCES``, or outside ``register("mine", Source(load))``.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torchvision.transforms.v2 import functional as F

from . import sources, splits
from .folder import Raw, fingerprint, get_images, load_folder, open_files, side_of
from .segmentation import SEGMENTATIONS, Segmentation, get_segmentation
from .splits import LUMA, DataError, FileSplit, TensorSplit, check_memory, expand, per_channel, unreadable
from .wild import open_wild

__all__ = [
    "DATASETS", "SEGMENTATIONS", "SOURCES", "TEST_SETS", "DataError", "Dataset", "FileSplit", "Raw",
    "Segmentation", "Source", "TensorSplit", "get_dataset", "get_images", "get_segmentation", "get_wild",
    "imagenet_statistics", "load_folder", "preset_of", "register",
]  # fmt: skip


@dataclass(frozen=True)
class Source:
    """What is known of a data set: its loader, published transforms, and what scripts take for it.

    load: (root, splits, download, attribute) -> ``Raw`` with the splits asked for, ("train", "test") or ("test",).
    img_size: None for that of the images. mean, std: None to compute them from the train split.
    crop: training pads by the size over `pad`, an eighth if not said otherwise, and crops at random. area: instead, at
    the data set's own size, classifiers learn from random boxes of at least this share of an image, stretched.
    pair: names of the default teacher and student. like: the data set whose presets it takes where it has none of its
    own. paper: what the papers call it.
    """

    load: Callable[[Path, Sequence[str], bool, str | None], Raw]
    img_size: int | None = None
    channels: int = 3
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    crop: bool = False
    flip: bool = False
    pair: tuple[str, str] = ("wrn40_2", "wrn16_1")
    like: str = "folder"
    paper: str | None = None
    pad: int = 8
    area: float | None = None

    def least_area(self, img_size: int | None) -> float | None:
        """`area` for images of this size, None for the data set's own; None where they are padded and cropped."""
        return self.area if img_size in (None, self.img_size) else None

    def padding(self, img_size: int) -> int:
        """The pixels that training pads images of this size by, on each side."""
        return img_size // self.pad if self.crop else 0


HALF = (0.5, 0.5, 0.5)
CIFAR10 = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)
CIFAR100 = (0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)
IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
LENET, ALEXNET = ("lenet5", "lenet5_half"), ("alexnet", "alexnet_half")
RESNET34, RESNET50 = ("resnet34_imagenet", "resnet18_imagenet"), ("resnet50_imagenet", "resnet18_imagenet")
SOURCES: dict[str, Source] = {
    # Statistics of digits: those of its 1,297 train images at 32x32.
    "digits": Source(sources.load_digits, 32, 1, (0.3060,), (0.3242,), pair=LENET, like="mnist"),
    "mnist": Source(sources.load_mnist, 32, 1, (0.1307,), (0.3081,), pair=LENET, paper="MNIST"),
    "fashion-mnist": Source(sources.load_fashion_mnist, 32, 1, (0.2860,), (0.3530,), pair=LENET, like="mnist"),
    "cifar10": Source(sources.load_cifar10, 32, 3, *CIFAR10, True, True, paper="CIFAR-10"),
    "cifar100": Source(sources.load_cifar100, 32, 3, *CIFAR100, True, True, like="cifar10", paper="CIFAR-100"),
    "svhn": Source(sources.load_svhn, 32, 3, HALF, HALF, like="cifar10"),
    # Only as a transfer set of MNIST in the papers, so with its statistics.
    "usps": Source(sources.load_usps, 32, 1, (0.1307,), (0.3081,), pair=LENET, like="mnist"),
    "celeba": Source(sources.load_celeba, 224, 3, HALF, HALF, False, True, ALEXNET, paper="CelebA"),
    "caltech101": Source(sources.load_caltech101, 128, 3, HALF, HALF, False, True, RESNET34, paper="Caltech101"),
    "tiny-imagenet": Source(
        sources.load_tiny_imagenet, 64, 3, HALF, HALF, True, True, ("resnet34", "resnet18"), pad=16
    ),
    "imagenet": Source(sources.load_imagenet, 224, 3, *IMAGENET, True, True, RESNET50, paper="ImageNet", area=0.08),
    "folder": Source(load_folder, crop=True, flip=True),
}
DATASETS = SOURCES.keys()  # a live view: what is registered later belongs to it


def TEST_SETS() -> tuple[str, ...]:
    """``DATASETS`` and "none", of which only the classes and the size are known."""
    return (*DATASETS, "none")


def register(name: str, source: Source) -> None:
    """Adds a data set to ``DATASETS``. Raises DataError if what it is like is unknown."""
    if source.like not in SOURCES:
        raise DataError(f"{name} is like '{source.like}', which is none of: {' '.join(DATASETS)}")
    SOURCES[name] = source


def preset_of(name: str, presets: Mapping[str, Any]) -> Any:
    """The data set's preset, else that of the data set which it is like, else that of "folder"."""
    while name not in presets and name != "folder":
        name = SOURCES[name].like if name in SOURCES else "folder"
    return presets[name]


@dataclass
class Dataset:
    """Splits, None for those that were not asked for, and what one needs to know about them.

    mean, std: one value per channel, for pixels in 0..1; None if unknown, which happens without the train split.
    padding, flip: the train transform: a random ``img_size`` crop of the image padded by ``padding`` pixels, a flip.
    fingerprint: of what was read, both splits or test alone. In memory: labels and pixels, before any resizing for
    data that comes as arrays, after it for decoded files. Streamed: paths, sizes and labels.
    """

    name: str
    train: TensorSplit | FileSplit | None
    test: TensorSplit | FileSplit | None
    class_names: tuple[str, ...]
    mean: tuple[float, ...] | None
    std: tuple[float, ...] | None
    img_size: int
    channels: int
    padding: int
    flip: bool
    fingerprint: str

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    def to(self, device: str | torch.device) -> "Dataset":
        """A copy whose batches come out on ``device``; splits in memory live there."""
        return replace(self, train=self.train and self.train.to(device), test=self.test and self.test.to(device))


def get_dataset(
    name: str, root: str | Path = "./datasets", img_size: int | None = None, channels: int | None = None,
    mean: Sequence[float] | None = None, std: Sequence[float] | None = None, attribute: str | None = None,
    download: bool = True, in_memory_limit: int = 2**30, train: bool = True, num_classes: int | None = None,
) -> Dataset:  # fmt: skip
    """Finds, or downloads into ``root``, one of ``DATASETS``; "none" has no images at all.

    img_size, channels, mean and std replace the dataset's own. Images are square afterwards (bilinear, antialiased;
    of a file the central square). One channel becomes three by repetition, three become one by ITU-R 601 luma, and so
    do published statistics (for std this is an upper bound, close since channels correlate).
    attribute: which of celeba's to predict (default: the most balanced one).
    in_memory_limit: bytes of pixels above which image files are streamed instead of decoded.
    train: False to read the test split alone: statistics that the train split would tell are None then.
    num_classes: of "none", which needs img_size, too.
    Raises DataError, one line that names the cure, if the data or an argument is wrong.
    """
    if name not in TEST_SETS():
        raise DataError(f"unknown dataset '{name}'; choose one of: {' '.join(TEST_SETS())}")
    if attribute and name != "celeba":
        raise DataError(f"{name} has no attributes: leave attribute out, it belongs to celeba")
    if num_classes and name != "none":
        raise DataError(f"{name} has classes of its own: leave out num_classes, it belongs to none")
    source = SOURCES["folder" if name == "none" else name]
    channels = source.channels if channels is None else channels
    if channels not in (1, 3):
        raise DataError(f"channels is {channels}: choose 1 or 3")
    if img_size is not None and not (isinstance(img_size, int) and img_size >= 1):
        raise DataError(f"img_size is {img_size}: choose at least 1 pixel")
    mean, std = per_channel("mean", mean, channels), per_channel("std", std, channels)

    if name == "none":
        if not (num_classes and img_size):
            raise DataError("dataset none has no images to learn its classes from: give --num_classes and --img_size")
        if not (isinstance(num_classes, int) and 2 <= num_classes <= 10**5):
            raise DataError(f"num_classes is {num_classes}: choose 2 to 100,000")
        check_memory(1, channels, img_size)
        classes = tuple(map(str, range(num_classes)))
        return Dataset(name, None, None, classes, mean, std, img_size, channels, img_size // 8, True, "none")

    names = ("train", "test") if train else ("test",)
    raw = _load(name, root, names, download, attribute)
    parts = {split: getattr(raw, split) for split in names}
    first, n = parts[names[0]], sum(map(len, parts.values()))
    needed = train and source.mean is None and (mean is None or std is None)
    if isinstance(first, TensorSplit):
        img_size = img_size or source.img_size or first.images.shape[-1]
        check_memory(n, channels, img_size)
        digest = fingerprint(parts.values())
        parts = {split: _fit(part, img_size, channels) for split, part in parts.items()}
        computed = splits.channel_statistics(parts["train"]) if needed else None
    else:
        img_size = img_size or source.img_size or side_of(first.paths[0])
        check_memory(min(n, 256), channels, img_size)
        try:
            parts, computed, digest = open_files(parts, raw.root, img_size, channels, in_memory_limit, needed)
        except OSError as error:
            raise unreadable(f"image {error.filename}", error, "replace or delete it") from None
    own_mean, own_std = computed or (source.mean, source.std)
    mean, std = mean or _follow(own_mean, channels), std or _follow(own_std, channels)
    classes, pad = tuple(map(splits.printable, raw.class_names)), source.padding(img_size)
    about = classes, mean, std, img_size, channels, pad, source.flip, digest
    return Dataset(name, parts.get("train"), parts["test"], *about)


def _load(name: str, root: str | Path, names: Sequence[str], download: bool, attribute: str | None) -> Raw:
    """What the data set's loader finds. Raises DataError if it cannot be read, or nothing can be learnt from it."""
    try:
        raw = SOURCES[name].load(expand(root), names, download, attribute)
    except OSError as error:
        raise unreadable(error.filename or root, error, "replace or delete it") from None
    if len(raw.class_names) < 2:
        names = "one class, " + raw.class_names[0] if raw.class_names else "no classes"
        raise DataError(f"{root} has {names}: give at least two, there is nothing to learn")
    if empty := [split for split in names if not len(getattr(raw, split))]:
        raise DataError(f"{name} has no images to {empty[0]} in {root}: put the whole data set there")
    return raw


def get_wild(source: str, root: str | Path, img_size: int, channels: int) -> tuple[TensorSplit | FileSplit, str]:
    """An unlabelled image set: a path, as it is or below ``root``, or the train images of one of ``DATASETS``.

    A path is of a folder (any depth) or a zip. Returns (split, fingerprint); images are as ``get_dataset``'s, labels
    mean nothing. Raises DataError if it has none.
    """
    if source in DATASETS:
        data = get_dataset(source, root, img_size=img_size, channels=channels)
        return data.train, data.fingerprint
    places = [expand(source), expand(root) / source]
    try:
        found = next((place for place in places if place.exists()), None)
    except OSError as error:
        raise unreadable(error.filename, error, "name a folder, a zip or a data set") from None
    if found:
        return open_wild(found, img_size, channels)
    where = " or ".join(map(str, dict.fromkeys(places)))
    raise DataError(f"image set {where} does not exist: name a folder, a zip or a data set")


def imagenet_statistics(channels: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """ImageNet's mean and standard deviation for images of 1 or 3 channels."""
    return tuple(_follow(values, channels) for values in IMAGENET)


def _follow(values: Sequence[float] | None, channels: int) -> tuple[float, ...] | None:
    """Per-channel statistics after a change of the number of channels; None stays None."""
    if values is None or len(values) == channels:
        return values and tuple(values)
    if channels == 3:
        return tuple(values) * 3
    return (sum(weight * value for weight, value in zip(LUMA, values, strict=True)),)


def _fit(split: TensorSplit, img_size: int, channels: int) -> TensorSplit:
    """Native images, uint8 (N, C, H, W), in the channels and the size asked for."""
    parts = []
    for images in split.images.split(4096):  # the arithmetic needs several bytes per value
        if channels == 1 and images.shape[1] == 3:
            # Pillow's own arithmetic: 16-bit fixed point, rounded.
            weights = torch.tensor([round(w * 65536) for w in LUMA], dtype=torch.int32).view(3, 1, 1)
            images = ((images * weights).sum(1, keepdim=True) + 32768 >> 16).to(torch.uint8)
        if images.shape[-2:] != (img_size, img_size):
            images = F.resize(images, [img_size, img_size], antialias=True)
        parts.append(images.expand(-1, channels, -1, -1))
    return TensorSplit(torch.cat(parts), split.labels)
