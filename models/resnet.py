"""ResNets (He et al. 2016) for 32-pixel images.

resnet34 -> resnet18 is the CIFAR pair of DAFL, DFND, DFAD (there resnet34_8x) and Fast-Datafree, whose registry also
offers the narrow ones of section 4.2, resnet8 to resnet110, and 4x wider ones; no table row needs these.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from .layers import add_numbered, conv, init_weights
from .registry import register


def _shortcut(c_in: int, c_out: int, stride: int) -> nn.Sequential:
    if stride == 1 and c_in == c_out:
        return nn.Sequential()
    return nn.Sequential(conv(c_in, c_out, 1, stride), nn.BatchNorm2d(c_out))


class BasicBlock(nn.Module):
    expansion = 1
    shortcut_name = "shortcut"

    def __init__(self, c_in: int, width: int, stride: int):
        super().__init__()
        add_numbered(self, conv(c_in, width, 3, stride), conv(width, width, 3))
        self.add_module(self.shortcut_name, _shortcut(c_in, width, stride))

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)), inplace=True)
        return F.relu(self.bn2(self.conv2(y)).add_(self.get_submodule(self.shortcut_name)(x)), inplace=True)


class NarrowBlock(BasicBlock):
    shortcut_name = "downsample"  # as published


class Bottleneck(nn.Module):
    expansion = 4

    def __init__(self, c_in: int, width: int, stride: int):
        super().__init__()
        c_out = width * self.expansion
        add_numbered(self, conv(c_in, width, 1), conv(width, width, 3, stride), conv(width, c_out, 1))
        self.shortcut = _shortcut(c_in, c_out, stride)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)), inplace=True)
        y = F.relu(self.bn2(self.conv2(y)), inplace=True)
        return F.relu(self.bn3(self.conv3(y)).add_(self.shortcut(x)), inplace=True)


class ResNet(nn.Module):
    """Images (N, channels, H, W) -> logits (N, num_classes); features: the pooled last map.

    `depths` counts the blocks of each stage. Pooling covers the whole map, at 32 pixels the published 4x4 window.
    """

    last_name = "linear"

    def __init__(
        self, block: type[nn.Module], depths: tuple[int, ...], num_classes: int = 10, channels: int = 3, stem: int = 64,
        width: int = 64,
    ):  # fmt: skip
        super().__init__()
        add_numbered(self, conv(channels, stem, 3))
        c_in, self.stages = stem, [f"layer{i + 1}" for i in range(len(depths))]
        for i, (name, depth) in enumerate(zip(self.stages, depths, strict=True)):
            blocks = []
            for j in range(depth):
                blocks.append(block(c_in, width * 2**i, stride=2 if i and not j else 1))
                c_in = width * 2**i * block.expansion
            self.add_module(name, nn.Sequential(*blocks))
        self.add_module(self.last_name, nn.Linear(c_in, num_classes))

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)), inplace=True)
        for name in self.stages:
            x = self.get_submodule(name)(x)
        return self.get_submodule(self.last_name)(F.adaptive_avg_pool2d(x, 1).flatten(1))


class NarrowResNet(ResNet):
    """Three stages, `depth` = 6 n + 2 layers in all."""

    last_name = "fc"  # as published

    def __init__(self, depth: int, num_classes: int = 10, channels: int = 3, **widths: int):
        super().__init__(NarrowBlock, [(depth - 2) // 6] * 3, num_classes, channels, **widths)
        init_weights(self)


register("resnet18", ResNet, block=BasicBlock, depths=(2, 2, 2, 2))
register("resnet34", ResNet, block=BasicBlock, depths=(3, 4, 6, 3))
register("resnet50", ResNet, block=Bottleneck, depths=(3, 4, 6, 3))
for depth in (8, 20, 32, 56, 110):
    register(f"resnet{depth}", NarrowResNet, depth=depth, stem=16, width=16)
for depth in (8, 32):
    register(f"resnet{depth}x4", NarrowResNet, depth=depth, stem=32, width=64)
