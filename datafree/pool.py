"""Synthetic images, kept as uint8 on the device and, as they are made, in the run's folder."""

import os
from pathlib import Path

import numpy as np
import torch
from torchvision.transforms.functional import to_pil_image

from datafree.runtime import UsageError


class ImagePool:
    """A growing set of images (C, H, W), uint8 on the device.

    Pixels in 0..1 are clamped, multiplied by 255 and cut off to bytes, as published. Images beyond
    `limit` stay in the host's memory (pinned for a GPU) and travel when they are drawn.

    `state_dict` appends what is new to `path`, raw bytes one image after the other, and returns
    their number: a checkpoint stays small, and resuming reads that many images back.

    Args:
        shape: (C, H, W). device: where batches come out. path: the file.
        limit: most images on the device, or None.

    Raises:
        UsageError: from load_state_dict, when the file is shorter than the checkpoint says.
    """

    def __init__(self, shape, device, path, limit=None):
        self.shape, self.device, self.path = tuple(shape), torch.device(device), Path(path)
        self.limit, self.near, self.far = limit, self._empty(self.device), self._empty("cpu")
        self.n_near = self.n_far = self.saved = 0

    def _empty(self, device, n=0):
        pinned = str(device) == "cpu" and self.device.type == "cuda"
        return torch.empty(n, *self.shape, dtype=torch.uint8, device=device, pin_memory=pinned)

    def __len__(self):
        return self.n_near + self.n_far

    def add(self, images):
        """Append images (N, C, H, W): float in 0..1, or uint8 as they are."""
        if images.dtype != torch.uint8:
            images = (images.detach().clamp(0, 1) * 255).to(torch.uint8)
        room = len(images) if self.limit is None else max(0, self.limit - self.n_near)
        self.near, self.n_near = self._append(self.near, self.n_near, images[:room])
        self.far, self.n_far = self._append(self.far, self.n_far, images[room:])

    def _append(self, store, n, images):
        """`images` behind the first n of `store`, whose size doubles when it is full."""
        end = n + len(images)
        if end > len(store):
            larger = self._empty(store.device, max(end, 2 * n))
            larger[:n] = store[:n]
            store = larger
        store[n:end] = images
        return store, end

    def _take(self, rows):
        """The images of these rows (on the device), spilled ones last: they are fetched."""
        if not self.n_far:
            return self.near[rows]
        rows = rows.cpu()  # once: a mask on the device would make the host wait several times
        near, far = rows[rows < self.n_near], rows[rows >= self.n_near] - self.n_near
        return torch.cat([self.near[near.to(self.device)], self.far[far].to(self.device)])

    def batches(self, batch_size, n):
        """n batches, uint8 (batch_size, C, H, W), of random passes over the pool.

        A pass meets every image once; a rest smaller than a batch is left out, unless the whole
        pool is smaller. The random numbers are the device's.
        """
        while n > 0:
            order = torch.randperm(len(self), device=self.device)
            for rows in order.split(batch_size)[: max(1, len(self) // batch_size)][:n]:
                n -= 1
                yield self._take(rows)

    def images(self, start=0, end=None):
        """Images start..end in the order of their making, in the host's memory."""
        end = len(self) if end is None else min(end, len(self))
        near = self.near[min(start, self.n_near) : min(end, self.n_near)].cpu()
        far = self.far[max(start - self.n_near, 0) : max(end - self.n_near, 0)]
        return torch.cat([near, far])

    def state_dict(self):
        if self.saved < len(self) or not self.saved:
            mode = "r+b" if self.saved else "wb"  # "a" would keep what a killed run left behind
            with self.path.open(mode) as file:
                file.seek(self.saved * self._bytes())
                file.truncate()
                file.write(self.images(self.saved).numpy().tobytes())
                file.flush()
                os.fsync(file.fileno())
            self.saved = len(self)
        return {"images": self.saved}

    def _bytes(self):
        return int(np.prod(self.shape))

    def load_state_dict(self, state):
        count = state["images"]
        images = read_raw(self.path, self.shape, count)
        self.n_near = self.n_far = 0
        self.add(images)
        self.saved = count

    def export(self, kind, folder):
        """Write all images to `folder`: "png" one file each, "npz" one archive (N, H, W, C).

        Returns the path that was written. Raises OSError as the file system does; of what cannot
        be written whole nothing is left.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        if kind == "npz":
            path = folder / "images.npz"
            _write_whole(
                path, lambda file: np.savez_compressed(file, images=self.images().permute(0, 2, 3, 1).numpy())
            )
            return path
        for i in range(len(self)):
            picture = to_pil_image(self.images(i, i + 1)[0])
            _write_whole(folder / f"{i:06}.png", lambda file, p=picture: p.save(file, "PNG"))
        return folder


def _write_whole(path, write):
    temporary = path.with_name(path.name + ".tmp")
    try:
        with temporary.open("wb") as file:
            write(file)
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise OSError(error.errno, error.strerror, str(path)) from error


def read_raw(path, shape, count=None):
    """Images uint8 (N, C, H, W) from a pool's file: the first `count`, or all.

    Raises:
        UsageError: missing, or shorter than `count` images.
    """
    size = int(np.prod(shape))
    try:
        content = np.fromfile(path, np.uint8, -1 if count is None else count * size)
    except OSError as error:
        raise UsageError(f"cannot read the images of {path} ({error.strerror})") from error
    if len(content) % size or (count is not None and len(content) < count * size):
        raise UsageError(
            f"{path} holds {len(content) // size} whole images of shape {shape}"
            + (f", the checkpoint {count}" if count is not None else "")
            + ": start the run anew, without --resume"
        )
    return torch.from_numpy(content).view(-1, *shape)
