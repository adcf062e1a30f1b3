"""Batched crop, flip and normalisation on the device; all of it differentiable.

Random numbers come from the global generator of the images' device, whose state is in the checkpoints.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from data import Dataset
from data.segmentation import Segmentation
from datafree.distributed import count, share


def random_crop(x: Tensor, padding: int) -> Tensor:
    """Crop each image of x (N, C, H, W) at its own uniform place from a zero-padded copy.

    Equal in distribution to torchvision's `RandomCrop((H, W), padding)`.
    """
    return _Crop.apply(x, *random_places(x, padding), padding)


def random_places(x: Tensor, padding: int) -> Tensor:
    """Where `random_crop` cuts: top and left (2, N, 1)."""
    return share(torch.randint(2 * padding + 1, (2, count(x), 1), device=x.device), 1)


class _Crop(torch.autograd.Function):
    """Crop image i of x at top[i], left[i] (N, 1) of the copy padded by `padding`.

    The adjoint of a shift is the opposite shift: a gather, where autograd's gradient adds element by element.
    """

    @staticmethod
    def forward(ctx, x: Tensor, top: Tensor, left: Tensor, padding: int) -> Tensor:
        ctx.save_for_backward(top, left)
        ctx.padding = padding
        image, channel, row, column = (torch.arange(size, device=x.device) for size in x.shape)
        rows, columns = (top + row)[:, None, :, None], (left + column)[:, None, None, :]
        return F.pad(x, (padding,) * 4)[image[:, None, None, None], channel[:, None, None], rows, columns]

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (top, left), p = ctx.saved_tensors, ctx.padding
        return _Crop.apply(gradient, 2 * p - top, 2 * p - left, p), None, None, None


def random_flip(x: Tensor) -> Tensor:
    """Mirror each image of x (N, C, H, W) left-right with probability 1/2."""
    return torch.where(random_sides(x), x.flip(-1), x)


def random_sides(x: Tensor) -> Tensor:
    """Which images `random_flip` mirrors, (N, 1, 1, 1)."""
    return share(torch.rand(count(x), 1, 1, 1, device=x.device)) < 0.5


def random_resized_crop(x: Tensor, area: float) -> Tensor:
    """Cut a box from each image of x (N, C, H, W), as floats, and stretch it to the full size.

    Equal in distribution to torchvision's `RandomResizedCrop((H, W), scale=(area, 1))`: a share of the area from
    `area` to 1, a ratio of the sides from 3/4 to 4/3, drawn again where such a box does not fit (ten times at most,
    then it is the whole of a square image).
    """
    x = x if x.is_floating_point() else x.float()
    n, (height, width) = count(x), x.shape[2:]
    u, places = share(torch.rand(2, 10, n, device=x.device), 2), share(torch.rand(2, n, device=x.device), 1)
    pixels = (area + (1 - area) * u[0]) * (height * width)
    ratio = torch.exp(math.log(4 / 3) * (2 * u[1] - 1))
    rows, columns = (pixels / ratio).sqrt().round(), (pixels * ratio).sqrt().round()
    fits = (rows > 0) & (rows <= height) & (columns > 0) & (columns <= width)
    first = fits.int().argmax(0, keepdim=True)
    axes = []
    for side, lengths, place in zip((height, width), (rows, columns), places, strict=True):
        length = torch.where(fits.any(0), lengths.gather(0, first)[0], side)[:, None]
        start = (place[:, None] * (side - length + 1)).floor()
        # Centres of the new pixels in the old image; outwards the box's border repeats.
        centres = (torch.arange(side, device=x.device) + 0.5) * length / side - 0.5
        centres = centres.clamp(min=0).minimum(length - 1) + start
        axes.append((2 * centres + 1) / side - 1)
    grid = torch.stack(torch.broadcast_tensors(axes[1][:, None, :], axes[0][:, :, None]), dim=3)
    return F.grid_sample(x, grid.to(x.dtype), align_corners=False, padding_mode="border")


@dataclass(eq=False)
class Transform:
    """uint8 images, as the data sets hold them, to what the networks take.

    Args:
        mean, std: one value per channel, of pixels in 0..1.
        padding, flip: the train transform's random crop and mirroring; 0 and False for none.
        area: instead of that crop, a random resized one of at least this share of the image.
    """

    mean: Sequence[float]
    std: Sequence[float]
    padding: int = 0
    flip: bool = False
    area: float | None = None
    tensors: dict = field(default_factory=dict, init=False, repr=False)

    @classmethod
    def of(
        cls, data: Dataset | Segmentation, metadata: Mapping | None = None, area: float | None = None
    ) -> "Transform":
        """A data set's transform, with the statistics that the network of this metadata, if any, was trained with."""
        known = metadata or {}
        return cls(known.get("mean", data.mean), known.get("std", data.std), data.padding, data.flip, area)

    def __call__(self, x: Tensor, train: bool = False) -> Tensor:
        """(N, C, H, W) uint8 -> float32, normalised, channels_last; augmented if `train`."""
        x = self.augment(x) if train else x
        return self.normalize(x.float() / 255).contiguous(memory_format=torch.channels_last)

    def augment(self, x: Tensor) -> Tensor:
        """The train transform's random crop and mirroring of images x (N, C, H, W)."""
        return self.vary(x)[0]

    @property
    def forms(self) -> int:
        """In how many forms `augment` may give an image, 0 if they are not counted."""
        return 0 if self.area else (2 * self.padding + 1) ** 2 * (1 + self.flip)

    def vary(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """`augment`, and which of its `forms` each image got, (N,)."""
        form = None if self.area else torch.zeros(len(x), dtype=torch.int64, device=x.device)
        if self.area:
            x = random_resized_crop(x, self.area)
        elif self.padding:
            top, left = random_places(x, self.padding)
            x, form = _Crop.apply(x, top, left, self.padding), (top * (2 * self.padding + 1) + left)[:, 0]
        if self.flip:
            mirrored = random_sides(x)
            x = torch.where(mirrored, x.flip(-1), x)
            form = None if form is None else 2 * form + mirrored.flatten()
        return x, form

    def normalize(self, x: Tensor) -> Tensor:
        """(x - mean) / std for float x (N, C, H, W) in 0..1."""
        mean, std = self._tensors(x)
        return (x - mean) / std

    def denormalize(self, x: Tensor) -> Tensor:
        """The inverse of `normalize`, clamped to 0..1 for looking at."""
        mean, std = self._tensors(x)
        return (x * std + mean).clamp(0, 1)

    def _tensors(self, x: Tensor) -> list[Tensor]:
        """mean and std (C, 1, 1) like x; kept, as each copy to a GPU would wait for it."""
        key = x.device, x.dtype
        if key not in self.tensors:
            self.tensors[key] = [x.new_tensor(v)[:, None, None] for v in (self.mean, self.std)]
        return self.tensors[key]
