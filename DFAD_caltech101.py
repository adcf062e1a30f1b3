"""DFAD on Caltech-101 (Fang et al. 2019), Data-Free Adversarial Distillation, Table 2: 73.5 %.

    python teacher_train.py --dataset caltech101 --model resnet34_imagenet
    python DFAD_caltech101.py --scheduler            # ResNet-34 -> ResNet-18, 128 pixels

Student S and generator G play a min-max game over the distance to the teacher T:

    k times:  min_S  E_z |T(G(z)) - S(G(z))|         the student imitates,
    once:     max_G  E_z |T(G(z)) - S(G(z))|         the generator looks for what it cannot do,

means over batch and logits, each step on fresh z ~ N(0, I). An epoch is --epoch_itrs iterations,
then a test. Published settings; the defaults of these flags are the data set's:
{presets}

Differences from the published code: with --scheduler the learning rates fall in the epoch that is
named, not one earlier, and at fractions of --n_epochs. Images are the central squares, 128 pixels
wide; the published test set holds them too, its training images are cut at random places.
"""

from data import DataError, get_dataset
from datafree.adversarial import distil_classifier, parse_classifier
from datafree.runtime import cli
from models import MODELS, agree_on_size, get_generator, get_model

PRESETS = {
    "caltech101": dict(
        teacher="resnet34_imagenet",
        student="resnet18_imagenet",
        batch_size=64,
        n_epochs=300,
        epoch_itrs=50,
        k=5,
        lr_S=0.05,
        lr_G=1e-3,
        optimizer_G="adam",
        weight_decay=5e-4,
        nz=256,
        milestones=[1 / 3, 2 / 3],
    )
}


def parse_args(argv=None):
    return parse_classifier(argv, __doc__, PRESETS, MODELS, agree_on_size)


def main(args):
    """Distil or evaluate; returns the content of result.json."""
    return distil_classifier(args, "DFAD_caltech101", "generator_b", get_dataset, get_model, get_generator)


if __name__ == "__main__":
    cli(main, parse_args, DataError)
