"""VGG (Simonyan and Zisserman 2015) with batch norm and one linear layer, for small images.

vgg11 -> resnet18 are rows of Fast-Datafree's CIFAR tables; the other depths come from its registry.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from .layers import init_weights
from .registry import register

WIDTHS = (64, 128, 256, 512, 512)


def _block(c_in: int, c_out: int, n: int) -> nn.Sequential:
    layers = []
    for i in range(n):
        layers += [nn.Conv2d(c_out if i else c_in, c_out, 3, padding=1), nn.BatchNorm2d(c_out), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers)


class VGG(nn.Module):
    """Images (N, channels, H, W) -> logits; features: the pooled last map (N, 512); `depths`: convolutions a block."""

    def __init__(self, depths: tuple[int, ...], num_classes: int = 10, channels: int = 3):
        super().__init__()
        for i, (n, width) in enumerate(zip(depths, WIDTHS, strict=True)):
            self.add_module(f"block{i}", _block(WIDTHS[i - 1] if i else channels, width, n))
        self.classifier = nn.Linear(WIDTHS[-1], num_classes)
        init_weights(self)
        nn.init.normal_(self.classifier.weight, std=0.01)
        nn.init.zeros_(self.classifier.bias)

    def forward(self, x: Tensor) -> Tensor:
        # As published, the fourth pool is for 64-pixel images alone.
        last_pool = x.shape[2] == 64
        x = F.max_pool2d(self.block0(x), 2)
        x = F.max_pool2d(self.block1(x), 2)
        x = self.block3(F.max_pool2d(self.block2(x), 2))
        x = self.block4(F.max_pool2d(x, 2) if last_pool else x)
        return self.classifier(F.adaptive_avg_pool2d(x, 1).flatten(1))


register("vgg8", VGG, depths=(1, 1, 1, 1, 1))
register("vgg11", VGG, depths=(1, 1, 2, 2, 2))
register("vgg13", VGG, depths=(2, 2, 2, 2, 2))
register("vgg16", VGG, depths=(2, 2, 3, 3, 3))
register("vgg19", VGG, depths=(2, 2, 4, 4, 4))
