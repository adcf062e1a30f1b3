"""DeepLabv3 (Chen et al. 2017) as DFAD uses it on CamVid and NYUv2 (Table 3), by its names of the parameters."""

import torch.nn.functional as F
from torch import nn
from torchvision.models import resnet50
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.models.segmentation.deeplabv3 import DeepLabHead

from .registry import SEGMENTERS, register

ATROUS_RATES = (12, 24, 32)  # as published; the usual third rate is 36

# Of MobileNetv2: expansion, width, blocks, stride.
STAGES = (1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1)


class DeepLabv3(nn.Module):
    """Images (N, 3, H, W) -> logits (N, classes, H, W): a backbone to an eighth of the size, ASPP, upsampling."""

    def __init__(self, backbone, width, num_classes):
        super().__init__()
        self.backbone = backbone
        self.classifier = DeepLabHead(width, num_classes, ATROUS_RATES)

    def forward(self, x):
        logits = self.classifier(self.backbone(x)["out"])
        return F.interpolate(logits, size=x.shape[-2:], mode="bilinear", align_corners=False)


def deeplabv3_resnet50(num_classes=11):
    """The teacher: torchvision's ResNet-50, its last two stages dilated."""
    resnet = resnet50(weights=None, replace_stride_with_dilation=[False, True, True])
    return DeepLabv3(IntermediateLayerGetter(resnet, {"layer4": "out"}), 2048, num_classes)


def deeplabv3_mobilenet(num_classes=11):
    """The student: MobileNetv2."""
    return DeepLabv3(MobileNetv2Backbone(), 320, num_classes)


class MobileNetv2Backbone(nn.Module):
    """MobileNetv2 (Sandler et al. 2018) without its last layer, at an eighth of the size.

    Where a stage would shrink the map further, the stages behind it are dilated instead; as
    published, the shrinking stage itself is not.
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

    def forward(self, x):
        return {"out": self.features(x)}


class InvertedResidual(nn.Module):
    """Expansion, depthwise 3x3, projection. As published, zeros are padded before the expansion,
    so that BatchNorm's bias reaches the border."""

    def __init__(self, c_in, c_out, expansion, stride, dilation):
        super().__init__()
        width = c_in * expansion
        self.padding, self.residual = dilation, stride == 1 and c_in == c_out
        self.conv = nn.Sequential(
            *(_conv_bn(c_in, width, 1) if expansion > 1 else ()),
            *_conv_bn(width, width, 3, stride=stride, dilation=dilation, groups=width),
            nn.Conv2d(width, c_out, 1, bias=False),
            nn.BatchNorm2d(c_out),
        )

    def forward(self, x):
        y = self.conv(F.pad(x, (self.padding,) * 4))
        return x + y if self.residual else y


def _conv_bn(c_in, c_out, kernel, **settings):
    conv = nn.Conv2d(c_in, c_out, kernel, bias=False, **settings)
    return nn.Sequential(conv, nn.BatchNorm2d(c_out), nn.ReLU6(inplace=True))


register("deeplabv3_resnet50", deeplabv3_resnet50, SEGMENTERS)
register("deeplabv3_mobilenet", deeplabv3_mobilenet, SEGMENTERS)
