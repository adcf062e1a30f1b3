"""Batched crop, flip and normalisation on the device; all of it differentiable.

Random numbers come from the global generator of the images' device, so that a checkpoint that
holds the generator states reproduces a run.
"""

import torch
import torch.nn.functional as F


def random_crop(x, padding):
    """Crop each image of x (N, C, H, W) at its own uniform place from a zero-padded copy.

    Equal in distribution to torchvision's `RandomCrop((H, W), padding)`.
    """
    top, left = torch.randint(2 * padding + 1, (2, len(x), 1), device=x.device)
    return _Crop.apply(x, top, left, padding)


class _Crop(torch.autograd.Function):
    """Crop image i of x at top[i], left[i] (N, 1) of the copy padded by `padding`.

    The adjoint of a shift is the opposite shift: a gather again, where autograd's own gradient of
    an indexed read adds element by element.
    """

    @staticmethod
    def forward(ctx, x, top, left, padding):
        ctx.save_for_backward(top, left)
        ctx.padding = padding
        n, c, h, w = x.shape
        padded = F.pad(x, (padding,) * 4)
        rows = top + torch.arange(h, device=x.device)
        columns = left + torch.arange(w, device=x.device)
        image = torch.arange(n, device=x.device)[:, None, None, None]
        channel = torch.arange(c, device=x.device)[:, None, None]
        return padded[image, channel, rows[:, None, :, None], columns[:, None, None, :]]

    @staticmethod
    def backward(ctx, gradient):
        top, left = ctx.saved_tensors
        p = ctx.padding
        return _Crop.apply(gradient, 2 * p - top, 2 * p - left, p), None, None, None


def random_flip(x):
    """Mirror each image of x (N, C, H, W) left-right with probability 1/2."""
    flip = torch.rand(x.shape[0], 1, 1, 1, device=x.device) < 0.5
    return torch.where(flip, x.flip(-1), x)


class Transform:
    """uint8 images, as the data sets hold them, to what the networks take.

    Args:
        mean, std: one value per channel, of pixels in 0..1.
        padding, flip: the train transform's random crop and mirroring; 0 and False for none.
    """

    def __init__(self, mean, std, padding=0, flip=False):
        self.mean, self.std, self.padding, self.flip = mean, std, padding, flip
        self.tensors = {}

    @classmethod
    def of(cls, data, card=None):
        """The transform of a data set, for a network whose checkpoint has this card, if any.

        A network must meet images with the statistics that it was trained with, the card's.
        """
        card = card or {}
        return cls(card.get("mean", data.mean), card.get("std", data.std), data.padding, data.flip)

    def __call__(self, x, train=False):
        """(N, C, H, W) uint8 -> float32, normalised, channels_last; augmented if `train`."""
        x = self.augment(x) if train else x
        return self.normalize(x.float() / 255).contiguous(memory_format=torch.channels_last)

    def augment(self, x):
        """The train transform's random crop and mirroring of images x (N, C, H, W)."""
        if self.padding:
            x = random_crop(x, self.padding)
        return random_flip(x) if self.flip else x

    def normalize(self, x):
        """(x - mean) / std for float x (N, C, H, W) in 0..1."""
        mean, std = self._tensors(x)
        return (x - mean) / std

    def denormalize(self, x):
        """The inverse of `normalize`, clamped to 0..1 for looking at."""
        mean, std = self._tensors(x)
        return (x * std + mean).clamp(0, 1)

    def _tensors(self, x):
        """mean and std (C, 1, 1) like x; kept, as each copy to a GPU would wait for it."""
        key = x.device, x.dtype
        if key not in self.tensors:
            self.tensors[key] = [x.new_tensor(v)[:, None, None] for v in (self.mean, self.std)]
        return self.tensors[key]
