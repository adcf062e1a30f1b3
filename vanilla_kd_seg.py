"""Knowledge distillation of segmentation networks on a transfer set: the baselines of DFAD (Fang et al. 2019), Table 3.

    python teacher_train_seg.py --dataset camvid                           mIoU: CamVid  NYUv2
    python vanilla_kd_seg.py --dataset camvid --transfer_set original    # KD-ORI 0.535  0.380
    python vanilla_kd_seg.py --dataset camvid --transfer_set related     # KD-REL 0.475  0.396
    python vanilla_kd_seg.py --dataset camvid --transfer_set unrelated   # KD-UNR 0.406  0.265
    python vanilla_kd_seg.py --dataset camvid --transfer_set noise       # RANDOM 0.018  0.021

`related` and `unrelated` stand for folders or zips of images, or other data sets. The student S learns the teacher's
logits T(x) on images x without their labels, with the loss of DFAD's own student:

    min_S  E_x |T(x) - S(x)|                      mean over batch, classes and pixels

    original:  random crops of the training images, mirrored at random;
    noise:     x ~ N(0, I) in the space of the teacher's normalised input, as many batches as the original set has;
    others:    the central square of every image, resized and mirrored at random.

A rest smaller than a batch is left out; the test is on whole images (short side 256). An epoch is one pass over the
transfer set: a large one wants fewer of them. Settings, with SGD of momentum 0.9:
{presets}

Differences from the published code, which lacks these rows, as the paper lacks their details:
 1. The loss is that of DFAD's student, the settings are those of the CamVid teacher.
 2. Which images were related and unrelated, and how they were cut, is left to the user.
"""

import datafree.interrupt  # noqa: F401

from argparse import Namespace
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.optim import Optimizer

import papers
from data import SEGMENTATIONS, TensorSplit, get_wild
from datafree import distributed
from datafree.augment import random_flip
from datafree.cli import Parser, cli, describe_presets, path_word
from datafree.errors import UsageError
from datafree.losses import l1_loss
from datafree.plots import side_by_side
from datafree.runtime import lr_at, make_optimizer, set_lr
from datafree.session import Session
from models import SEGMENTERS
from teacher_train_seg import RECIPE, SAVE_IMG, SETTINGS

PRESET = dict(teacher="deeplabv3_resnet50", student="deeplabv3_mobilenet") | SETTINGS
SETS = (
    ("--dataset", "the teacher's data set (default: %(default)s)", dict(choices=SEGMENTATIONS, default="camvid")),
    ("--transfer_set", "original, noise, a data set, or a folder (any depth) or zip of images, as it is or below "
     "--data_root (default: %(default)s)", dict(default="original", metavar="SET")),
)  # fmt: skip
IN_MEMORY = 2**30  # bytes of pixels up to which a folder's images are decoded once and kept


def parse_args(argv: Sequence | None = None) -> Namespace:
    p = Parser(__file__, __doc__.format(presets=describe_presets({"camvid, nyuv2": PRESET})))
    p.add(*SETS)
    p.add_networks(SEGMENTERS)
    p.add_recipe(**RECIPE | dict(n_epochs="passes over the transfer set"))
    p.add(SAVE_IMG)
    p.add_run()
    args = p.parse_args(argv)
    return p.complete(args, PRESET, words=[path_word(args.transfer_set)], named=["transfer_set"])


def transfer_batches(s: Session, images: TensorSplit | None) -> Iterator[Tensor]:
    """One pass over the transfer set: batches (N, 3, crop, crop), normalised for the teacher.

    Args:
        images: another data set's, a folder's or a zip's; None for original and noise.
    """
    size, crop, device = s.args.batch_size, s.args.crop, s.runtime.device
    if images is not None:
        for x, _ in images.batches(size, shuffle=True, drop_last=True, device=device):
            yield s.transform(random_flip(x))
    elif s.args.transfer_set == "original":
        for x, _ in s.data.train.crops(size, crop, device):
            yield s.transform(x)
    else:
        for _ in range(len(s.data.train) // size):
            x = torch.randn(size, s.data.channels, crop, crop, device=device)
            yield x.contiguous(memory_format=torch.channels_last)


def train_epoch(s: Session, optimizer: Optimizer, batches: Iterable[Tensor]) -> dict[str, Tensor]:
    """One pass over the batches; returns the mean loss."""
    s.student.train()
    total = steps = 0
    for x in batches:
        with s.runtime.autocast():
            with torch.no_grad():
                t_logits = s.folded_teacher(x)
            s_logits = s.student(x)
        total, steps = total + s.step(l1_loss(s_logits, t_logits), optimizer), steps + 1
    return {"loss": total / steps}


def main(args: Namespace) -> dict:
    """Distil or evaluate; returns the content of result.json."""
    own = args.transfer_set in ("original", "noise")
    distributed.alone("vanilla_kd_seg.py")
    s = Session(args, papers.published(args), train=own, segmentation=True)
    if s.result:
        return s.result
    images, facts = None, {}
    if not own:
        images, fingerprint = get_wild(args.transfer_set, args.data_root, args.crop, s.data.channels)
        args.transfer_fingerprint = fingerprint  # a run goes on with the same images only
        images = images.in_memory(IN_MEMORY).to(s.runtime.device)
        facts = {"transfer_images": len(images), "transfer_fingerprint": fingerprint}
    size = len(s.data.train if own else images)
    if size < args.batch_size:
        raise UsageError(f"--batch_size {args.batch_size} does not fit into {size} images to transfer: lower it")
    optimizer = make_optimizer("sgd", s.student.parameters(), args.lr, args.weight_decay)
    for epoch in s.epochs(size // args.batch_size, args.batch_size, student=s.student, optimizer=optimizer):
        set_lr(optimizer, lr_at(epoch, args.lr, args.n_epochs, args.milestones))
        s.record(train_epoch(s, optimizer, transfer_batches(s, images)))
    networks = {"teacher": s.folded_teacher, "student": s.student}
    side_by_side(s.run.folder / "samples", networks, s.data, s.transform, s.runtime, args.save_img)
    return s.finish(method=f"KD ({Path(args.transfer_set).name})", **facts)


if __name__ == "__main__":
    cli(main, parse_args)
