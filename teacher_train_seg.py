"""Train a segmentation network on CamVid or NYUv2: the teachers of DFAD (2019), Table 3.

    python teacher_train_seg.py --dataset camvid          # DeepLabv3 ResNet-50
    python teacher_train_seg.py --dataset nyuv2
    python teacher_train_seg.py --dataset camvid --model deeplabv3_mobilenet --backbone_weights none

Random crops of 128 pixels, mirrored at random, of images with a short side of 256; the test is on whole images. The
loss is the focal one, as published. The best weights (by mIoU on the test images, as in the paper) go to
checkpoints/<dataset>-<model>.pt.

Published settings:
{presets}
The published backbone starts from ImageNet's weights: downloaded for ResNet-50, or read from --backbone_weights.

Differences from the published code: without ImageNet's weights it goes on, from scratch, with a
line at the start that says so: 22.8 mIoU after 10 of 200 epochs on CamVid (results/camvid/). Images that are
left of an epoch, fewer than a batch, are left out (22 updates instead of 23 on CamVid).
"""

import datafree.interrupt  # noqa: F401

from argparse import Namespace
from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

import papers
from data import SEGMENTATIONS
from datafree import checkpoint, distributed
from datafree.cli import Parser, cli, describe_presets, number
from datafree.errors import UsageError
from datafree.plots import side_by_side
from datafree.run import run_folder
from datafree.runtime import lr_at, make_optimizer, set_lr
from datafree.session import Session
from datafree.teachers import PRETRAINED, fetch, save_teacher, teacher_file
from models import SEGMENTERS

SETTINGS = dict(lr=0.1, weight_decay=5e-4, batch_size=16, n_epochs=200, milestones=[0.5], crop=128)
CAMVID = dict(model="deeplabv3_resnet50") | SETTINGS
PRESETS = {"camvid": CAMVID, "nyuv2": CAMVID | dict(lr=0.05)}
RECIPE = dict(
    lr="learning rate, at first", weight_decay="of SGD", batch_size="images of an iteration",
    n_epochs="passes over the training images", milestones="lr x 0.1 at these fractions of the epochs",
    crop="side of the training images in pixels",
)  # fmt: skip
BACKBONE = ("--backbone_weights", "a state dict of torchvision's classifier, or none for scratch (default: "
            "torchvision's, if it can be had)", dict(metavar="FILE"))  # fmt: skip
SAVE_IMG = ("--save_img", "at the end write N test images beside ground truth and the networks' classes (default: "
            "%(default)s)", dict(type=number(int, 0), default=4, metavar="N"))  # fmt: skip


def parse_args(argv: Sequence | None = None) -> Namespace:
    p = Parser(__file__, __doc__.format(presets=describe_presets(PRESETS)))
    p.add_argument("--dataset", choices=SEGMENTATIONS, default="camvid", help="(default: %(default)s)")
    p.add_networks(SEGMENTERS, ("model",))
    p.add_recipe(**RECIPE)
    p.add(BACKBONE, SAVE_IMG)
    p.add_run()
    args = p.parse_args(argv)
    return p.complete(args, PRESETS[args.dataset])


def focal_loss(logits: Tensor, labels: Tensor, gamma: float = 2) -> Tensor:
    """(1 - exp(-c))^gamma c, mean over all pixels; c (cross-entropy) is 0 where the label is 255.

    Args:
        logits: (N, classes, H, W). labels: (N, H, W).
    """
    c = F.cross_entropy(logits, labels, reduction="none", ignore_index=255)
    return ((1 - (-c).exp()) ** gamma * c).mean()


def train_epoch(s: Session, optimizer: Optimizer) -> dict[str, Tensor]:
    """One pass over the training set; returns the mean loss."""
    s.student.train()
    total, train, size = 0.0, s.data.train, s.args.batch_size
    for x, y in train.crops(size, s.args.crop, s.runtime.device):
        with s.runtime.autocast():
            logits = s.student(s.transform(x))
        total += s.step(focal_loss(logits.float(), y), optimizer) / (len(train) // size)
    return {"loss": total}


def load_backbone(model: nn.Module, args: Namespace) -> str:
    """ImageNet's weights for model.backbone, if they can be had; returns what to tell the user.

    Raises:
        UsageError: the file is missing, damaged or for another network.
    """
    if args.backbone_weights == "none":
        return "backbone from scratch"
    if path := args.backbone_weights:
        state = checkpoint.weights(checkpoint.read(path), path)
    elif args.model != "deeplabv3_resnet50":
        return f"no ImageNet weights are known for {args.model}: backbone from scratch"
    else:
        try:
            state, path = fetch("resnet50_imagenet"), f"torchvision's {PRETRAINED['resnet50_imagenet']}"
        except UsageError as error:
            args.backbone_weights = "none"  # so the record says it
            return f"{error}; backbone from scratch: --backbone_weights FILE brings them, too"
    backbone = getattr(model, "backbone", model)
    own = backbone.state_dict()
    fitting = {k: v for k, v in state.items() if k in own and own[k].shape == v.shape}
    needed = {k for k in own if not k.endswith("num_batches_tracked")}  # which torchvision's files lack
    if lacking := needed - fitting.keys():
        part = f"{len(needed) - len(lacking)} of {len(needed)} tensors of the backbone of {args.model}"
        raise UsageError(f"{path} fits {part}: give weights of the same network, or none")
    backbone.load_state_dict(fitting, strict=False)
    return f"backbone from {path}"


def main(args: Namespace) -> dict:
    """Train or evaluate; returns the content of result.json."""
    distributed.alone("teacher_train_seg.py")
    s = Session(args, papers.published(args), train=True, taught=False, segmentation=True)
    target = teacher_file(args.checkpoints, args.dataset, args.model, None)
    if s.result:
        if not args.evaluate_only and not target.exists():
            print(save_teacher(run_folder(args) / "best.pt", target))
        return s.result
    images = len(s.data.train)
    if images < args.batch_size:
        raise UsageError(f"--batch_size {args.batch_size} does not fit into {images} training images: lower it")
    origin = load_backbone(s.student, args)
    checkpoint.check_writable(target.parent, "--checkpoints")
    optimizer = make_optimizer("sgd", s.student.parameters(), args.lr, args.weight_decay)
    s.start(student=s.student, optimizer=optimizer)
    text = f"{args.model} on {s.data.name}: {images} training images; {origin}"
    s.run.log(f"{text}; {s.runtime.precision} on {s.runtime.device}")
    for epoch in s.epochs(images // args.batch_size, args.batch_size):
        set_lr(optimizer, lr_at(epoch, args.lr, args.n_epochs, args.milestones))
        s.record(train_epoch(s, optimizer))
    side_by_side(s.run.folder / "samples", {args.model: s.student}, s.data, s.transform, s.runtime, args.save_img)
    s.run.log(save_teacher(s.run.best, target))
    return s.finish(method="Teacher", model=args.model, backbone=origin, weights=str(target))


if __name__ == "__main__":
    cli(main, parse_args)
