"""A network of one's own: the ResNet-20 of He et al. (2016), section 4.2, with parameter-free shortcuts ("option A").

    python datafree_kd.py --dataset cifar10 --teacher examples/resnet20_option_a.py:resnet20 --teacher_ckpt FILE

Nothing here knows of these scripts. They call the function, with the number of classes, load the file's weights under
the names below and find what else they need by looking at the layers that run.
"""

import torch
import torch.nn.functional as F
from torch import nn


class Block(nn.Module):
    """Two 3x3 convolutions beside a shortcut, which skips every second pixel and fills new channels with zeros."""

    def __init__(self, c_in: int, c_out: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(c_in, c_out, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(c_out)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(c_out)
        self.stride, self.fill = stride, (c_out - c_in) // 2

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        x = x[:, :, :: self.stride, :: self.stride]
        return F.relu(y + F.pad(x, (0, 0, 0, 0, self.fill, self.fill)))


class ResNet(nn.Module):
    """Images (N, 3, H, W) -> logits (N, num_classes); three stages of n blocks, 6 n + 2 layers."""

    def __init__(self, n: int, num_classes: int):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        widths = (16, 16, 32, 64)
        for i in (1, 2, 3):
            first = Block(widths[i - 1], widths[i], stride=1 if i == 1 else 2)
            self.add_module(f"layer{i}", nn.Sequential(first, *(Block(widths[i], widths[i], 1) for _ in range(n - 1))))
        self.linear = nn.Linear(64, num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(x.mean((2, 3)))


def resnet20(num_classes: int = 10) -> nn.Module:
    """The network of 20 layers, 269,722 parameters for ten classes."""
    return ResNet(3, num_classes)
