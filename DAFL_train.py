"""DAFL: Data-Free Learning of Student Networks (Chen et al., ICCV 2019), Tables 1 and 3.

    python teacher_train.py --dataset mnist --model lenet5
    python DAFL_train.py --dataset mnist                   # 98.20 %: LeNet-5 -> LeNet-5-HALF
    python DAFL_train.py --dataset mnist --teacher hintonnet --student hintonnet_half    # 97.91 %
    python DAFL_train.py --dataset cifar10                 # 92.22 %: ResNet-34 -> ResNet-18
    python DAFL_train.py --dataset digits                  # embedded data: two to three minutes on two cores

A generator G makes images that the teacher N_T takes for real ones, and the student N_S learns
the teacher's answers on them; no image of the training data is read. With x = G(z), z ~ N(0, I):

    L_oh = H(N_T(x), argmax N_T(x))        Eq. 3   the teacher is confident,
    L_a  = -mean |f_T(x)|                  Eq. 4   its features fire,
    L_ie = sum_c p_c log p_c, p = mean softmax N_T(x)   Eq. 5   and classes are equally frequent
    L_G  = oh L_oh + a L_a + ie L_ie       Eq. 6
    L_KD = KL(N_T(x) || N_S(x))            Eq. 1   x detached from the generator

One backward pass of L_G + L_KD serves both optimisers. An epoch is --iterations, then a test.

Published settings; the defaults of these flags are the data set's:
{presets}

--variant mmrazor replaces some of them by MMRazor's, with a teacher of --recipe fast:
{mmrazor}

Differences from the published code:
 1. The learning rate of SGD falls at 40 % and 80 % of --n_epochs (800 and 1600 of 2000).
 2. L_ie has the code's logarithm to base 10, which its weights belong to, not the paper's natural
    one: --ie_log e takes that.
 3. Upsampling and the convolution behind it run as one transposed convolution (exact), and
    networks in bfloat16 where the hardware has it (--precision fp32 turns that off). MNIST's
    preset is float32: with its lr_G of 0.2 a bfloat16 run fell from 95.9 to 87.7 % in epoch 19, and
    of three float32 runs on an H200 one lost its generator in epoch 29 (results/mnist/); a run says
    so where it happens. A whole one on a CPU went from 98.2 to 89.8 % around epoch 160 and came back
    to 97.9. --precision auto is 1.8 times faster there.
 4. Caltech-101's setting is CIFAR-10's with smaller batches (DFAD, Table 2, names none), and so
    is ImageNet's, which no table has. The digits' is ours: without L_a, at temperature 4 and with
    a slow generator the student ends several points higher there. CelebA's number of epochs is
    ours too, as the paper names none.
 5. MMRazor's code counts the iterations to the student's falling rate from the end of the warm-up,
    500 late, and passes each batch through the student twice, so that its running statistics move
    as by a momentum of 0.19: --as_published does both. One process sees the batch of 8 x 256.
 6. CIFAR-100 has its own statistics, not CIFAR-10's: other people's networks need --mean and --std.
"""

import datafree.interrupt  # noqa: F401

import math
from argparse import Namespace
from collections.abc import Callable, Sequence

from torch import Tensor, nn
from torch.optim import Optimizer

import papers
from data import preset_of
from datafree.cli import FEATURES, PICTURES, Parser, cli, describe_presets
from datafree.distributed import mean, share
from datafree.hooks import features_of, settle_features
from datafree.inputs import trial_images
from datafree.losses import activation_loss, information_entropy_loss, kd_loss, one_hot_loss
from datafree.runtime import lr_at, make_optimizer, set_lr
from datafree.session import Session
from models import set_folded

MNIST = dict(batch_size=512, n_epochs=200, iterations=120, optimizer_G="adam", lr_G=0.2, optimizer_S="adam",
             lr_S=2e-3, weight_decay=0.0, milestones=[], warmup=0, nz=100, oh=1.0, ie=5.0, a=0.1, T=1.0)  # fmt: skip
CIFAR10 = MNIST | dict(teacher="resnet34", student="resnet18", batch_size=1024, n_epochs=2000, lr_G=0.02,
                       optimizer_S="sgd", lr_S=0.1, weight_decay=5e-4, milestones=[0.4, 0.8],
                       nz=1000, oh=0.05, a=0.01)  # fmt: skip
IMAGENET = CIFAR10 | dict(teacher="resnet50_imagenet", student="resnet18_imagenet", batch_size=64)
PRESETS = {
    "mnist": MNIST | dict(precision="fp32"),
    "cifar10": CIFAR10,
    "cifar100": CIFAR10 | dict(oh=0.5, ie=20.0, a=0.1),
    "celeba": MNIST | dict(lr_G=2e-3, lr_S=2e-4, oh=2.0),
    "caltech101": IMAGENET | dict(teacher="resnet34_imagenet"),
    "imagenet": IMAGENET,
    "digits": MNIST | dict(batch_size=128, n_epochs=10, lr_G=5e-4, milestones=[0.6, 0.85], a=0.0, T=4.0),
    "folder": CIFAR10,
}
MMRAZOR = dict(batch_size=2048, n_epochs=200, iterations=150, optimizer_G="adamw", lr_G=1e-3, optimizer_S="adamw",
               lr_S=0.1, weight_decay=0.01, milestones=[0.4, 0.8], warmup=500, T=6.0)  # fmt: skip
RECIPE = dict(
    batch_size="images of an iteration", n_epochs="epochs of --iterations", optimizer_G="of the generator",
    lr_G="learning rate of the generator", optimizer_S="of the student", lr_S="learning rate of the student",
    weight_decay="of the student", milestones="lr_S x 0.1 at these fractions of the epochs",
    warmup="iterations with a linearly rising learning rate", nz="length of z", oh="weight of L_oh",
    ie="weight of L_ie", a="weight of L_a", T="temperature of L_KD", iterations="of an epoch",
)  # fmt: skip


def parse_args(argv: Sequence | None = None) -> Namespace:
    presets, mmrazor = describe_presets(PRESETS), describe_presets({"mmrazor": MMRAZOR})
    p = Parser(__file__, __doc__.format(presets=presets, mmrazor=mmrazor), paper="dafl")
    p.add_dataset()
    p.add_networks()
    p.add(("--variant", "whose setting (default: %(default)s)", dict(choices=("dafl", "mmrazor"), default="dafl")))
    p.add_recipe(**RECIPE)
    p.add_argument("--ie_log", choices=("10", "e"), default="10", help="base of L_ie's logarithm (default: 10)")
    p.add_argument("--as_published", action="store_true", help="with --variant mmrazor: difference 5 is none")
    p.add_argument("--unfolded", action="store_true", help="run upsampling and convolution apart, as published")
    p.add(FEATURES, PICTURES)
    p.add_run()
    args = p.parse_args(argv)
    preset = preset_of(args.dataset, PRESETS) | (MMRAZOR if args.variant == "mmrazor" else {})
    p.paper = papers.TEACHERS_OF.get(args.variant, p.paper)
    args = p.complete(args, preset)
    if not args.oh and not args.ie and not args.a:
        p.error("--oh, --ie and --a are all 0: nothing would teach the generator")
    if args.feature_layer and not args.a:
        p.error("--feature_layer is what L_a reads, whose weight is 0: leave it out, or give --a")
    if args.as_published and args.variant != "mmrazor":
        p.error("--as_published belongs to --variant mmrazor: leave it out")
    return args


def distill_step(
    z: Tensor, generator: nn.Module, teacher: nn.Module, student: nn.Module, optimizer_G: Optimizer,
    optimizer_S: Optimizer, args: Namespace, autocast: Callable,
) -> dict[str, Tensor]:  # fmt: skip
    """One iteration of DAFL; returns the losses {name: 0-d tensor} before the update.

    Args:
        z: latents (N, nz).
        generator, student: in train mode. teacher: in eval mode, its weights frozen.
        args: oh, ie, a (weights), ie_log ("10" or "e"), T (temperature).
        autocast: the precision's context; the losses are computed outside it.
    """
    with autocast():
        x = generator(z)
        with features_of(teacher, args.a > 0) as t_features:
            t_logits = teacher(x)
        s_logits = student(x.detach())
    loss_oh = one_hot_loss(t_logits)  # Eq. 3
    loss_a = mean(activation_loss(t_features[0])) if args.a else t_logits.new_zeros(())  # Eq. 4
    loss_ie = information_entropy_loss(t_logits, 10 if args.ie_log == "10" else math.e)  # Eq. 5
    loss_G = args.oh * loss_oh + args.a * loss_a + args.ie * loss_ie  # Eq. 6
    loss_kd = kd_loss(s_logits, t_logits.detach(), args.T)  # Eq. 1
    optimizer_G.zero_grad()
    optimizer_S.zero_grad()
    (loss_G + loss_kd).backward()
    optimizer_G.step()
    optimizer_S.step()
    losses = {"loss_oh": loss_oh, "loss_a": loss_a, "loss_ie": loss_ie, "loss_G": loss_G, "loss_kd": loss_kd}
    return {k: v.detach() for k, v in losses.items()}


def rates_at(step: int, args: Namespace) -> tuple[float, float]:
    """The learning rates of generator and student in an iteration, from 0.

    Both rise linearly over --warmup iterations, from a ten-thousandth; then the student's falls at --milestones.
    """
    rise = 1.0 if step >= args.warmup - 1 else 1e-4 + (1 - 1e-4) * step / (args.warmup - 1)
    epoch = (step - args.warmup * args.as_published) // args.iterations
    return args.lr_G * rise, lr_at(epoch, args.lr_S, args.n_epochs, args.milestones) * rise


def move_statistics_twice(student: nn.Module) -> None:
    """Let a pass move the running statistics as far as two passes of the same batch did."""
    for m in student.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.momentum = 1 - (1 - m.momentum) ** 2


def train_epoch(
    epoch: int, s: Session, generator: nn.Module, optimizer_G: Optimizer, optimizer_S: Optimizer
) -> dict[str, Tensor]:
    """args.iterations steps; returns the mean of each loss."""
    args = s.args
    generator.train()
    s.student.train()
    total = {}
    for i in range(args.iterations):
        for optimizer, lr in zip((optimizer_G, optimizer_S), rates_at(epoch * args.iterations + i, args), strict=True):
            set_lr(optimizer, lr)
        z = share(generator.latents(args.batch_size, device=s.runtime.device))
        losses = distill_step(z, generator, s.teacher, s.student, optimizer_G, optimizer_S, args, s.runtime.autocast)
        total = {k: total.get(k, 0) + v for k, v in losses.items()}
        s.run.tick(losses["loss_kd"])
    return {k: v / args.iterations for k, v in total.items()}


def main(args: Namespace) -> dict:
    """Distil or evaluate; returns the content of result.json."""
    s = Session(args, papers.published(args))
    if s.result:
        return s.result
    if args.a:
        settle_features(s.teacher, trial_images(s.data, s.runtime.device), args.feature_layer)
    if args.as_published:
        move_statistics_twice(s.student)
    generator = s.generator("dafl", args.nz)
    set_folded(generator, not args.unfolded)
    optimizer_G = make_optimizer(args.optimizer_G, generator.parameters(), args.lr_G)
    optimizer_S = make_optimizer(args.optimizer_S, s.student.parameters(), args.lr_S, args.weight_decay)
    z_shown = generator.latents(64, device=s.runtime.device)
    states = dict(student=s.student, generator=generator, optimizer_G=optimizer_G, optimizer_S=optimizer_S)
    for epoch in s.epochs(args.iterations, args.batch_size, **states):
        losses = train_epoch(epoch, s, generator, optimizer_G, optimizer_S)
        s.record(losses, pictures=lambda: s.transform.denormalize(s.sample(generator, z_shown)))
    return s.finish(method="DAFL", generated_images=args.n_epochs * args.iterations * args.batch_size)


if __name__ == "__main__":
    cli(main, parse_args)
