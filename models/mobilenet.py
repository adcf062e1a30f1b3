"""MobileNetV2 (Sandler et al. 2018), a student of Fast-Datafree's ImageNet table."""

from torchvision.models.mobilenetv2 import MobileNetV2 as TorchvisionMobileNetV2

from .init import with_channels
from .registry import register


class MobileNetV2(TorchvisionMobileNetV2):
    """torchvision's network and names: images (N, channels, H, W) -> logits; strides total 32.

    Features (N, 1280) are the pooled last map before drop-out, so they are the same in training.
    The published network returns none.
    """

    def __init__(self, num_classes=10, channels=3):
        super().__init__(num_classes=num_classes)
        self.features[0][0] = with_channels(self.features[0][0], channels)

    def forward(self, x, return_features=False):
        features = self.features(x).mean((2, 3))
        logits = self.classifier(features)
        return (logits, features) if return_features else logits


register("mobilenetv2", MobileNetV2)
