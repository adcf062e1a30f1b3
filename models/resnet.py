"""ResNets (He et al. 2016) with the stem for 32-pixel images, and torchvision's for large ones.

resnet34 -> resnet18 is the CIFAR pair of DAFL, DFND, DFAD and Fast-Datafree (resnet34_8x there in
DFAD); the torchvision ones serve DFAD's Caltech101 rows (34 -> 18) and Fast-Datafree's ImageNet
table (teacher 50).
"""

import torch.nn.functional as F
import torchvision.models.resnet as tv
from torch import nn

from .init import with_channels
from .registry import register


def _conv(c_in, c_out, kernel, stride=1):
    return nn.Conv2d(c_in, c_out, kernel, stride=stride, padding=kernel // 2, bias=False)


def _shortcut(c_in, c_out, stride):
    if stride == 1 and c_in == c_out:
        return nn.Sequential()
    return nn.Sequential(_conv(c_in, c_out, 1, stride), nn.BatchNorm2d(c_out))


class BasicBlock(nn.Module):
    expansion = 1

    def __init__(self, c_in, width, stride):
        super().__init__()
        self.conv1 = _conv(c_in, width, 3, stride)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = _conv(width, width, 3)
        self.bn2 = nn.BatchNorm2d(width)
        self.shortcut = _shortcut(c_in, width, stride)

    def forward(self, x):
        y = F.relu(self.bn1(self.conv1(x)), inplace=True)
        return F.relu(self.bn2(self.conv2(y)).add_(self.shortcut(x)), inplace=True)


class Bottleneck(nn.Module):
    expansion = 4

    def __init__(self, c_in, width, stride):
        super().__init__()
        c_out = width * self.expansion
        self.conv1 = _conv(c_in, width, 1)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = _conv(width, width, 3, stride)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = _conv(width, c_out, 1)
        self.bn3 = nn.BatchNorm2d(c_out)
        self.shortcut = _shortcut(c_in, c_out, stride)

    def forward(self, x):
        y = F.relu(self.bn1(self.conv1(x)), inplace=True)
        y = F.relu(self.bn2(self.conv2(y)), inplace=True)
        return F.relu(self.bn3(self.conv3(y)).add_(self.shortcut(x)), inplace=True)


class ResNet(nn.Module):
    """Images (N, channels, H, W) -> logits (N, num_classes); features: the pooled last map.

    Pooling covers the whole map; where the published code has a fixed 4x4 window, that is the
    same for 32-pixel images.
    """

    def __init__(self, block, depths, num_classes=10, channels=3):
        super().__init__()
        self.conv1 = _conv(channels, 64, 3)
        self.bn1 = nn.BatchNorm2d(64)
        c_in = 64
        for i, depth in enumerate(depths):
            width = 64 * 2**i
            blocks = []
            for j in range(depth):
                blocks.append(block(c_in, width, stride=2 if i and not j else 1))
                c_in = width * block.expansion
            self.add_module(f"layer{i + 1}", nn.Sequential(*blocks))
        self.linear = nn.Linear(c_in, num_classes)

    def forward(self, x, return_features=False):
        x = F.relu(self.bn1(self.conv1(x)), inplace=True)
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        features = F.adaptive_avg_pool2d(x, 1).flatten(1)
        logits = self.linear(features)
        return (logits, features) if return_features else logits


class ImageNetResNet(tv.ResNet):
    """torchvision's ResNet, parameter names included: images (N, channels, H, W) -> logits."""

    def __init__(self, block, depths, num_classes=10, channels=3):
        super().__init__(block, list(depths), num_classes=num_classes)
        self.conv1 = with_channels(self.conv1, channels)

    def forward(self, x, return_features=False):
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        features = self.avgpool(x).flatten(1)
        logits = self.fc(features)
        return (logits, features) if return_features else logits


register("resnet18", ResNet, block=BasicBlock, depths=(2, 2, 2, 2))
register("resnet34", ResNet, block=BasicBlock, depths=(3, 4, 6, 3))
register("resnet50", ResNet, block=Bottleneck, depths=(3, 4, 6, 3))
register("resnet18_imagenet", ImageNetResNet, block=tv.BasicBlock, depths=(2, 2, 2, 2))
register("resnet34_imagenet", ImageNetResNet, block=tv.BasicBlock, depths=(3, 4, 6, 3))
register("resnet50_imagenet", ImageNetResNet, block=tv.Bottleneck, depths=(3, 4, 6, 3))
