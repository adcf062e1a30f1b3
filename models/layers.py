"""What several families share: convolutions, their published names, first weights."""

from collections.abc import Callable
from functools import partial

from torch import Tensor, nn

HE = partial(nn.init.kaiming_normal_, mode="fan_out", nonlinearity="relu")  # He et al. 2015, by outgoing connections


def conv(c_in: int, c_out: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    """A convolution without bias; only its stride changes the size of the map."""
    return nn.Conv2d(c_in, c_out, kernel, stride=stride, padding=kernel // 2, groups=groups, bias=False)


def add_numbered(module: nn.Module, *convs: nn.Conv2d) -> None:
    """Give `module` these convolutions as conv1, conv2 ..., and to each its batch norm: bn1, bn2 ..."""
    for i, layer in enumerate(convs, 1):
        module.add_module(f"conv{i}", layer)
        module.add_module(f"bn{i}", nn.BatchNorm2d(layer.out_channels))


def init_weights(module: nn.Module, fill: Callable[[Tensor], Tensor] = HE, kinds: type | tuple = nn.Conv2d) -> None:
    """Let `fill` draw the weights of all layers of these kinds; their biases are zero."""
    for m in module.modules():
        if isinstance(m, kinds):
            fill(m.weight)
            if m.bias is not None:
                nn.init.zeros_(m.bias)
