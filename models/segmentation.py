"""DFAD's segmentation networks, by its names of the parameters.

DeepLabv3 (Chen et al. 2017) as on CamVid and NYUv2 (Table 3); SegNet (Badrinarayanan et al. 2017) with VGG encoders is
what its teacher script offers besides.
"""

from collections import OrderedDict
from itertools import pairwise

import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models import resnet50
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.models.segmentation.deeplabv3 import DeepLabHead

from .layers import init_weights
from .registry import SEGMENTERS, register

ATROUS_RATES = (12, 24, 32)  # as published; the usual third rate is 36

# Of MobileNetv2: expansion, width, blocks, stride.
STAGES = (1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1)


class DeepLabv3(nn.Module):
    """Images (N, 3, H, W) -> logits (N, classes, H, W): a backbone to an eighth of the size, ASPP, upsampling."""

    def __init__(self, backbone: nn.Module, width: int, num_classes: int):
        super().__init__()
        self.backbone = backbone
        self.classifier = DeepLabHead(width, num_classes, ATROUS_RATES)

    def forward(self, x: Tensor) -> Tensor:
        logits = self.classifier(self.backbone(x)["out"])
        return F.interpolate(logits, size=x.shape[-2:], mode="bilinear", align_corners=False)


def deeplabv3_resnet50(num_classes: int = 11) -> DeepLabv3:
    """The teacher: torchvision's ResNet-50, its last two stages dilated."""
    resnet = resnet50(weights=None, replace_stride_with_dilation=[False, True, True])
    return DeepLabv3(IntermediateLayerGetter(resnet, {"layer4": "out"}), 2048, num_classes)


def deeplabv3_mobilenet(num_classes: int = 11) -> DeepLabv3:
    """The student: MobileNetv2."""
    return DeepLabv3(MobileNetv2Backbone(), 320, num_classes)


class MobileNetv2Backbone(nn.Module):
    """MobileNetv2 (Sandler et al. 2018) without its last layer, at an eighth of the size.

    Where a stage would shrink the map further, those behind it are dilated; as published, that stage itself is not.
    """

    def __init__(self):
        super().__init__()
        layers = [_conv_bn(3, 32, 3, stride=2, padding=1)]
        width, size, dilation = 32, 2, 1
        for expansion, c_out, n, stride in STAGES:
            shrink = stride if size < 8 else 1
            for i in range(n):
                layers.append(InvertedResidual(width, c_out, expansion, shrink if i == 0 else 1, dilation))
                width = c_out
            size *= shrink
            dilation *= stride // shrink
        self.features = nn.Sequential(*layers)
        init_weights(self, nn.init.kaiming_normal_)  # as published; of its inputs

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"out": self.features(x)}


class InvertedResidual(nn.Module):
    """Expansion, depthwise 3x3, projection. As published, padding comes first: BatchNorm's bias reaches the border."""

    def __init__(self, c_in: int, c_out: int, expansion: int, stride: int, dilation: int):
        super().__init__()
        width = c_in * expansion
        self.padding, self.residual = dilation, stride == 1 and c_in == c_out
        self.conv = nn.Sequential(
            *(_conv_bn(c_in, width, 1) if expansion > 1 else ()),
            *_conv_bn(width, width, 3, stride=stride, dilation=dilation, groups=width),
            nn.Conv2d(width, c_out, 1, bias=False),
            nn.BatchNorm2d(c_out),
        )

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(F.pad(x, (self.padding,) * 4))
        return x + y if self.residual else y


def _conv_bn(c_in: int, c_out: int, kernel: int, **settings: int) -> nn.Sequential:
    conv = nn.Conv2d(c_in, c_out, kernel, bias=False, **settings)
    return nn.Sequential(conv, nn.BatchNorm2d(c_out), nn.ReLU6(inplace=True))


class SegNet(nn.Module):
    """Images (N, 3, H, W) -> logits (N, classes, H, W); `depths`: convolutions of the five stages.

    The decoder unpools to the places that the encoder's max pooling came from. As published, BatchNorm and ReLU follow
    the last convolution, too: logits are never negative.
    """

    def __init__(self, depths: tuple[int, ...], num_classes: int = 11):
        super().__init__()
        widths = (3, 64, 128, 256, 512, 512)
        for i, n in enumerate(depths, 1):
            self.add_module(f"down{i}", _stage([widths[i - 1]] + [widths[i]] * n))
        for i, n in reversed(tuple(enumerate(depths, 1))):
            self.add_module(f"up{i}", _stage([widths[i]] * n + [widths[i - 1] if i > 1 else num_classes]))

    def forward(self, x: Tensor) -> Tensor:
        places = []
        for i in range(1, 6):
            before = getattr(self, f"down{i}")(x)
            x, indices = F.max_pool2d(before, 2, return_indices=True)
            places.append((indices, before.shape[-2:]))
        for i in range(5, 0, -1):
            indices, size = places.pop()
            x = getattr(self, f"up{i}")(F.max_unpool2d(x, indices, 2, output_size=size))
        return x


def _stage(widths: list[int]) -> nn.Sequential:
    """Convolutions (with BatchNorm and ReLU) of the given widths, first to last, by their published names."""
    stage = nn.Sequential()
    for i, (before, after) in enumerate(pairwise(widths), 1):
        unit = nn.Sequential(nn.Conv2d(before, after, 3, padding=1), nn.BatchNorm2d(after), nn.ReLU(inplace=True))
        stage.add_module(f"conv{i}", nn.Sequential(OrderedDict(cbr_unit=unit)))
    return stage


register("deeplabv3_resnet50", deeplabv3_resnet50, SEGMENTERS)
register("deeplabv3_mobilenet", deeplabv3_mobilenet, SEGMENTERS)
register("segnet_vgg13", SegNet, SEGMENTERS, depths=(2, 2, 2, 2, 2))
register("segnet_vgg16", SegNet, SEGMENTERS, depths=(2, 2, 3, 3, 3))
register("segnet_vgg19", SegNet, SEGMENTERS, depths=(2, 2, 4, 4, 4))
