"""AlexNet and AlexNet-half, DAFL's CelebA pair (2 classes, 224-pixel images).

Layers and parameter names of torchvision's AlexNet (Krizhevsky 2014, One weird trick), whose class has fixed widths;
the half has half of each.
"""

from torch import Tensor, nn

from .registry import register


class AlexNet(nn.Module):
    """Images (N, channels, S, S), S >= 63 -> logits; features are (N, 4096), half: (N, 2048)."""

    def __init__(self, num_classes: int = 10, channels: int = 3, divide: int = 1):
        super().__init__()
        a, b, c, d, hidden = (w // divide for w in (64, 192, 384, 256, 4096))
        self.features = nn.Sequential(
            nn.Conv2d(channels, a, 11, stride=4, padding=2), nn.ReLU(inplace=True), nn.MaxPool2d(3, stride=2),
            nn.Conv2d(a, b, 5, padding=2), nn.ReLU(inplace=True), nn.MaxPool2d(3, stride=2),
            nn.Conv2d(b, c, 3, padding=1), nn.ReLU(inplace=True),
            nn.Conv2d(c, d, 3, padding=1), nn.ReLU(inplace=True),
            nn.Conv2d(d, d, 3, padding=1), nn.ReLU(inplace=True), nn.MaxPool2d(3, stride=2),
        )  # fmt: skip
        self.avgpool = nn.AdaptiveAvgPool2d(6)
        self.classifier = nn.Sequential(
            nn.Dropout(), nn.Linear(d * 6 * 6, hidden), nn.ReLU(inplace=True),
            nn.Dropout(), nn.Linear(hidden, hidden), nn.ReLU(inplace=True), nn.Linear(hidden, num_classes),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.avgpool(self.features(x)).flatten(1))


register("alexnet", AlexNet)
register("alexnet_half", AlexNet, divide=2)
