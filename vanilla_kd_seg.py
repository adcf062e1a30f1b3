"""Knowledge distillation of segmentation networks on a transfer set: the baselines of DFAD (Fang
et al. 2019), Data-Free Adversarial Distillation, Table 3.

    python teacher_train_seg.py --dataset camvid                           mIoU: CamVid  NYUv2
    python vanilla_kd_seg.py --dataset camvid --transfer_set original    # KD-ORI 0.535  0.380
    python vanilla_kd_seg.py --dataset camvid --transfer_set related     # KD-REL 0.475  0.396
    python vanilla_kd_seg.py --dataset camvid --transfer_set unrelated   # KD-UNR 0.406  0.265
    python vanilla_kd_seg.py --dataset camvid --transfer_set noise       # RANDOM 0.018  0.021

`related` and `unrelated` stand for folders or zips of images. The student S learns the teacher's
logits T(x) on images x without their labels, with the loss of DFAD's own student:

    min_S  E_x |T(x) - S(x)|                      mean over batch, classes and pixels

    original:  random crops of the training images, mirrored at random;
    noise:     x ~ N(0, I) in the space of the teacher's normalised input, drawn anew, as many
               batches an epoch as the original set has;
    a folder:  the central square of every image, resized and mirrored at random.

A rest smaller than a batch is left out; the test is on whole images (short side 256). Settings,
the defaults: SGD 0.1, momentum 0.9, weight decay 5e-4, batch 16, 200 epochs, x0.1 at half of them,
128 pixels. An epoch is one pass over the transfer set: a large one wants fewer of them.

Differences from the published code, which lacks these rows, as the paper lacks their details:
 1. The loss is that of DFAD's student, the settings are those of the CamVid teacher.
 2. Which images were related and unrelated, and how they were cut, is left to the user.
"""

from pathlib import Path

import torch

from data import SEGMENTATIONS, DataError, get_segmentation, get_wild
from datafree import checkpoint
from datafree.augment import Transform, random_flip
from datafree.fold import fold_batch_norm
from datafree.log import Run, evaluate_checkpoint, side_by_side
from datafree.losses import l1_loss
from datafree.metrics import mean_iou, segmentation_scores
from datafree.published import describe, published
from datafree.runtime import (
    Parser,
    UsageError,
    add_run_arguments,
    cli,
    lr_at,
    make_optimizer,
    number,
    set_lr,
    setup,
)
from models import SEGMENTERS, get_segmenter

METHODS = {"original": ("KD-ORI",), "noise": ("RANDOM",)}
OTHER_DATA = ("KD-REL", "KD-UNR")
IN_MEMORY = 2**30  # bytes of pixels up to which a folder's images are decoded once and kept


def parse_args(argv=None):
    p = Parser(__doc__)
    p.add_argument(
        "--dataset",
        choices=SEGMENTATIONS,
        default="camvid",
        help="the teacher's data set (default: %(default)s)",
    )
    p.add_argument(
        "--transfer_set",
        default="original",
        metavar="SET",
        help="original, noise, or a folder (any depth) or zip of images (default: %(default)s)",
    )
    for role, network in (("teacher", "deeplabv3_resnet50"), ("student", "deeplabv3_mobilenet")):
        p.add_argument(
            f"--{role}",
            choices=sorted(SEGMENTERS),
            default=network,
            metavar="NAME",
            help="one of " + ", ".join(sorted(SEGMENTERS)) + " (default: %(default)s)",
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
        help="where teacher_train_seg.py left its weights (default: %(default)s)",
    )
    for flag, kind, value in (
        ("lr", number(float, 0, above=True), 0.1),
        ("weight_decay", number(float, 0), 5e-4),
        ("batch_size", number(int, 2), 16),
        ("n_epochs", number(int, 1), 200),
    ):
        p.add_argument(f"--{flag}", type=kind, default=value, metavar="X", help="(default: %(default)s)")
    p.add_argument(
        "--milestones",
        type=number(float, 0, 1),
        nargs="*",
        default=[0.5],
        metavar="FRACTION",
        help="lr x 0.1 at these fractions of the epochs (default: 0.5)",
    )
    p.add_argument(
        "--crop",
        type=number(int, 32, 256),
        default=128,
        metavar="PIXELS",
        help="side of the images that the student learns on (default: %(default)s)",
    )
    p.add_argument(
        "--save_img",
        type=number(int, 0),
        default=4,
        metavar="N",
        help="at the end write N test images beside ground truth, teacher's and "
        "student's classes (default: %(default)s)",
    )
    add_run_arguments(p)
    args = p.parse_args(argv)
    args.argv = argv
    return args


def transfer_batches(args, data, images, transform, device):
    """One pass over the transfer set: batches (N, 3, crop, crop), normalised for the teacher.

    Args:
        images: split of a folder's or zip's images; None for original and noise.
    """
    if args.transfer_set == "original":
        for x, _ in data.train.crops(args.batch_size, args.crop, device):
            yield transform(x)
    elif args.transfer_set == "noise":
        for _ in range(len(data.train) // args.batch_size):
            x = torch.randn(args.batch_size, data.channels, args.crop, args.crop, device=device)
            yield x.contiguous(memory_format=torch.channels_last)
    else:
        for x, _ in images.batches(args.batch_size, shuffle=True, drop_last=True, device=device):
            yield transform(random_flip(x))


def train_epoch(teacher, student, optimizer, batches, runtime, tick):
    """One pass over the batches; returns the mean loss."""
    student.train()
    total = steps = 0
    for x in batches:
        with runtime.autocast():
            with torch.no_grad():
                t_logits = teacher(x)
            s_logits = student(x)
        loss = l1_loss(s_logits, t_logits)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        total, steps = total + loss.detach(), steps + 1
        tick(loss.detach())
    return total / steps


def main(args):
    """Distil or evaluate; returns the content of result.json."""
    runtime = setup(args)
    data = get_segmentation(args.dataset, args.data_root, args.mean, args.std)
    student = get_segmenter(args.student, data.num_classes)
    source = Path(args.transfer_set).expanduser().absolute()
    name = f"vanilla_kd_seg-{args.dataset}-{args.teacher}-{args.student}-{source.name}"
    if args.evaluate_only:
        return evaluate_checkpoint(args, name, student, args.student, data, runtime, mean_iou, "mIoU")
    teacher, card = checkpoint.load_teacher(
        args, lambda name, n, _: get_segmenter(name, n), data, "teacher_train_seg.py"
    )
    images, size, facts = None, len(data.train), {}
    if args.transfer_set not in METHODS:
        # The whole path, as a bare name could be that of a data set.
        images, fingerprint = get_wild(str(source), args.data_root, args.crop, data.channels)
        size = len(images)
        facts = {"transfer_images": size, "transfer_fingerprint": fingerprint}
    if size < args.batch_size:
        raise UsageError(
            f"--batch_size {args.batch_size} does not fit into {size} images of the transfer set: lower it"
        )
    if images:
        images = images.held(IN_MEMORY).to(runtime.device)
    runtime.place(teacher, student)
    teacher = fold_batch_norm(teacher)
    transform = Transform.of(data, card)
    run = Run(args, name, runtime, "mIoU")
    optimizer = make_optimizer("sgd", student.parameters(), args.lr, args.weight_decay)
    start = run.start(student=student, optimizer=optimizer)
    teacher_score = mean_iou(teacher, data, transform, runtime)
    cells = published(args.dataset, METHODS.get(args.transfer_set, OTHER_DATA), args.teacher, args.student)
    run.log(
        f"teacher {args.teacher}: {teacher_score:.2f} %; student {args.student}; transfer set "
        f"{args.transfer_set}; {runtime.precision} on {runtime.device}; published: "
        f"{describe(cells)}"
    )
    run.progress([size // args.batch_size] * args.n_epochs, args.batch_size)
    card, scores = checkpoint.card(args.student, data, transform), {}
    for epoch in range(start, args.n_epochs):
        set_lr(optimizer, lr_at(epoch, args.lr, args.n_epochs, args.milestones))
        batches = transfer_batches(args, data, images, transform, runtime.device)
        loss = train_epoch(teacher, student, optimizer, batches, runtime, run.tick)
        scores = segmentation_scores(student, data, transform, runtime)
        percent = scores.pop("mIoU")
        run.end_epoch(epoch, percent, {"loss": loss}, student, card, **scores)
    result = run.finish(
        method=f"KD ({source.name})",
        dataset=data.name,
        teacher=args.teacher,
        student=args.student,
        teacher_accuracy=teacher_score,
        published=cells,
        fingerprint=data.fingerprint,
        last_scores=scores,
        **facts,
    )
    side_by_side(
        run.folder / "samples",
        {"teacher": teacher, "student": student},
        data,
        transform,
        runtime,
        args.save_img,
    )
    return result


if __name__ == "__main__":
    cli(main, parse_args, DataError)
