"""DFAD on NYUv2 (Fang et al. 2019), Data-Free Adversarial Distillation, Table 3: mIoU 0.364.

    python teacher_train_seg.py --dataset nyuv2
    python DFAD_nyu_deeplab.py --scheduler --save_img 10

The algorithm is in DFAD_camvid_deeplab.py. Published settings, the defaults:
{presets}
"""

import datafree.interrupt  # noqa: F401

from argparse import Namespace
from collections.abc import Sequence

import DFAD_camvid_deeplab
from datafree.cli import cli

PRESET = DFAD_camvid_deeplab.PRESET | dict(dataset="nyuv2", weight_decay=5e-5, gamma=0.3)
main = DFAD_camvid_deeplab.main


def parse_args(argv: Sequence | None = None) -> Namespace:
    return DFAD_camvid_deeplab.parse_args(argv, __file__, __doc__, PRESET)


if __name__ == "__main__":
    cli(main, parse_args)
