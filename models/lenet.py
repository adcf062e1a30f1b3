"""The MNIST pairs: LeNet-5 and its half (DAFL, DFAD, DFND), HintonNet 2x1200 -> 2x800 (Table 1 of DAFL).

LeNet-5 after LeCun et al. 1998, with ReLU and max pooling; the half has half of every width. HintonNet after Hinton
et al. 2015, Distilling the Knowledge in a Neural Network, section 3.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from .registry import register

# Fast-Datafree names the same five layers differently; its checkpoints load as well.
PUBLISHED_NAMES = {
    "features.0.": "conv1.", "features.3.": "conv2.", "features.6.": "conv3.", "fc.0.": "fc1.", "fc.2.": "fc2.",
}  # fmt: skip


class LeNet5(nn.Module):
    """Images (N, channels, 32, 32) -> logits (N, num_classes); features are (N, widths[2])."""

    input_size = 32
    features_enter = "fc1"  # as DAFL has it: the end of the convolutions

    def __init__(self, num_classes: int = 10, channels: int = 1, widths: tuple[int, ...] = (6, 16, 120, 84)):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, widths[0], 5)
        self.conv2 = nn.Conv2d(widths[0], widths[1], 5)
        self.conv3 = nn.Conv2d(widths[1], widths[2], 5)
        self.fc1 = nn.Linear(widths[2], widths[3])
        self.fc2 = nn.Linear(widths[3], num_classes)
        self.register_load_state_dict_pre_hook(_rename_published)

    def forward(self, x: Tensor) -> Tensor:
        # Pooling first is the same, with a quarter of the ReLU's work.
        x = F.relu(F.max_pool2d(self.conv1(x), 2))
        x = F.relu(F.max_pool2d(self.conv2(x), 2))
        x = F.relu(self.conv3(x)).flatten(1)
        return self.fc2(F.relu(self.fc1(x)))


def _rename_published(module: nn.Module, state_dict: dict[str, Tensor], prefix: str, *_) -> None:
    for published, name in PUBLISHED_NAMES.items():
        for kind in ("weight", "bias"):
            old = prefix + published + kind
            if old in state_dict:
                state_dict[prefix + name + kind] = state_dict.pop(old)


class HintonNet(nn.Module):
    """Images (N, channels, 28, 28) -> logits (N, num_classes); features are (N, width)."""

    input_size = 28

    def __init__(self, num_classes: int = 10, channels: int = 1, width: int = 1200):
        super().__init__()
        self.fc1 = nn.Linear(channels * 28 * 28, width)
        self.fc2 = nn.Linear(width, width)
        self.fc3 = nn.Linear(width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc3(F.relu(self.fc2(F.relu(self.fc1(x.flatten(1))))))


register("lenet5", LeNet5)
register("lenet5_half", LeNet5, widths=(3, 8, 60, 42))
register("hintonnet", HintonNet)
register("hintonnet_half", HintonNet, width=800)
