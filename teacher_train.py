"""Train a classifier on a data set, for the rows "Teacher" and "Student scratch" of all tables.

    python teacher_train.py --dataset mnist --model lenet5          # DAFL Table 1: 98.91 %
    python teacher_train.py --dataset mnist --model lenet5_half     # from scratch: 98.65 %
    python teacher_train.py --dataset cifar10 --model resnet34      # DAFL Table 3: 95.58 %
    python teacher_train.py --dataset folder --data_root DIR --model wrn16_2
    python teacher_train.py --dataset imagenet --model resnet50_imagenet --pretrained

The best weights (by test accuracy, as in the papers) are copied to
checkpoints/<dataset>-<model>.pt, where the distillation scripts look for their teacher; the run's
record is in runs/. Both the last and the best accuracy are reported. --pretrained only tests
torchvision's ImageNet weights and copies them there; here and in all scripts ImageNet's test
images are whole central squares, torchvision's numbers are of their central 7/8.

Recipes (--recipe; the default is the one published for the model and the data set):
{recipes}
Differences from the published code: x0.1 at fixed epochs is written as fractions of --n_epochs,
so that a shorter run keeps the schedule's shape. Fast-Datafree's weight decay of 1e-4 is kept as
published; with it users reach 92 to 94 % on CIFAR-10 instead of the table's 94.87 % and 95.70 %,
and --weight_decay 5e-4 closes most of the gap.
"""

import torch
import torch.nn.functional as F

from data import DATASETS, DataError, get_dataset
from datafree import checkpoint
from datafree.augment import Transform
from datafree.log import Run, evaluate_checkpoint
from datafree.metrics import test_accuracy
from datafree.published import describe, published_classifier
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

SGD = dict(
    optimizer="sgd", lr=0.1, weight_decay=5e-4, batch_size=128, n_epochs=200, milestones=[0.4, 0.6], gamma=0.1
)
ADAM = dict(
    optimizer="adam", lr=1e-3, weight_decay=0.0, batch_size=256, n_epochs=10, milestones=[], gamma=0.1
)
RECIPES = {
    "dafl-mnist": ADAM,
    "dfad-mnist": ADAM | dict(optimizer="sgd", lr=0.01, weight_decay=1e-4),
    "dafl": SGD,
    "dfad": SGD | dict(milestones=[0.4, 0.8]),
    "fast": SGD | dict(weight_decay=1e-4, batch_size=256, milestones=[0.6, 0.75, 0.9], gamma=0.2),
    "dfad-caltech101": SGD | dict(n_epochs=150, milestones=[1 / 3, 2 / 3]),
    "imagenet": SGD | dict(weight_decay=1e-4, batch_size=256, n_epochs=90, milestones=[1 / 3, 2 / 3]),
    # Ours: the paper names none for CelebA, and the digits are not in it.
    "celeba": ADAM | dict(lr=1e-4, batch_size=128, n_epochs=20, milestones=[0.5]),
    "digits": ADAM | dict(lr=2e-3, batch_size=64, n_epochs=40, milestones=[0.6, 0.85], gamma=0.2),
}


def default_recipe(model, dataset):
    """The recipe published for a model and a data set, else the nearest one."""
    if dataset in ("digits", "celeba", "imagenet"):
        return dataset
    if dataset == "caltech101":
        return "dfad-caltech101"
    if dataset in ("mnist", "fashion-mnist", "usps"):
        return "dafl-mnist"
    return "dafl" if model in ("resnet18", "resnet34", "resnet50") else "fast"


def parse_args(argv=None):
    p = Parser(__doc__.format(recipes=describe_presets(RECIPES)))
    p.add_argument("--dataset", choices=DATASETS, default="digits", help="(default: %(default)s)")
    p.add_argument(
        "--model",
        choices=sorted(MODELS),
        default="lenet5",
        metavar="NAME",
        help="one of " + ", ".join(sorted(MODELS)) + " (default: %(default)s)",
    )
    p.add_argument("--recipe", choices=sorted(RECIPES), help="(default: the published one)")
    p.add_argument(
        "--pretrained",
        action="store_true",
        help="train nothing: take torchvision's IMAGENET1K_V1 weights of " + ", ".join(checkpoint.PRETRAINED),
    )
    p.add_argument("--optimizer", choices=("adam", "adamw", "sgd"), help="(default: the recipe's)")
    for flag, kind in (
        ("lr", number(float, 0, above=True)),
        ("weight_decay", number(float, 0)),
        ("batch_size", number(int, 2)),
        ("n_epochs", number(int, 1)),
        ("gamma", number(float, 0, 1)),
    ):
        p.add_argument(f"--{flag}", type=kind, metavar="X", help="(default: the recipe's)")
    p.add_argument(
        "--milestones",
        type=number(float, 0, 1),
        nargs="*",
        metavar="FRACTION",
        help="lr x gamma at these fractions of the epochs (default: the recipe's)",
    )
    p.add_argument("--img_size", type=number(int, 8), help="(default: the model's or data's)")
    p.add_argument("--attribute", help="CelebA: the attribute (default: the most balanced)")
    p.add_argument(
        "--checkpoints",
        default="./checkpoints",
        metavar="DIR",
        help="where the best weights are copied to (default: %(default)s)",
    )
    add_run_arguments(p)
    args = p.parse_args(argv)
    args.argv = argv
    args.recipe = args.recipe or default_recipe(args.model, args.dataset)
    if args.pretrained:
        if args.dataset != "imagenet" or args.model not in checkpoint.PRETRAINED:
            p.error("--pretrained is for --dataset imagenet and --model " + ", ".join(checkpoint.PRETRAINED))
        for flag in RECIPES["imagenet"]:
            if getattr(args, flag) is not None:
                p.error(f"--pretrained trains nothing: leave --{flag} out")
        args.n_epochs = 1
    fill_defaults(args, RECIPES[args.recipe])
    args.img_size = p.image_size((args.model,), args.img_size, agree_on_size)
    return args


def train_epoch(model, optimizer, batches, transform, runtime, tick):
    """One pass over the training set; returns the mean cross-entropy."""
    total = torch.zeros((), device=runtime.device)
    for x, y in batches:
        with runtime.autocast():
            logits = model(transform(x, train=True))
        loss = F.cross_entropy(logits.float(), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        total += loss.detach()
        tick(loss.detach())
    return total / len(batches)


def main(args):
    """Train or evaluate; returns the content of result.json."""
    runtime = setup(args)
    data = get_dataset(
        args.dataset,
        args.data_root,
        img_size=args.img_size,
        mean=args.mean,
        std=args.std,
        attribute=args.attribute,
    ).to(runtime.device)
    model = get_model(args.model, data.num_classes, data.channels)
    name = f"teacher_train-{args.dataset}-{args.model}"
    if args.evaluate_only:
        return evaluate_checkpoint(args, name, model, args.model, data, runtime)
    if args.pretrained:
        path = f"torchvision's {checkpoint.PRETRAINED[args.model]}"
        checkpoint.load_weights(model, checkpoint.fetch(args.model), path, args.model)
    runtime.place(model)
    transform = Transform.of(data)
    cells = published_classifier(args.dataset, args.model)
    card = checkpoint.card(args.model, data, transform)
    target = checkpoint.teacher_file(args.checkpoints, args.dataset, args.model)
    run = Run(args, name, runtime)
    optimizer = make_optimizer(args.optimizer, model.parameters(), args.lr, args.weight_decay)
    start = run.start(model=model, optimizer=optimizer)
    run.log(
        f"{args.model} on {data.name}: {len(data.train)} training and {len(data.test)} test "
        f"images; {'pretrained' if args.pretrained else 'recipe ' + args.recipe}; "
        f"{runtime.precision} on {runtime.device}; published: {describe(cells)}"
    )
    # A last batch of one image would stop BatchNorm on a 1x1 map.
    batches = data.train.batches(
        args.batch_size, shuffle=True, device=runtime.device, drop_last=len(data.train) % args.batch_size == 1
    )
    run.progress([len(batches)] * args.n_epochs, args.batch_size)
    for epoch in range(start, args.n_epochs):
        losses = {}
        if not args.pretrained:
            set_lr(optimizer, lr_at(epoch, args.lr, args.n_epochs, args.milestones, args.gamma))
            model.train()
            losses["loss"] = train_epoch(model, optimizer, batches, transform, runtime, run.tick)
        accuracy = test_accuracy(model, data, transform, runtime)
        run.end_epoch(epoch, accuracy, losses, model, card)
    checkpoint.save(checkpoint.read(run.best), target)
    run.log(f"weights of the best epoch: {target}")
    return run.finish(
        dataset=data.name,
        model=args.model,
        method="Teacher",
        published=cells,
        fingerprint=data.fingerprint,
        weights=str(target),
    )


if __name__ == "__main__":
    cli(main, parse_args, DataError)
