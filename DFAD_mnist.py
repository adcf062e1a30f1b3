"""DFAD on MNIST: Data-Free Adversarial Distillation (Fang et al. 2019), Table 2: 98.3 +- 0.2 %.

    python teacher_train.py --dataset mnist --model lenet5 --recipe dfad-mnist
    python DFAD_mnist.py                             # LeNet-5 -> LeNet-5-HALF
    bash scripts/dfad_mnist.sh                       # both in one go
    bash scripts/dfad_mnist.sh --dataset digits      # the same on embedded data

The algorithm is in DFAD_cifar.py. Published settings; the defaults of these flags are the data set's:
{presets}

The milestones, which --scheduler needs, are ours: the published ones lie behind the 40 epochs. So is the
digits' setting; the shell script adds --scheduler to it, without which the last epochs scatter.
"""

import datafree.interrupt  # noqa: F401

from argparse import Namespace
from collections.abc import Sequence

import DFAD_cifar
from datafree.cli import cli

MNIST = dict(batch_size=512, n_epochs=40, epoch_itrs=50, k=5, lr_S=0.01, lr_G=1e-3, optimizer_G="adam",
             weight_decay=1e-4, nz=100, milestones=[0.2, 0.4], gamma=0.1)  # fmt: skip
PRESETS = {"mnist": MNIST, "digits": MNIST | dict(batch_size=128, n_epochs=9, milestones=[0.65, 0.85])}
main = DFAD_cifar.main


def parse_args(argv: Sequence | None = None) -> Namespace:
    return DFAD_cifar.parse_args(argv, __file__, __doc__, PRESETS)


if __name__ == "__main__":
    cli(main, parse_args)
