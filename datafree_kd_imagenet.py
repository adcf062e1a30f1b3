"""Fast-Datafree on ImageNet (Fang et al., AAAI 2022): meta-learnt generator and latents, Fast-50.

    python teacher_train.py --dataset imagenet --model resnet50_imagenet --pretrained
    python datafree_kd_imagenet.py --student resnet50_imagenet    # ImageNet table: 68.61 %
    python datafree_kd_imagenet.py --student resnet18_imagenet    # 53.45 %
    python datafree_kd_imagenet.py --student mobilenetv2          # 43.02 %
    python datafree_kd_imagenet.py --dataset folder --data_root DIR --img_size 64 --teacher resnet18

ImageNet itself, for testing only, lies in <data_root>/imagenet/{{train,val}}/<class>/. The table
says 140k images and 6.28 hours of synthesis; its rows have not been run here.

A generator G_theta and a batch of latent maps z are learnt across rounds. A round copies both,
phi = theta and u = z, and --g_steps steps of Adam on the copies minimise, for random classes y,

    L(phi, u) = bn L_bn + oh H(t(x), y) + adv L_adv,   x = G_phi(u), cropped, stretched, mirrored

    L_bn    sum_l |mean_l(x) - mean_l| + |var_l(x) - var_l|   inputs of the teacher's BatchNorms
    L_adv   -mean [arg-maxes agree] KL(t(x) || s(x))          where the student is not as sure yet

The images of the lowest L go to the pool. Then Reptile moves what the next round starts from:

    theta <- Adam(theta, r (theta - phi)),     z <- Adam(z, r (z - u)),     r = --reptile_factor

and after --z_rounds rounds z is drawn anew. (--is_maml 1: first-order MAML, along the copies' last
gradients.) A first phase of --phase1_rounds rounds has no student: it fills the pool without L_adv.
Then an epoch is ep_steps / kd_steps rounds, each with kd_steps student steps behind it, on images of
the whole pool, cropped, stretched and mirrored, too:

    T^2 KL(softmax(t(x) / T) || softmax(s(x) / T))

Published settings, by the student; the defaults of these flags:
{presets}

Differences from the published code:
 1. z has a meta gradient. In the published code z and its copy share their memory: z - u is 0, and
    the rounds' own steps move z.
 2. The pool gets each round's images of the lowest loss, not the last ones.
 3. Both phases are one run. How long the first was is not known; its adversarial term, 0.01 or
    none, is none. With 1,400 rounds it makes the table's 140k images; the second phase, with
    the published settings, adds 400k. The pool then has 81 GB, in memory and on disk.
 4. Reptile's difference is taken once, as published here; datafree_kd.py --is_maml 0 takes it 67
    times, as published there; Adam takes out a factor.
 5. The test is on whole central squares, not on the central 7/8 of them.
The learning rate falls along a cosine to 0, as it does in the published logs; the milestones that are
published, 120, 150 and 180, have no effect there. bn_mmt is theirs, too.
"""

import datafree.interrupt  # noqa: F401

from argparse import Namespace
from collections.abc import Sequence

from torch.optim import Optimizer

import papers
from datafree.cli import PICTURES, Parser, cli, describe_presets, number
from datafree.errors import UsageError
from datafree.hooks import BatchNormHooks
from datafree.runtime import Stopwatch, cosine_at, make_optimizer, set_lr
from datafree.session import Session
from datafree.synthesis import FLAGS, IMAGENET, FastLatents
from datafree_kd import check_rounds, distill, make_images, make_synthesizer

PRESETS = {"resnet18_imagenet": IMAGENET | dict(adv=1.0), "other students": IMAGENET}
SAVE_ROUNDS = 100  # of the first phase between checkpoints
AREA = 0.75  # the least share of an image that a crop keeps
POOL_SIZE = ("--pool_size", "images of the pool that stay on the device, 0.15 MB each at 224 pixels, the others wait "
             "in the host's memory (default: %(default)s)",
             dict(type=number(int, 0), default=100_000, metavar="N"))  # fmt: skip


def parse_args(argv: Sequence | None = None) -> Namespace:
    p = Parser(__file__, __doc__.format(presets=describe_presets(PRESETS)))
    p.add_dataset(default="imagenet")
    p.add_networks()
    p.add_recipe(**{flag: FLAGS[flag] for flag in IMAGENET})
    p.add(POOL_SIZE, PICTURES)
    p.add_run()
    args = p.parse_args(argv)
    networks = dict(teacher="resnet50_imagenet", student="resnet18_imagenet")
    args = p.complete(args, networks | PRESETS.get(args.student or networks["student"], IMAGENET))
    if not args.bn and not args.oh and (args.phase1_rounds or not args.adv):
        phase = " in the first phase" if args.adv else ""
        p.error(f"--bn and --oh are both 0: nothing would make images{phase}")
    check_rounds(p, args)
    return args


def train_epoch(epoch: int, s: Session, synthesizer: FastLatents, optimizer: Optimizer, timer: Stopwatch) -> dict:
    """args.ep_steps // args.kd_steps rounds; returns the mean of each loss."""
    args = s.args
    rounds = args.ep_steps // args.kd_steps
    set_lr(optimizer, cosine_at(epoch, args.lr, args.n_epochs, 0))
    total = {f"loss_{term}": 0.0 for term in synthesizer.terms if getattr(args, term)} | {"loss_kd": 0.0}
    for _ in range(rounds):
        losses = make_images(s, synthesizer, True, timer)
        losses["loss_kd"] = distill(synthesizer.sample(args.kd_steps, args.batch_size), s, optimizer)
        total = {k: v + losses[k] / rounds for k, v in total.items()}
    return total


def main(args: Namespace) -> dict:
    """Distil or evaluate; returns the content of result.json."""
    s = Session(args, papers.published(args), area=AREA)
    if s.result:
        return s.result
    if args.bn and not BatchNormHooks(s.teacher).layers:
        lack = f"teacher {args.teacher} has no BatchNorm layers"
        raise UsageError(f"{lack}, which --bn reads: give --bn 0, or a teacher that has them")
    generator = s.generator("deep", args.nz, ngf=args.ngf)
    rounds = args.ep_steps // args.kd_steps
    images = (args.phase1_rounds + args.n_epochs * rounds) * args.synthesis_batch_size
    synthesizer = make_synthesizer(s, FastLatents, generator, images)
    optimizer = make_optimizer("sgd", s.student.parameters(), args.lr, args.weight_decay)
    timer = Stopwatch(s.runtime.device)
    states = dict(student=s.student, optimizer=optimizer, synthesizer=synthesizer, timer=timer)
    start = s.start(**states, pool=synthesizer.pool, answers=s.answers)
    done = 0 if start else synthesizer.rounds
    first, *others = [rounds * (args.g_steps + args.kd_steps)] * args.n_epochs
    epochs = s.epochs([first + args.phase1_rounds * args.g_steps, *others], args.batch_size, done=done * args.g_steps)
    for epoch in epochs:
        if not epoch:
            first_phase(s, synthesizer, timer, done)
        losses = train_epoch(epoch, s, synthesizer, optimizer, timer)
        s.record(losses, lambda: synthesizer.pictures(64), synthesis_seconds=round(timer.seconds(), 3))
    return s.finish(
        method="fast_meta", synthesis_seconds=round(timer.seconds(), 1), generated_images=len(synthesizer.pool)
    )


def first_phase(s: Session, synthesizer: FastLatents, timer: Stopwatch, done: int) -> None:
    """The rounds without a student that are left when `done` are."""
    for made in range(done + 1, s.args.phase1_rounds + 1):
        losses = make_images(s, synthesizer, False, timer)
        if made % SAVE_ROUNDS == 0:
            s.run.save_first(losses, s.student, s.metadata)


if __name__ == "__main__":
    cli(main, parse_args)
