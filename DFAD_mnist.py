"""DFAD on MNIST: Data-Free Adversarial Distillation (Fang et al. 2019), Table 2: 98.3 +- 0.2 %.

    python teacher_train.py --dataset mnist --model lenet5 --recipe dfad-mnist
    python DFAD_mnist.py                             # LeNet-5 -> LeNet-5-HALF
    bash scripts/dfad_mnist.sh                       # both in one go
    bash scripts/dfad_mnist.sh --dataset digits      # the same on embedded data

Student S and generator G play a min-max game over the distance to the teacher T:

    k times:  min_S  E_z |T(G(z)) - S(G(z))|         the student imitates,
    once:     max_G  E_z |T(G(z)) - S(G(z))|         the generator looks for what it cannot do,

means over batch and logits, each step on fresh z ~ N(0, I). An epoch is --epoch_itrs iterations,
then a test. Published settings; the defaults of these flags are the data set's:
{presets}

Differences from the published code: with --scheduler the learning rates fall in the epoch that is
named, not one earlier, and at fractions of --n_epochs. The digits' setting is ours; the shell
script adds --scheduler to it, without which the last epochs scatter by several points.
"""

from data import DataError, get_dataset
from datafree.adversarial import distil_classifier, parse_classifier
from datafree.runtime import cli
from models import MODELS, agree_on_size, get_generator, get_model

MNIST = dict(
    teacher="lenet5",
    student="lenet5_half",
    batch_size=512,
    n_epochs=40,
    epoch_itrs=50,
    k=5,
    lr_S=0.01,
    lr_G=1e-3,
    optimizer_G="adam",
    weight_decay=1e-4,
    nz=100,
    milestones=[0.2, 0.4],
)
PRESETS = {
    "mnist": MNIST,
    "fashion-mnist": MNIST,
    "usps": MNIST,
    "digits": MNIST | dict(batch_size=128, n_epochs=9, milestones=[0.65, 0.85]),
}


def parse_args(argv=None):
    return parse_classifier(argv, __doc__, PRESETS, MODELS, agree_on_size)


def main(args):
    """Distil or evaluate; returns the content of result.json."""
    return distil_classifier(args, "DFAD_mnist", "generator_a", get_dataset, get_model, get_generator)


if __name__ == "__main__":
    cli(main, parse_args, DataError)
