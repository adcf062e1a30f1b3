"""Datasets as uint8 batches on a device: ``get_dataset(name)`` is the way in.

Images come out unaugmented and unnormalised; ``mean``, ``std``, ``padding`` and ``flip`` say
what the caller should do with them. To add a dataset, write a loader (sources.py has ten)
and give it a row in ``SOURCES``.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torchvision.transforms.v2 import functional as F

from . import sources
from .folder import Raw, fingerprint, get_images, load_folder, open_files, side_of
from .segmentation import SEGMENTATIONS, Segmentation, get_segmentation
from .splits import LUMA, DataError, FileSplit, TensorSplit, one_line, per_channel
from .wild import open_wild

__all__ = [
    "DATASETS", "SEGMENTATIONS", "DataError", "Dataset", "FileSplit", "Segmentation",
    "TensorSplit", "get_dataset", "get_images", "get_segmentation", "get_wild",
    "imagenet_statistics",
]  # fmt: skip


@dataclass(frozen=True)
class Source:
    """A loader and the published defaults of its data.

    ``img_size`` None: that of the files. ``mean`` None: computed from the train split.
    ``crop``: training pads by an eighth of the size and crops at random (32 pixels: by 4).
    """

    load: Callable[[Path, bool, str | None], Raw]
    img_size: int | None
    channels: int
    mean: tuple[float, ...] | None
    std: tuple[float, ...] | None
    crop: bool = False
    flip: bool = False


HALF = (0.5, 0.5, 0.5)
CIFAR10_MEAN, CIFAR10_STD = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)
CIFAR100_MEAN, CIFAR100_STD = (0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SOURCES = {
    # Statistics of digits: those of its 1,297 train images at 32x32.
    "digits": Source(sources.load_digits, 32, 1, (0.3060,), (0.3242,)),
    "mnist": Source(sources.load_mnist, 32, 1, (0.1307,), (0.3081,)),
    "fashion-mnist": Source(sources.load_fashion_mnist, 32, 1, (0.2860,), (0.3530,)),
    "cifar10": Source(sources.load_cifar10, 32, 3, CIFAR10_MEAN, CIFAR10_STD, True, True),
    "cifar100": Source(sources.load_cifar100, 32, 3, CIFAR100_MEAN, CIFAR100_STD, True, True),
    "svhn": Source(sources.load_svhn, 32, 3, HALF, HALF),
    # Only as a transfer set of MNIST in the papers, so with its statistics.
    "usps": Source(sources.load_usps, 32, 1, (0.1307,), (0.3081,)),
    "celeba": Source(sources.load_celeba, 224, 3, HALF, HALF, flip=True),
    "caltech101": Source(sources.load_caltech101, 128, 3, HALF, HALF, flip=True),
    # The published training crop is a random resized one.
    "imagenet": Source(sources.load_imagenet, 224, 3, IMAGENET_MEAN, IMAGENET_STD, True, True),
    "folder": Source(load_folder, None, 3, None, None, True, True),
}
DATASETS = tuple(SOURCES)


@dataclass
class Dataset:
    """Two splits and what one needs to know about them.

    mean, std: one value per channel, for pixels in 0..1.
    padding, flip: the train transform, a random ``img_size`` crop of the image padded by
    ``padding`` pixels, and a horizontal flip; the test transform is nothing.
    fingerprint: identifies the content. In memory: labels and pixels, before any resizing for
    data that comes as arrays, after it for decoded files. Streamed: paths, sizes and labels.
    """

    name: str
    train: TensorSplit | FileSplit
    test: TensorSplit | FileSplit
    num_classes: int
    class_names: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    img_size: int
    channels: int
    padding: int
    flip: bool
    fingerprint: str

    def to(self, device) -> "Dataset":
        """A copy whose batches come out on ``device``; splits in memory live there."""
        return replace(self, train=self.train.to(device), test=self.test.to(device))


def get_dataset(
    name: str,
    root: str | Path = "./datasets",
    img_size: int | None = None,
    channels: int | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    attribute: str | None = None,
    download: bool = True,
    in_memory_limit: int = 2**30,
) -> Dataset:
    """Finds, or downloads into ``root``, one of ``DATASETS``.

    img_size, channels, mean and std replace the dataset's own. Images are square afterwards
    (bilinear, antialiased; of a file the central square). One channel becomes three by
    repetition, three become one by ITU-R 601 luma. Published statistics follow: repeated, or
    weighted like luma (for std this is an upper bound, close since channels correlate).
    attribute: which of celeba's to predict (default: the most balanced one).
    in_memory_limit: bytes of pixels above which image files are streamed instead of decoded.

    Raises DataError, one line that names the cure, if the data or an argument is wrong.
    """
    if name not in SOURCES:
        raise DataError(f"unknown dataset '{name}'; choose one of: {' '.join(DATASETS)}")
    if attribute and name != "celeba":
        raise DataError(f"{name} has no attributes: leave attribute out, it belongs to celeba")
    source = SOURCES[name]
    channels = source.channels if channels is None else channels
    if channels not in (1, 3):
        raise DataError(f"channels is {channels}: choose 1 or 3")
    if img_size is not None and img_size < 1:
        raise DataError(f"img_size is {img_size}: choose at least 1 pixel")
    mean, std = per_channel("mean", mean, channels), per_channel("std", std, channels)

    try:
        raw = source.load(Path(root).expanduser(), download, attribute)
    except OSError as error:
        raise DataError(f"cannot read the data ({one_line(error)}): check {root}") from None
    img_size = img_size or source.img_size or side_of(raw.train.paths[0])
    computed = None
    if isinstance(raw.train, TensorSplit):
        train, test = (_fit(split, img_size, channels) for split in (raw.train, raw.test))
        digest = fingerprint(raw.train, raw.test)
    else:
        needed = source.mean is None and (mean is None or std is None)
        train, test, computed, digest = open_files(raw, img_size, channels, in_memory_limit, needed)
    own_mean, own_std = computed or (source.mean, source.std)
    return Dataset(
        name=name,
        train=train,
        test=test,
        num_classes=len(raw.class_names),
        class_names=raw.class_names,
        mean=mean or _follow(own_mean, channels),
        std=std or _follow(own_std, channels),
        img_size=img_size,
        channels=channels,
        padding=img_size // 8 if source.crop else 0,
        flip=source.flip,
        fingerprint=digest,
    )


def get_wild(source: str, root: str | Path, img_size: int, channels: int):
    """An unlabelled image set: a folder (any depth), a zip, or the train images of a data set.

    Args:
        source: the path, or one of ``DATASETS``, which is looked for in ``root``.

    Returns (split, fingerprint); the split's labels mean nothing. Its images come out as those of
    ``get_dataset`` do. Raises DataError if there are none.
    """
    if source in DATASETS:
        data = get_dataset(source, root, img_size=img_size, channels=channels)
        return data.train, data.fingerprint
    return open_wild(Path(source).expanduser(), img_size, channels)


def imagenet_statistics(channels: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """ImageNet's mean and standard deviation for images of 1 or 3 channels."""
    return _follow(IMAGENET_MEAN, channels), _follow(IMAGENET_STD, channels)


def _follow(values: Sequence[float], channels: int) -> tuple[float, ...]:
    """Per-channel statistics after a change of the number of channels."""
    if len(values) == channels:
        return tuple(values)
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
