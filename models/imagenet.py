"""torchvision's networks for large images, for any number of input channels.

ResNets (He et al. 2016) serve DFAD's Caltech101 rows (34 -> 18) and Fast-Datafree's ImageNet table (teacher 50),
MobileNetV2 (Sandler et al. 2018) is a student of the latter.
"""

import torchvision.models.resnet as tv
from torch import Tensor, nn
from torchvision.models import mobilenetv2

from .layers import init_weights
from .registry import register


def with_channels(conv: nn.Conv2d, channels: int) -> nn.Conv2d:
    """`conv` itself, or one like it, without a bias, for another number of input channels than torchvision's 3."""
    if conv.in_channels == channels:
        return conv
    conv = nn.Conv2d(channels, conv.out_channels, conv.kernel_size, conv.stride, conv.padding, bias=False)
    init_weights(conv)
    return conv


class ImageNetResNet(tv.ResNet):
    """torchvision's ResNet, parameter names included: images (N, channels, H, W) -> logits."""

    def __init__(self, block: type[nn.Module], depths: tuple[int, ...], num_classes: int = 10, channels: int = 3):
        super().__init__(block, list(depths), num_classes=num_classes)
        self.conv1 = with_channels(self.conv1, channels)


class MobileNetV2(mobilenetv2.MobileNetV2):
    """torchvision's network and names: images (N, channels, H, W) -> logits; strides total 32.

    Features (N, 1280) are the pooled last map before drop-out, the same in training; the published network has none.
    """

    features_enter = "classifier"

    def __init__(self, num_classes: int = 10, channels: int = 3):
        super().__init__(num_classes=num_classes)
        self.features[0][0] = with_channels(self.features[0][0], channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x).mean((2, 3)))


register("resnet18_imagenet", ImageNetResNet, block=tv.BasicBlock, depths=(2, 2, 2, 2))
register("resnet34_imagenet", ImageNetResNet, block=tv.BasicBlock, depths=(3, 4, 6, 3))
register("resnet50_imagenet", ImageNetResNet, block=tv.Bottleneck, depths=(3, 4, 6, 3))
register("mobilenetv2", MobileNetV2)
