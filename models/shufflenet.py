"""ShuffleNetV2 1x (Ma et al. 2018) for 32-pixel images, from Fast-Datafree's registry."""

import torch
import torch.nn.functional as F
from torch import nn

from .registry import register


def _depthwise(channels, stride):
    return nn.Conv2d(channels, channels, 3, stride=stride, padding=1, groups=channels, bias=False)


def _pointwise(c_in, c_out):
    return nn.Conv2d(c_in, c_out, 1, bias=False)


def _shuffle(left, right):
    """Join two halves so that their channels alternate."""
    return torch.stack((left, right), 2).flatten(1, 2)


class DownBlock(nn.Module):
    """Halves the map; both branches see the whole input."""

    def __init__(self, c_in, c_out):
        super().__init__()
        half = c_out // 2
        self.conv1 = _depthwise(c_in, 2)
        self.bn1 = nn.BatchNorm2d(c_in)
        self.conv2 = _pointwise(c_in, half)
        self.bn2 = nn.BatchNorm2d(half)
        self.conv3 = _pointwise(c_in, half)
        self.bn3 = nn.BatchNorm2d(half)
        self.conv4 = _depthwise(half, 2)
        self.bn4 = nn.BatchNorm2d(half)
        self.conv5 = _pointwise(half, half)
        self.bn5 = nn.BatchNorm2d(half)

    def forward(self, x):
        left = self.bn1(self.conv1(x))
        left = F.relu(self.bn2(self.conv2(left)), inplace=True)
        right = F.relu(self.bn3(self.conv3(x)), inplace=True)
        right = self.bn4(self.conv4(right))
        right = F.relu(self.bn5(self.conv5(right)), inplace=True)
        return _shuffle(left, right)


class BasicBlock(nn.Module):
    """Half of the channels passes untouched."""

    def __init__(self, channels):
        super().__init__()
        half = channels // 2
        self.conv1 = _pointwise(half, half)
        self.bn1 = nn.BatchNorm2d(half)
        self.conv2 = _depthwise(half, 1)
        self.bn2 = nn.BatchNorm2d(half)
        self.conv3 = _pointwise(half, half)
        self.bn3 = nn.BatchNorm2d(half)

    def forward(self, x):
        left, right = x.chunk(2, 1)
        right = F.relu(self.bn1(self.conv1(right)), inplace=True)
        right = self.bn2(self.conv2(right))
        right = F.relu(self.bn3(self.conv3(right)), inplace=True)
        return _shuffle(left, right)


class ShuffleNetV2(nn.Module):
    """Images (N, channels, H, W) -> logits; features: the pooled last map (N, 1024).

    As published for CIFAR: a 1x1 stem without stride, three stages that halve the map.
    """

    def __init__(self, num_classes=10, channels=3):
        super().__init__()
        self.conv1 = _pointwise(channels, 24)
        self.bn1 = nn.BatchNorm2d(24)
        c_in = 24
        for i, (c_out, n) in enumerate(((116, 3), (232, 7), (464, 3))):
            blocks = [DownBlock(c_in, c_out)] + [BasicBlock(c_out) for _ in range(n)]
            self.add_module(f"layer{i + 1}", nn.Sequential(*blocks))
            c_in = c_out
        self.conv2 = _pointwise(c_in, 1024)
        self.bn2 = nn.BatchNorm2d(1024)
        self.linear = nn.Linear(1024, num_classes)

    def forward(self, x, return_features=False):
        x = F.relu(self.bn1(self.conv1(x)), inplace=True)
        x = self.layer3(self.layer2(self.layer1(x)))
        x = F.relu(self.bn2(self.conv2(x)), inplace=True)
        features = F.adaptive_avg_pool2d(x, 1).flatten(1)
        logits = self.linear(features)
        return (logits, features) if return_features else logits


register("shufflenetv2", ShuffleNetV2)
