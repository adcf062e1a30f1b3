"""Eight data-free distillation methods in one loop: Fast-Datafree (Fang et al., AAAI 2022).

    python teacher_train.py --dataset cifar10 --model wrn40_2
    python datafree_kd.py --method fast_meta --teacher wrn40_2 --student wrn16_1 --dataset cifar10
                                           # Fast-10, 89.29 %; --g_steps 5 and 2: Fast-5, Fast-2
    python datafree_kd.py --method dfq --teacher wrn40_2 --student wrn16_1 --dataset cifar10
    bash scripts/fast_cifar.sh             # the table's rows, one after the other
    bash scripts/fast_digits.sh            # embedded data: minutes on two cores

    method     makes images by                                                     paper's row
    zskt       a generator against the student (Micaelli and Storkey 2019)         ZSKT
    dfad       the same, mean absolute difference of logits (Fang et al. 2019)     DFAD
    dafl       a generator that the teacher takes for data (Chen et al. 2019)      DAFL
    dfq        both, and BatchNorm statistics (Choi et al. 2020)                   DFQ
    deepinv    optimising pixels (Yin et al. 2020)                                 DeepInv
    cmi        optimising a generator a batch, new ones unlike old ones (2021)     CMI
    fast       optimising one generator on and on, batch after batch
    fast_meta  meta-learning it, so that few steps make a batch                    Fast-2, -5, -10

An epoch is ep_steps / kd_steps rounds: a synthesizer makes a batch of images in g_steps updates,
then the student takes kd_steps steps of  T^2 KL(teacher / T || student / T)  on images of all
rounds so far (zskt, dfad, dafl, dfq: on fresh images of the generator), from epoch `warmup` on;
its learning rate falls along a cosine. A synthesizer minimises the weighted sum of

    bn L_bn       the teacher's BatchNorm statistics against those of its training data
    oh L_oh       cross-entropy with random classes, or with the teacher's own arg-max
    adv L_adv     minus the student's distance from the teacher, from epoch `warmup` on
    act, balance  DAFL's L_a and L_ie         cr  CMI's contrastive loss          tv, l2  priors

each in its family's file in datafree/synthesis/. Published settings, the defaults:
{recipes}
fast and fast_meta take adv and oh by the pair of networks (resnet34: 1.33, 0.5; vgg11: 1.0, 0.5;
else 1.1, 0.4) and lr_z, lr_g by g_steps (2: 0.015, 5e-3; 5: 0.01, 3e-3; 10: 0.01, 2e-3). On small
grey images all methods are shortened, on ImageNet the batches are (datafree_kd_imagenet.py has the
published way there); these settings are ours:
{small}

Differences from the published code (--as_published brings 1 to 4 back):
 1. zskt, dfad, dafl, dfq: the adversarial term sees the student. The published code hands in the
    teacher, so that the term is 0, and distils at T = 1 whatever --T says.
 2. fast, cmi: the adversarial term starts with the student's first epoch, not one epoch earlier,
    and --reset_l0 counts epochs too, at 60 % of those that follow the warm-up.
 3. --reset_l0 gives the first BatchNorm scales around 1, not around 0.
 4. deepinv keeps the images of the lowest loss, not the last ones.
 5. The pool holds this run's images only, in memory, not whatever lies in a folder; a weight of 0
    leaves its term out; a full memory bank forgets its oldest rows.
"""

import os
from pathlib import Path

import numpy as np
import torch

from data import DATASETS, DataError, get_dataset, get_images
from datafree import checkpoint, synthesis
from datafree.augment import Transform
from datafree.fold import fold_batch_norm
from datafree.hooks import BatchNormHooks
from datafree.log import Run, evaluate_checkpoint
from datafree.losses import kd_loss, l1_loss
from datafree.metrics import test_accuracy
from datafree.pool import ImagePool, read_raw
from datafree.published import describe, published
from datafree.runtime import (
    Parser,
    Stopwatch,
    UsageError,
    add_run_arguments,
    cli,
    cosine_at,
    describe_presets,
    fill_defaults,
    make_optimizer,
    number,
    set_lr,
    setup,
)
from models import GENERATORS, MODELS, agree_on_size, get_generator, get_model

STUDENT = dict(
    n_epochs=200,
    warmup=0,
    ep_steps=400,
    kd_steps=400,
    batch_size=256,
    synthesis_batch_size=256,
    lr=0.1,
    weight_decay=1e-4,
    criterion="kl",
    T=20.0,
)
GENERATOR = dict(generator="fast", nz=256, ngf=64)
GENERATIVE = (
    STUDENT
    | GENERATOR
    | dict(kd_steps=5, g_steps=1, lr_g=1e-3, adv=0.0, bn=0.0, oh=0.0, act=0.0, balance=0.0)
)
FAST = (
    STUDENT
    | GENERATOR
    | dict(
        n_epochs=220,
        warmup=20,
        lr=0.2,
        g_steps=10,
        lr_z=0.01,
        lr_g=2e-3,
        adv=1.1,
        bn=10.0,
        oh=0.4,
        bn_mmt=0.9,
        reset_l0=1,
        reset_bn=0,
    )
)
RECIPES = {
    "zskt": GENERATIVE | dict(adv=1.0),
    "dfad": GENERATIVE | dict(adv=1.0, criterion="l1", T=1.0),
    "dafl": GENERATIVE | dict(oh=1.0, act=0.001, balance=20.0, nz=512),
    "dfq": GENERATIVE | dict(kd_steps=10, adv=1.0, bn=1.0, oh=1.0, balance=20.0),
    "deepinv": STUDENT | dict(g_steps=1000, lr_g=0.1, adv=1.0, bn=10.0, oh=1.0, tv=0.0, l2=0.0),
    "cmi": STUDENT
    | GENERATOR
    | dict(
        g_steps=200,
        lr_g=1e-3,
        adv=0.5,
        bn=1.0,
        oh=1.0,
        cr=0.8,
        cr_T=0.2,
        bank_size=40960,
        n_neg=4096,
        head_dim=256,
    ),
    "fast": FAST,
    "fast_meta": FAST | dict(is_maml=1),
}
FAMILIES = {
    "zskt": (synthesis.Generative, {}),
    "dfad": (synthesis.Generative, {}),
    "dafl": (synthesis.Generative, {}),
    "dfq": (synthesis.Generative, {}),
    "deepinv": (synthesis.DeepInversion, {}),
    "cmi": (synthesis.CMI, {}),
    "fast": (synthesis.Fast, dict(meta=False, is_maml=0)),
    "fast_meta": (synthesis.Fast, dict(meta=True)),
}
# By what the published scripts choose these; see the docstring.
FAST_BY_TEACHER = {"resnet34": dict(adv=1.33, oh=0.5), "vgg11": dict(adv=1.0, oh=0.5)}
FAST_BY_STEPS = {2: dict(lr_z=0.015, lr_g=5e-3), 5: dict(lr_z=0.01, lr_g=3e-3)}
PAIRS = dict.fromkeys(DATASETS, ("wrn40_2", "wrn16_1")) | {
    "digits": ("lenet5", "lenet5_half"),
    "mnist": ("lenet5", "lenet5_half"),
    "fashion-mnist": ("lenet5", "lenet5_half"),
    "usps": ("lenet5", "lenet5_half"),
    "celeba": ("alexnet", "alexnet_half"),
    "caltech101": ("resnet34_imagenet", "resnet18_imagenet"),
    "imagenet": ("resnet50_imagenet", "resnet18_imagenet"),
}
# LeNet-5 has no BatchNorm and diverges at the published learning rates.
GREY = dict(n_epochs=80, warmup=4, ep_steps=100, lr=0.01)
SMALL = {
    # At the published weight of L_adv a student of 16,000 parameters falls behind its images.
    "digits": GREY | dict(n_epochs=120, ep_steps=40, batch_size=128, synthesis_batch_size=128, adv=0.3),
    "mnist": GREY,
    "fashion-mnist": GREY,
    "usps": GREY,
    "imagenet": dict(batch_size=100, synthesis_batch_size=100),
}
WEIGHTS = ("bn", "oh", "adv", "act", "balance", "cr", "tv", "l2")
CRITERIA = {"kl": kd_loss, "l1": lambda s_logits, t_logits, T: l1_loss(s_logits, t_logits)}
ROWS = {
    "zskt": "ZSKT",
    "dfad": "DFAD",
    "dafl": "DAFL",
    "dfq": "DFQ",
    "deepinv": "DeepInv-2k",
    "cmi": "CMI-500",
}


def defaults(args):
    """The recipe of args: method, data set, teacher and g_steps (or None)."""
    recipe = dict(RECIPES[args.method])
    if "lr_z" in recipe:
        recipe |= FAST_BY_TEACHER.get(args.teacher, {})
        recipe |= FAST_BY_STEPS.get(args.g_steps, {})
    small = SMALL.get(args.dataset, {})
    recipe |= {k: min(v, recipe[k]) if k != "warmup" else v * bool(recipe[k]) for k, v in small.items()}
    recipe["kd_steps"] = min(recipe["kd_steps"], args.ep_steps or recipe["ep_steps"])
    if args.n_epochs and args.n_epochs < recipe["n_epochs"]:
        recipe["warmup"] = recipe["warmup"] * args.n_epochs // recipe["n_epochs"]
    return recipe


def parse_args(argv=None):
    p = Parser(__doc__.format(recipes=describe_presets(RECIPES), small=describe_presets(SMALL)))
    p.add_argument("--method", choices=RECIPES, default="fast_meta", help="(default: %(default)s)")
    p.add_argument(
        "--dataset",
        choices=DATASETS,
        default="digits",
        help="the teacher's data set; only its test images are used (default: %(default)s)",
    )
    for role in ("teacher", "student"):
        p.add_argument(
            f"--{role}",
            choices=sorted(MODELS),
            metavar="NAME",
            help=(
                "one of " + ", ".join(sorted(MODELS)) + " (default: wrn40_2; digits, MNIST: lenet5)"
                if role == "teacher"
                else "the same names (default: wrn16_1; lenet5_half)"
            ),
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
    count, positive, weight = number(int, 1), number(float, 0, above=True), number(float, 0)
    group = p.add_argument_group(
        "recipe", "left out, each is the recipe's; a flag that the method does not have is refused"
    )
    for flag, kind, text in (
        ("n_epochs", count, "epochs of ep_steps"),
        ("warmup", number(int, 0), "epochs without student steps and adversarial term"),
        ("ep_steps", count, "student steps of an epoch"),
        ("kd_steps", count, "student steps of a round"),
        ("g_steps", count, "updates that make a batch"),
        ("batch_size", number(int, 2), "images of a student step"),
        ("synthesis_batch_size", number(int, 2), "images of a round"),
        ("lr", positive, "learning rate of the student (SGD, momentum 0.9)"),
        ("weight_decay", weight, "of the student"),
        ("T", positive, "temperature of the student's loss"),
        ("lr_g", positive, "learning rate of the generator (deepinv: of the pixels)"),
        ("lr_z", positive, "learning rate of the latents"),
        ("adv", weight, "weight of the adversarial term"),
        ("bn", weight, "weight of the BatchNorm statistics"),
        ("oh", weight, "weight of the cross-entropy"),
        ("act", weight, "weight of the activation loss"),
        ("balance", weight, "weight of the class balance"),
        ("cr", weight, "weight of the contrastive loss"),
        ("cr_T", positive, "temperature of the contrastive loss"),
        ("tv", weight, "weight of the total variation"),
        ("l2", weight, "weight of the batch's norm"),
        ("bn_mmt", number(float, 0, 1), "momentum of the batches' BatchNorm statistics"),
        ("bank_size", count, "images in the memory bank"),
        ("n_neg", count, "of the bank, negatives of a step"),
        ("head_dim", count, "output size of the instance discriminator"),
        ("nz", count, "length of a latent"),
        ("ngf", count, "width of the generator"),
        ("is_maml", int, "1: first-order MAML, 0: Reptile"),
        ("reset_l0", int, "1: redraw the generator's first layer in mid-run"),
        ("reset_bn", int, "1: redraw the generator's BatchNorm layers in mid-run"),
    ):
        switch = dict(choices=(0, 1)) if kind is int else dict(metavar="X")
        names = ("--n_epochs", "--epochs") if flag == "n_epochs" else (f"--{flag}",)
        group.add_argument(*names, type=kind, help=text, **switch)
    group.add_argument(
        "--criterion",
        choices=CRITERIA,
        help="the student's loss: KL at temperature T, or mean absolute difference of logits",
    )
    group.add_argument(
        "--generator",
        choices=sorted(GENERATORS),
        metavar="NAME",
        help="one of " + ", ".join(sorted(GENERATORS)),
    )
    p.add_argument(
        "--cmi_init",
        metavar="PATH",
        help="cmi: start from images inverted before: a "
        "run's folder, an .npz of --export_images, or any folder of images",
    )
    p.add_argument(
        "--as_published",
        action="store_true",
        help="with the published code's faults 1 to 4, to see what they do",
    )
    p.add_argument(
        "--pool_size",
        type=number(int, 0),
        metavar="N",
        help="images of the pool that "
        "stay on the device, the others wait in the host's memory (default: all)",
    )
    p.add_argument(
        "--export_images",
        choices=("png", "npz"),
        help="at the end write the pool as files; with --resume of a finished run, only that",
    )
    p.add_argument(
        "--save_dir",
        metavar="DIR",
        help="where --export_images writes "
        "(default: <run folder>/images); by itself it means --export_images png",
    )
    p.add_argument("--img_size", type=number(int, 8), help="(default: the model's or data's)")
    p.add_argument("--attribute", help="CelebA: the attribute (default: the most balanced)")
    p.add_argument(
        "--sample_every",
        type=number(int, 0),
        default=10,
        metavar="N",
        help="write a grid of images each N epochs, 0 for never (default: %(default)s)",
    )
    add_run_arguments(p)
    args = p.parse_args(argv)
    args.argv = argv
    args.teacher, args.student = (
        given or name for given, name in zip((args.teacher, args.student), PAIRS[args.dataset], strict=True)
    )
    family, fixed = FAMILIES[args.method]
    recipe = defaults(args)
    args.bn_is_default = args.bn is None
    for action in group._group_actions:
        if action.dest not in recipe and getattr(args, action.dest) is not None:
            p.error(
                f"--{action.dest} is not a setting of {args.method}, whose settings are: " + " ".join(recipe)
            )
    fill_defaults(args, recipe)
    vars(args).update(fixed)
    if args.as_published:
        args.T = family.published_T or args.T
    if not any(getattr(args, w) for w in WEIGHTS):
        p.error(
            "the weights "
            + " ".join(f"--{w}" for w in WEIGHTS if w in recipe)
            + " are all 0: nothing would make images"
        )
    if args.kd_steps > args.ep_steps:
        p.error(
            f"--kd_steps {args.kd_steps} does not fit into an epoch of --ep_steps "
            f"{args.ep_steps}: raise the latter"
        )
    if args.warmup >= args.n_epochs:
        p.error(
            f"--warmup {args.warmup} leaves none of {args.n_epochs} epochs to the student: "
            "lower it, or raise --epochs"
        )
    if args.cmi_init and family is not synthesis.CMI:
        p.error("--cmi_init is for --method cmi")
    if args.save_dir and not args.export_images:
        args.export_images = "png"
    if args.export_images and not family.pooled:
        p.error(f"--export_images: {args.method} keeps no images, its student meets each once")
    args.img_size = p.image_size((args.teacher, args.student), args.img_size, agree_on_size)
    return args


def train_epoch(epoch, synthesizer, teacher, student, optimizer, args, runtime, timer, tick):
    """args.ep_steps // args.kd_steps rounds; returns the mean of each loss, 0 while it is off."""
    rounds = args.ep_steps // args.kd_steps
    set_lr(optimizer, cosine_at(epoch - args.warmup, args.lr, args.n_epochs - args.warmup, 2e-4))
    total = {f"loss_{w}": 0.0 for w in (*WEIGHTS, "kd") if getattr(args, w, True)}
    for i in range(rounds):
        # As published, rounds are counted from 1 here, and the student's epochs from 0.
        clock = epoch * rounds + i + 1 if args.as_published else epoch
        reset = args.warmup + (120 if args.as_published else round(0.6 * (args.n_epochs - args.warmup)))
        if clock == reset and (i == 0 or args.as_published) and (args.reset_l0 or args.reset_bn):
            synthesizer.reset()
        student.eval().requires_grad_(False)
        with timer:
            losses = synthesizer.synthesize(clock >= args.warmup, tick)
        total |= {k: total[k] + v / rounds for k, v in losses.items()}
        if epoch >= args.warmup:
            student.train().requires_grad_(True)
            batches = synthesizer.sample(args.kd_steps, args.batch_size)
            total["loss_kd"] += distill(batches, teacher, student, optimizer, args, runtime, tick) / rounds
    return total


def distill(batches, teacher, student, optimizer, args, runtime, tick):
    """A student step on each batch of normalised images; returns the mean loss."""
    total, criterion = 0.0, CRITERIA[args.criterion]
    for x in batches:
        with runtime.autocast():
            with torch.no_grad():
                t_logits = teacher(x)
            s_logits = student(x)
        loss = criterion(s_logits, t_logits, args.T)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        total += loss.detach()
        tick(total)
    return total / args.kd_steps


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
    name = f"datafree_kd-{args.dataset}-{args.teacher}-{args.student}-{args.method}"
    name += str(args.g_steps) if args.method in ("fast", "fast_meta") else ""
    if args.evaluate_only:
        return evaluate_checkpoint(args, name, student, args.student, data, runtime)
    teacher, card = checkpoint.load_teacher(args, get_model, data)
    note = settle_batch_norm(args, teacher)
    shape = (data.channels, data.img_size, data.img_size)
    generator = None
    if args.generator:
        try:
            generator = get_generator(args.generator, args.nz, data.img_size, data.channels, args.ngf)
        except ValueError as error:
            raise UsageError(f"{error}: choose another --img_size or --generator") from error
        runtime.place(generator)
    runtime.place(teacher, student)
    transform = Transform.of(data, card)
    inverted = read_inverted(args.cmi_init, shape) if args.cmi_init else None
    if args.save_dir:
        check_writable(args.save_dir)
    run = Run(args, name, runtime)
    family, _ = FAMILIES[args.method]
    pool = ImagePool(shape, runtime.device, run.folder / "pool.u8", args.pool_size) if family.pooled else None
    synthesizer = family(
        teacher,
        student,
        generator,
        transform,
        shape,
        data.num_classes,
        runtime,
        pool,
        **{k: getattr(args, k) for k in family.settings},
    )
    optimizer = make_optimizer("sgd", student.parameters(), args.lr, args.weight_decay)
    timer = Stopwatch(runtime.device)
    states = dict(student=student, optimizer=optimizer, synthesizer=synthesizer, timer=timer)
    start = run.start(**states, **({"pool": pool} if family.pooled else {}))
    if inverted is not None and not start:
        synthesizer.start_from(inverted)
    quick_teacher = fold_batch_norm(teacher)  # the synthesizer's shows what enters its BatchNorms
    teacher_accuracy = test_accuracy(teacher, data, transform, runtime)
    cells = published(
        args.dataset, (ROWS.get(args.method, f"Fast-{args.g_steps}"),), args.teacher, args.student
    )
    run.log(
        f"{args.method}: teacher {args.teacher}: {teacher_accuracy:.2f} %; student "
        f"{args.student}; {runtime.precision} on {runtime.device}; published: "
        f"{describe(cells)}{note}"
    )
    synthesis_ticks = args.ep_steps // args.kd_steps * args.g_steps
    student_ticks = args.ep_steps // args.kd_steps * args.kd_steps
    run.progress(
        [synthesis_ticks + student_ticks * (epoch >= args.warmup) for epoch in range(args.n_epochs)],
        args.batch_size,
    )
    card = checkpoint.card(args.student, data, transform)
    for epoch in range(start, args.n_epochs):
        losses = train_epoch(
            epoch, synthesizer, quick_teacher, student, optimizer, args, runtime, timer, run.tick
        )
        accuracy = test_accuracy(student, data, transform, runtime)
        run.end_epoch(epoch, accuracy, losses, student, card, synthesis_seconds=round(timer.seconds(), 3))
        last = epoch + 1 == args.n_epochs
        if args.sample_every and (last or (epoch + 1) % args.sample_every == 0):
            run.images(f"epoch{epoch + 1:04}", synthesizer.pictures(64))
    result = run.finish(
        method=args.method,
        dataset=data.name,
        teacher=args.teacher,
        student=args.student,
        teacher_accuracy=teacher_accuracy,
        published=cells,
        synthesis_seconds=round(timer.seconds(), 1),
        generated_images=len(pool)
        if pool
        else student_ticks * args.batch_size * (args.n_epochs - args.warmup),
        fingerprint=data.fingerprint,
    )
    if args.export_images:
        folder = args.save_dir or run.folder / "images"
        run.log(f"images: {pool.export(args.export_images, folder)}")
    return result


def settle_batch_norm(args, teacher):
    """Drop the default L_bn for a teacher without BatchNorm; returns what to tell the user.

    Raises:
        UsageError: the BatchNorm layers were asked for, or the method cannot do without.
    """
    if BatchNormHooks(teacher).layers or not (args.bn or args.cr):
        return ""
    if args.cr or not args.bn_is_default:
        weight = "--cr" if args.cr else "--bn"
        raise UsageError(
            f"teacher {args.teacher} has no BatchNorm layers, which {weight} reads: "
            f"give {weight} 0, or a teacher that has them"
        )
    args.bn = 0.0
    if not any(getattr(args, w) for w in WEIGHTS):
        raise UsageError(
            f"teacher {args.teacher} has no BatchNorm layers and all other weights "
            "are 0: give one of them, or a teacher that has them"
        )
    return f"; {args.teacher} has no BatchNorm: the term bn is left out"


def read_inverted(path, shape):
    """Images uint8 (N, C, H, W) of shape (C, H, W) from a run's folder, an .npz or a folder."""
    path = Path(path)
    if (path / "pool.u8").is_file():
        return read_raw(path / "pool.u8", shape)
    if path.suffix != ".npz":
        return get_images(path, shape[1], shape[0])
    try:
        with np.load(path) as archive:
            images = torch.from_numpy(archive["images"]).permute(0, 3, 1, 2)
    except (OSError, ValueError, KeyError) as error:
        raise UsageError(f"{path} is no archive of --export_images: {error}") from error
    if images.dtype != torch.uint8 or images.shape[1:] != shape:
        raise UsageError(
            f"{path} holds {images.dtype} images of shape {tuple(images.shape[1:])}, not uint8 of {shape}"
        )
    return images


def check_writable(folder):
    """Make the folder if it is missing. Raises UsageError if it cannot be written to."""
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise PermissionError(13, "Permission denied")
    except OSError as error:
        raise UsageError(f"cannot write to {folder} ({error.strerror}): choose another --save_dir") from error


if __name__ == "__main__":
    cli(main, parse_args, DataError)
