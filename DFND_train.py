"""DFND: Learning Student Networks in the Wild (Chen et al., CVPR 2021), Table 1.

    python teacher_train.py --dataset cifar10 --model resnet34 --recipe dafl
    python DFND_train.py --dataset cifar10 --wild my/imagenet     # 94.02 %: ResNet-34 -> ResNet-18
    python DFND_train.py --dataset cifar100 --wild my/imagenet                           # 76.35 %
    python DFND_train.py --dataset cifar10 --wild my/imagenet --selection random         # 91.25 %
    python DFND_train.py --dataset digits --wild mnist     # embedded teacher, another set's images

Any large set of unlabelled images serves instead of the training data. The teacher N_T looks at all of them and keeps
those that it is surest about; the student N_S learns its answers x -> N_T(x) on these, and, as some of its labels are
wrong, a noise-adaptation matrix Q beside it:

    value(x) = H(N_T(x), argmax N_T(x))                    the --num_select lowest are kept
    L_KD = T^2 KL(N_T(x) / T || N_S(x) / T)                T = 4
    Q = the teacher's accuracy on the diagonal; the rest of a row is a learnt softmax over the
        other classes: row c says as what the teacher labels an image that is a c
    L_noise = -log (softmax(N_S(x)) Q)_y,  y = argmax N_T(x)
    L_S  = L_KD + L_noise

Wild images are brought to the teacher's size and channels and normalised with its statistics. The scan of the wild set
is kept in <out>/wild_scans/ and used again for the same teacher and images; files that cannot be read are counted and
left out. Of a run's folder, samples/wild_best.png and wild_worst.png show what the teacher is most and least sure of,
wild_values.png all values.

Published settings, the defaults. The student sees about 20 million images: --n_epochs is
int(40000 / num_select * 512) - 1, unless named here:
{presets}

Differences from the published code, which cannot run as it stands:
 1. It normalises wild images with ImageNet's statistics for a teacher trained with other ones: --wild_stats imagenet.
 2. The accuracy in Q comes from the teacher's file (published: 0.9523 for CIFAR-10 and 0.7774 for CIFAR-100), from
    --teacher_acc, or is estimated by the teacher's mean confidence.
 3. Without test images (--dataset none) the score is the agreement with the teacher, beyond chance, on wild images not
    selected, a thousand at the most; --selection all holds out evenly spread ones.
 4. The networks run in bfloat16 where the hardware has it, the scan included (--precision fp32).
 5. Settings of data sets other than CIFAR are ours; CIFAR-100 has its own statistics, not CIFAR-10's.
 6. The first row of Q is made as the others.
"""

import datafree.interrupt  # noqa: F401

import hashlib
import math
import time
from argparse import Namespace
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.optim import Optimizer
from tqdm import tqdm

import papers
from data import DATASETS, FileSplit, TensorSplit, get_wild, imagenet_statistics, preset_of
from datafree import checkpoint
from datafree.augment import Transform
from datafree.cli import Parser, cli, describe_presets, number, positive, set_word
from datafree.distributed import apart, first_alone, from_first, gather, share, total, turns
from datafree.errors import UsageError
from datafree.losses import at_least_float32, kd_loss
from datafree.resume import ANYTHING, difference
from datafree.run import Run
from datafree.runtime import Runtime, lr_at, make_optimizer, set_lr
from datafree.session import Session
from models import word_of

CIFAR = dict(num_select=600_000, batch_size=256, optimizer="sgd", lr=0.1, weight_decay=5e-4, milestones=[0.4, 0.8],
             lr_Q=1e-3, T=4.0)  # fmt: skip
CIFAR10 = CIFAR | dict(teacher="resnet34", student="resnet18")
GREY = CIFAR | dict(num_select=20_000, optimizer="adam", lr=2e-3, weight_decay=0.0, n_epochs=30)
PRESETS = {
    "mnist": GREY,
    "digits": GREY | dict(num_select=5_000, batch_size=128, n_epochs=20),
    "cifar10": CIFAR10,
    **dict.fromkeys(("caltech101", "imagenet"), CIFAR | dict(batch_size=64)),
    "celeba": CIFAR | dict(optimizer="adam", lr=1e-4, weight_decay=0.0, batch_size=128),
    "folder": CIFAR10,
}
FLAGS = (
    ("--wild", "the unlabelled images: a folder (any depth) or a zip, as it is given or below --wild_root, or the "
     f"train images of one of {', '.join(DATASETS)}", dict(metavar="SET")),
    ("--wild_root", "where that set is (default: --data_root)", dict(metavar="DIR")),
    ("--wild_stats", "whose mean and standard deviation normalise them (default: %(default)s)",
     dict(choices=("teacher", "imagenet"), default="teacher")),
    ("--selection", "which of them teach: the --num_select of lowest value, as many at random, or all (default: "
     "%(default)s)", dict(choices=("lowest", "random", "all"), default="lowest")),
    ("--teacher_acc", "the teacher's accuracy, for Q (default: as its file says)",
     dict(type=number(float, 1e-9, 1), metavar="FRACTION")),
    ("--memory", "keep the selected images on the device up to this size, else decode them anew in each epoch "
     "(default: %(default)s)", dict(type=positive, default=4.0, metavar="GIB")),
)  # fmt: skip
RECIPE = dict(
    num_select="wild images that teach", batch_size="images of an iteration",
    n_epochs="passes over the selected images", optimizer="of the student", lr="learning rate of the student",
    weight_decay="of the student", milestones="lr x 0.1 at these fractions of the epochs",
    lr_Q="learning rate of Q, by Adam", T="temperature of L_KD",
)  # fmt: skip
HELD_OUT = 1000  # wild images at the most that score the student where there are no test images


def parse_args(argv: Sequence | None = None) -> Namespace:
    p = Parser(__file__, __doc__.format(presets=describe_presets(PRESETS)), paper="dafl")
    p.add_dataset()
    p.add(*FLAGS)
    p.add_networks()
    p.add_recipe(**RECIPE)
    p.add_run()
    args = p.parse_args(argv)
    if args.wild is None and not args.ckpt:
        p.error("--wild is missing: name a folder of images, a zip or a data set")
    words = [set_word(args.wild or "", args.wild_root, args.data_root)]
    args = p.complete(args, preset_of(args.dataset, PRESETS), words=words, named=["wild"])
    if args.selection != "all":
        args.n_epochs = args.n_epochs or max_epoch(args.num_select) - 1
    return args


def max_epoch(num_select: int) -> int:
    """The published length of training, about 80,000 batches of 256; epochs count from 1 to one less than this."""
    return max(2, int(40000 / num_select * 512))


class NoiseAdaptation(nn.Module):
    """The matrix Q and the loss in which it stands (DFND, Sec. 3.2).

    Args:
        num_classes: n. accuracy: the teacher's, in 0..1.
    """

    def __init__(self, num_classes: int, accuracy: float):
        super().__init__()
        self.right, self.wrong = (math.log(p) if p > 0 else -math.inf for p in (accuracy, 1 - accuracy))
        self.logits = nn.Parameter(torch.zeros(num_classes, num_classes - 1))

    def log_matrix(self) -> Tensor:
        """log Q (n, n): row = what the student means, column = what the teacher says.

        Row c is the accuracy at column c and (1 - accuracy) softmax(logits[c]) in the others: it sums to 1.
        """
        n = len(self.logits)
        wrong = at_least_float32(self.logits).log_softmax(1) + self.wrong
        # The parameters of a row fill its columns in order and leave out the diagonal: n + 1
        # places further along the flattened matrix comes the next diagonal entry.
        right = wrong.new_full((n - 1, 1), self.right)
        rows = torch.cat([right, wrong.reshape(n - 1, n)], 1).flatten()
        return torch.cat([rows, right[0]]).view(n, n)

    def forward(self, s_logits: Tensor, t_logits: Tensor) -> Tensor:
        """L_noise of logits (N, n): mean -log (softmax(s) Q)_y at the teacher's arg-max y."""
        log_s = at_least_float32(s_logits).log_softmax(1)
        return -(log_s + self.log_matrix().T[t_logits.argmax(1)]).logsumexp(1).mean()


def value_of(t_logits: Tensor) -> Tensor:
    """Cross-entropy (N,) of the teacher with its own arg-max: low where it is sure."""
    return 0 - at_least_float32(t_logits).log_softmax(1).amax(1)  # not -0.0


def train_epoch(
    s: Session, noise: NoiseAdaptation, optimizers: Sequence[Optimizer], batches: Iterable, transform: Transform
) -> dict[str, Tensor]:
    """One pass over the selected images; returns the mean of each loss."""
    s.student.train()
    total = torch.zeros(2, device=s.runtime.device)
    for images, _ in batches:
        x = transform(images, train=True)
        with s.runtime.autocast():
            s_logits = s.student(x)
            with torch.no_grad():
                t_logits = s.folded_teacher(x)
        loss_kd, loss_noise = kd_loss(s_logits, t_logits, s.args.T), noise(s_logits, t_logits)
        for optimizer in optimizers:
            optimizer.zero_grad()
        (loss_kd + loss_noise).backward()
        for optimizer in optimizers:
            optimizer.step()
        total += torch.stack([loss_kd.detach(), loss_noise.detach()])
        s.run.tick(loss_kd.detach())
    return dict(zip(("loss_kd", "loss_noise"), total / len(batches), strict=True))


@torch.no_grad()
def scan(teacher: nn.Module, split: TensorSplit | FileSplit, transform: Transform, runtime: Runtime) -> dict:
    """The teacher's value of every image of a split, in order.

    Returns:
        {"values" float32 (N,), NaN for unreadable files, "labels" int16 (N,): the teacher's,
        "broken": the number of unreadable files, "example": one of them and why, or None}.
    """
    # Ranks take the same batches in turn, so that the values are the same for any number of them.
    values, labels, broken = torch.zeros(len(split)), torch.zeros(len(split), dtype=torch.int64), []
    batches = list(turns(torch.arange(len(split)).split(512)))
    own = torch.cat(batches) if batches else torch.arange(0)
    with tqdm(desc="scanning the wild set", total=len(own), unit=" images", unit_scale=True, disable=None) as bar:
        scanned = (split if len(own) == len(split) else split.take(own)).scan(512, runtime.device) if batches else ()
        for rows, (images, unreadable) in zip(batches, scanned, strict=True):
            with apart(), runtime.eagerly(), runtime.autocast():
                t_logits = teacher(transform(images))
            values[rows], labels[rows] = value_of(t_logits).cpu(), t_logits.argmax(1).cpu()
            broken += [(own[row].item(), reason) for row, reason in unreadable]
            bar.update(len(images))
    values[torch.tensor([row for row, _ in broken], dtype=torch.int64)] = math.nan
    broken = sorted(gather(broken))
    total(values), total(labels)
    return {
        "values": values,
        "labels": labels.short(),
        "broken": len(broken),
        "example": broken[0][1] if broken else None,
    }


def cached_scan(s: Session, split: TensorSplit | FileSplit, fingerprint: str, transform: Transform) -> dict:
    """`scan`, or what is left of an earlier one of the same teacher and images in <out>/wild_scans.

    Raises UsageError if that is damaged.
    """
    teacher, shape = (word_of(s.args.teacher), s.args.teacher_sha256), (s.data.channels, s.data.img_size)
    statistics = transform.mean, transform.std, s.runtime.precision
    about = fingerprint, getattr(split, "stamp", ""), *teacher, *shape, *statistics
    path = Path(s.args.out) / "wild_scans" / f"{hashlib.sha256(repr(about).encode()).hexdigest()[:16]}.pt"
    if from_first(path.exists):
        s.run.log(f"wild set: {len(split):,} images, scanned before ({path})")
        found, n = from_first(lambda: checkpoint.read(path)), len(split)
        wanted = dict(values=torch.empty(n), labels=torch.empty(n, dtype=torch.int16), broken=0, example=ANYTHING)
        if difference(found, wanted) or not ((found["labels"] >= 0) & (found["labels"] < s.data.num_classes)).all():
            raise UsageError(f"{path} is no scan of this set: delete it, and the set is scanned anew")
        return found
    started = time.perf_counter()
    found = scan(s.folded_teacher, split, transform, s.runtime)
    seconds = time.perf_counter() - started
    checkpoint.save(found, path)
    s.run.log(f"wild set: {len(split):,} images scanned in {seconds:.0f} s ({len(split) / seconds:,.0f}/s): {path}")
    return found


def _spread(rows: Tensor, most: int) -> Tensor:
    """At most so many, and HELD_OUT, of the rows, evenly spread, as a set may be sorted by class."""
    n = min(HELD_OUT, most, len(rows))
    return rows[torch.arange(n) * len(rows) // max(1, n)]


def select(found: Mapping, args: Namespace) -> Tensor:
    """Rows of the images that teach, int64 (n,): the lowest values or all, in their order, or random ones.

    Raises:
        UsageError: fewer images can be read than are to be selected.
    """
    values, wanted = found["values"], args.num_select
    readable = (~values.isnan()).nonzero().flatten()
    if args.selection == "all":
        if args.dataset == "none":  # evenly spread ones are left to score the student
            readable = readable[~torch.isin(readable, _spread(readable, len(readable) // 2))]
        wanted = len(readable)
    if len(readable) < max(2, wanted):
        raise _too_few(args, f"{len(readable):,} images that can be read")
    if args.selection == "random":
        generator = torch.Generator().manual_seed(args.seed)
        return readable[torch.randperm(len(readable), generator=generator)[:wanted]]
    return readable[values[readable].argsort(stable=True)[:wanted]]


def _too_few(args: Namespace, images: str) -> UsageError:
    wanted = f"fewer than --num_select {args.num_select:,}"
    return UsageError(f"wild set {args.wild} has {images}, {wanted}: lower it, or give more images")


def not_selected(found: Mapping, rows: Tensor) -> Tensor:
    """Rows, int64 (n,), of at most HELD_OUT readable images that are not among `rows`, evenly spread.

    Raises:
        UsageError: there is none.
    """
    rest = ~found["values"].isnan()
    rest[rows] = False
    if not rest.any():
        raise UsageError("no wild image is left to score the student: lower --num_select, or give more images")
    return _spread(rest.nonzero().flatten(), HELD_OUT)


def report(run: Run, split: TensorSplit | FileSplit, found: Mapping, rows: Tensor, class_names: Sequence[str]) -> None:
    """Say what was selected; wild_values.png, and grids of the surest and unsurest images."""
    values = found["values"]
    order = values.argsort(stable=True)[: len(values) - found["broken"]]
    levels = values[order][torch.linspace(0, len(order) - 1, 5).long()].tolist()
    shares = ", ".join(f"{25 * i} % below {level:.2g}" for i, level in enumerate(levels))
    counts = found["labels"][rows].long().bincount(minlength=len(class_names)).tolist()
    classes = ", ".join(f"{name} {count:,}" for name, count in zip(class_names[:20], counts, strict=False))
    classes += " ..." if len(class_names) > 20 else ""
    if found["broken"]:
        run.log(f"left out: {found['broken']:,} files that cannot be read, such as {found['example']}")
    run.log(f"cross-entropy with the teacher's own label: {shares}")
    run.log(f"selected {len(rows):,} of {len(order):,}; by the teacher's label: {classes}")
    for name, shown in (("wild_best", order[:64]), ("wild_worst", order.flip(0)[:64])):
        images, _ = next(iter(split.take(shown).batches(len(shown), device="cpu")))
        run.images(name, images.float() / 255)
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot(xlabel="cross-entropy of the teacher with its own label", ylabel="images", yscale="log")
    edges = torch.linspace(0, values[order[-1]].item() or 1.0, 51).tolist()
    axes.hist(values[order].numpy(), edges, label="wild set")
    axes.hist(values[rows].numpy(), edges, label="selected")
    axes.legend()
    figure.savefig(run.folder / "wild_values.png", dpi=120)


def main(args: Namespace) -> dict:
    """Select and distil, or evaluate; returns the content of result.json."""
    s = Session(args, papers.published(args))
    if s.result:
        return s.result
    data, device = s.data, s.runtime.device
    with first_alone():
        split, fingerprint = get_wild(args.wild, args.wild_root or args.data_root, data.img_size, data.channels)
    args.wild_fingerprint = fingerprint  # a run goes on with the same images only
    if args.selection != "all" and len(split) < args.num_select:
        raise _too_few(args, f"{len(split):,} images")
    transform = s.transform
    if args.wild_stats == "imagenet":
        transform = Transform(*imagenet_statistics(data.channels), data.padding, data.flip)
    found = cached_scan(s, split, fingerprint, transform)
    rows = select(found, args)
    args.n_epochs = args.n_epochs or max_epoch(len(rows)) - 1  # of --selection all
    report(s.run, split, found, rows, data.class_names)
    memory = args.memory * 2**30
    batches = split.take(rows).in_memory(memory).to(device).shuffled(args.batch_size, share)
    if data.test is None:
        unseen = split.take(not_selected(found, rows)).in_memory(memory).to(device)
        s.unseen = lambda: (transform(x) for x, _ in unseen.batches(250, device=device))
    accuracy = args.teacher_acc or s.teacher_metadata.get("accuracy", math.nan) / 100
    if math.isnan(accuracy):
        accuracy = (-found["values"][rows]).exp().mean().item()
        s.run.log("the teacher's file does not say how good it is: Q takes its mean confidence (--teacher_acc sets it)")
    s.run.log(f"the teacher's accuracy in Q: {accuracy:.4f}")
    noise = NoiseAdaptation(data.num_classes, accuracy).to(device)
    optimizer_S = make_optimizer(args.optimizer, s.student.parameters(), args.lr, args.weight_decay)
    optimizer_Q = make_optimizer("adam", noise.parameters(), args.lr_Q, of_share=False)  # it sees the whole batch
    states = dict(student=s.student, noise=noise, optimizer_S=optimizer_S, optimizer_Q=optimizer_Q)
    for epoch in s.epochs(len(batches), args.batch_size, **states):
        # As published, epochs count from 1, to one less than `max_epoch`.
        set_lr(optimizer_S, lr_at(epoch + 1, args.lr, args.n_epochs + 1, args.milestones))
        s.record(train_epoch(s, noise, (optimizer_S, optimizer_Q), batches, transform))
    wild = dict(wild=args.wild, wild_fingerprint=fingerprint, wild_images=len(split), wild_broken=found["broken"])
    return s.finish(method="DFND", **wild, selected=len(rows), accuracy_in_Q=accuracy)


if __name__ == "__main__":
    cli(main, parse_args)
