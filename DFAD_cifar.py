"""DFAD on CIFAR: Data-Free Adversarial Distillation (Fang et al. 2019), Table 2, and MMRazor.

    python teacher_train.py --dataset cifar10 --model resnet34 --recipe dfad
    python DFAD_cifar.py --scheduler                 # CIFAR-10, ResNet-34 -> ResNet-18: 93.3 %
    python DFAD_cifar.py --dataset cifar100 --scheduler                          # 67.7 %
    python DFAD_cifar.py --variant mmrazor           # CIFAR-10, a teacher of --recipe fast: 92.80 %
    python DFAD_cifar.py --dataset folder --data_root DIR --teacher wrn16_2 --student wrn16_1

Student S and generator G play a min-max game over the distance to the teacher T:

    k times:  min_S  E_z |T(G(z)) - S(G(z))|         the student imitates,
    once:     max_G  E_z |T(G(z)) - S(G(z))|         the generator looks for what it cannot do,

means over batch and logits, each step on fresh z ~ N(0, I). An epoch is --epoch_itrs iterations,
then a test. Published settings; the defaults of these flags are the data set's:
{presets}

--variant mmrazor is MMRazor's setting: batches of 8 x 32, the generator by AdamW (weight decay
0.01), --scheduler on, a test every 250 iterations.

Differences from the published code: with --scheduler the learning rates fall in the epoch that is
named, not one earlier, and at fractions of --n_epochs. The normalisation is the teacher's, CIFAR-100's
its own (published: CIFAR-10's). MMRazor's batch norms see the 32 images of a GPU; and there the
generator's backward pass leaves its gradient in the student, which the next student step adds to its
own although it is to do the opposite: not here, but with --keep_student_gradient, except over the end
of an epoch.
"""

import datafree.interrupt  # noqa: F401

from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

import papers
from data import preset_of
from datafree.cli import PICTURES, Parser, cli, count, describe_presets
from datafree.distributed import share
from datafree.losses import l1_loss
from datafree.runtime import keep_gradients, lr_at, make_optimizer, set_lr
from datafree.session import Session

CIFAR = dict(teacher="resnet34", student="resnet18", batch_size=256, n_epochs=500, epoch_itrs=50, k=5, lr_S=0.1,
             lr_G=1e-3, optimizer_G="adam", weight_decay=5e-4, nz=256, milestones=[0.2, 0.4], gamma=0.1)  # fmt: skip
# 8 x 32 images; both learning rates x 0.1 at iterations 5000 and 10 000 of 25 000
MMRAZOR = dict(batch_size=256, n_epochs=100, epoch_itrs=250, optimizer_G="adamw", lr_G=1e-3, milestones=[0.2, 0.4],
               scheduler=True)  # fmt: skip
PRESETS = {"cifar10": CIFAR, "folder": CIFAR}
RECIPE = dict(
    batch_size="images of a step", n_epochs="epochs of --epoch_itrs", epoch_itrs="iterations of an epoch",
    k="student steps of an iteration", lr_S="learning rate of the student (SGD, momentum 0.9)",
    weight_decay="of the student", optimizer_G="of the generator", lr_G="learning rate of the generator",
    nz="length of z", milestones="with --scheduler: both learning rates x gamma at these fractions of the epochs",
    gamma="what --scheduler multiplies the learning rates by",
)  # fmt: skip
FLAGS = (
    ("--scheduler", "let both learning rates fall", dict(action="store_true")),
    ("--step_size", "with --scheduler: x gamma every N epochs instead", dict(type=count, metavar="N")),
    ("--keep_student_gradient", "as MMRazor, see above (default: it is cleared)", dict(action="store_true")),
)


def parse_args(
    argv: Sequence | None = None, script: str = __file__, docstring: str = __doc__, presets: Mapping = PRESETS
) -> Namespace:
    """The command line; the doors to this script give their own file, docstring and presets, the default first."""
    p = Parser(script, docstring.format(presets=describe_presets(presets)), paper="dfad")
    p.add_dataset(default=next(iter(presets)))
    p.add_networks()
    p.add(("--variant", "whose setting (default: %(default)s)", dict(choices=("dfad", "mmrazor"), default="dfad")))
    p.add_recipe(**RECIPE)
    p.add(*FLAGS, PICTURES)
    p.add_run()
    args = p.parse_args(argv)
    first = next(iter(presets.values()))
    preset = preset_of(args.dataset, {"folder": first} | presets) | (MMRAZOR if args.variant == "mmrazor" else {})
    args.scheduler |= args.variant == "mmrazor"
    p.paper = papers.TEACHERS_OF.get(args.variant, p.paper)
    return p.complete(args, preset)


def student_step(
    z: Tensor, generator: nn.Module, teacher: nn.Module, student: nn.Module, optimizer_S: Optimizer, autocast: Callable
) -> Tensor:
    """The student imitates: min_S E_z |T(G(z)) - S(G(z))|. Returns the loss (0-d) before the update.

    Args:
        z: latents (N, nz). generator, student: in train mode. teacher: in eval mode, frozen.
        autocast: the precision's context; the losses are computed outside it.
    """
    with autocast():
        with torch.no_grad():
            x = generator(z)
            t_logits = teacher(x)
        s_logits = student(x)
    loss_S = l1_loss(s_logits, t_logits)
    loss_S.backward()
    optimizer_S.step()
    optimizer_S.zero_grad()  # after the step: what a generator's step left is still part of it
    return loss_S.detach()


def generator_step(
    z: Tensor, generator: nn.Module, teacher: nn.Module, student: nn.Module, optimizer_G: Optimizer,
    autocast: Callable, log_space: bool = False, keep_student_gradient: bool = False,
) -> Tensor:  # fmt: skip
    """The generator looks for what the student cannot do yet: max_G E_z |T(G(z)) - S(G(z))|.

    Args:
        log_space: maximise log(1 + it) instead, as for segmentation. The rest: see `student_step`.
    """
    student.requires_grad_(keep_student_gradient)
    with autocast():
        x = generator(z)
        t_logits, s_logits = teacher(x), student(x)
    loss_G = -l1_loss(s_logits, t_logits)
    if log_space:
        loss_G = -(1 - loss_G).log()
    optimizer_G.zero_grad()
    loss_G.backward()
    if keep_student_gradient:
        keep_gradients(student)
    optimizer_G.step()
    student.requires_grad_(True)
    return loss_G.detach()


def lr_fall(epoch: int, args: Namespace) -> float:
    """What --scheduler multiplies both learning rates by in an epoch (from 0)."""
    if not args.scheduler:
        return 1.0
    if args.step_size:
        return args.gamma ** (epoch // args.step_size)
    return lr_at(epoch, 1.0, args.n_epochs, args.milestones, args.gamma)


def train_epoch(
    epoch: int, s: Session, generator: nn.Module, optimizer_S: Optimizer, optimizer_G: Optimizer,
    log_space: bool = False,
) -> dict[str, Tensor]:  # fmt: skip
    """args.epoch_itrs iterations; returns the mean of both losses. As published, S stays in train mode throughout."""
    args, autocast = s.args, s.runtime.autocast
    networks = generator.train(), s.folded_teacher, s.student.train()
    set_lr(optimizer_S, args.lr_S * lr_fall(epoch, args))
    set_lr(optimizer_G, args.lr_G * lr_fall(epoch, args))
    total_S = total_G = 0.0
    for _ in range(args.epoch_itrs):
        for _ in range(args.k):
            z = share(generator.latents(args.batch_size, device=s.runtime.device))
            loss_S = student_step(z, *networks, optimizer_S, autocast)
            total_S += loss_S / args.k
            s.run.tick(loss_S)
        z = share(generator.latents(args.batch_size, device=s.runtime.device))
        total_G += generator_step(z, *networks, optimizer_G, autocast, log_space, args.keep_student_gradient)
        s.run.tick(loss_S)
    optimizer_S.zero_grad()  # a checkpoint holds no gradients, and a resumed run is to be the same
    return {"loss_S": total_S / args.epoch_itrs, "loss_G": total_G / args.epoch_itrs}


def train(s: Session, generator: nn.Module, shown: int = 64, log_space: bool = False) -> int:
    """All epochs, tests and record included; returns the number of images that were generated.

    Args:
        shown: images of a grid. log_space: see `generator_step`.
    """
    args = s.args
    z_shown = generator.latents(shown, device=s.runtime.device)
    optimizer_S = make_optimizer("sgd", s.student.parameters(), args.lr_S, args.weight_decay)
    optimizer_G = make_optimizer(args.optimizer_G, generator.parameters(), args.lr_G)
    states = dict(student=s.student, generator=generator, optimizer_S=optimizer_S, optimizer_G=optimizer_G)
    steps = args.epoch_itrs * (args.k + 1)
    for epoch in s.epochs(steps, args.batch_size, **states):
        losses = train_epoch(epoch, s, generator, optimizer_S, optimizer_G, log_space)
        s.record(losses, pictures=lambda: s.transform.denormalize(s.sample(generator, z_shown)))
    return args.n_epochs * steps * args.batch_size


def main(args: Namespace, generator: str = "generator_a") -> dict:
    """Distil or evaluate; returns the content of result.json. `generator`: registry name."""
    s = Session(args, papers.published(args))
    if s.result:
        return s.result
    return s.finish(method="DFAD", generated_images=train(s, s.generator(generator, args.nz)))


if __name__ == "__main__":
    cli(main, parse_args)
