"""Images with a class for every pixel: ``get_segmentation(name)`` is the way in.

All have a short side of 256 (images bilinear and antialiased, labels nearest), in memory as uint8; void is 255.
"""

import hashlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2
from tqdm import tqdm

from .folder import SUFFIXES
from .splits import DataError, expand, no_package, open_image, per_channel, regular, unreadable

VOID = 255
SHORT_SIDE = 256
SPLITS_LIMIT = 2**16  # bytes of splits.mat, which can unpack to a thousand times as many


@dataclass
class SegmentationSplit:
    """Pairs of image, uint8 (3, H, W), and label, uint8 (H, W), in files' order."""

    images: list[Tensor]
    labels: list[Tensor]

    def __len__(self) -> int:
        return len(self.images)

    def crops(self, batch_size: int, size: int, device: str | torch.device) -> Iterator[tuple[Tensor, Tensor]]:
        """One shuffled pass of random crops, mirrored with probability 1/2, without a rest smaller than a batch.

        Yields images uint8 (N, 3, size, size) and labels int64 (N, size, size).
        """
        cut = v2.Compose([v2.RandomCrop(size), v2.RandomHorizontalFlip()])
        for rows in torch.randperm(len(self)).split(batch_size)[: len(self) // batch_size]:
            pairs = [cut(tv_tensors.Image(self.images[i]), tv_tensors.Mask(self.labels[i])) for i in rows.tolist()]
            images, labels = (torch.stack([p.as_subclass(Tensor) for p in part]) for part in zip(*pairs, strict=True))
            yield images.to(device), labels.to(device).long()

    def whole(self, device: str | torch.device, batch_size: int = 1) -> Iterator[tuple[Tensor, Tensor]]:
        """One pass over whole images in order, uint8 (N, 3, H, W) and int64 (N, H, W), N of one size at once."""
        for _, rows in itertools.groupby(range(len(self)), lambda row: self.images[row].shape):
            rows = list(rows)
            for start in range(rows[0], rows[-1] + 1, batch_size):
                part = slice(start, min(start + batch_size, rows[-1] + 1))
                images, labels = torch.stack(self.images[part]), torch.stack(self.labels[part])
                yield images.to(device), labels.to(device).long()

    def to(self, device: str | torch.device, limit: int = 2**30) -> "SegmentationSplit":
        """The split on ``device``, or itself if it takes more than ``limit`` bytes."""
        if sum(tensor.numel() for tensor in (*self.images, *self.labels)) > limit:
            return self
        return SegmentationSplit([i.to(device) for i in self.images], [i.to(device) for i in self.labels])


@dataclass
class Segmentation:
    """Two splits (train None if it was not asked for), the classes' names and colours, (R, G, B) each."""

    name: str
    class_names: tuple[str, ...]
    colours: tuple[tuple[int, int, int], ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    test: SegmentationSplit
    train: SegmentationSplit | None = None
    padding, flip = 0, False  # what a Transform adds; here the crops do it
    channels, img_size = 3, SHORT_SIDE

    @property
    def fingerprint(self) -> str:
        """The first 16 hex digits of SHA-256 over sizes, pixels and labels of the splits that were read."""
        digest = hashlib.sha256()
        for split in filter(None, (self.train, self.test)):
            for tensor in (*split.images, *split.labels):
                digest.update(repr(tuple(tensor.shape)).encode())
                digest.update(tensor.cpu().numpy())
        return digest.hexdigest()[:16]

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    def to(self, device: str | torch.device) -> "Segmentation":
        """A copy whose splits live on ``device`` where they fit, see `SegmentationSplit.to`."""
        return replace(self, test=self.test.to(device), train=self.train and self.train.to(device))

    def paint(self, labels: Tensor) -> Tensor:
        """Labels (N, H, W) as pictures in 0..1, (N, 3, H, W); void is black."""
        colours = torch.zeros(256, 3)
        colours[: self.num_classes] = torch.tensor(self.colours) / 255
        return colours[labels.cpu().long()].permute(0, 3, 1, 2)


def get_segmentation(
    name: str, root: str | Path = "./datasets", mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None, train: bool = True,
) -> Segmentation:  # fmt: skip
    """Reads one of ``SEGMENTATIONS`` from ``root`` or the folder of that name below it.

    mean and std, three values each, replace 0.5. train: False to read the test split alone. Raises DataError.
    """
    if name not in SEGMENTATIONS:
        raise DataError(f"unknown segmentation data '{name}'; choose one of: {' '.join(SEGMENTATIONS)}")
    mean, std = per_channel("mean", mean, 3), per_channel("std", std, 3)
    source = SEGMENTATIONS[name]
    root = expand(root)
    splits = ("train", "test") if train else ("test",)
    try:
        found = {split: _read(source.pairs(root, split), len(source.colours), source.void) for split in splits}
    except OSError as error:
        raise unreadable(error.filename or root, error, "unpack the data again") from None
    half = (0.5, 0.5, 0.5)
    return Segmentation(name, tuple(source.colours), tuple(source.colours.values()), mean or half, std or half, **found)


def _place(root: Path, name: str, folders: tuple[str, ...], wanted: str) -> Path:
    places = [root / folder for folder in folders]
    if found := next((place for place in places if (place / wanted).exists()), None):
        return found
    where = ", ".join(map(str, places))
    raise DataError(f"no {name}: looked for {wanted} in {where}; unpack it into one of these folders")


def _camvid(root: Path, split: str) -> list[tuple[Path, Path]]:
    """CamVid as SegNet has it: 367 + 233 frames."""
    place = _place(root, "camvid", ("CamVid", "camvid", "camvid/CamVid", "."), f"{split}annot")
    frames = sorted(p for p in (place / split).iterdir() if p.suffix.lower() in SUFFIXES)
    if not frames:
        raise DataError(f"no images in {place / split}: unpack CamVid again")
    return [(path, place / f"{split}annot" / f"{path.stem}.png") for path in frames]


def _nyuv2(root: Path, split: str) -> list[tuple[Path, Path]]:
    """NYUv2: 795 + 654 rooms, listed in splits.mat, as 480_640/IMAGE/<index - 1>.png, labels as
    nyuv2-meta-data/{train,test}_labels_13/new_nyu_class13_<index>.png."""
    place = _place(root, "nyuv2", ("nyuv2", "NYUv2", "."), "splits.mat")
    path = place / "splits.mat"
    try:
        regular(path, SPLITS_LIMIT)
        from scipy.io import loadmat

        numbers = [int(i) for i in loadmat(path)[f"{split}Ndxs"].flatten().tolist()]
    except ImportError as error:
        raise no_package("scipy", "scipy", error) from None
    except Exception as error:  # scipy raises nearly anything on damaged files
        raise unreadable(path, error, "fetch it again") from None
    if not numbers:
        raise DataError(f"{path} lists no images to {split}: fetch it again")
    images, labels = place / "480_640" / "IMAGE", place / "nyuv2-meta-data" / f"{split}_labels_13"
    return [(images / f"{i - 1}.png", labels / f"new_nyu_class13_{i:04}.png") for i in numbers]


@dataclass(frozen=True)
class SegmentationSource:
    """Where a data set's pairs of image and label file are, for (root, split), and what the labels mean.

    colours: of the classes in order. void: its value in the files, the classes have the others from 0. paper: its name.
    """

    pairs: Callable[[Path, str], list[tuple[Path, Path]]]
    colours: dict[str, tuple[int, int, int]]
    void: int
    paper: str


CAMVID = {
    "sky": (128, 128, 128), "building": (128, 0, 0), "pole": (192, 192, 128), "road": (128, 64, 128),
    "pavement": (60, 40, 222), "tree": (128, 128, 0), "sign": (192, 128, 128), "fence": (64, 64, 128),
    "car": (64, 0, 128), "pedestrian": (64, 64, 0), "bicyclist": (0, 128, 192),
}  # fmt: skip
NYUV2 = {
    "bed": (0, 0, 255), "books": (233, 89, 48), "ceiling": (0, 218, 0), "chair": (149, 0, 240), "floor": (222, 241, 24),
    "furniture": (255, 206, 206), "objects": (0, 224, 229), "picture": (106, 136, 204), "sofa": (117, 29, 41),
    "table": (240, 35, 235), "tv": (0, 167, 156), "wall": (249, 139, 0), "window": (225, 229, 194),
}  # fmt: skip
SEGMENTATIONS = {
    "camvid": SegmentationSource(_camvid, CAMVID, 11, "CamVid"),
    "nyuv2": SegmentationSource(_nyuv2, NYUV2, 0, "NYUv2"),
}


def _read(pairs: list[tuple[Path, Path]], num_classes: int, void: int) -> SegmentationSplit:
    """Decodes and resizes pairs of image and label file; ``void`` is its value in the files."""
    classes = list(range(num_classes))
    table = np.full(256, -1)
    table[: num_classes + 1] = [*classes[:void], VOID, *classes[void:]]
    images, labels = [], []
    for image_path, label_path in tqdm(pairs, "reading images", leave=False, delay=2, disable=None):
        image, label = _open(image_path, "RGB"), _open(label_path, None)
        if image.size != label.size:
            sizes = f"{image_path} is {image.width}x{image.height}, {label_path} {label.width}x{label.height}"
            raise DataError(f"{sizes}: image and label must have the same size")
        if max(image.size) > 16 * min(image.size):
            raise DataError(f"{image_path} is a strip of {image.width}x{image.height}: fetch it again")
        values = np.asarray(label)
        if values.ndim != 2 or values.dtype != np.uint8:
            raise DataError(f"{label_path} is no 8-bit grey or palette picture: fetch it again")
        mapped = table[values]
        if (mapped < 0).any():
            wrong = values[mapped < 0].flat[0]
            raise DataError(f"{label_path} holds the label {wrong}: 0..{num_classes} is possible, {void} for void")
        size = tuple(SHORT_SIDE * side // min(image.size) for side in image.size)
        image = image.resize(size, Image.Resampling.BILINEAR)
        label = Image.fromarray(mapped.astype(np.uint8)).resize(size, Image.Resampling.NEAREST)
        images.append(torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous())
        labels.append(torch.from_numpy(np.array(label)))
    return SegmentationSplit(images, labels)


def _open(path: Path, mode: str | None) -> Image.Image:
    try:
        with open_image(path) as image:
            image.load()
            return image.convert(mode) if mode else image
    except FileNotFoundError:
        raise DataError(f"{path} is missing: every image needs its label file, unpack the data again") from None
    except Exception as error:  # decoders raise nearly anything on damaged files
        raise unreadable(path, error, "fetch it again") from None
