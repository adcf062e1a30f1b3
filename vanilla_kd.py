"""Knowledge distillation (Hinton et al. 2015) on a transfer set: the tables' baselines.

    python vanilla_kd.py --dataset mnist --transfer_set original    # "KD original data", KD-ORI
    python vanilla_kd.py --dataset mnist --transfer_set noise       # "Random noise", RANDOM
    python vanilla_kd.py --dataset mnist --transfer_set svhn        # related or unrelated data,
    python vanilla_kd.py --dataset mnist --transfer_set my/images   #   KD-REL, KD-UNR
    python vanilla_kd.py --dataset mnist --alpha 0.9 --beta 0.1     # with labels: "KD"
    python vanilla_kd.py --dataset mnist --scratch                  # labels only: "Student"

The student learns alpha T^2 KL(teacher / T || student / T) + beta CE(student, label); labels exist
in the original set only, so --beta needs it. Noise is drawn anew from N(0, 1) in the space of the
teacher's normalised input, as many images an epoch as the original set has. Images of another set
are brought to the teacher's size and channels and normalised with its statistics.

Published setting (Fast-Datafree): SGD 0.1, momentum 0.9, weight decay 1e-4, batch 128, 200 epochs,
x0.1 at 60, 75 and 90 % of them. Presets (flags override them):
{presets}

Differences from the published code:
 1. The settings of the small grey sets are ours, as no paper names them.
 2. Which sets are related and unrelated is left to the user, where the tables do not name them.
"""

from pathlib import Path

import torch
import torch.nn.functional as F

from data import DATASETS, DataError, get_dataset, get_wild
from datafree import checkpoint
from datafree.augment import Transform
from datafree.log import Run, evaluate_checkpoint
from datafree.losses import kd_loss
from datafree.metrics import test_accuracy
from datafree.published import SCRATCH, describe, published
from datafree.runtime import (
    Parser,
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
from models import MODELS, agree_on_size, get_model

CIFAR = dict(
    teacher="wrn40_2",
    student="wrn16_1",
    optimizer="sgd",
    lr=0.1,
    weight_decay=1e-4,
    batch_size=128,
    n_epochs=200,
    milestones=[0.6, 0.75, 0.9],
)
GREY = dict(
    teacher="lenet5",
    student="lenet5_half",
    optimizer="adam",
    lr=1e-3,
    weight_decay=0.0,
    batch_size=256,
    n_epochs=10,
    milestones=[],
)
PRESETS = {
    "mnist": GREY,
    "fashion-mnist": GREY,
    "usps": GREY,
    "digits": GREY | dict(lr=2e-3, batch_size=64, n_epochs=40),
    "cifar10": CIFAR,
    "cifar100": CIFAR,
    "svhn": CIFAR,
    "folder": CIFAR,
    "caltech101": CIFAR | dict(teacher="resnet34_imagenet", student="resnet18_imagenet"),
    "imagenet": CIFAR | dict(teacher="resnet50_imagenet", student="resnet18_imagenet", batch_size=100),
    "celeba": CIFAR
    | dict(
        teacher="alexnet", student="alexnet_half", optimizer="adam", lr=1e-4, weight_decay=0.0, n_epochs=20
    ),
}
IN_MEMORY = 2**32  # bytes of decoded images above which a folder is read anew in each epoch
OTHER_DATA = ("KD-REL", "KD-UNR", "KD alternative data (USPS)", "KD alternative data (similar)")


def parse_args(argv=None):
    p = Parser(__doc__.format(presets=describe_presets(PRESETS)))
    p.add_argument(
        "--dataset", choices=DATASETS, default="digits", help="the teacher's data set (default: %(default)s)"
    )
    p.add_argument(
        "--transfer_set",
        default="original",
        metavar="SET",
        help="original, noise, another data set (" + ", ".join(DATASETS) + "), or a "
        "folder or zip of images at any depth (default: %(default)s)",
    )
    p.add_argument("--scratch", action="store_true", help="no teacher: the same as --alpha 0 --beta 1")
    p.add_argument(
        "--transfer_root", metavar="DIR", help="where that other data set is (default: --data_root)"
    )
    for role in ("teacher", "student"):
        p.add_argument(
            f"--{role}",
            choices=sorted(MODELS),
            metavar="NAME",
            help="one of " + ", ".join(sorted(MODELS)) + " (default: see above)"
            if role == "teacher"
            else "the same names (default: see above)",
        )
    p.add_argument(
        "--teacher_ckpt",
        "--teacher_dir",
        metavar="FILE",
        help="the teacher's weights (default: <checkpoints>/<dataset>-<teacher>.pt)",
    )
    p.add_argument(
        "--checkpoints",
        default="./checkpoints",
        metavar="DIR",
        help="where teacher_train.py left its weights (default: %(default)s)",
    )
    p.add_argument(
        "--alpha",
        type=number(float, 0),
        default=1.0,
        help="weight of the teacher's answers (default: %(default)s)",
    )
    p.add_argument(
        "--beta", type=number(float, 0), default=0.0, help="weight of the labels (default: %(default)s)"
    )
    p.add_argument(
        "--T", type=number(float, 0, above=True), default=4.0, help="temperature (default: %(default)s)"
    )
    p.add_argument("--optimizer", choices=("adam", "adamw", "sgd"), help="(default: see above)")
    for flag, kind in (
        ("lr", number(float, 0, above=True)),
        ("weight_decay", number(float, 0)),
        ("batch_size", number(int, 2)),
        ("n_epochs", number(int, 1)),
    ):
        p.add_argument(f"--{flag}", type=kind, metavar="X", help="(default: see above)")
    p.add_argument(
        "--milestones",
        type=number(float, 0, 1),
        nargs="*",
        metavar="FRACTION",
        help="lr x 0.1 at these fractions of the epochs (default: see above)",
    )
    p.add_argument("--img_size", type=number(int, 8), help="(default: the model's or data's)")
    add_run_arguments(p)
    args = p.parse_args(argv)
    args.argv = argv
    fill_defaults(args, PRESETS[args.dataset])
    args.img_size = p.image_size((args.teacher, args.student), args.img_size, agree_on_size)
    if args.scratch:
        args.alpha, args.beta = 0.0, 1.0
    if args.beta and args.transfer_set != "original":
        p.error("--beta weighs labels, which only --transfer_set original has")
    if not args.alpha and not args.beta:
        p.error("--alpha and --beta are both 0: nothing would be learnt")
    return args


class Noise:
    """Batches of N(0, 1) images (N, C, H, W) on the device, without labels."""

    def __init__(self, n, batch_size, shape, device):
        self.n, self.batch_size, self.shape, self.device = n, batch_size, shape, device

    def __len__(self):
        return -(-self.n // self.batch_size)

    def __iter__(self):
        for _ in range(len(self)):
            x = torch.randn(self.batch_size, *self.shape, device=self.device)
            yield x.contiguous(memory_format=torch.channels_last), None


def train_epoch(teacher, student, optimizer, batches, transform, args, runtime, tick):
    """One pass over the transfer set; returns the mean loss. `transform` is None for noise."""
    student.train()
    total = torch.zeros((), device=runtime.device)
    for images, y in batches:
        x = images if transform is None else transform(images, train=True)
        with runtime.autocast():
            s_logits = student(x)
            with torch.no_grad():
                t_logits = teacher(x) if args.alpha else None
        loss = args.alpha * kd_loss(s_logits, t_logits, args.T) if args.alpha else 0.0
        if args.beta:
            loss = loss + args.beta * F.cross_entropy(s_logits.float(), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        total += loss.detach()
        tick(loss.detach())
    return total / len(batches)


def transfer_images(args, data):
    """The split of images that --transfer_set names, other than noise; a folder's undecoded."""
    if args.transfer_set == "original":
        return data.train
    return get_wild(args.transfer_set, args.transfer_root or args.data_root, data.img_size, data.channels)[0]


def main(args):
    """Distil or evaluate; returns the content of result.json."""
    runtime = setup(args)
    data = get_dataset(args.dataset, args.data_root, img_size=args.img_size, mean=args.mean, std=args.std).to(
        runtime.device
    )
    student = get_model(args.student, data.num_classes, data.channels)
    taught = args.alpha > 0
    source = Path(args.transfer_set).name if taught else "scratch"
    name = f"vanilla_kd-{args.dataset}-{args.teacher}-{args.student}-{source}"
    if args.evaluate_only:
        return evaluate_checkpoint(args, name, student, args.student, data, runtime)
    images = None if args.transfer_set == "noise" else transfer_images(args, data)
    teacher, card = checkpoint.load_teacher(args, get_model, data) if taught else (None, None)
    runtime.place(student, *([teacher] if taught else []))
    transform = Transform.of(data, card)
    if args.transfer_set == "noise":
        shape = (data.channels, data.img_size, data.img_size)
        batches = Noise(len(data.train), args.batch_size, shape, runtime.device)
        transfer = None
    else:
        transfer, images = transform, images.held(IN_MEMORY).to(runtime.device)
        batches = images.batches(
            args.batch_size, shuffle=True, device=runtime.device, drop_last=len(images) % args.batch_size == 1
        )
    run = Run(args, name, runtime)
    optimizer = make_optimizer(args.optimizer, student.parameters(), args.lr, args.weight_decay)
    start = run.start(student=student, optimizer=optimizer)
    teacher_accuracy = test_accuracy(teacher, data, transform, runtime) if taught else None
    methods = {
        "scratch": SCRATCH,
        "original": ("KD original data", "KD-ORI", "KD"),
        "noise": ("Random noise (normal distribution)", "RANDOM"),
    }.get(source, OTHER_DATA)
    cells = published(args.dataset, methods, args.teacher, args.student)
    run.log(
        (f"teacher {args.teacher}: {teacher_accuracy:.2f} %; " if taught else "")
        + f"student {args.student}; transfer set {args.transfer_set}; published: "
        + describe(cells)
    )
    run.progress([len(batches)] * args.n_epochs, args.batch_size)
    card = checkpoint.card(args.student, data, transform)
    for epoch in range(start, args.n_epochs):
        set_lr(optimizer, lr_at(epoch, args.lr, args.n_epochs, args.milestones))
        loss = train_epoch(teacher, student, optimizer, batches, transfer, args, runtime, run.tick)
        accuracy = test_accuracy(student, data, transform, runtime)
        run.end_epoch(epoch, accuracy, {"loss": loss}, student, card)
    return run.finish(
        method=f"KD ({source})" if taught else "Student",
        dataset=data.name,
        teacher=args.teacher,
        student=args.student,
        teacher_accuracy=teacher_accuracy,
        published=cells,
        fingerprint=data.fingerprint,
    )


if __name__ == "__main__":
    cli(main, parse_args, DataError)
