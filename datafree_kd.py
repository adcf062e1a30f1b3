"""Nine data-free distillation methods in one loop: Fast-Datafree's (Fang et al., AAAI 2022), and NAYER.

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
    nayer      optimising one on embeddings of the labels, through a layer that
               is drawn anew for each batch (Tran et al., CVPR 2024)               NAYER-100, -200, -300

An epoch is ep_steps / kd_steps rounds: a synthesizer makes a batch of images in g_steps updates,
then the student takes kd_steps steps of  T^2 KL(teacher / T || student / T)  on images of all
rounds so far (zskt, dfad, dafl, dfq: on fresh images of the generator), from epoch `warmup` on;
its learning rate falls along a cosine. On a CPU the teacher is asked once for each image and crop of
it, and its answer kept (datafree/answers.py). A synthesizer minimises the weighted sum of

    bn L_bn       the teacher's BatchNorm statistics against those of its training data
    oh L_oh       cross-entropy with random classes, or with the teacher's own arg-max
    adv L_adv     minus the student's distance from the teacher, from epoch `warmup` on
    act, balance  DAFL's L_a and L_ie         cr  CMI's contrastive loss          tv, l2  priors

each in its family's file in datafree/synthesis/. Published settings, the defaults:
{recipes}
fast and fast_meta take adv and oh by the teacher (resnet34: 1.33, 0.5; vgg11: 1.0, 0.5; else 1.1,
0.4) and lr_z, lr_g by g_steps (2: 0.015, 5e-3; 5: 0.01, 3e-3; 10: 0.01, 2e-3); cmi looks at the
stages of a resnet34; nayer makes g_loops batches a round, each of all classes in turn, of 30 steps
on CIFAR-10, and on Tiny ImageNet has g_steps 60, g_loops 4, gwp_loops 20, synthesis_batch_size 200,
batch_size 256, lr 0.1, ep_steps and kd_steps 1000. The tables' DeepInv-2k and CMI-500 are
--g_steps 2000 and 500, NAYER-100 and -200 --n_epochs 120 and 220, with --warmup 20. On small grey
images all methods are shortened, on ImageNet the batches are (datafree_kd_imagenet.py has the
published way there); these are ours:
{small}

Differences from the published code (--as_published brings 1 to 4 and 6 back):
 1. zskt, dfad, dafl, dfq: the adversarial term sees the student. The published code hands in the
    teacher, so that the term is 0, and distils at T = 1 whatever --T says.
 2. fast, cmi: the adversarial term starts with the student's first epoch, not one epoch earlier,
    and --reset_l0 counts epochs too, at 60 % of those that follow the warm-up.
 3. --reset_l0 gives the first BatchNorm scales around 1, not around 0.
 4. deepinv keeps the images of the lowest loss, not the last ones.
 5. The pool holds this run's images only, in memory, not whatever lies in a folder; a weight of 0
    leaves its term out, a round without any makes nothing; a full memory bank forgets its oldest rows.
 6. nayer: the student is in eval mode while all batches of a round are made, not the first alone; a
    generator begins anew every --g_life rounds, not at such distances from the warm-up's end, too.
    Text features, the paper's embeddings, are --label_embedding FILE.npy; orthogonal rows need no file.
Kept as published: nayer's random labels behind the whole turns of a batch may be equal, and then so are
their images; on Tiny ImageNet it mirrors images during synthesis, too, which was not meant. The table's
DeepInv-2k on ImageNet made 140k images, --n_epochs 1400 here; how many passes it took is not known.
"""

import datafree.interrupt  # noqa: F401

import argparse
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

import papers
from data import SOURCES, get_images, preset_of
from datafree import checkpoint, distributed
from datafree.answers import Answers
from datafree.cli import FEATURES, PICTURES, Parser, cli, describe_presets, number
from datafree.errors import UsageError
from datafree.hooks import BatchNormHooks, settle_features
from datafree.inputs import trial_images
from datafree.pool import ImagePool, check_alone, read_raw
from datafree.run import run_folder
from datafree.runtime import Stopwatch, cosine_at, make_optimizer, set_lr
from datafree.session import Session
from datafree.synthesis import CMI, CRITERIA, FLAGS, METHODS, Fast, Sample, Synthesizer

# LeNet-5 has no BatchNorm and diverges at the published learning rates.
GREY = dict(n_epochs=80, warmup=4, ep_steps=100, lr=0.01)
SMALL = {
    # At the published weight of L_adv a student of 16,000 parameters falls behind its images.
    "digits": GREY | dict(n_epochs=120, ep_steps=40, batch_size=128, synthesis_batch_size=128, adv=0.3),
    "mnist": GREY,
    "digits, nayer": dict(n_epochs=100, g_steps=5, g_loops=1, gwp_loops=2, nz=256, ngf=32, label_embedding="teacher"),
    "mnist, nayer": dict(g_steps=10, g_loops=1, gwp_loops=4, nz=256),
    "imagenet": dict(batch_size=100, synthesis_batch_size=100),
    "folder": {},
}
OWN = (
    ("--cmi_init", "cmi: start from images inverted before: a run's folder, an .npz of --export_images, or any folder "
     "of images", dict(metavar="PATH")),
    ("--as_published", "with the published code's faults 1 to 4 and 6, to see what they do", dict(action="store_true")),
    ("--pool_size", "images of the pool that stay on the device, the others wait in the host's memory (default: all)",
     dict(type=number(int, 0), metavar="N")),
    ("--export_images", "at the end write the pool as files; with --resume of a finished run, only that",
     dict(choices=("png", "npz"))),
    ("--save_dir", "where --export_images writes (default: <run folder>/images); by itself it means --export_images "
     "png", dict(metavar="DIR")),
)  # fmt: skip


def for_small(recipe: dict, small: dict) -> dict:
    """A recipe where it is not larger than that of `small` grey sets; methods without a warm-up have none there."""
    return recipe | {
        k: v if isinstance(v, str) else v * bool(recipe[k]) if k == "warmup" else min(v, recipe[k])
        for k, v in small.items()
        if k in recipe
    }


def preset_for(args: argparse.Namespace) -> dict:
    """The recipe of args: method, data set, teacher and g_steps (or None)."""
    method, pair = METHODS[args.method], SOURCES.get(args.dataset, SOURCES["folder"]).pair
    recipe = dict(method.recipe) | method.adjust(args.dataset, args.teacher or pair[0], args.g_steps)
    recipe = for_small(recipe, preset_of(args.dataset, SMALL) | SMALL.get(f"{args.dataset}, {args.method}", {}))
    recipe["kd_steps"] = min(recipe["kd_steps"], args.ep_steps or recipe["ep_steps"])
    if args.n_epochs and args.n_epochs < recipe["n_epochs"]:
        recipe["warmup"] = recipe["warmup"] * args.n_epochs // recipe["n_epochs"]
    return recipe


def parse_args(argv: Sequence | None = None) -> argparse.Namespace:
    recipes = describe_presets({name: method.recipe for name, method in METHODS.items()})
    small = describe_presets({k: v for k, v in SMALL.items() if v})
    p = Parser(__file__, __doc__.format(recipes=recipes, small=small))
    p.add(("--method", "(default: %(default)s)", dict(choices=METHODS, default="fast_meta")))
    p.add_dataset()
    p.add_networks()
    p.add_recipe(**{k: FLAGS[k] for method in METHODS.values() for k in method.recipe})
    p.add(FEATURES, *OWN, PICTURES)
    p.add_run()
    args = p.parse_args(argv)
    method, recipe = METHODS[args.method], preset_for(args)
    family = method.family
    for flag in FLAGS:
        if flag not in recipe and getattr(args, flag, None) is not None:
            p.error(f"--{flag} is not a setting of {args.method}, whose settings are: {' '.join(recipe)}")
    args.bn_is_default = args.bn is None
    steps = issubclass(family, Fast)
    word = f"{args.method}{args.g_steps or recipe['g_steps']}" if steps else args.method
    args = p.complete(args, recipe, [word], ["method", "g_steps"] if steps else ["method"])
    vars(args).update(method.fixed)
    if args.as_published:
        args.T = family.published_T or args.T
    if not any(getattr(args, term) for term in family.terms):
        p.error(f"the weights {' '.join(f'--{t}' for t in family.terms)} are all 0: nothing would make images")
    if args.feature_layer and not args.act:
        p.error("--feature_layer is what L_a reads, whose weight --act is 0: leave it out, or take --method dafl")
    check_rounds(p, args)
    if args.warmup >= args.n_epochs:
        left = f"leaves none of {args.n_epochs} epochs to the student"
        p.error(f"--warmup {args.warmup} {left}: lower it, or raise --epochs")
    if family is CMI and args.dataset == "none" and not (args.bn or args.oh or args.adv):
        p.error("--dataset none scores the student on images made without --cr: give --bn, --oh or --adv a weight")
    if args.cmi_init and family is not CMI:
        p.error("--cmi_init is for --method cmi")
    if args.save_dir and not args.export_images:
        args.export_images = "png"
    if args.export_images and not family.pooled:
        p.error(f"--export_images: {args.method} keeps no images, its student meets each once")
    return args


def check_rounds(p: Parser, args: argparse.Namespace) -> None:
    """Refuse rounds that are longer than an epoch."""
    if args.kd_steps > args.ep_steps:
        limit = f"an epoch of --ep_steps {args.ep_steps}"
        p.error(f"--kd_steps {args.kd_steps} does not fit into {limit}: raise the latter")


def clock(args: argparse.Namespace, epoch: int, i: int) -> int:
    """What --warmup is compared with in round i of an epoch: the epoch; as published the number of rounds, from 1."""
    early = args.as_published and METHODS[args.method].family.early
    return epoch * (args.ep_steps // args.kd_steps) + i + 1 if early else epoch


def counts(args: argparse.Namespace, of: Callable[[bool], int]) -> list[int]:
    """`of(whether the adversarial term is on)`, summed over the rounds of each epoch."""
    rounds = range(args.ep_steps // args.kd_steps)
    return [sum(of(clock(args, epoch, i) >= args.warmup) for i in rounds) for epoch in range(args.n_epochs)]


def make_images(s: Session, synthesizer: Synthesizer, adversarial: bool, timer: Stopwatch) -> dict[str, Tensor]:
    """A round of the synthesizer, timed, against a student that stands still; returns its last losses."""
    s.student.eval().requires_grad_(False)
    with timer:
        losses = synthesizer.synthesize(adversarial, s.run.tick)
    s.student.train().requires_grad_(True)
    return losses


def train_epoch(epoch: int, s: Session, synthesizer: Synthesizer, optimizer: Optimizer, timer: Stopwatch) -> dict:
    """args.ep_steps // args.kd_steps rounds; returns the mean of each loss, 0 while it is off."""
    args = s.args
    rounds = args.ep_steps // args.kd_steps
    set_lr(optimizer, cosine_at(epoch - args.warmup, args.lr, args.n_epochs - args.warmup, 2e-4))
    total = {f"loss_{term}": 0.0 for term in synthesizer.terms if getattr(args, term)} | {"loss_kd": 0.0}
    reset = args.warmup + (120 if args.as_published else round(0.6 * (args.n_epochs - args.warmup)))
    for i in range(rounds):
        now = clock(args, epoch, i)
        if now == reset and (i == 0 or args.as_published) and (args.reset_l0 or args.reset_bn):
            synthesizer.reset()
        losses = make_images(s, synthesizer, now >= args.warmup, timer)
        total |= {k: total[k] + v / rounds for k, v in losses.items()}
        if epoch >= args.warmup:
            total["loss_kd"] += distill(synthesizer.sample(args.kd_steps, args.batch_size), s, optimizer) / rounds
    return total


def distill(batches: Iterable[Sample], s: Session, optimizer: Optimizer) -> Tensor | float:
    """A student step on each batch; returns the mean loss."""
    total, args = 0.0, s.args
    for x, numbers in batches:
        with s.runtime.autocast():
            with torch.no_grad():
                t_logits = s.answers(x, numbers)
            s_logits = s.student(x)
        total += s.step(CRITERIA[args.criterion](s_logits, t_logits, args.T), optimizer)
    return total / args.kd_steps


def main(args: argparse.Namespace) -> dict:
    """Distil or evaluate; returns the content of result.json."""
    s = Session(args, papers.published(args))
    if s.result:
        if args.export_images and not args.evaluate_only:
            distributed.alone("--export_images of a finished run")
            folder = run_folder(args)
            known = checkpoint.metadata_of(checkpoint.read(folder / "best.pt"), folder / "best.pt")
            pool = ImagePool((known["channels"], *[known["img_size"]] * 2), "cpu", folder / "pool.u8")
            pool.load_state_dict({"images": s.result["generated_images"]})
            print(f"images: {pool.export(args.export_images, args.save_dir or folder / 'images')}")
        return s.result
    note = leave_out_batch_norm(args, s.teacher)
    if args.act:
        settle_features(s.teacher, trial_images(s.data, s.runtime.device), args.feature_layer)
    shape = (s.data.channels, s.data.img_size, s.data.img_size)
    generator = s.generator(args.generator, args.nz, ngf=args.ngf) if args.generator else None
    inverted = read_inverted(args.cmi_init, shape) if args.cmi_init else None
    if args.save_dir:
        checkpoint.check_writable(args.save_dir, "--save_dir")
        if args.export_images == "png" and not args.resume:
            check_alone(args.save_dir, 0)
    family, rounds = METHODS[args.method].family, args.ep_steps // args.kd_steps
    batches = sum(counts(args, lambda adversarial: family.batches(vars(args), adversarial)))
    images = batches * args.synthesis_batch_size + (0 if inverted is None else len(inverted))
    synthesizer = make_synthesizer(s, family, generator, images)
    pool = synthesizer.pool
    optimizer = make_optimizer("sgd", s.student.parameters(), args.lr, args.weight_decay)
    timer = Stopwatch(s.runtime.device)
    states = dict(student=s.student, optimizer=optimizer, synthesizer=synthesizer, timer=timer)
    start = s.start(**states, **({} if pool is None else dict(pool=pool, answers=s.answers)))
    if inverted is not None and not start:
        synthesizer.start_from(inverted)
    if note:
        s.run.log(note)
    for epoch in s.epochs(iterations_of(args, synthesizer), args.batch_size):
        losses = train_epoch(epoch, s, synthesizer, optimizer, timer)
        s.record(losses, lambda: synthesizer.pictures(64), synthesis_seconds=round(timer.seconds(), 3))
    fresh = rounds * args.kd_steps * args.batch_size * (args.n_epochs - args.warmup)
    made, seconds = fresh if pool is None else len(pool), round(timer.seconds(), 1)
    result = s.finish(method=args.method, synthesis_seconds=seconds, generated_images=made)
    if pool is not None:
        s.answers.path.unlink(missing_ok=True)
    if args.export_images:
        s.run.log(f"images: {pool.export(args.export_images, args.save_dir or s.run.folder / 'images')}")
    return result


def make_synthesizer(s: Session, family: type[Synthesizer], generator: nn.Module | None, images: int) -> Synthesizer:
    """Who makes the images of a run, with a pool for so many in the run's folder if they are kept."""
    args, pool, shape = s.args, None, (s.data.channels, s.data.img_size, s.data.img_size)
    if family.pooled:
        pool = ImagePool(shape, s.runtime.device, run_folder(args) / "pool.u8", args.pool_size, images)
        # A GPU would have to wait for the host at each step, several processes say the whole batch's logits together,
        # and what is compiled takes batches of one size.
        alone = s.runtime.device.type == "cpu" and distributed.SIZE == 1 and not s.runtime.compiles
        # The folded one: the synthesizer's own shows what enters its BatchNorms.
        s.answers = Answers(
            lambda x: s.folded_teacher(x), s.data.num_classes, run_folder(args) / "answers.bin",
            images * s.transform.forms * alone,
        )  # fmt: skip
    settings = {k: getattr(args, k) for k in family.settings}
    networks = s.teacher, s.student, generator, s.transform
    synthesizer = family(*networks, shape, s.data.num_classes, s.runtime, pool, **settings)
    s.unseen = synthesizer.unseen
    return synthesizer


def iterations_of(args: argparse.Namespace, synthesizer: Synthesizer) -> list[int]:
    """The updates of each epoch, by rounds that make images and by the student."""
    steps = args.ep_steps // args.kd_steps * args.kd_steps
    made = counts(args, synthesizer.updates)
    return [n + steps * (epoch >= args.warmup) for epoch, n in enumerate(made)]


def leave_out_batch_norm(args: argparse.Namespace, teacher: nn.Module) -> str:
    """Drop the default L_bn for a teacher without BatchNorm; returns what to tell the user.

    Raises:
        UsageError: the BatchNorm layers were asked for, or the method cannot do without.
    """
    features = args.cr and args.feature_layers == "bn"
    if BatchNormHooks(teacher).layers or not (args.bn or features):
        return ""
    lack = f"teacher {args.teacher} has no BatchNorm layers"
    if features or not args.bn_is_default:
        weight = "--cr" if features else "--bn"
        others = [
            name for name, method in METHODS.items() if not {"bn", "cr"} & {k for k, v in method.recipe.items() if v}
        ]
        raise UsageError(f"{lack}, which {weight} reads: give {weight} 0, or take --method {' or '.join(others)}")
    args.bn = 0.0
    if not any(getattr(args, term) for term in METHODS[args.method].family.terms):
        raise UsageError(f"{lack} and all other weights are 0: give one of them, or a teacher that has them")
    return f"{args.teacher} has no BatchNorm: the term bn is left out"


def read_inverted(path: str, shape: tuple[int, int, int]) -> Tensor:
    """Images uint8 (N, C, H, W) of shape (C, H, W) from a run's folder, an .npz or a folder."""
    path = Path(path)
    if (path / "pool.u8").is_file():
        if (best := path / "best.pt").is_file():
            known = checkpoint.metadata_of(checkpoint.read(best), best)
            if (of := (known.get("channels"), *[known.get("img_size")] * 2)) != shape:
                raise UsageError(f"the images of {path} are of shape {of}, not {shape}: name another --cmi_init")
        return read_raw(path / "pool.u8", shape)
    if path.suffix != ".npz":
        return get_images(path, shape[1], shape[0])
    try:
        with np.load(path) as archive:
            images = torch.from_numpy(archive["images"]).permute(0, 3, 1, 2)
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, EOFError, BadZipFile) as error:
        raise UsageError(f"{path} is no archive of --export_images: {error}") from error
    if images.dtype != torch.uint8 or images.shape[1:] != shape:
        raise UsageError(f"{path} holds {images.dtype} images of shape {tuple(images.shape[1:])}, not uint8 of {shape}")
    return images


if __name__ == "__main__":
    cli(main, parse_args)
