"""Initial weights that the CIFAR families of wide and small ResNets and VGG share."""

from torch import nn


def init_convs(module):
    """Fill every convolution as He et al. 2015 do, by outgoing connections; biases are zero."""
    for m in module.modules():
        if isinstance(m, nn.Conv2d):
            nn.init.kaiming_normal_(m.weight, mode="fan_out", nonlinearity="relu")
            if m.bias is not None:
                nn.init.zeros_(m.bias)


def with_channels(conv, channels):
    """`conv` itself, or one like it for another number of input channels.

    For the networks that come from torchvision, which knows only colour images. Without a bias.
    """
    if conv.in_channels == channels:
        return conv
    conv = nn.Conv2d(channels, conv.out_channels, conv.kernel_size, conv.stride, conv.padding, bias=False)
    init_convs(conv)
    return conv
