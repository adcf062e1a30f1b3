"""Synthetic images, kept as uint8 on the device and, as they are made, in the run's folder."""

import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms.functional import to_pil_image

from datafree.distributed import SIZE, from_first, share, speaks, whole
from datafree.errors import UsageError

Shape = tuple[int, int, int]  # (C, H, W) of an image
CHUNK = 2**26  # bytes that go to a file or come from it at a time


class ImagePool:
    """A growing set of images (C, H, W), uint8 on the device.

    Pixels in 0..1 are clamped, multiplied by 255 and cut off to bytes, as published. Images beyond `limit` stay in
    the host's memory and travel when they are drawn. `flush` appends what is new to `path`, raw bytes one image after
    the other, and `state_dict` is their number: a checkpoint stays small, and resuming reads that many images back.
    Of several processes each holds its share of the images; the file has all of them.

    Args:
        shape: (C, H, W). device: where batches come out. path: the file. limit: most images on the device, or None.
        capacity: how many will come: memory is taken once, here. More make it grow.

    Raises:
        UsageError: no memory for so many; from load_state_dict, when the file is shorter than the checkpoint says.
    """

    def __init__(
        self, shape: Shape, device: str | torch.device, path: str | Path, limit: int | None = None, capacity: int = 0
    ):
        self.shape, self.device, self.path, self.limit = tuple(shape), torch.device(device), Path(path), limit
        self.n_near = self.n_far = self.saved = 0
        capacity //= SIZE
        near = self._near_part(capacity)
        try:
            self.near, self.far = self._empty(near, self.device), self._empty(capacity - near, "cpu")
        except RuntimeError as error:
            text = f"the {capacity} images of this run take {capacity * math.prod(shape) / 1e9:.1f} GB, {near} of them "
            text += "on the device: there is less memory; lower --pool_size (of those on the device), --n_epochs or "
            raise UsageError(f"{text}--synthesis_batch_size") from error

    def _near_part(self, n: int) -> int:
        return n if self.limit is None else min(n, self.limit)

    def _empty(self, n: int, device: str | torch.device, pinned: bool = False) -> Tensor:
        return torch.empty(n, *self.shape, dtype=torch.uint8, device=device, pin_memory=pinned)

    @property
    def own(self) -> int:
        """The number of images that this process holds."""
        return self.n_near + self.n_far

    def __len__(self) -> int:
        return self.own * SIZE

    def add(self, images: Tensor) -> None:
        """Append a process's share of images, (N, C, H, W): float in 0..1, or uint8 as they are."""
        if images.dtype != torch.uint8:
            images = (images.detach().clamp(0, 1) * 255).to(torch.uint8)
        start = self.own
        self._reserve(start + len(images))
        near, far = self._parts(start)
        near.copy_(images[: len(near)])
        far.copy_(images[len(near) :])

    def _reserve(self, n: int) -> None:
        """Count n images in all; a store that is too small for its part of them doubles."""
        near = self._near_part(n)
        self.near, self.far = self._grown(self.near, self.n_near, near), self._grown(self.far, self.n_far, n - near)
        self.n_near, self.n_far = near, n - near

    def _grown(self, store: Tensor, used: int, needed: int) -> Tensor:
        if needed <= len(store):
            return store
        larger = self._empty(max(needed, 2 * used), store.device)
        larger[:used] = store[:used]
        return larger

    def _parts(self, start: int = 0, end: int | None = None) -> tuple[Tensor, Tensor]:
        """This process's images start..end: those on the device, and the spilled ones behind them."""
        end = self.own if end is None else min(end, self.own)
        near = self.near[min(start, self.n_near) : min(end, self.n_near)]
        return near, self.far[max(start - self.n_near, 0) : max(end - self.n_near, 0)]

    def _take(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """These rows and their images; with spilled ones, which are fetched and come last, rows are the host's."""
        if not self.n_far:
            return rows, self.near[rows]
        near, far = rows[rows < self.n_near], rows[rows >= self.n_near]
        fetched = self._empty(len(far), "cpu", pinned=self.device.type == "cuda")
        torch.index_select(self.far, 0, far - self.n_near, out=fetched)
        at = (near.pin_memory() if self.device.type == "cuda" else near).to(self.device, non_blocking=True)
        images = torch.cat([self.near[at], fetched.to(self.device, non_blocking=True)])
        return torch.cat([near, far]), images

    def batches(self, batch_size: int, n: int) -> Iterator[tuple[Tensor, Tensor]]:
        """n batches of random passes over the pool by the device's random numbers: rows, images.

        Rows (batch_size,) are this process's, images uint8 (batch_size, C, H, W). A pass meets every image once; a rest
        smaller than a batch is left out, unless the whole pool is smaller. Of several processes each gives its share of
        a batch, from its own images.
        """
        batch_size //= SIZE
        while n > 0:
            order = torch.randperm(self.own, device=self.device)
            order = order.cpu() if self.n_far else order  # the host waits once a pass
            for rows in order.split(batch_size)[: max(1, self.own // batch_size)][:n]:
                n -= 1
                yield self._take(rows)

    def images(self, start: int = 0, end: int | None = None) -> Tensor:
        """Images start..end in the order of their making, in the host's memory: of several processes, from all."""
        near, far = self._parts(start // SIZE, None if end is None else end // SIZE)
        return whole(torch.cat([near.cpu(), far]))

    def flush(self) -> None:
        """Write what is new behind what the file holds, and nothing else: what a killed run left there goes."""
        if self.saved < len(self) or not self.saved:
            size = math.prod(self.shape)
            start, parts = self.saved * size, self._parts(self.saved // SIZE)
            near, far = parts if SIZE == 1 else (self.images(self.saved), parts[1][:0])
            write_rows(self.path, (start, near), (start + near.numel(), far), new=not self.saved)
            self.saved = len(self)
            if speaks():
                os.truncate(self.path, self.saved * size)

    def state_dict(self) -> dict[str, int]:
        return {"images": len(self)}

    def load_state_dict(self, state: dict[str, int]) -> None:
        size = math.prod(self.shape)
        found = from_first(lambda: self.path.stat().st_size if self.path.is_file() else 0)
        if not 0 <= state["images"] * size <= found:
            text = f"{self.path} has not the {state['images']} images that the checkpoint counts"
            raise UsageError(f"{text}: start the run anew, without --resume")
        self._reserve(state["images"] // SIZE)
        near, far = self._parts()
        if SIZE == 1:
            read_rows(self.path, (0, near), (near.numel(), far))
        else:
            self._read_shares(near, far)
        self.saved = len(self)

    def _read_shares(self, *parts: Tensor) -> None:
        """Fill what this process holds from the file, which rank 0 reads for all."""
        start = 0
        for rows in (chunk for part in parts for chunk in _chunks(part)):
            images = torch.empty(len(rows) * SIZE, *self.shape, dtype=torch.uint8)

            def read(images: Tensor = images, start: int = start) -> Tensor:
                read_rows(self.path, (start, images))
                return images

            rows.copy_(share(from_first(read)))
            start += images.numel()

    def export(self, kind: str, folder: str | Path) -> Path:
        """Write all images to `folder`, "png" one file each, "npz" one archive (N, H, W, C); returns what was written.

        Raises OSError as the file system does, of what cannot be written whole nothing is left, and UsageError where
        pictures lie in `folder` that would not be overwritten: they would be taken for these ones.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        if kind == "png":
            check_alone(folder, len(self))
        if kind == "npz":
            images = self.images().permute(0, 2, 3, 1).numpy()
            _write_whole(folder / "images.npz", lambda file: np.savez_compressed(file, images=images))
            return folder / "images.npz"
        for first in range(0, len(self), SIZE):
            for i, image in enumerate(self.images(first, first + SIZE), first):
                _write_whole(folder / f"{i:06}.png", lambda file, image=image: to_pil_image(image).save(file, "PNG"))
        return folder


def check_alone(folder: str | Path, n: int) -> None:
    """Raises UsageError if a folder holds pictures that n exported ones would not overwrite."""
    if others := {path.name for path in Path(folder).glob("*.png")} - {f"{i:06}.png" for i in range(n)}:
        raise UsageError(f"{folder} holds other pictures, as {min(others)}: give an empty --save_dir")


def _write_whole(path: Path, write: Callable) -> None:
    if not speaks():
        return
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            write(file)
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise OSError(error.errno, error.strerror, str(path)) from error


def _chunks(rows: Tensor) -> tuple[Tensor, ...]:
    return rows.split(max(1, CHUNK // (math.prod(rows.shape[1:]) * rows.element_size())))


def write_rows(path: Path, *pieces: tuple[int, Tensor], new: bool = False) -> None:
    """Write tensors to the disk, each at its byte of a file, which is emptied before if it is to be `new`."""
    if not speaks():
        return
    with path.open("wb" if new else "r+b") as file:
        for offset, rows in pieces:
            file.seek(offset)
            for part in _chunks(rows):
                file.write(part.cpu().numpy())
        file.flush()
        os.fsync(file.fileno())


def read_rows(path: Path, *pieces: tuple[int, Tensor]) -> None:
    """Fill tensors, each from its byte of a file on. Raises UsageError if that is missing or too short."""
    try:
        with path.open("rb") as file:
            for offset, rows in pieces:
                file.seek(offset)
                for part in _chunks(rows):
                    read = torch.empty(part.shape, dtype=part.dtype)
                    if file.readinto(read.numpy()) < read.nbytes:
                        raise OSError(0, "it is shorter than the checkpoint says")
                    part.copy_(read)
    except OSError as error:
        raise UsageError(f"cannot read {path} ({error.strerror}): start the run anew, without --resume") from error


def read_raw(path: str | Path, shape: Shape) -> Tensor:
    """All images, uint8 (N, C, H, W), of a pool's file. Raises UsageError: missing, or no whole number of images."""
    try:
        content = np.fromfile(path, np.uint8)
    except OSError as error:
        raise UsageError(f"cannot read the images of {path} ({error.strerror})") from error
    if len(content) % math.prod(shape):
        raise UsageError(f"{path} holds no whole number of images of shape {shape}: name another --cmi_init")
    return torch.from_numpy(content).view(-1, *shape)
