"""DFAD on CamVid (Fang et al. 2019), Data-Free Adversarial Distillation, Table 3: mIoU 0.535.

    python teacher_train_seg.py --dataset camvid
    python DFAD_camvid_deeplab.py --scheduler --save_img 10

Student S and generator G play a min-max game over the distance to the teacher T:

    k times:  min_S  E_z |T(G(z)) - S(G(z))|                  the student imitates,
    once:     max_G  log(1 + E_z |T(G(z)) - S(G(z))|)         the generator looks for more,

means over batch, classes and pixels, each step on fresh z ~ N(0, I). An epoch is --epoch_itrs
iterations, then a test on the whole test images (short side 256). Published settings, the defaults:
{presets}

Differences from the published code: with --scheduler the learning rates fall in the epoch that is
named, not one earlier, and at fractions of --n_epochs.
"""

from data import DataError, get_segmentation
from datafree.adversarial import distil_segmenter, parse_segmenter
from datafree.runtime import cli
from models import SEGMENTERS, get_generator, get_segmenter

PRESET = dict(
    dataset="camvid",
    teacher="deeplabv3_resnet50",
    student="deeplabv3_mobilenet",
    batch_size=64,
    n_epochs=300,
    epoch_itrs=50,
    k=5,
    lr_S=0.1,
    lr_G=1e-3,
    optimizer_G="adam",
    weight_decay=5e-4,
    nz=256,
    milestones=[1 / 3, 2 / 3],
)


def parse_args(argv=None):
    return parse_segmenter(argv, __doc__, PRESET, SEGMENTERS)


def main(args):
    """Distil or evaluate; returns the content of result.json."""
    return distil_segmenter(args, "DFAD_camvid_deeplab", get_segmentation, get_segmenter, get_generator)


if __name__ == "__main__":
    cli(main, parse_args, DataError)
