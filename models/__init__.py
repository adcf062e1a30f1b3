"""Networks by name: `get_model`, `get_generator` and `get_segmenter`; `register` adds one's own.

A classifier maps images to logits; its features are what its last linear layer sees, or the layer that it names as
`features_enter`. A segmentation network maps images to logits (N, classes, H, W). Each file registers its networks
beside their definitions; from elsewhere it is `models.register("my_net", MyNet)`. `get_model` also takes networks that
are not registered, see `models.outside`.
"""

# ruff: noqa: F401, I001, what is imported here is what the package offers
from importlib import import_module
from pkgutil import iter_modules

from .generator import UpsampleConv2d, set_folded
from .outside import NetworkError, Program, defaults_of, is_program, place_of, said, word_of
from .registry import GENERATORS, MODELS, SEGMENTERS, agree_on_size, check_name, get_generator, get_model, get_segmenter
from .registry import input_size, register

for file in iter_modules(__path__):
    import_module(f"{__name__}.{file.name}")
