"""Train a segmentation network on CamVid or NYUv2: the teachers of DFAD (2019), Table 3.

    python teacher_train_seg.py --dataset camvid          # DeepLabv3 ResNet-50
    python teacher_train_seg.py --dataset nyuv2
    python teacher_train_seg.py --dataset camvid --model deeplabv3_mobilenet --backbone_weights none

Random crops of 128 pixels, mirrored at random, of images with a short side of 256; the test is on
whole images. The loss is the focal one, as published: mean over all pixels, void ones included
with 0, of (1 - exp(-c))^2 c with c the cross-entropy of a pixel. The best weights (by mIoU on the
test images, as in the paper) go to checkpoints/<dataset>-<model>.pt.

Published settings:
{presets}
The published backbone starts from ImageNet's weights. They are downloaded for ResNet-50 where a
network is there, or read from --backbone_weights; otherwise everything is trained from scratch,
which costs many points of mIoU on a few hundred images. The line at the start says which.

Differences from the published code: without ImageNet's weights it goes on, from scratch.
"""

import torch.nn.functional as F

from data import SEGMENTATIONS, DataError, get_segmentation
from datafree import checkpoint
from datafree.augment import Transform
from datafree.log import Run, evaluate_checkpoint, side_by_side
from datafree.metrics import mean_iou, segmentation_scores
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
from models import SEGMENTERS, get_segmenter

CAMVID = dict(lr=0.1, weight_decay=5e-4, batch_size=16, n_epochs=200, milestones=[0.5])
PRESETS = {"camvid": CAMVID, "nyuv2": CAMVID | dict(lr=0.05)}


def parse_args(argv=None):
    p = Parser(__doc__.format(presets=describe_presets(PRESETS)))
    p.add_argument("--dataset", choices=SEGMENTATIONS, default="camvid", help="(default: %(default)s)")
    p.add_argument(
        "--model",
        choices=sorted(SEGMENTERS),
        default="deeplabv3_resnet50",
        metavar="NAME",
        help="one of " + ", ".join(sorted(SEGMENTERS)) + " (default: %(default)s)",
    )
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
    p.add_argument(
        "--crop",
        type=number(int, 32, 256),
        default=128,
        metavar="PIXELS",
        help="side of the training crops (default: %(default)s)",
    )
    p.add_argument(
        "--backbone_weights",
        metavar="FILE",
        help="a state dict of torchvision's "
        "classifier, or none for scratch (default: torchvision's, if it can be had)",
    )
    p.add_argument(
        "--save_img",
        type=number(int, 0),
        default=4,
        metavar="N",
        help="at the end write N test images beside ground truth and prediction (default: %(default)s)",
    )
    p.add_argument(
        "--checkpoints",
        default="./checkpoints",
        metavar="DIR",
        help="where the best weights are copied to (default: %(default)s)",
    )
    add_run_arguments(p)
    args = p.parse_args(argv)
    args.argv = argv
    fill_defaults(args, PRESETS[args.dataset])
    return args


def focal_loss(logits, labels, gamma=2):
    """(1 - exp(-c))^gamma c, mean over all pixels; c (cross-entropy) is 0 where the label is 255.

    Args:
        logits: (N, classes, H, W). labels: (N, H, W).
    """
    c = F.cross_entropy(logits, labels, reduction="none", ignore_index=255)
    return ((1 - (-c).exp()) ** gamma * c).mean()


def train_epoch(model, optimizer, data, transform, args, runtime, tick):
    """One pass over the training set; returns the mean loss."""
    model.train()
    total = 0.0
    batches = len(data.train) // args.batch_size
    for x, y in data.train.crops(args.batch_size, args.crop, runtime.device):
        with runtime.autocast():
            logits = model(transform(x))
        loss = focal_loss(logits.float(), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        total += loss.detach() / batches
        tick(loss.detach())
    return total


def load_backbone(model, args):
    """ImageNet's weights for model.backbone, if they can be had; returns what to tell the user.

    Raises:
        UsageError: the file is missing, damaged or for another network.
    """
    if args.backbone_weights == "none":
        return "backbone from scratch"
    if args.backbone_weights:
        path = args.backbone_weights
        state = checkpoint.weights(checkpoint.read(path), path)
    elif args.model == "deeplabv3_resnet50":
        try:
            state = checkpoint.fetch("resnet50_imagenet")
        except UsageError as error:
            return (
                f"{error}; backbone from scratch, which costs many points: --backbone_weights "
                "FILE brings them, too"
            )
        path = f"torchvision's {checkpoint.PRETRAINED['resnet50_imagenet']}"
    else:
        return f"no ImageNet weights are known for {args.model}: backbone from scratch"
    own = getattr(model, "backbone", model).state_dict()
    fitting = {k: v for k, v in state.items() if k in own and own[k].shape == v.shape}
    if len(fitting) < len(own):
        raise UsageError(
            f"{path} fits {len(fitting)} of {len(own)} tensors of the backbone of "
            f"{args.model}: give weights of the same network, or none"
        )
    model.backbone.load_state_dict(fitting)
    return f"backbone from {path}"


def main(args):
    """Train or evaluate; returns the content of result.json."""
    runtime = setup(args)
    data = get_segmentation(args.dataset, args.data_root, args.mean, args.std)
    model = get_segmenter(args.model, data.num_classes)
    name = f"teacher_train_seg-{args.dataset}-{args.model}"
    if args.evaluate_only:
        return evaluate_checkpoint(args, name, model, args.model, data, runtime, mean_iou, "mIoU")
    if len(data.train) < args.batch_size:
        raise UsageError(
            f"--batch_size {args.batch_size} does not fit into {len(data.train)} training images: lower it"
        )
    origin = load_backbone(model, args)
    runtime.place(model)
    transform = Transform.of(data)
    run = Run(args, name, runtime, "mIoU")
    optimizer = make_optimizer("sgd", model.parameters(), args.lr, args.weight_decay)
    start = run.start(model=model, optimizer=optimizer)
    cells = published(args.dataset, ("Teacher",), args.model)
    run.log(
        f"{args.model} on {data.name}: {len(data.train)} training and {len(data.test)} test "
        f"images; {origin}; {runtime.precision} on {runtime.device}; published: "
        f"{describe(cells)}"
    )
    run.progress([len(data.train) // args.batch_size] * args.n_epochs, args.batch_size)
    card, scores = checkpoint.card(args.model, data, transform), {}
    for epoch in range(start, args.n_epochs):
        set_lr(optimizer, lr_at(epoch, args.lr, args.n_epochs, args.milestones))
        loss = train_epoch(model, optimizer, data, transform, args, runtime, run.tick)
        scores = segmentation_scores(model, data, transform, runtime)
        percent = scores.pop("mIoU")
        run.end_epoch(epoch, percent, {"loss": loss}, model, card, **scores)
    target = checkpoint.teacher_file(args.checkpoints, args.dataset, args.model)
    checkpoint.save(checkpoint.read(run.best), target)
    run.log(f"weights of the best epoch: {target}")
    result = run.finish(
        dataset=data.name,
        model=args.model,
        method="Teacher",
        published=cells,
        fingerprint=data.fingerprint,
        backbone=origin,
        last_scores=scores,
        weights=str(target),
    )
    side_by_side(run.folder / "samples", {args.model: model}, data, transform, runtime, args.save_img)
    return result


if __name__ == "__main__":
    cli(main, parse_args, DataError)
