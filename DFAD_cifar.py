"""DFAD on CIFAR: Data-Free Adversarial Distillation (Fang et al. 2019), Table 2, and MMRazor.

    python teacher_train.py --dataset cifar10 --model resnet34 --recipe dfad
    python DFAD_cifar.py --scheduler                 # CIFAR-10, ResNet-34 -> ResNet-18: 93.3 %
    python DFAD_cifar.py --dataset cifar100 --scheduler                          # 67.7 %
    python DFAD_cifar.py --variant mmrazor           # CIFAR-10: 92.80 %
    python DFAD_cifar.py --dataset folder --data_root DIR --teacher wrn16_2 --student wrn16_1

Student S and generator G play a min-max game over the distance to the teacher T:

    k times:  min_S  E_z |T(G(z)) - S(G(z))|         the student imitates,
    once:     max_G  E_z |T(G(z)) - S(G(z))|         the generator looks for what it cannot do,

means over batch and logits, each step on fresh z ~ N(0, I). An epoch is --epoch_itrs iterations,
then a test. Published settings; the defaults of these flags are the data set's:
{presets}

--variant mmrazor is MMRazor's setting: batches of 8 x 32, the generator by AdamW, --scheduler on.

Differences from the published code: with --scheduler the learning rates fall in the epoch that is
named, not one earlier, and at fractions of --n_epochs. The normalisation is the teacher's.
"""

from data import DataError, get_dataset
from datafree.adversarial import distil_classifier, parse_classifier
from datafree.runtime import cli
from models import MODELS, agree_on_size, get_generator, get_model

CIFAR = dict(
    teacher="resnet34",
    student="resnet18",
    batch_size=256,
    n_epochs=500,
    epoch_itrs=50,
    k=5,
    lr_S=0.1,
    lr_G=1e-3,
    optimizer_G="adam",
    weight_decay=5e-4,
    nz=256,
    milestones=[0.2, 0.4],
)
PRESETS = {"cifar10": CIFAR, "cifar100": CIFAR, "svhn": CIFAR, "folder": CIFAR}


def parse_args(argv=None):
    return parse_classifier(argv, __doc__, PRESETS, MODELS, agree_on_size)


def main(args):
    """Distil or evaluate; returns the content of result.json."""
    return distil_classifier(args, "DFAD_cifar", "generator_a", get_dataset, get_model, get_generator)


if __name__ == "__main__":
    cli(main, parse_args, DataError)
