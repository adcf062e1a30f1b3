"""Wide ResNets (Zagoruyko and Komodakis 2016), without drop-out: of Fast-Datafree's CIFAR tables."""

from collections import OrderedDict

import torch.nn.functional as F
from torch import Tensor, nn

from .layers import conv, init_weights
from .registry import register


class Block(nn.Module):
    def __init__(self, c_in: int, c_out: int, stride: int):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(c_in)
        self.conv1 = conv(c_in, c_out, 3, stride)
        self.bn2 = nn.BatchNorm2d(c_out)
        self.conv2 = conv(c_out, c_out, 3)
        self.convShortcut = None if c_in == c_out else conv(c_in, c_out, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(x), inplace=True)
        # A shortcut that changes the width starts from the activated input, others from the raw.
        shortcut = x if self.convShortcut is None else self.convShortcut(y)
        y = F.relu(self.bn2(self.conv1(y)), inplace=True)
        return self.conv2(y).add_(shortcut)


def _stage(n: int, c_in: int, c_out: int, stride: int) -> nn.Sequential:
    """n blocks; the level between, `layer`, is there for the published parameter names."""
    blocks = [Block(c_in, c_out, stride), *(Block(c_out, c_out, 1) for _ in range(n - 1))]
    return nn.Sequential(OrderedDict(layer=nn.Sequential(*blocks)))


class WideResNet(nn.Module):
    """Images (N, channels, H, W) -> logits; depth = 6 n + 4; features: the pooled last map."""

    def __init__(self, depth: int, widen: int, num_classes: int = 10, channels: int = 3):
        super().__init__()
        n, (a, b, c) = (depth - 4) // 6, (16 * widen, 32 * widen, 64 * widen)
        self.conv1 = conv(channels, 16, 3)
        self.block1 = _stage(n, 16, a, 1)
        self.block2 = _stage(n, a, b, 2)
        self.block3 = _stage(n, b, c, 2)
        self.bn1 = nn.BatchNorm2d(c)
        self.fc = nn.Linear(c, num_classes)
        init_weights(self)
        nn.init.zeros_(self.fc.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = self.block3(self.block2(self.block1(self.conv1(x))))
        x = F.relu(self.bn1(x), inplace=True)
        return self.fc(F.adaptive_avg_pool2d(x, 1).flatten(1))


for depth, widen in ((16, 1), (16, 2), (40, 1), (40, 2)):
    register(f"wrn{depth}_{widen}", WideResNet, depth=depth, widen=widen)
