"""Networks by name: `get_model`, `get_generator` and `get_segmenter`.

A classifier maps images to logits: `model(x)`, or `model(x, return_features=True)` for the pair
(logits, features), where features (N, D) is what the last linear layer sees. A segmentation
network (`get_segmenter`) maps images (N, 3, H, W) to logits (N, classes, H, W).
"""

from difflib import get_close_matches
from functools import partial

from torch import nn

from .alexnet import alexnet, alexnet_half
from .deeplab import deeplabv3_mobilenet, deeplabv3_resnet50
from .generator import DeepGenerator, FastGenerator, GeneratorA, GeneratorB, UpsampleConv2d, set_folded
from .lenet import lenet5, lenet5_half
from .mlp import hintonnet, hintonnet_half
from .mobilenet import mobilenetv2
from .resnet import resnet18, resnet18_imagenet, resnet34, resnet34_imagenet, resnet50, resnet50_imagenet
from .resnet_small import resnet8, resnet8x4, resnet20, resnet32, resnet32x4, resnet56, resnet110
from .segnet import segnet_vgg13, segnet_vgg16, segnet_vgg19
from .shufflenet import shufflenetv2
from .vgg import vgg8, vgg11, vgg13, vgg16, vgg19
from .wresnet import wrn16_1, wrn16_2, wrn40_1, wrn40_2

__all__ = [
    "GENERATORS",
    "MODELS",
    "SEGMENTERS",
    "UpsampleConv2d",
    "agree_on_size",
    "get_generator",
    "get_model",
    "get_segmenter",
    "input_size",
    "set_folded",
]

MODELS = {
    "lenet5": lenet5,
    "lenet5_half": lenet5_half,
    "hintonnet": hintonnet,
    "hintonnet_half": hintonnet_half,
    "alexnet": alexnet,
    "alexnet_half": alexnet_half,
    "resnet18": resnet18,
    "resnet34": resnet34,
    "resnet50": resnet50,
    "resnet18_imagenet": resnet18_imagenet,
    "resnet34_imagenet": resnet34_imagenet,
    "resnet50_imagenet": resnet50_imagenet,
    "resnet8": resnet8,
    "resnet20": resnet20,
    "resnet32": resnet32,
    "resnet56": resnet56,
    "resnet110": resnet110,
    "resnet8x4": resnet8x4,
    "resnet32x4": resnet32x4,
    "wrn16_1": wrn16_1,
    "wrn16_2": wrn16_2,
    "wrn40_1": wrn40_1,
    "wrn40_2": wrn40_2,
    "vgg8": vgg8,
    "vgg11": vgg11,
    "vgg13": vgg13,
    "vgg16": vgg16,
    "vgg19": vgg19,
    "mobilenetv2": mobilenetv2,
    "shufflenetv2": shufflenetv2,
}

SEGMENTERS = {
    "deeplabv3_resnet50": deeplabv3_resnet50,
    "deeplabv3_mobilenet": deeplabv3_mobilenet,
    "segnet_vgg13": segnet_vgg13,
    "segnet_vgg16": segnet_vgg16,
    "segnet_vgg19": segnet_vgg19,
}

GENERATORS = {
    "generator_a": GeneratorA,
    "generator_b": GeneratorB,
    "dafl": partial(GeneratorA, bn_eps=0.8),
    "fast": FastGenerator,
    "dcgan": partial(GeneratorB, last=nn.Sigmoid),
    "deep": DeepGenerator,
    "cmi_large": partial(FastGenerator, widen=2),
}


def get_model(name, num_classes=10, channels=None):
    """A classifier with fresh weights. `channels` None means the published number of channels.

    Raises ValueError for a name that is not in MODELS.
    """
    constructor = _lookup(MODELS, name, "model")
    if channels is None:
        return constructor(num_classes=num_classes)
    return constructor(num_classes=num_classes, channels=channels)


def input_size(name):
    """The side in pixels of the square images that the model insists on; None if any will do."""
    constructor = _lookup(MODELS, name, "model")
    return getattr(getattr(constructor, "func", constructor), "input_size", None)


def agree_on_size(names, img_size=None):
    """The side of the images that all the models take: `img_size`, or theirs; None: any will do.

    Raises ValueError when they insist on different sizes.
    """
    for name in names:
        own = input_size(name)
        if own and img_size and own != img_size:
            raise ValueError(f"{name} takes images of {own} pixels, not {img_size}")
        img_size = img_size or own
    return img_size


def get_generator(name, nz, img_size=32, channels=3, ngf=64):
    """A generator with fresh weights: `nz` latent size, `ngf` width, images of img_size pixels.

    Raises ValueError for a name that is not in GENERATORS, or when img_size is not a multiple of
    the generator's upsampling factor (4; for generator_b, dcgan and deep 16).
    """
    constructor = _lookup(GENERATORS, name, "generator")
    return constructor(nz=nz, img_size=img_size, channels=channels, ngf=ngf)


def get_segmenter(name, num_classes):
    """A segmentation network with fresh weights. Raises ValueError for an unknown name."""
    return _lookup(SEGMENTERS, name, "segmentation network")(num_classes=num_classes)


def _lookup(table, name, kind):
    if name in table:
        return table[name]
    close = get_close_matches(str(name), table)
    hint = f"did you mean {' or '.join(close)}" if close else f"known: {', '.join(table)}"
    raise ValueError(f"unknown {kind} {name!r}; {hint}")
