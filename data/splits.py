"""A split of a dataset, in memory or streamed from files: both give uint8 batches on a device."""

import contextlib
import errno
import math
import os
import stat
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

# Pillow's fixed-point ITU-R 601-2 luma, so that tensors and files turn grey identically.
LUMA = (19595 / 65536, 38470 / 65536, 7471 / 65536)


# Others, which Pillow tells by their content, are not opened: of some it would run a program.
FORMATS = ("PNG", "JPEG", "BMP", "WEBP", "GIF", "TIFF", "PPM")
FILE_LIMIT = 2**30  # bytes: no file that is read whole is larger


class DataError(Exception):
    """Something is wrong with the user's data; the message is one line that names the cure."""

    def __init__(self, text: str):
        super().__init__(printable(text))


def printable(text: str) -> str:
    """The text with escapes for line breaks and for the bytes of file names that are no UTF-8."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def unreadable(path: str | Path, error: Exception, cure: str) -> DataError:
    """The error for what cannot be read: `cure`, unless it is merely locked."""
    cure = "change its permissions" if isinstance(error, PermissionError) else cure
    return DataError(f"cannot read {path} ({one_line(error)}): {cure}")


def no_package(module: str, name: str, error: Exception) -> DataError:
    """The error for a package, called `name` on PyPI, that is missing or fails when imported."""
    if isinstance(error, ModuleNotFoundError) and error.name == module:
        return DataError(f"this data set needs {name}: pip install {name}")
    text = f"{name} cannot be imported ({type(error).__name__}: {one_line(error)})"
    return DataError(f"{text}: repair it, for instance with pip install --force-reinstall {name}")


def regular(path: Path, limit: float = math.inf) -> os.stat_result:
    """The status of a regular file. Raises OSError for pipes and devices, which may never end, and for large files."""
    found, reason = path.stat(), "no regular file"
    if stat.S_ISREG(found.st_mode):
        if found.st_size <= limit:
            return found
        reason = f"{found.st_size:,} bytes are too many"
    raise OSError(errno.EINVAL, reason, str(path))


def expand(path: str | Path) -> Path:
    """The path with ~ resolved; that of a user who is none stays."""
    return Path(os.path.expanduser(path))  # noqa: PTH111 - pathlib's raises


def check_memory(n: int, channels: int, img_size: int) -> None:
    """Raises DataError if so many images exceed the machine's memory."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 2**40
    if n * channels * img_size**2 > memory:
        text = f"{n:,} images of {img_size}x{img_size} pixels do not fit into {memory >> 30} GiB of memory"
        raise DataError(f"{text}: choose a smaller img_size")


def per_channel(name: str, values: Sequence[float] | None, channels: int) -> tuple[float, ...] | None:
    """The user's mean or std as one value per channel; None stays None. Raises DataError."""
    if values is None:
        return None
    values = tuple(map(float, values))
    if len(values) != channels or not all(0 <= v <= 1 and (v or name == "mean") for v in values):
        bounds = "from 0 to 1" if name == "mean" else "from 0 to 1 and not 0"
        raise DataError(f"{name} is {values}: give {channels} value(s), one per channel, {bounds}")
    return values


class Batches:
    """Passes over a split, as images uint8 (N, C, H, W) and labels int64 (N,); ``len()`` counts the batches.

    A shuffled pass draws one ``torch.randperm`` from the global CPU generator: restoring its state repeats the pass.
    ``share`` chooses of each batch's rows, int64 (n,), those that are wanted here; a batch without any is left out.
    """

    def __init__(
        self, split: "Split", batch_size: int, shuffle: bool, drop_last: bool, device: str | torch.device,
        share: Callable[[Tensor], Tensor],
    ):  # fmt: skip
        self.split, self.batch_size, self.shuffle, self.share = split, batch_size, shuffle, share
        self.device = torch.device(device)
        self.kept = len(split) // batch_size * batch_size if drop_last else len(split)
        if not self.kept:
            raise DataError(
                f"a batch of {batch_size} exceeds the split's {len(split)} images: choose a smaller batch size"
            )

    def __len__(self) -> int:
        whole, rest = divmod(self.kept, self.batch_size)
        return whole + (len(self.share(torch.arange(rest))) > 0)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        n = len(self.split)
        order = torch.randperm(n, device="cpu") if self.shuffle else torch.arange(n, device="cpu")
        rows = [self.share(rows) for rows in order[: self.kept].split(self.batch_size)]
        rows = [chunk for chunk in rows if len(chunk)]
        return self.split.read(rows, self.device) if rows else iter(())


class Split:
    """What splits share: they have ``labels`` and a ``device``."""

    def __len__(self) -> int:
        return len(self.labels)

    def batches(
        self, batch_size: int, shuffle: bool = False, drop_last: bool = False, device: str | torch.device | None = None,
        share: Callable[[Tensor], Tensor] = lambda rows: rows,
    ) -> Batches:  # fmt: skip
        """Batches on ``device`` (default: the split's). Raises DataError if there are none, or a file is damaged."""
        return Batches(self, batch_size, shuffle, drop_last, self.device if device is None else device, share)

    def shuffled(self, batch_size: int, share: Callable[[Tensor], Tensor]) -> Batches:
        """Batches to train on; a last one of a single image, which would stop BatchNorm on a 1x1 map, is left out."""
        return self.batches(batch_size, shuffle=True, drop_last=len(self) % batch_size == 1, share=share)


@dataclass
class TensorSplit(Split):
    """Images uint8 (N, C, H, W) and labels int64 (N,), both on one device."""

    images: Tensor
    labels: Tensor

    @property
    def device(self) -> torch.device:
        return self.images.device

    def to(self, device: str | torch.device) -> "TensorSplit":
        return TensorSplit(self.images.to(device), self.labels.to(device))

    def take(self, rows: Tensor) -> "TensorSplit":
        """The split of these rows, int64 (n,) on the CPU."""
        rows = rows.to(self.device)
        return TensorSplit(self.images[rows], self.labels[rows])

    def in_memory(self, limit: float) -> "TensorSplit":
        """Itself, as `FileSplit.in_memory`."""
        return self

    def scan(self, batch_size: int, device: str | torch.device) -> Iterator[tuple[Tensor, list[tuple[int, str]]]]:
        """One pass in order: images on `device`, and no unreadable ones, as `FileSplit.scan`."""
        for images, _ in self.batches(batch_size, device=device):
            yield images, []

    def read(self, chunks: list[Tensor], device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
        # The order travels once, so that cutting a batch on a GPU never waits for the host.
        for rows in torch.cat(chunks).to(self.device).split([len(rows) for rows in chunks]):
            yield self.images[rows].to(device), self.labels[rows].to(device)


@dataclass
class FileSplit(Split):
    """Image files and their labels int64 (N,), decoded and resized whenever they are read."""

    paths: list[Path]
    labels: Tensor
    img_size: int | None = None
    channels: int = 3
    device: str | torch.device = "cpu"

    def to(self, device: str | torch.device) -> "FileSplit":
        return replace(self, device=device)

    def take(self, rows: Tensor) -> "FileSplit":
        """The split of these rows, int64 (n,) on the CPU."""
        array = isinstance(self.paths, np.ndarray)
        paths = self.paths[rows.numpy()] if array else [self.paths[row] for row in rows.tolist()]
        return replace(self, paths=paths, labels=self.labels[rows])

    def in_memory(self, limit: float) -> "TensorSplit | FileSplit":
        """The split decoded, if its pixels fit into `limit` bytes, else as it is."""
        return self.decode() if len(self) * self.channels * self.img_size**2 <= limit else self

    def source(self, row: int) -> Path | IO[bytes]:
        """What ``decode`` reads: the path of a file, or a file object."""
        return self.paths[row]

    def name(self, row: int) -> str:
        """The image's name for people."""
        return str(self.paths[row])

    def scan(self, batch_size: int, device: str | torch.device) -> Iterator[tuple[Tensor, list[tuple[int, str]]]]:
        """One pass in order: images on ``device``, and the rows that cannot be read (black), each with its reason."""
        chunks, pin_memory = (
            torch.arange(len(self), device="cpu").split(batch_size),
            torch.device(device).type == "cuda",
        )
        for images, _, broken in self._loader(chunks, pin_memory):
            yield images.to(device, non_blocking=True), broken

    def read(self, chunks: list[Tensor], device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
        for images, labels, broken in self._loader(chunks, device.type == "cuda"):
            _refuse(broken)
            yield images.to(device, non_blocking=True), labels.to(device, non_blocking=True)

    def decode(self) -> TensorSplit:
        """The whole split in memory. Raises DataError that counts all files it cannot read, or if it does not fit."""
        check_memory(len(self), self.channels, self.img_size)
        images = torch.empty(len(self), self.channels, self.img_size, self.img_size, dtype=torch.uint8)
        parts, all_broken = images.split(256), []
        loader = self._loader(torch.arange(len(self), device="cpu").split(256))
        batches = tqdm(loader, "decoding images", leave=False, delay=2, disable=None)
        for part, (batch, _, broken) in zip(parts, batches, strict=True):
            part.copy_(batch)
            all_broken += broken
        _refuse(all_broken)
        return TensorSplit(images, self.labels)

    def __getitem__(self, rows: Tensor) -> tuple[Tensor, Tensor, list[tuple[int, str]]]:
        """One batch, made in a worker: images, labels, and rows and reasons of unreadable files, not raised there:
        DataLoader would make a page of traceback of them."""
        shape = (self.img_size, self.img_size, self.channels)
        images, broken = np.zeros((len(rows), *shape), np.uint8), []
        for image, row in zip(images, rows.tolist(), strict=True):
            try:
                image[:] = decode(self.source(row), self.img_size, self.channels).reshape(shape)
            except Exception as error:  # decoders raise nearly anything on damaged files
                broken.append((row, printable(f"{self.name(row)} ({one_line(error)})")))
        images = torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()
        return images, self.labels[rows], broken

    def _loader(self, chunks: Sequence[Tensor], pin_memory: bool = False) -> DataLoader:
        workers = min(8, _cpus(), len(chunks) - 1)
        own = torch.Generator()  # which the workers' seed is drawn from, not from the one that runs save
        return DataLoader(self, None, sampler=chunks, num_workers=workers, pin_memory=pin_memory, generator=own)


@contextlib.contextmanager
def open_image(source: Path | IO[bytes]) -> Iterator[Image.Image]:
    """A picture in one of ``FORMATS``. Raises OSError if it is no regular file, and whatever Pillow raises."""
    if isinstance(source, Path):
        regular(source)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of large pictures and odd palettes: several lines for each
        with Image.open(source, formats=FORMATS) as image:
            yield image


def decode(path: Path | IO[bytes], img_size: int, channels: int) -> np.ndarray:
    """The central square of an image, resized (bilinear, antialiased): uint8 (img_size, img_size[, 3 of 3 channels]).

    Of an animation the first picture counts. Transparent pixels become white, 16-bit grey is scaled to 8 bits (Pillow
    clips it). Raises whatever Pillow raises on a damaged file, ValueError on pixels of unknown range.
    """
    with open_image(path) as image:
        if image.mode.startswith("I"):
            values = np.asarray(image)
            if values.min() < 0 or values.max() > 65535:
                raise ValueError("more than 16 bits a pixel: save it as 8 or 16 bits")
            image = Image.fromarray(np.rint(values / 257).astype(np.uint8))
        elif image.mode == "F":
            raise ValueError("floating-point pixels have no agreed range: save it as 8 bits")
        elif image.has_transparency_data:
            white = Image.new("RGBA", image.size, "white")
            image = Image.alpha_composite(white, image.convert("RGBA"))
        if image.mode not in ("L", "RGB"):
            image = image.convert("RGB")
        if image.mode != (mode := "L" if channels == 1 else "RGB"):  # converting to the same mode would copy
            image = image.convert(mode)
        if image.size != (img_size, img_size):
            side = min(image.size)
            left, top = ((length - side) / 2 for length in image.size)
            box = (left, top, left + side, top + side)
            image = image.resize((img_size, img_size), Image.Resampling.BILINEAR, box)
        return np.asarray(image)


def channel_statistics(split: TensorSplit | FileSplit) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of each channel, 0..1, by exact histograms: independent of the images' order."""
    counts, batches = 0, split.batches(256, device="cpu")
    for images, _ in tqdm(batches, "computing statistics", leave=False, delay=2, disable=None):
        counts += torch.stack([torch.bincount(c, minlength=256) for c in images.transpose(0, 1).flatten(1)])
    weights = counts.double() / counts.sum(1, keepdim=True)
    values = torch.arange(256, dtype=torch.float64) / 255
    mean = weights @ values
    variance = (weights * (values - mean[:, None]).square()).sum(1)
    # Wholly constant images must not lead to a division by zero when they are normalised.
    return mean.tolist(), variance.sqrt().clamp(min=1 / 255).tolist()


def one_line(error: BaseException) -> str:
    """An error's message without line breaks and its file's name, or its type where it has none."""
    return " ".join(str(getattr(error, "strerror", None) or error).split()) or type(error).__name__


def _refuse(broken: list[tuple[int, str]]) -> None:
    if broken:
        more = f" and {len(broken) - 1} more" if len(broken) > 1 else ""
        raise DataError(f"cannot read image {broken[0][1]}{more}: unlock, replace or delete what is broken")


def _cpus() -> int:
    """CPUs this process may use, which can be fewer than exist."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
