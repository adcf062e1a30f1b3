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

and after --z_rounds rounds z is drawn anew. A first phase of --phase1_rounds rounds has no student:
it fills the pool without L_adv. Then an epoch is ep_steps / kd_steps rounds, each with kd_steps
student steps behind it, on images of the whole pool, cropped, stretched and mirrored, too:

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
 4. Learning rates fall at fractions of --n_epochs: the published 120, 150 and 180 are of 200.
 5. Reptile's difference is taken once, as published here; datafree_kd.py --is_maml 0 takes it 67
    times, as published there. Adam hardly tells them apart.
 6. The test is on whole central squares, not on the central 7/8 of them.
"""

from data import DATASETS, DataError, get_dataset
from datafree import checkpoint
from datafree.augment import Transform
from datafree.fold import fold_batch_norm
from datafree.hooks import BatchNormHooks
from datafree.log import Run, evaluate_checkpoint
from datafree.losses import kd_loss
from datafree.metrics import test_accuracy
from datafree.pool import ImagePool
from datafree.published import describe, published
from datafree.runtime import (
    Parser,
    Stopwatch,
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
from datafree.synthesis import FastLatents
from models import MODELS, agree_on_size, get_generator, get_model

SETTINGS = dict(
    n_epochs=400,
    ep_steps=1000,
    kd_steps=100,
    batch_size=100,
    lr=0.1,
    weight_decay=1e-4,
    milestones=[0.6, 0.75, 0.9],
    T=5.0,
    synthesis_batch_size=100,
    g_steps=50,
    lr_g=2e-4,
    lr_z=0.01,
    meta_lr_g=1e-4,
    meta_lr_z=5e-3,
    z_rounds=50,
    bn=0.1,
    oh=0.1,
    adv=0.1,
    nz=256,
    ngf=64,
)
PRESETS = {"resnet18_imagenet": SETTINGS | dict(adv=1.0), "other students": SETTINGS}
SAVE_ROUNDS = 100  # of the first phase between checkpoints
AREA = 0.75  # the least share of an image that a crop keeps


def parse_args(argv=None):
    p = Parser(__doc__.format(presets=describe_presets(PRESETS)))
    p.add_argument(
        "--dataset",
        choices=DATASETS,
        default="imagenet",
        help="the teacher's data set; only its test images are used (default: %(default)s)",
    )
    for role, name in (("teacher", "resnet50_imagenet"), ("student", "resnet18_imagenet")):
        p.add_argument(
            f"--{role}",
            choices=sorted(MODELS),
            default=name,
            metavar="NAME",
            help=("one of " + ", ".join(sorted(MODELS)) if role == "teacher" else "the same names")
            + " (default: %(default)s)",
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
    for flag, kind, text in (
        ("n_epochs", count, "epochs of ep_steps"),
        ("ep_steps", count, "student steps of an epoch"),
        ("kd_steps", count, "student steps of a round"),
        ("batch_size", number(int, 2), "images of a student step"),
        ("lr", positive, "learning rate of the student (SGD, momentum 0.9)"),
        ("weight_decay", weight, "of the student"),
        ("T", positive, "temperature of the student's loss"),
        ("synthesis_batch_size", number(int, 2), "images of a round"),
        ("g_steps", count, "updates that make them"),
        ("lr_g", positive, "learning rate of the round's generator"),
        ("lr_z", positive, "learning rate of the round's latents"),
        ("meta_lr_g", positive, "learning rate of the common generator"),
        ("meta_lr_z", positive, "learning rate of the common latents"),
        ("z_rounds", count, "rounds with the same common latents"),
        ("bn", weight, "weight of the BatchNorm statistics"),
        ("oh", weight, "weight of the cross-entropy"),
        ("adv", weight, "weight of the adversarial term"),
        ("nz", count, "channels of a latent map"),
        ("ngf", count, "width of the generator"),
    ):
        p.add_argument(f"--{flag}", type=kind, metavar="X", help=f"{text} (default: see above)")
    p.add_argument(
        "--milestones",
        type=number(float, 0, 1),
        nargs="*",
        metavar="FRACTION",
        help="lr x 0.1 at these fractions of the epochs (default: see above)",
    )
    p.add_argument(
        "--reptile_factor",
        type=positive,
        default=1.0,
        metavar="X",
        help="of the meta gradients (default: %(default)s, as published)",
    )
    p.add_argument(
        "--phase1_rounds",
        type=number(int, 0),
        default=1400,
        metavar="N",
        help="rounds without a student before the first epoch (default: %(default)s, "
        "for the 140k images that the paper's table counts)",
    )
    p.add_argument(
        "--pool_size",
        type=number(int, 0),
        default=100_000,
        metavar="N",
        help="images of the pool that stay on the device, 0.15 MB each at 224 pixels, "
        "the others wait in the host's memory (default: %(default)s)",
    )
    p.add_argument("--img_size", type=number(int, 8), help="(default: the model's or data's)")
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
    fill_defaults(args, PRESETS.get(args.student, SETTINGS))
    if not args.bn and not args.oh and (args.phase1_rounds or not args.adv):
        p.error(
            "--bn and --oh are both 0: nothing would make images"
            + (" in the first phase" if args.adv else "")
        )
    if args.kd_steps > args.ep_steps:
        p.error(
            f"--kd_steps {args.kd_steps} does not fit into an epoch of --ep_steps "
            f"{args.ep_steps}: raise the latter"
        )
    args.img_size = p.image_size((args.teacher, args.student), args.img_size, agree_on_size)
    return args


def train_epoch(epoch, synthesizer, teacher, student, optimizer, args, runtime, timer, tick):
    """args.ep_steps // args.kd_steps rounds; returns the mean of each loss."""
    rounds = args.ep_steps // args.kd_steps
    set_lr(optimizer, lr_at(epoch, args.lr, args.n_epochs, args.milestones))
    total = {f"loss_{w}": 0.0 for w in ("bn", "oh", "adv", "kd") if getattr(args, w, True)}
    for _ in range(rounds):
        student.eval().requires_grad_(False)
        with timer:
            losses = synthesizer.synthesize(True, tick)
        total |= {k: total[k] + v / rounds for k, v in losses.items()}
        student.train().requires_grad_(True)
        for x in synthesizer.sample(args.kd_steps, args.batch_size):
            with runtime.autocast():
                t_logits = teacher(x)
                s_logits = student(x)
            loss = kd_loss(s_logits, t_logits, args.T)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total["loss_kd"] += loss.detach() / (rounds * args.kd_steps)
            tick(loss.detach())
    return total


def main(args):
    """Distil or evaluate; returns the content of result.json."""
    runtime = setup(args)
    data = get_dataset(args.dataset, args.data_root, img_size=args.img_size, mean=args.mean, std=args.std).to(
        runtime.device
    )
    student = get_model(args.student, data.num_classes, data.channels)
    name = f"datafree_kd_imagenet-{args.dataset}-{args.teacher}-{args.student}"
    if args.evaluate_only:
        return evaluate_checkpoint(args, name, student, args.student, data, runtime)
    teacher, card = checkpoint.load_teacher(args, get_model, data)
    if args.bn and not BatchNormHooks(teacher).layers:
        raise UsageError(
            f"teacher {args.teacher} has no BatchNorm layers, which --bn reads: give "
            "--bn 0, or a teacher that has them"
        )
    try:
        generator = get_generator("deep", args.nz, data.img_size, data.channels, args.ngf)
    except ValueError as error:
        raise UsageError(f"{error}: choose another --img_size") from error
    runtime.place(teacher, student, generator)
    transform = Transform.of(data, card, AREA)
    shape = (data.channels, data.img_size, data.img_size)
    run = Run(args, name, runtime)
    pool = ImagePool(shape, runtime.device, run.folder / "pool.u8", args.pool_size)
    synthesizer = FastLatents(
        teacher,
        student,
        generator,
        transform,
        shape,
        data.num_classes,
        runtime,
        pool,
        **{k: getattr(args, k) for k in FastLatents.settings},
    )
    optimizer = make_optimizer("sgd", student.parameters(), args.lr, args.weight_decay)
    timer = Stopwatch(runtime.device)
    start = run.start(student=student, optimizer=optimizer, synthesizer=synthesizer, timer=timer, pool=pool)
    quick_teacher = fold_batch_norm(teacher)  # the synthesizer's shows what enters its BatchNorms
    teacher_accuracy = test_accuracy(teacher, data, transform, runtime)
    cells = published(args.dataset, (f"Fast-{args.g_steps}",), args.teacher, args.student)
    run.log(
        f"teacher {args.teacher}: {teacher_accuracy:.2f} %; student {args.student}; "
        f"{runtime.precision} on {runtime.device}; published: {describe(cells)}"
    )
    rounds = args.ep_steps // args.kd_steps
    first, *others = [rounds * (args.g_steps + args.kd_steps)] * args.n_epochs
    done = 0 if start else synthesizer.rounds
    run.progress([first + args.phase1_rounds * args.g_steps, *others], args.batch_size, done * args.g_steps)
    card = checkpoint.card(args.student, data, transform)
    if not start:
        student.eval().requires_grad_(False)
        for made in range(done + 1, args.phase1_rounds + 1):
            with timer:
                losses = synthesizer.synthesize(False, run.tick)
            if made % SAVE_ROUNDS == 0:
                run.save_first(losses, student, card)
    for epoch in range(start, args.n_epochs):
        losses = train_epoch(
            epoch, synthesizer, quick_teacher, student, optimizer, args, runtime, timer, run.tick
        )
        accuracy = test_accuracy(student, data, transform, runtime)
        run.end_epoch(epoch, accuracy, losses, student, card, synthesis_seconds=round(timer.seconds(), 3))
        last = epoch + 1 == args.n_epochs
        if args.sample_every and (last or (epoch + 1) % args.sample_every == 0):
            run.images(f"epoch{epoch + 1:04}", synthesizer.pictures(64))
    return run.finish(
        method="fast_meta",
        dataset=data.name,
        teacher=args.teacher,
        student=args.student,
        teacher_accuracy=teacher_accuracy,
        published=cells,
        synthesis_seconds=round(timer.seconds(), 1),
        generated_images=len(pool),
        fingerprint=data.fingerprint,
    )


if __name__ == "__main__":
    cli(main, parse_args, DataError)
