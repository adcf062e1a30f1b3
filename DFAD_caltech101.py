"""DFAD on Caltech-101 (Fang et al. 2019), Data-Free Adversarial Distillation, Table 2: 73.5 %.

    python teacher_train.py --dataset caltech101 --model resnet34_imagenet
    python DFAD_caltech101.py --scheduler            # ResNet-34 -> ResNet-18, 128 pixels

The algorithm is in DFAD_cifar.py. Published settings; the defaults of these flags are the data set's:
{presets}

Difference from the published code: images are the central squares, 128 pixels wide; the published
test set holds them too, its training images are cut at random places.
"""

import datafree.interrupt  # noqa: F401

from argparse import Namespace
from collections.abc import Sequence

import DFAD_cifar
from datafree.cli import cli

PRESETS = {"caltech101": dict(batch_size=64, n_epochs=300, epoch_itrs=50, k=5, lr_S=0.05, lr_G=1e-3,
                              optimizer_G="adam", weight_decay=5e-4, nz=256, milestones=[1 / 3, 2 / 3],
                              gamma=0.1)}  # fmt: skip


def parse_args(argv: Sequence | None = None) -> Namespace:
    return DFAD_cifar.parse_args(argv, __file__, __doc__, PRESETS)


def main(args: Namespace) -> dict:
    """Distil or evaluate; returns the content of result.json."""
    return DFAD_cifar.main(args, "generator_b")


if __name__ == "__main__":
    cli(main, parse_args)
