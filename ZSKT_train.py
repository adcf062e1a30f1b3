"""ZSKT: Zero-shot Knowledge Transfer via Adversarial Belief Matching (Micaelli and Storkey, NeurIPS 2019), by MMRazor.

    python teacher_train.py --dataset cifar10 --model resnet34 --recipe fast
    python ZSKT_train.py --dataset cifar10                 # 93.05 %: ResNet-34 -> ResNet-18
    python ZSKT_train.py --dataset digits                  # embedded data: minutes on one core

Student S and generator G play a min-max game over what S believes otherwise than the teacher T:

    once:     max_G  kl KL(T(G(z)) || S(G(z)))                                    (1)
    k times:  min_S  kl KL(T(G(z)) || S(G(z))) + at sum_l |a_l(S) - a_l(T)|^2     (2)

each step on fresh z ~ N(0, I). KL is a mean over batch and classes. a_l is the attention map of stage l: the channels'
mean square, flattened, of unit length; |.|^2 is a mean over batch and positions. Images go to both networks as the
generator makes them; an epoch is --epoch_itrs iterations, then a test.

Published settings (MMRazor's; the digits' is ours); the defaults of these flags are the data set's:
{presets}

Differences from the published code:
 1. There the generator's backward pass leaves its gradient in the student too, and the next student step, which is to
    do the opposite, adds it to its own. Here it does not: --keep_student_gradient is as published.
 2. One process sees the whole batch (8 GPUs x 16 there), so that batch norms average over 128 images, not 16.
 3. The losses on record are means over all k student steps, not the last one's.
MMRazor differs from the paper, where one z serves the generator's and all ten student steps, KL weighs 1, both networks
learn by Adam (student 2e-3, generator 1e-3, cosine to 0 over 80 000 batches of 128, gradients clipped at norm 5), z has
length 100 and the networks are Wide ResNets, which can be named here as well.
"""

import datafree.interrupt  # noqa: F401

import re
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

import papers
from data import preset_of
from datafree.cli import PICTURES, Parser, cli, describe_presets
from datafree.distributed import mean, share
from datafree.errors import UsageError
from datafree.losses import attention_loss, kd_loss
from datafree.runtime import keep_gradients, lr_at, make_optimizer, set_lr
from datafree.session import Session

FOLDER = dict(batch_size=128, n_epochs=100, epoch_itrs=250, k=10, lr_S=0.1, weight_decay=5e-4, lr_G=1e-3,
              milestones=[0.2, 0.4], nz=256, kl=2.0, at=250.0)  # fmt: skip
MNIST = FOLDER | dict(at=0.0)  # LeNet-5 has no stages
PRESETS = {
    "cifar10": FOLDER | dict(teacher="resnet34", student="resnet18"),
    "mnist": MNIST,
    "digits": MNIST | dict(batch_size=64, n_epochs=6, epoch_itrs=10, milestones=[0.6, 0.85], nz=100),
    "folder": FOLDER,
}
RECIPE = dict(
    batch_size="images of a step", n_epochs="epochs of --epoch_itrs", epoch_itrs="iterations of an epoch",
    k="student steps of an iteration", lr_S="learning rate of the student (SGD, momentum 0.9)",
    weight_decay="of the student", lr_G="learning rate of the generator (Adam)",
    milestones="both learning rates x 0.1 at these fractions of the epochs", nz="length of z", kl="weight of KL",
    at="weight of the attention maps' differences; 0 for networks whose stages differ",
)  # fmt: skip
KEEP = ("--keep_student_gradient", "as published, difference 1 (default: it is cleared)", dict(action="store_true"))


def parse_args(argv: Sequence | None = None) -> Namespace:
    p = Parser(__file__, __doc__.format(presets=describe_presets(PRESETS)), paper="fast")
    p.add_dataset()
    p.add_networks()
    p.add_recipe(**RECIPE)
    p.add(KEEP, PICTURES)
    p.add_run()
    args = p.parse_args(argv)
    return p.complete(args, preset_of(args.dataset, PRESETS))


@contextmanager
def stage_outputs(network: nn.Module, wanted: bool = True) -> Iterator[list[Tensor]]:
    """A list that gets each stage's feature map (N, C, H, W), in order, when the network runs in the block.

    Stages are the children named layer<i> or block<i>. Not `wanted`, or a network without any: it stays empty.
    """
    stages = [m for name, m in network.named_children() if wanted and re.fullmatch(r"(layer|block)\d", name)]
    maps = []

    def keep(_module: nn.Module, _given: tuple, y: object) -> None:
        if isinstance(y, Tensor) and y.dim() == 4:
            maps.append(y)

    with ExitStack() as handles:
        for stage in stages:
            handles.enter_context(stage.register_forward_hook(keep))
        yield maps


def generator_step(
    z: Tensor, generator: nn.Module, teacher: nn.Module, student: nn.Module, optimizer_G: Optimizer, args: Namespace,
    autocast: Callable,
) -> Tensor:  # fmt: skip
    """The generator looks for what the student believes otherwise; returns its loss (0-d) before the update.

    Args:
        z: latents (N, nz). generator, student: in train mode. teacher: in eval mode, frozen.
        args: kl (weight), keep_student_gradient.
        autocast: the precision's context; the losses are computed outside it.
    """
    student.requires_grad_(args.keep_student_gradient)
    with autocast():
        x = generator(z)
        t_logits, s_logits = teacher(x), student(x)
    loss_G = -args.kl * kd_loss(s_logits, t_logits) / t_logits.shape[1]  # (1)
    optimizer_G.zero_grad()
    loss_G.backward()
    if args.keep_student_gradient:
        keep_gradients(student)
    optimizer_G.step()
    student.requires_grad_(True)
    return loss_G.detach()


def student_step(
    z: Tensor, generator: nn.Module, teacher: nn.Module, student: nn.Module, optimizer_S: Optimizer, args: Namespace,
    autocast: Callable,
) -> dict[str, Tensor]:  # fmt: skip
    """The student imitates; returns the weighted losses before the update. Arguments: `generator_step`'s, and at."""
    with autocast():
        with torch.no_grad(), stage_outputs(teacher, args.at > 0) as t_maps:
            x = generator(z)
            t_logits = teacher(x)
        with stage_outputs(student, args.at > 0) as s_maps:
            s_logits = student(x)
    losses = {"loss_kl": args.kl * kd_loss(s_logits, t_logits) / t_logits.shape[1]}
    for i, maps in enumerate(zip(s_maps, t_maps, strict=True), 1):
        losses[f"loss_at{i}"] = args.at * mean(attention_loss(*maps))
    losses["loss_S"] = sum(losses.values())  # (2)
    losses["loss_S"].backward()
    optimizer_S.step()
    optimizer_S.zero_grad()  # after the step: what a generator's step left is still part of it
    return {k: v.detach() for k, v in losses.items()}


def train_epoch(
    epoch: int, s: Session, generator: nn.Module, optimizer_G: Optimizer, optimizer_S: Optimizer
) -> dict[str, Tensor]:
    """args.epoch_itrs iterations; returns the mean of each loss."""
    args, device, autocast, total = s.args, s.runtime.device, s.runtime.autocast, {}
    # A folded teacher has no stages any more.
    networks = generator.train(), s.teacher if args.at else s.folded_teacher, s.student.train()
    fall = lr_at(epoch, 1.0, args.n_epochs, args.milestones)
    set_lr(optimizer_G, args.lr_G * fall)
    set_lr(optimizer_S, args.lr_S * fall)
    for _ in range(args.epoch_itrs):
        z = share(generator.latents(args.batch_size, device=device))
        loss_G = generator_step(z, *networks, optimizer_G, args, autocast)
        total["loss_G"] = total.get("loss_G", 0) + loss_G / args.epoch_itrs
        for _ in range(args.k):
            z = share(generator.latents(args.batch_size, device=device))
            losses = student_step(z, *networks, optimizer_S, args, autocast)
            total |= {k: total.get(k, 0) + v / (args.epoch_itrs * args.k) for k, v in losses.items()}
            s.run.tick(losses["loss_S"])
        s.run.tick(losses["loss_S"])
    return total


@torch.no_grad()
def check_stages(s: Session) -> None:
    """Raises UsageError unless the stages of teacher and student have the same sizes, one by one."""
    x = torch.zeros(1, s.data.channels, s.data.img_size, s.data.img_size, device=s.runtime.device)
    sides = []
    for network in (s.teacher, s.student.eval()):
        with s.runtime.eagerly(), stage_outputs(network) as maps:
            network(x)
        sides.append([m.shape[-1] for m in maps])
    if sides[0] != sides[1] or not sides[0]:
        raise UsageError(
            f"the stages of {s.args.teacher} make maps of {sides[0] or 'no'} pixels, those of {s.args.student} of "
            f"{sides[1] or 'no'}: their attention cannot be compared, give --at 0"
        )


def main(args: Namespace) -> dict:
    """Distil or evaluate; returns the content of result.json."""
    s = Session(args, papers.published(args))
    if s.result:
        return s.result
    if args.at:
        check_stages(s)
    generator = s.generator("zskt", args.nz)
    optimizer_G = make_optimizer("adam", generator.parameters(), args.lr_G)
    optimizer_S = make_optimizer("sgd", s.student.parameters(), args.lr_S, args.weight_decay)
    z_shown = generator.latents(64, device=s.runtime.device)
    states = dict(student=s.student, generator=generator, optimizer_G=optimizer_G, optimizer_S=optimizer_S)
    steps = args.epoch_itrs * (args.k + 1)
    for epoch in s.epochs(steps, args.batch_size, **states):
        losses = train_epoch(epoch, s, generator, optimizer_G, optimizer_S)
        s.record(losses, pictures=lambda: s.transform.denormalize(s.sample(generator, z_shown)))
    return s.finish(method="ZSKT", generated_images=args.n_epochs * steps * args.batch_size)


if __name__ == "__main__":
    cli(main, parse_args)
