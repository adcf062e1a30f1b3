"""What a run reads: the data set by its flags, and by what its teacher's file says of it."""

import argparse
import math
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from data import SOURCES, get_dataset, get_segmentation
from data.splits import printable
from datafree.errors import UsageError


def trial_images(data, device: torch.device, n: int = 2) -> Tensor:
    """n images (n, C, H, W) of the size of `data`, in the range of normalised ones, that use no random numbers."""
    shape = n, data.channels, data.img_size, data.img_size
    x = torch.arange(math.prod(shape), device=device).float().sin().view(shape)
    return x.contiguous(memory_format=torch.channels_last)


def open_data(args: argparse.Namespace, metadata: Mapping, train: bool = False, segmentation: bool = False):
    """The data set of args, its training images only if `train`.

    Args:
        metadata: of the teacher's file; it knows the statistics, and of a folder or of no images the rest.

    Raises:
        UsageError, DataError: statistics that nobody knows or that do not fit; whatever is wrong with the files.
    """
    if segmentation:
        data = get_segmentation(args.dataset, args.data_root, args.mean, args.std, train)
    else:
        known = metadata if args.dataset in ("none", "folder") else {}
        channels, num_classes = (args.channels, args.num_classes) if "channels" in args else (None, None)
        size, channels = args.img_size or known.get("img_size"), channels or known.get("channels")
        told = {len(values) for values in (args.mean, args.std) if values}
        if "channels" in args and args.dataset in ("none", "folder") and told in ({1}, {3}):
            channels = channels or told.pop()
        if args.dataset == "none":
            num_classes = num_classes or metadata.get("num_classes")
        about = args.dataset, args.data_root, size, channels, args.mean, args.std, args.attribute
        data = get_dataset(*about, train=train, num_classes=num_classes)
        names = tuple(printable(str(name)) for name in metadata.get("class_names", ()))
        if args.dataset == "none" and len(names) == len({*names}) == data.num_classes:
            data = replace(data, class_names=names)
        if args.dataset == "none" and (source := SOURCES.get(metadata.get("dataset"))):
            data = replace(data, padding=source.padding(data.img_size), flip=source.flip)
    for key in ("mean", "std"):
        values = metadata.get(key, getattr(data, key))
        if values is None:
            text = f"the statistics of {args.dataset} are not known, as the teacher's file does not say them: "
            raise UsageError(text + "give --mean and --std, one value per channel")
        if len(values) != data.channels:
            text = f"the teacher's file has {len(values)} values as {key}, the images {data.channels} channels: "
            raise UsageError(text + f"give --{key}, one value per channel")
    return data
