"""HintonNet, the multi-layer perceptrons of DAFL's Table 1 (MNIST, 2x1200 -> 2x800).

After Hinton et al. 2015, Distilling the Knowledge in a Neural Network, section 3.
"""

import torch.nn.functional as F
from torch import nn

from .registry import register


class HintonNet(nn.Module):
    """Images (N, channels, 28, 28) -> logits (N, num_classes); features are (N, width)."""

    input_size = 28

    def __init__(self, num_classes=10, channels=1, width=1200):
        super().__init__()
        self.fc1 = nn.Linear(channels * 28 * 28, width)
        self.fc2 = nn.Linear(width, width)
        self.fc3 = nn.Linear(width, num_classes)

    def forward(self, x, return_features=False):
        features = F.relu(self.fc2(F.relu(self.fc1(x.flatten(1)))))
        logits = self.fc3(features)
        return (logits, features) if return_features else logits


register("hintonnet", HintonNet)
register("hintonnet_half", HintonNet, width=800)
