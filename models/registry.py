"""The tables of networks by name, and how a network enters them and is made from them."""

from collections.abc import Callable, Iterable, Mapping
from difflib import get_close_matches
from functools import partial

from torch import nn

from .outside import build_outside, check_outside, place_of

MODELS: dict[str, Callable[..., nn.Module]] = {}
SEGMENTERS: dict[str, Callable[..., nn.Module]] = {}
GENERATORS: dict[str, Callable[..., nn.Module]] = {}


def register(name: str, constructor: Callable[..., nn.Module], table: dict = MODELS, **settings) -> None:
    """Offer `constructor` by `name`, to every script's command line as well.

    Args:
        constructor: takes `num_classes` and `channels` (MODELS), `num_classes` (SEGMENTERS) or `nz, img_size, channels,
            ngf` (GENERATORS). Images of only one size: give it that side as an attribute `input_size`.
        table: one of the three. settings: further arguments for it.

    Raises ValueError where the name is taken.
    """
    if name in table:
        raise ValueError(f"the name {name!r} is taken: register the network under another one")
    table[name] = partial(constructor, **settings)


def get_model(name: str, num_classes: int = 10, channels: int | None = None) -> nn.Module:
    """A classifier with fresh weights; `channels` None: as published.

    `name` is in MODELS or from outside, see `models.outside`. Raises ValueError for another one.
    """
    if name not in MODELS and place_of(name):
        return build_outside(name, num_classes, channels)
    given = {} if channels is None else {"channels": channels}
    return _lookup(MODELS, name, "model")(num_classes=num_classes, **given)


def check_name(name: str, table: Mapping = MODELS) -> None:
    """Raises ValueError unless a network of this name can be looked for: in `table`, or a classifier from outside."""
    if table is MODELS and name not in table and place_of(name):
        check_outside(name)
    else:
        _lookup(table, name, "network")


def input_size(name: str) -> int | None:
    """The side in pixels of the square images that the model insists on; None if any will do."""
    return getattr(_lookup(MODELS, name, "model").func, "input_size", None)


def agree_on_size(names: Iterable[str], img_size: int | None = None) -> int | None:
    """The side of the images that all the models take: `img_size`, or theirs; None: any will do.

    Raises ValueError when they insist on different sizes.
    """
    given = img_size
    for name in names:
        own = input_size(name)
        if own and img_size and own != img_size:
            cure = f"give --img_size {own}" if given else "take networks of one size"
            raise ValueError(f"{name} takes images of {own} pixels, not {img_size}: {cure}")
        img_size = img_size or own
    return img_size


def get_generator(name: str, nz: int, img_size: int = 32, channels: int = 3, ngf: int = 64) -> nn.Module:
    """A generator with fresh weights: `nz` latent size, `ngf` width, images of img_size pixels.

    Raises ValueError for a name not in GENERATORS, or if img_size is no multiple of 4 (generator_b, dcgan, deep: 16).
    """
    return _lookup(GENERATORS, name, "generator")(nz=nz, img_size=img_size, channels=channels, ngf=ngf)


def get_segmenter(name: str, num_classes: int) -> nn.Module:
    """A segmentation network with fresh weights. Raises ValueError for an unknown name."""
    return _lookup(SEGMENTERS, name, "segmentation network")(num_classes=num_classes)


def _lookup(table: Mapping[str, Callable], name: str, kind: str) -> Callable[..., nn.Module]:
    if name in table:
        return table[name]
    close = get_close_matches(str(name), table)
    hint = f"did you mean {' or '.join(close)}" if close else f"known: {', '.join(table)}"
    raise ValueError(f"unknown {kind} {name!r}; {hint}")
