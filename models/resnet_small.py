"""The narrow CIFAR ResNets of He et al. 2016, section 4.2: resnet8 to resnet110, and 4x wider ones.

Offered by Fast-Datafree's registry; no table row needs them.
"""

from itertools import pairwise

import torch.nn.functional as F
from torch import nn

from .init import init_convs
from .registry import register


class BasicBlock(nn.Module):
    def __init__(self, c_in, c_out, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(c_in, c_out, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(c_out)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(c_out)
        self.downsample = nn.Sequential()
        if stride != 1 or c_in != c_out:
            self.downsample = nn.Sequential(nn.Conv2d(c_in, c_out, 1, stride=stride, bias=False), nn.BatchNorm2d(c_out))

    def forward(self, x):
        y = F.relu(self.bn1(self.conv1(x)), inplace=True)
        return F.relu(self.bn2(self.conv2(y)).add_(self.downsample(x)), inplace=True)


class SmallResNet(nn.Module):
    """Images (N, channels, H, W) -> logits; depth = 6 n + 2; features: the pooled last map."""

    def __init__(self, depth, widths=(16, 16, 32, 64), num_classes=10, channels=3):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, widths[0], 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(widths[0])
        for i, (before, after) in enumerate(pairwise(widths)):
            blocks = [BasicBlock(before, after, stride=2 if i else 1)]
            blocks += [BasicBlock(after, after, stride=1) for _ in range((depth - 2) // 6 - 1)]
            self.add_module(f"layer{i + 1}", nn.Sequential(*blocks))
        self.fc = nn.Linear(widths[-1], num_classes)
        init_convs(self)

    def forward(self, x, return_features=False):
        x = F.relu(self.bn1(self.conv1(x)), inplace=True)
        x = self.layer3(self.layer2(self.layer1(x)))
        features = F.adaptive_avg_pool2d(x, 1).flatten(1)
        logits = self.fc(features)
        return (logits, features) if return_features else logits


for depth in (8, 20, 32, 56, 110):
    register(f"resnet{depth}", SmallResNet, depth=depth)
for depth in (8, 32):
    register(f"resnet{depth}x4", SmallResNet, depth=depth, widths=(32, 64, 128, 256))
