"""SegNet (Badrinarayanan et al. 2017) with VGG encoders, as DFAD's teacher script offers it."""

from collections import OrderedDict
from itertools import pairwise

import torch.nn.functional as F
from torch import nn

from .registry import SEGMENTERS, register


class SegNet(nn.Module):
    """Images (N, 3, H, W) -> logits (N, classes, H, W); `depths`: convolutions of the five stages.

    The decoder unpools to the places that the encoder's max pooling came from. As published, the
    last convolution too is followed by BatchNorm and ReLU, so that logits are never negative.
    """

    def __init__(self, depths, num_classes=11):
        super().__init__()
        widths = (3, 64, 128, 256, 512, 512)
        for i, n in enumerate(depths, 1):
            before, width = widths[i - 1 : i + 1]
            self.add_module(f"down{i}", _stage([before] + [width] * n))
        for i, n in reversed(tuple(enumerate(depths, 1))):
            before, width = widths[i - 1 : i + 1]
            # The first stage's decoder ends in the classes.
            self.add_module(f"up{i}", _stage([width] * n + [num_classes if i == 1 else before]))

    def forward(self, x):
        places = []
        for i in range(1, 6):
            x = getattr(self, f"down{i}")(x)
            size = x.shape[-2:]
            x, indices = F.max_pool2d(x, 2, return_indices=True)
            places.append((indices, size))
        for i in range(5, 0, -1):
            indices, size = places[i - 1]
            x = getattr(self, f"up{i}")(F.max_unpool2d(x, indices, 2, output_size=size))
        return x


def _stage(widths):
    """Convolutions (with BatchNorm and ReLU) of the given widths, first to last, by their published names."""
    stage = nn.Sequential()
    for i, (before, after) in enumerate(pairwise(widths), 1):
        unit = nn.Sequential(nn.Conv2d(before, after, 3, padding=1), nn.BatchNorm2d(after), nn.ReLU(inplace=True))
        stage.add_module(f"conv{i}", nn.Sequential(OrderedDict(cbr_unit=unit)))
    return stage


register("segnet_vgg13", SegNet, SEGMENTERS, depths=(2, 2, 2, 2, 2))
register("segnet_vgg16", SegNet, SEGMENTERS, depths=(2, 2, 3, 3, 3))
register("segnet_vgg19", SegNet, SEGMENTERS, depths=(2, 2, 4, 4, 4))
