"""DAFL: Data-Free Learning of Student Networks (Chen et al., ICCV 2019), Tables 1 and 3.

    python teacher_train.py --dataset mnist --model lenet5
    python DAFL_train.py --dataset mnist                   # 98.20 %: LeNet-5 -> LeNet-5-HALF
    python DAFL_train.py --dataset mnist --teacher hintonnet --student hintonnet_half    # 97.91 %
    python DAFL_train.py --dataset cifar10                 # 92.22 %: ResNet-34 -> ResNet-18
    python DAFL_train.py --dataset digits                  # embedded data: two minutes on two cores

A generator G makes images that the teacher N_T takes for real ones, and the student N_S learns
the teacher's answers on them; no image of the training data is read. With x = G(z), z ~ N(0, I):

    L_oh = H(N_T(x), argmax N_T(x))        Eq. 3   the teacher is confident,
    L_a  = -mean |f_T(x)|                  Eq. 4   its features fire,
    L_ie = sum_c p_c log p_c, p = mean softmax N_T(x)   Eq. 5   and classes are equally frequent
    L_G  = oh L_oh + a L_a + ie L_ie       Eq. 6
    L_KD = KL(N_T(x) || N_S(x))            Eq. 1   x detached from the generator

One backward pass of L_G + L_KD serves both optimisers. An epoch is 120 iterations, then a test.

Published settings; the defaults of these flags are the data set's:
{presets}

--variant mmrazor replaces some of them by MMRazor's:
{mmrazor}

Differences from the published code:
 1. The learning rate of SGD falls at 40 % and 80 % of --n_epochs (800 and 1600 of 2000).
 2. L_ie has the code's logarithm to base 10, which its weights belong to, not the paper's natural
    one: --ie_log e takes that.
 3. Upsampling and the convolution behind it run as one transposed convolution (exact), and
    networks in bfloat16 where the hardware has it (--precision fp32 turns that off). MNIST's
    preset is float32: with its lr_G of 0.2 a bfloat16 run lost its generator in epoch 17, the
    float32 run did not (README, Results). --precision auto is 1.8 times faster there.
 4. Caltech-101's setting is CIFAR-10's with smaller batches (DFAD, Table 2, names none), and so
    is ImageNet's, which no table has. The digits' is ours: without L_a, at temperature 4 and with
    a slow generator the student ends several points higher there. CelebA's number of epochs is
    ours too, as the paper names none.
"""

import math

import torch

from data import DATASETS, DataError, get_dataset
from datafree import checkpoint
from datafree.augment import Transform
from datafree.log import Run, evaluate_checkpoint
from datafree.losses import activation_loss, information_entropy_loss, kd_loss, one_hot_loss
from datafree.metrics import test_accuracy
from datafree.published import describe, published
from datafree.runtime import (
    Parser,
    UsageError,
    add_run_arguments,
    cli,
    describe_presets,
    fill_defaults,
    lr_at,
    make_optimizer,
    number,
    set_lr,
    setup,
)
from models import MODELS, agree_on_size, get_generator, get_model, set_folded

MNIST = dict(
    teacher="lenet5",
    student="lenet5_half",
    batch_size=512,
    n_epochs=200,
    optimizer_G="adam",
    lr_G=0.2,
    optimizer_S="adam",
    lr_S=2e-3,
    weight_decay=0.0,
    milestones=[],
    warmup=0,
    nz=100,
    oh=1.0,
    ie=5.0,
    a=0.1,
    T=1.0,
    precision="fp32",
)
CIFAR10 = dict(
    teacher="resnet34",
    student="resnet18",
    batch_size=1024,
    n_epochs=2000,
    optimizer_G="adam",
    lr_G=0.02,
    optimizer_S="sgd",
    lr_S=0.1,
    weight_decay=5e-4,
    milestones=[0.4, 0.8],
    warmup=0,
    nz=1000,
    oh=0.05,
    ie=5.0,
    a=0.01,
    T=1.0,
    precision="auto",
)
PRESETS = {
    "mnist": MNIST,
    "fashion-mnist": MNIST,
    "usps": MNIST,
    "cifar10": CIFAR10,
    "cifar100": CIFAR10 | dict(oh=0.5, ie=20.0, a=0.1),
    "svhn": CIFAR10,
    "celeba": MNIST
    | dict(teacher="alexnet", student="alexnet_half", lr_G=2e-3, lr_S=2e-4, oh=2.0, precision="auto"),
    "caltech101": CIFAR10 | dict(teacher="resnet34_imagenet", student="resnet18_imagenet", batch_size=64),
    "imagenet": CIFAR10 | dict(teacher="resnet50_imagenet", student="resnet18_imagenet", batch_size=64),
    "digits": MNIST
    | dict(batch_size=128, n_epochs=10, lr_G=5e-4, milestones=[0.6, 0.85], a=0.0, T=4.0, precision="auto"),
    "folder": CIFAR10,
}
MMRAZOR = dict(
    batch_size=2048,
    n_epochs=250,
    optimizer_G="adamw",
    lr_G=1e-3,
    optimizer_S="adamw",
    lr_S=0.1,
    weight_decay=0.01,
    milestones=[0.4, 0.8],
    warmup=500,
    T=6.0,
)


def parse_args(argv=None):
    p = Parser(
        __doc__.format(presets=describe_presets(PRESETS), mmrazor=describe_presets({"mmrazor": MMRAZOR}))
    )
    p.add_argument(
        "--dataset",
        choices=DATASETS,
        default="digits",
        help="the teacher's data set; only its test images are used (default: %(default)s)",
    )
    p.add_argument(
        "--variant", choices=("dafl", "mmrazor"), default="dafl", help="whose setting (default: %(default)s)"
    )
    for role in ("teacher", "student"):
        p.add_argument(
            f"--{role}",
            choices=sorted(MODELS),
            metavar="NAME",
            help="(default: the data set's, see above) "
            + ("one of " + ", ".join(sorted(MODELS)) if role == "teacher" else "the same names"),
        )
    p.add_argument(
        "--teacher_ckpt",
        "--teacher_dir",
        metavar="FILE",
        help="the teacher's weights: a file, or a run folder (default: <checkpoints>/<dataset>-<teacher>.pt)",
    )
    p.add_argument(
        "--checkpoints",
        default="./checkpoints",
        metavar="DIR",
        help="where teacher_train.py left its weights (default: %(default)s)",
    )
    positive, weight = number(float, 0, above=True), number(float, 0)
    for flag, kind, text in (
        ("batch_size", number(int, 2), "images per iteration"),
        ("n_epochs", number(int, 1), "epochs of --iterations"),
        ("lr_G", positive, "learning rate of the generator"),
        ("lr_S", positive, "learning rate of the student"),
        ("weight_decay", weight, "of the student"),
        ("warmup", number(int, 0), "iterations with a linearly rising learning rate"),
        ("oh", weight, "weight of L_oh"),
        ("ie", weight, "weight of L_ie"),
        ("a", weight, "weight of L_a"),
        ("T", positive, "temperature of L_KD"),
    ):
        p.add_argument(f"--{flag}", type=kind, metavar="X", help=f"{text} (default: see above)")
    for flag in ("optimizer_G", "optimizer_S"):
        p.add_argument(f"--{flag}", choices=("adam", "adamw", "sgd"), help="(default: see above)")
    p.add_argument(
        "--milestones",
        type=number(float, 0, 1),
        nargs="*",
        metavar="FRACTION",
        help="lr_S x 0.1 at these fractions of the epochs (default: see above)",
    )
    p.add_argument(
        "--nz", "--latent_dim", type=number(int, 1), metavar="X", help="length of z (default: see above)"
    )
    p.add_argument(
        "--iterations", type=number(int, 1), default=120, help="iterations of an epoch (default: %(default)s)"
    )
    p.add_argument(
        "--ie_log", choices=("10", "e"), default="10", help="base of L_ie's logarithm (default: %(default)s)"
    )
    p.add_argument("--img_size", type=number(int, 8), help="(default: the model's or data's)")
    p.add_argument("--attribute", help="CelebA: the attribute (default: the most balanced)")
    p.add_argument(
        "--sample_every",
        type=number(int, 0),
        default=10,
        metavar="N",
        help="write a grid of generated images each N epochs, 0 for never (default: %(default)s)",
    )
    p.add_argument(
        "--unfolded",
        action="store_true",
        help="run upsampling and convolution apart, as published, to compare",
    )
    add_run_arguments(p)
    p.set_defaults(precision=None)
    args = p.parse_args(argv)
    args.argv = argv
    defaults = PRESETS[args.dataset] | (MMRAZOR if args.variant == "mmrazor" else {})
    fill_defaults(args, defaults)
    if not args.oh and not args.ie and not args.a:
        p.error("--oh, --ie and --a are all 0: nothing would teach the generator")
    args.img_size = p.image_size((args.teacher, args.student), args.img_size, agree_on_size)
    return args


def distill_step(z, generator, teacher, student, optimizer_G, optimizer_S, args, autocast):
    """One iteration of DAFL; returns the losses {name: 0-d tensor} before the update.

    Args:
        z: latents (N, nz).
        generator, student: in train mode. teacher: in eval mode, its weights frozen.
        args: oh, ie, a (weights), ie_log ("10" or "e"), T (temperature).
        autocast: the precision's context; the losses are computed outside it.
    """
    with autocast():
        x = generator(z)
        t_logits, t_features = teacher(x, return_features=True)
        s_logits = student(x.detach())
    loss_oh = one_hot_loss(t_logits)  # Eq. 3
    loss_a = activation_loss(t_features)  # Eq. 4
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


def train_epoch(epoch, generator, teacher, student, optimizer_G, optimizer_S, args, runtime, tick):
    """args.iterations steps; returns the mean of each loss."""
    generator.train()
    student.train()
    lr_S = lr_at(epoch, args.lr_S, args.n_epochs, args.milestones)
    total = {}
    for i in range(args.iterations):
        step = epoch * args.iterations + i
        rise = min(1.0, (step + 1) / args.warmup) if args.warmup else 1.0
        set_lr(optimizer_S, lr_S * rise)
        set_lr(optimizer_G, args.lr_G * rise)
        z = generator.latents(args.batch_size, device=runtime.device)
        losses = distill_step(
            z, generator, teacher, student, optimizer_G, optimizer_S, args, runtime.autocast
        )
        total = {k: total.get(k, 0) + v for k, v in losses.items()}
        tick(losses["loss_kd"])
    return {k: v / args.iterations for k, v in total.items()}


def main(args):
    """Distil or evaluate; returns the content of result.json."""
    runtime = setup(args)
    data = get_dataset(
        args.dataset,
        args.data_root,
        img_size=args.img_size,
        mean=args.mean,
        std=args.std,
        attribute=args.attribute,
    ).to(runtime.device)
    student = get_model(args.student, data.num_classes, data.channels)
    name = f"DAFL_train-{args.dataset}-{args.teacher}-{args.student}"
    name += "" if args.variant == "dafl" else f"-{args.variant}"
    if args.evaluate_only:
        return evaluate_checkpoint(args, name, student, args.student, data, runtime)
    teacher, card = checkpoint.load_teacher(args, get_model, data)
    try:
        generator = get_generator("dafl", args.nz, data.img_size, data.channels)
    except ValueError as error:
        raise UsageError(f"{error}: choose another --img_size") from error
    set_folded(generator, not args.unfolded)
    runtime.place(teacher, student, generator)
    transform = Transform.of(data, card)
    run = Run(args, name, runtime)
    optimizer_G = make_optimizer(args.optimizer_G, generator.parameters(), args.lr_G)
    optimizer_S = make_optimizer(args.optimizer_S, student.parameters(), args.lr_S, args.weight_decay)
    z_shown = generator.latents(64, device=runtime.device)
    start = run.start(student=student, generator=generator, optimizer_G=optimizer_G, optimizer_S=optimizer_S)
    teacher_accuracy = test_accuracy(teacher, data, transform, runtime)
    cells = published(args.dataset, ("DAFL",), args.teacher, args.student)
    run.log(
        f"teacher {args.teacher}: {teacher_accuracy:.2f} %; student {args.student}; "
        f"{runtime.precision} on {runtime.device}; published: {describe(cells)}"
    )
    run.progress([args.iterations] * args.n_epochs, args.batch_size)
    card = checkpoint.card(args.student, data, transform)
    for epoch in range(start, args.n_epochs):
        losses = train_epoch(
            epoch, generator, teacher, student, optimizer_G, optimizer_S, args, runtime, run.tick
        )
        accuracy = test_accuracy(student, data, transform, runtime)
        run.end_epoch(epoch, accuracy, losses, student, card)
        last = epoch + 1 == args.n_epochs
        if args.sample_every and (last or (epoch + 1) % args.sample_every == 0):
            run.images(f"epoch{epoch + 1:04}", show(generator, z_shown, transform))
    return run.finish(
        method="DAFL",
        dataset=data.name,
        teacher=args.teacher,
        student=args.student,
        teacher_accuracy=teacher_accuracy,
        published=cells,
        generated_images=args.n_epochs * args.iterations * args.batch_size,
        fingerprint=data.fingerprint,
    )


@torch.no_grad()
def show(generator, z, transform):
    """Images of the latents z in 0..1, by the generator's running statistics."""
    training = generator.training
    generator.eval()
    x = transform.denormalize(generator(z).float())
    generator.train(training)
    return x


if __name__ == "__main__":
    cli(main, parse_args, DataError)
