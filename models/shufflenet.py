"""ShuffleNetV2 1x (Ma et al. 2018) for 32-pixel images, from Fast-Datafree's registry."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .layers import add_numbered, conv
from .registry import register


def _shuffle(left: Tensor, right: Tensor) -> Tensor:
    """Join two halves so that their channels alternate."""
    return torch.stack((left, right), 2).flatten(1, 2)


class DownBlock(nn.Module):
    """Halves the map; both branches see the whole input."""

    def __init__(self, c_in: int, c_out: int):
        super().__init__()
        half = c_out // 2
        left = conv(c_in, c_in, 3, 2, groups=c_in), conv(c_in, half, 1)
        right = conv(c_in, half, 1), conv(half, half, 3, 2, groups=half), conv(half, half, 1)
        add_numbered(self, *left, *right)

    def forward(self, x: Tensor) -> Tensor:
        left = F.relu(self.bn2(self.conv2(self.bn1(self.conv1(x)))), inplace=True)
        right = self.bn4(self.conv4(F.relu(self.bn3(self.conv3(x)), inplace=True)))
        right = F.relu(self.bn5(self.conv5(right)), inplace=True)
        return _shuffle(left, right)


class BasicBlock(nn.Module):
    """Half of the channels passes untouched."""

    def __init__(self, channels: int):
        super().__init__()
        half = channels // 2
        add_numbered(self, conv(half, half, 1), conv(half, half, 3, groups=half), conv(half, half, 1))

    def forward(self, x: Tensor) -> Tensor:
        left, right = x.chunk(2, 1)
        right = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(right)), inplace=True)))
        right = F.relu(self.bn3(self.conv3(right)), inplace=True)
        return _shuffle(left, right)


class ShuffleNetV2(nn.Module):
    """Images (N, channels, H, W) -> logits; features: the pooled last map (N, 1024). As published, with a 1x1 stem."""

    def __init__(self, num_classes: int = 10, channels: int = 3):
        super().__init__()
        add_numbered(self, conv(channels, 24, 1))
        c_in = 24
        for i, (c_out, n) in enumerate(((116, 3), (232, 7), (464, 3))):
            blocks = [DownBlock(c_in, c_out)] + [BasicBlock(c_out) for _ in range(n)]
            self.add_module(f"layer{i + 1}", nn.Sequential(*blocks))
            c_in = c_out
        self.conv2 = conv(c_in, 1024, 1)
        self.bn2 = nn.BatchNorm2d(1024)
        self.linear = nn.Linear(1024, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)), inplace=True)
        x = self.layer3(self.layer2(self.layer1(x)))
        x = F.relu(self.bn2(self.conv2(x)), inplace=True)
        return self.linear(F.adaptive_avg_pool2d(x, 1).flatten(1))


register("shufflenetv2", ShuffleNetV2)
