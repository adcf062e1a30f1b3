"""Wide ResNets (Zagoruyko and Komodakis 2016): wrn40_2 -> wrn16_1, wrn40_1, wrn16_2.

The pairs of Fast-Datafree's CIFAR tables, as in CMI. Pre-activation blocks, no drop-out.
"""

import torch.nn.functional as F
from torch import nn

from .init import init_convs
from .registry import register


class Block(nn.Module):
    def __init__(self, c_in, c_out, stride):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(c_in)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, stride=stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(c_out)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1, bias=False)
        self.convShortcut = None
        if c_in != c_out:
            self.convShortcut = nn.Conv2d(c_in, c_out, 1, stride=stride, bias=False)

    def forward(self, x):
        y = F.relu(self.bn1(x), inplace=True)
        # A shortcut that changes the width starts from the activated input, others from the raw.
        shortcut = x if self.convShortcut is None else self.convShortcut(y)
        y = F.relu(self.bn2(self.conv1(y)), inplace=True)
        return self.conv2(y).add_(shortcut)


class Stage(nn.Module):
    """n blocks; the level between, `layer`, is there for the published parameter names."""

    def __init__(self, n, c_in, c_out, stride):
        super().__init__()
        rest = [Block(c_out, c_out, 1) for _ in range(n - 1)]
        self.layer = nn.Sequential(Block(c_in, c_out, stride), *rest)

    def forward(self, x):
        return self.layer(x)


class WideResNet(nn.Module):
    """Images (N, channels, H, W) -> logits; depth = 6 n + 4; features: the pooled last map."""

    def __init__(self, depth, widen, num_classes=10, channels=3):
        super().__init__()
        n = (depth - 4) // 6
        a, b, c = 16 * widen, 32 * widen, 64 * widen
        self.conv1 = nn.Conv2d(channels, 16, 3, padding=1, bias=False)
        self.block1 = Stage(n, 16, a, 1)
        self.block2 = Stage(n, a, b, 2)
        self.block3 = Stage(n, b, c, 2)
        self.bn1 = nn.BatchNorm2d(c)
        self.fc = nn.Linear(c, num_classes)
        init_convs(self)
        nn.init.zeros_(self.fc.bias)

    def forward(self, x, return_features=False):
        x = self.block3(self.block2(self.block1(self.conv1(x))))
        x = F.relu(self.bn1(x), inplace=True)
        features = F.adaptive_avg_pool2d(x, 1).flatten(1)
        logits = self.fc(features)
        return (logits, features) if return_features else logits


for depth, widen in ((16, 1), (16, 2), (40, 1), (40, 2)):
    register(f"wrn{depth}_{widen}", WideResNet, depth=depth, widen=widen)
