"""DFND: Learning Student Networks in the Wild (Chen et al., CVPR 2021), Table 1.

    python teacher_train.py --dataset cifar10 --model resnet34 --recipe dafl
    python DFND_train.py --dataset cifar10 --wild my/imagenet     # 94.02 %: ResNet-34 -> ResNet-18
    python DFND_train.py --dataset cifar100 --wild my/imagenet                           # 76.35 %
    python DFND_train.py --dataset cifar10 --wild my/imagenet --selection random         # 91.25 %
    python DFND_train.py --dataset digits --wild mnist     # embedded teacher, another set's images

Any large set of unlabelled images serves instead of the training data. The teacher N_T looks at
all of them and keeps those that it is surest about; the student N_S learns its answers x -> N_T(x)
on these, and, as some of its labels are wrong, a noise-adaptation matrix Q beside it:

    value(x) = H(N_T(x), argmax N_T(x))                    the --num_select lowest are kept
    L_KD = T^2 KL(N_T(x) / T || N_S(x) / T)                T = 4
    Q = the teacher's accuracy on the diagonal; the rest of a row is a learnt softmax over the
        other classes: row c says as what the teacher labels an image that is a c
    L_noise = -log (softmax(N_S(x)) Q)_y,  y = argmax N_T(x)
    L_S  = L_KD + L_noise

Wild images are brought to the teacher's size and channels and normalised with its statistics. The
scan of the wild set is kept in <out>/wild_scans/ and used again for the same teacher and images;
files that cannot be read are counted and left out. Of a run's folder, samples/wild_best.png and
wild_worst.png show what the teacher is most and least sure of, wild_values.png all values.

Published settings; the defaults of these flags are the data set's. The student sees about 20
million images: --n_epochs is int(40000 / num_select * 512) - 1, unless named here:
{presets}

Differences from the published code, which cannot run as it stands:
 1. It normalises wild images with ImageNet's statistics for a teacher trained with other ones:
    --wild_stats imagenet.
 2. The accuracy in Q comes from the teacher's file (published: 0.9523 for CIFAR-10 and 0.7774 for
    CIFAR-100), from --teacher_acc, or is estimated by the teacher's mean confidence.
 3. The networks run in bfloat16 where the hardware has it, the scan included (--precision fp32).
 4. Settings of data sets other than CIFAR are ours.
"""

import hashlib
import math
import time
from pathlib import Path

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import nn
from tqdm import tqdm

from data import DATASETS, DataError, get_dataset, get_wild, imagenet_statistics
from datafree import checkpoint
from datafree.augment import Transform
from datafree.fold import fold_batch_norm
from datafree.log import Run, evaluate_checkpoint
from datafree.losses import kd_loss, wide
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
from models import MODELS, agree_on_size, get_model

CIFAR = dict(
    teacher="resnet34",
    student="resnet18",
    num_select=600_000,
    batch_size=256,
    optimizer="sgd",
    lr=0.1,
    weight_decay=5e-4,
)
GREY = CIFAR | dict(
    teacher="lenet5",
    student="lenet5_half",
    num_select=20_000,
    optimizer="adam",
    lr=2e-3,
    weight_decay=0.0,
    n_epochs=30,
)
PRESETS = {
    "mnist": GREY,
    "fashion-mnist": GREY,
    "usps": GREY,
    "digits": GREY | dict(num_select=5_000, batch_size=128, n_epochs=20),
    "cifar10": CIFAR,
    "cifar100": CIFAR,
    "svhn": CIFAR,
    "folder": CIFAR,
    "caltech101": CIFAR | dict(teacher="resnet34_imagenet", student="resnet18_imagenet", batch_size=64),
    "imagenet": CIFAR | dict(teacher="resnet50_imagenet", student="resnet18_imagenet", batch_size=64),
    "celeba": CIFAR
    | dict(
        teacher="alexnet", student="alexnet_half", optimizer="adam", lr=1e-4, weight_decay=0.0, batch_size=128
    ),
}
ROWS = {"lowest": "DFND", "random": "Random wild images", "all": "all wild images"}


def parse_args(argv=None):
    p = Parser(__doc__.format(presets=describe_presets(PRESETS)))
    p.add_argument(
        "--dataset",
        choices=DATASETS,
        default="digits",
        help="the teacher's; only its test images are used (default: %(default)s)",
    )
    p.add_argument(
        "--wild",
        metavar="SET",
        help="the unlabelled images: a folder (any depth), a "
        "zip, or the train images of one of " + ", ".join(DATASETS),
    )
    p.add_argument("--wild_root", metavar="DIR", help="where that data set is (default: --data_root)")
    p.add_argument(
        "--wild_stats",
        choices=("teacher", "imagenet"),
        default="teacher",
        help="whose mean and standard deviation normalise them (default: %(default)s)",
    )
    p.add_argument(
        "--selection",
        choices=ROWS,
        default="lowest",
        help="which of them teach: the "
        "--num_select of lowest value, as many at random, or all (default: %(default)s)",
    )
    p.add_argument("--num_select", type=number(int, 2), metavar="N", help="(default: see above)")
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
        "--teacher_acc",
        type=number(float, 0, 1, above=True),
        metavar="FRACTION",
        help="the teacher's accuracy, for Q (default: as its file says)",
    )
    p.add_argument(
        "--T", type=number(float, 0, above=True), default=4.0, help="temperature (default: %(default)s)"
    )
    p.add_argument("--optimizer", choices=("adam", "adamw", "sgd"), help="(default: see above)")
    positive = number(float, 0, above=True)
    for flag, kind in (
        ("lr", positive),
        ("weight_decay", number(float, 0)),
        ("batch_size", number(int, 2)),
        ("n_epochs", number(int, 1)),
    ):
        p.add_argument(f"--{flag}", type=kind, metavar="X", help="(default: see above)")
    p.add_argument(
        "--lr_Q",
        type=positive,
        default=1e-3,
        metavar="X",
        help="learning rate of Q, by Adam (default: %(default)s)",
    )
    p.add_argument(
        "--milestones",
        type=number(float, 0, 1),
        nargs="*",
        default=[0.4, 0.8],
        metavar="FRACTION",
        help="lr x 0.1 at these fractions of the epochs (default: 0.4 0.8)",
    )
    p.add_argument(
        "--memory",
        type=positive,
        default=4.0,
        metavar="GIB",
        help="keep the selected "
        "images on the device up to this size, else decode them anew in each epoch "
        "(default: %(default)s)",
    )
    p.add_argument("--img_size", type=number(int, 8), help="(default: the model's or data's)")
    add_run_arguments(p)
    args = p.parse_args(argv)
    args.argv = argv
    fill_defaults(args, {"n_epochs": None} | PRESETS[args.dataset])
    args.img_size = p.image_size((args.teacher, args.student), args.img_size, agree_on_size)
    if args.wild is None and not args.evaluate_only:
        p.error("--wild is missing: name a folder of images, a zip or a data set")
    return args


def max_epoch(num_select):
    """The published length of training: about 80,000 batches of 256, whatever is selected.

    Epochs are counted from 1 to one less than this.
    """
    return max(2, int(40000 / num_select * 512))


class NoiseAdaptation(nn.Module):
    """The matrix Q and the loss in which it stands (DFND, Sec. 3.2).

    Args:
        num_classes: n. accuracy: the teacher's, in 0..1.
    """

    def __init__(self, num_classes, accuracy):
        super().__init__()
        self.accuracy = accuracy
        self.logits = nn.Parameter(torch.zeros(num_classes, num_classes - 1))

    def log_matrix(self):
        """log Q (n, n): row = what the student means, column = what the teacher says.

        Row c is the accuracy at column c and (1 - accuracy) softmax(logits[c]) in the others, so
        that every row sums to 1.
        """
        n = len(self.logits)
        wrong = wide(self.logits).log_softmax(1) + log(1 - self.accuracy)
        # The parameters of a row fill its columns in order and leave out the diagonal: n + 1
        # places further along the flattened matrix comes the next diagonal entry.
        right = wrong.new_full((n - 1, 1), log(self.accuracy))
        rows = torch.cat([right, wrong.reshape(n - 1, n)], 1).flatten()
        return torch.cat([rows, right[0]]).view(n, n)

    def forward(self, s_logits, t_logits):
        """L_noise of logits (N, n): mean -log (softmax(s) Q)_y at the teacher's arg-max y."""
        log_s = wide(s_logits).log_softmax(1)
        y = t_logits.argmax(1)
        return -(log_s + self.log_matrix().T[y]).logsumexp(1).mean()


def log(x):
    return math.log(x) if x > 0 else -math.inf


def value_of(t_logits):
    """Cross-entropy (N,) of the teacher with its own arg-max: low where it is sure."""
    return 0 - wide(t_logits).log_softmax(1).amax(1)  # not -0.0


def train_epoch(teacher, student, noise, optimizer_S, optimizer_Q, batches, transform, args, runtime, tick):
    """One pass over the selected images; returns the mean of each loss."""
    student.train()
    total = torch.zeros(2, device=runtime.device)
    for images, _ in batches:
        x = transform(images, train=True)
        with runtime.autocast():
            s_logits = student(x)
            with torch.no_grad():
                t_logits = teacher(x)
        loss_kd = kd_loss(s_logits, t_logits, args.T)
        loss_noise = noise(s_logits, t_logits)
        optimizer_S.zero_grad()
        optimizer_Q.zero_grad()
        (loss_kd + loss_noise).backward()
        optimizer_S.step()
        optimizer_Q.step()
        total += torch.stack([loss_kd.detach(), loss_noise.detach()])
        tick(loss_kd.detach())
    return dict(zip(("loss_kd", "loss_noise"), total / len(batches), strict=True))


@torch.no_grad()
def scan(teacher, split, transform, runtime, batch_size=512):
    """The teacher's value of every image of a split, in order.

    Returns:
        {"values" float32 (N,), NaN for unreadable files, "labels" int16 (N,): the teacher's,
        "broken": the number of unreadable files, "example": one of them and why, or None}.
    """
    n = len(split)
    values, labels = torch.empty(n), torch.empty(n, dtype=torch.int16)
    broken, done = [], 0
    with tqdm(total=n, unit=" images", unit_scale=True, desc="scanning the wild set", disable=None) as bar:
        for images, unreadable in split.scan(batch_size, runtime.device):
            with runtime.autocast():
                t_logits = teacher(transform(images))
            rows = slice(done, done + len(images))
            values[rows], labels[rows] = value_of(t_logits).cpu(), t_logits.argmax(1).cpu().short()
            broken += unreadable
            done += len(images)
            bar.update(len(images))
    if broken:
        values[[row for row, _ in broken]] = math.nan
    return {
        "values": values,
        "labels": labels,
        "broken": len(broken),
        "example": broken[0][1] if broken else None,
    }


def cached_scan(teacher, split, fingerprint, transform, runtime, folder, log):
    """`scan`, or what is left of an earlier one of the same teacher and images in `folder`."""
    key = hashlib.sha256(
        repr((fingerprint, len(split), transform.mean, transform.std, runtime.precision)).encode()
    )
    for name, tensor in teacher.state_dict().items():
        key.update(name.encode())
        key.update(tensor.detach().cpu().contiguous().numpy())
    path = Path(folder) / f"{key.hexdigest()[:16]}.pt"
    if path.exists():
        log(f"wild set: {len(split):,} images, scanned before ({path})")
        return checkpoint.read(path)
    started = time.perf_counter()
    found = scan(fold_batch_norm(teacher), split, transform, runtime)
    seconds = time.perf_counter() - started
    checkpoint.save(found, path)
    log(f"wild set: {len(split):,} images scanned in {seconds:.0f} s ({len(split) / seconds:,.0f}/s): {path}")
    return found


def select(found, args):
    """Rows of the images that teach, int64 (n,): the lowest values or all, in their order, or
    random ones.

    Raises:
        UsageError: fewer images can be read than are to be selected.
    """
    values = found["values"]
    readable = (~values.isnan()).nonzero().flatten()
    wanted = len(readable) if args.selection == "all" else args.num_select
    if len(readable) < max(2, wanted):
        raise UsageError(
            f"wild set {args.wild} has {len(readable):,} images that can be read, "
            f"fewer than --num_select {args.num_select:,}: lower it, or give more "
            "images"
        )
    if args.selection == "random":
        generator = torch.Generator().manual_seed(args.seed)
        return readable[torch.randperm(len(readable), generator=generator)[:wanted]]
    return readable[values[readable].argsort(stable=True)[:wanted]]


def report(run, split, found, rows, class_names):
    """Say what was selected; wild_values.png, and grids of the surest and unsurest images."""
    values = found["values"]
    order = values.argsort(stable=True)
    order = order[: len(order) - found["broken"]]
    counts = found["labels"][rows].long().bincount(minlength=len(class_names)).tolist()
    levels = values[order][torch.linspace(0, len(order) - 1, 5).long()].tolist()
    if found["broken"]:
        run.log(f"left out: {found['broken']:,} files that cannot be read, such as {found['example']}")
    run.log(
        "cross-entropy with the teacher's own label: "
        + ", ".join(
            f"{share} % below {level:.2g}" for share, level in zip((0, 25, 50, 75, 100), levels, strict=True)
        )
    )
    run.log(
        f"selected {len(rows):,} of {len(order):,}; by the teacher's label: "
        + ", ".join(f"{name} {count:,}" for name, count in zip(class_names[:20], counts, strict=False))
        + (" ..." if len(class_names) > 20 else "")
    )
    for name, shown in (("wild_best", order[:64]), ("wild_worst", order.flip(0)[:64])):
        images = split.take(shown).batches(len(shown), device="cpu")
        run.images(name, next(iter(images))[0].float() / 255)
    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot(
        xlabel="cross-entropy of the teacher with its own label", ylabel="images", yscale="log"
    )
    edges = torch.linspace(0, values[order[-1]].item() or 1.0, 51).tolist()
    axes.hist(values[order].numpy(), edges, label="wild set")
    axes.hist(values[rows].numpy(), edges, label="selected")
    axes.legend()
    figure.savefig(run.folder / "wild_values.png", dpi=120)


def main(args):
    """Select and distil, or evaluate; returns the content of result.json."""
    runtime = setup(args)
    data = get_dataset(args.dataset, args.data_root, img_size=args.img_size, mean=args.mean, std=args.std).to(
        runtime.device
    )
    student = get_model(args.student, data.num_classes, data.channels)
    name = f"DFND_train-{args.dataset}-{args.teacher}-{args.student}"
    name += "" if args.selection == "lowest" else f"-{args.selection}"
    if args.evaluate_only:
        return evaluate_checkpoint(args, name, student, args.student, data, runtime)
    teacher, card = checkpoint.load_teacher(args, get_model, data)
    split, fingerprint = get_wild(args.wild, args.wild_root or args.data_root, data.img_size, data.channels)
    if args.selection != "all" and len(split) < args.num_select:
        raise UsageError(
            f"wild set {args.wild} has {len(split):,} images, fewer than --num_select "
            f"{args.num_select:,}: lower it, or give more images"
        )
    runtime.place(teacher, student)
    transform = Transform.of(data, card)
    wild_transform = transform
    if args.wild_stats == "imagenet":
        wild_transform = Transform(*imagenet_statistics(data.channels), data.padding, data.flip)
    run = Run(args, name, runtime)
    found = cached_scan(
        teacher, split, fingerprint, wild_transform, runtime, Path(args.out) / "wild_scans", run.log
    )
    rows = select(found, args)
    report(run, split, found, rows, data.class_names)
    images = split.take(rows).held(args.memory * 2**30).to(runtime.device)
    batches = images.batches(
        args.batch_size, shuffle=True, device=runtime.device, drop_last=len(images) % args.batch_size == 1
    )
    accuracy = args.teacher_acc or card.get("accuracy", math.nan) / 100
    if math.isnan(accuracy):
        accuracy = (-found["values"][rows]).exp().mean().item()
        run.log(
            f"the teacher's file does not say how good it is: Q takes its mean confidence, "
            f"{accuracy:.4f} (--teacher_acc sets it)"
        )
    noise = NoiseAdaptation(data.num_classes, accuracy).to(runtime.device)
    optimizer_S = make_optimizer(args.optimizer, student.parameters(), args.lr, args.weight_decay)
    optimizer_Q = make_optimizer("adam", noise.parameters(), args.lr_Q)
    n_epochs = args.n_epochs or max_epoch(len(rows)) - 1
    start = run.start(student=student, noise=noise, optimizer_S=optimizer_S, optimizer_Q=optimizer_Q)
    teacher_accuracy = test_accuracy(teacher, data, transform, runtime)
    quick_teacher = fold_batch_norm(teacher)
    cells = published(args.dataset, (ROWS[args.selection],), args.teacher, args.student)
    run.log(
        f"teacher {args.teacher}: {teacher_accuracy:.2f} %, {accuracy:.4f} in Q; student "
        f"{args.student}; published: {describe(cells)}"
    )
    run.progress([len(batches)] * n_epochs, args.batch_size)
    student_card = checkpoint.card(args.student, data, transform)
    for epoch in range(start, n_epochs):
        set_lr(optimizer_S, lr_at(epoch + 1, args.lr, n_epochs + 1, args.milestones))
        losses = train_epoch(
            quick_teacher,
            student,
            noise,
            optimizer_S,
            optimizer_Q,
            batches,
            wild_transform,
            args,
            runtime,
            run.tick,
        )
        run.end_epoch(epoch, test_accuracy(student, data, transform, runtime), losses, student, student_card)
    return run.finish(
        method=ROWS[args.selection],
        dataset=data.name,
        teacher=args.teacher,
        student=args.student,
        teacher_accuracy=teacher_accuracy,
        published=cells,
        wild=args.wild,
        wild_images=len(split),
        wild_broken=found["broken"],
        selected=len(rows),
        accuracy_in_Q=accuracy,
        wild_fingerprint=fingerprint,
        fingerprint=data.fingerprint,
    )


if __name__ == "__main__":
    cli(main, parse_args, DataError)
