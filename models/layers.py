"""What several families of classifiers share: convolutions, their published names, their first weights."""

from torch import nn


def conv(c_in, c_out, kernel, stride=1, groups=1):
    """A convolution without bias; only its stride changes the size of the map."""
    return nn.Conv2d(c_in, c_out, kernel, stride=stride, padding=kernel // 2, groups=groups, bias=False)


def add_numbered(module, *convs):
    """Give `module` these convolutions as conv1, conv2 ..., and to each its batch norm: bn1, bn2 ..."""
    for i, layer in enumerate(convs, 1):
        module.add_module(f"conv{i}", layer)
        module.add_module(f"bn{i}", nn.BatchNorm2d(layer.out_channels))


def init_convs(module):
    """Fill every convolution as He et al. 2015 do, by outgoing connections; biases are zero."""
    for m in module.modules():
        if isinstance(m, nn.Conv2d):
            nn.init.kaiming_normal_(m.weight, mode="fan_out", nonlinearity="relu")
            if m.bias is not None:
                nn.init.zeros_(m.bias)
