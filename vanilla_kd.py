"""Knowledge distillation (Hinton et al. 2015) on a transfer set: the tables' baselines.

    python vanilla_kd.py --dataset mnist --transfer_set original    # "KD original data", KD-ORI
    python vanilla_kd.py --dataset mnist --transfer_set noise       # "Random noise", RANDOM
    python vanilla_kd.py --dataset mnist --transfer_set svhn        # related or unrelated data,
    python vanilla_kd.py --dataset mnist --transfer_set my/images   #   KD-REL, KD-UNR
    python vanilla_kd.py --dataset mnist --beta 0.1                 # with labels: "KD"
    python vanilla_kd.py --dataset mnist --scratch                  # labels only: "Student"

The student learns alpha T^2 KL(teacher / T || student / T) + beta CE(student, label); labels exist in the original set
only, so --beta needs it. Noise is drawn anew from N(0, 1) in the space of the teacher's normalised input, as many
images an epoch as the original set has. Images of another set are brought to the teacher's size and channels and
normalised with its statistics.

Presets (flags override them), SGD with momentum 0.9; "folder" has what Fast-Datafree published for CIFAR, where T is 1.
The teacher is that of --teacher_recipe, checkpoints/<dataset>-<teacher>-<recipe>.pt:
{presets}

Differences from the published code:
 1. The settings of the small grey sets and of CelebA are ours, as no paper names them.
 2. Which sets are related and unrelated is left to the user, where the tables do not name them.
 3. ImageNet's random resized crops are of the central square.
 4. The teacher's BatchNorms are folded into its convolutions: the same logits up to rounding, faster.
"""

import datafree.interrupt  # noqa: F401

from argparse import Namespace
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim import Optimizer

import papers
from data import DATASETS, SOURCES, get_wild, preset_of
from datafree.augment import Transform
from datafree.cli import Parser, cli, describe_presets, set_word
from datafree.distributed import first_alone, share, whole
from datafree.losses import kd_loss
from datafree.runtime import lr_at, make_optimizer, set_lr
from datafree.session import Session

CIFAR = dict(optimizer="sgd", lr=0.1, weight_decay=1e-4, batch_size=128, n_epochs=200, milestones=[0.6, 0.75, 0.9],
             alpha=1.0, beta=0.0, T=1.0)  # fmt: skip
GREY = CIFAR | dict(optimizer="adam", lr=1e-3, weight_decay=0.0, batch_size=256, n_epochs=10, milestones=[], T=4.0)
PRESETS = {
    "mnist": GREY,
    "digits": GREY | dict(lr=2e-3, batch_size=64, n_epochs=40),
    "folder": CIFAR,
    "imagenet": CIFAR | dict(batch_size=100),
    "celeba": CIFAR | dict(optimizer="adam", lr=1e-4, weight_decay=0.0, n_epochs=20, T=4.0),
}
TRANSFER = (
    ("--transfer_set", f"original, noise, another data set ({', '.join(DATASETS)}), or a folder or zip of images at "
     "any depth, as it is or below --transfer_root (default: %(default)s)", dict(default="original", metavar="SET")),
    ("--transfer_root", "where the transfer set is (default: --data_root)", dict(metavar="DIR")),
    ("--scratch", "no teacher: the same as --alpha 0 --beta 1", dict(action="store_true")),
)  # fmt: skip
RECIPE = dict(
    alpha="weight of the teacher's answers", beta="weight of the labels", T="temperature", optimizer="of the student",
    lr="learning rate, at first", weight_decay="of the student", batch_size="images of an iteration",
    n_epochs="passes over the transfer set", milestones="lr x 0.1 at these fractions of the epochs",
)  # fmt: skip
IN_MEMORY = 2**32  # bytes of decoded images above which a folder is read anew in each epoch


def parse_args(argv: Sequence | None = None) -> Namespace:
    p = Parser(__file__, __doc__.format(presets=describe_presets(PRESETS)))
    p.add_dataset(none=False)
    p.add(*TRANSFER)
    p.add_networks()
    p.add_recipe(**RECIPE)
    p.add_run()
    args = p.parse_args(argv)
    preset = preset_of(args.dataset, PRESETS)
    source = set_word(args.transfer_set, args.transfer_root, args.data_root)
    if args.scratch:
        preset, source = preset | dict(alpha=0.0, beta=1.0), "scratch"
        args.alpha = args.beta = None
    args = p.complete(args, preset, words=[source], named=["transfer_set", "scratch"])
    if args.beta and args.transfer_set != "original":
        p.error("--beta weighs labels, which only --transfer_set original has")
    if not args.alpha and not args.beta:
        p.error("--alpha and --beta are both 0: nothing would be learnt")
    return args


class Noise:
    """Batches of N(0, 1) images (N, C, H, W) on the device, without labels."""

    def __init__(self, n: int, batch_size: int, shape: Sequence[int], device: torch.device):
        self.n, self.batch_size, self.shape, self.device = n, batch_size, shape, device

    def __len__(self) -> int:
        return -(-self.n // self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, None]]:
        for _ in range(len(self)):
            x = share(torch.randn(self.batch_size, *self.shape, device=self.device))
            yield x.contiguous(memory_format=torch.channels_last), None


def train_epoch(s: Session, optimizer: Optimizer, batches: Iterable, transform: Transform | None) -> dict[str, Tensor]:
    """One pass over the transfer set; returns the mean loss. `transform` is None for noise."""
    args = s.args
    s.student.train()
    total = torch.zeros((), device=s.runtime.device)
    for images, y in batches:
        x = images if transform is None else transform(images, train=True)
        with s.runtime.autocast():
            s_logits = s.student(x)
            with torch.no_grad():
                t_logits = s.folded_teacher(x) if args.alpha else None
        loss = args.alpha * kd_loss(s_logits, t_logits, args.T) if args.alpha else 0.0
        if args.beta:
            loss = loss + args.beta * F.cross_entropy(s_logits.float(), whole(y))
        total += s.step(loss, optimizer)
    return {"loss": total / len(batches)}


def main(args: Namespace) -> dict:
    """Distil or evaluate; returns the content of result.json."""
    noise, original = (args.transfer_set == name for name in ("noise", "original"))
    area = SOURCES[args.dataset].least_area(args.img_size)
    s = Session(args, papers.published(args), train=noise or original, taught=args.alpha > 0, area=area)
    if s.result:
        return s.result
    data, device, facts = s.data, s.runtime.device, {}
    if noise:
        shape = (data.channels, data.img_size, data.img_size)
        batches, transform = Noise(len(data.train), args.batch_size, shape, device), None
    else:
        images, transform = data.train, s.transform
        if not original:
            where = args.transfer_set, args.transfer_root or args.data_root
            with first_alone():
                images, fingerprint = get_wild(*where, data.img_size, data.channels)
            args.transfer_fingerprint = fingerprint  # a run goes on with the same images only
            facts = {"transfer_images": len(images), "transfer_fingerprint": fingerprint}
        batches = images.in_memory(IN_MEMORY).to(device).shuffled(args.batch_size, share)
    optimizer = make_optimizer(args.optimizer, s.student.parameters(), args.lr, args.weight_decay)
    for epoch in s.epochs(len(batches), args.batch_size, student=s.student, optimizer=optimizer):
        set_lr(optimizer, lr_at(epoch, args.lr, args.n_epochs, args.milestones))
        s.record(train_epoch(s, optimizer, batches, transform))
    method = f"KD ({Path(args.transfer_set).name})" if args.alpha else "Student"
    return s.finish(method=method, student=args.student, **facts)


if __name__ == "__main__":
    cli(main, parse_args)
