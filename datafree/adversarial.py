"""DFAD's min-max game (Fang et al. 2019), which its five scripts share."""

import torch

from datafree import checkpoint
from datafree.augment import Transform
from datafree.fold import fold_batch_norm
from datafree.log import Run, evaluate_checkpoint, run_folder, side_by_side
from datafree.losses import l1_loss
from datafree.metrics import mean_iou, segmentation_scores, test_accuracy
from datafree.published import describe, published
from datafree.runtime import (
    Parser,
    UsageError,
    add_run_arguments,
    describe_presets,
    fill_defaults,
    lr_at,
    make_optimizer,
    number,
    set_lr,
    setup,
)

# MMRazor's setting: 8 x 32 images, both learning rates x0.1 at iterations 5000 and 10000 of 25000.
MMRAZOR = dict(batch_size=256, n_epochs=500, optimizer_G="adamw", lr_G=1e-3, milestones=[0.2, 0.4])


def parse_classifier(argv, card, presets, models, agree_on_size):
    """The command line of a script for classifiers.

    Args:
        card: its docstring, with {presets}. presets: data set -> flag -> default, the first data
            set being the default. models, agree_on_size: of models/.
    """
    p = Parser(card.format(presets=describe_presets(presets)))
    p.add_argument(
        "--dataset",
        choices=presets,
        default=next(iter(presets)),
        help="the teacher's data set; only its test images are used (default: %(default)s)",
    )
    for role in ("teacher", "student"):
        p.add_argument(
            f"--{role}",
            choices=sorted(models),
            metavar="NAME",
            help="(default: see above) "
            + ("one of " + ", ".join(sorted(models)) if role == "teacher" else "the same names"),
        )
    p.add_argument(
        "--variant", choices=("dfad", "mmrazor"), default="dfad", help="whose setting (default: %(default)s)"
    )
    add_game_arguments(p)
    p.add_argument("--img_size", type=number(int, 8), help="(default: the model's or data's)")
    add_run_arguments(p)
    args = p.parse_args(argv)
    args.argv = argv
    fill_defaults(args, presets[args.dataset] | (MMRAZOR if args.variant == "mmrazor" else {}))
    args.scheduler = args.scheduler or args.variant == "mmrazor"
    args.img_size = p.image_size((args.teacher, args.student), args.img_size, agree_on_size)
    return args


def add_game_arguments(p):
    """The flags of the published scripts; their defaults are the script's preset."""
    positive, weight = number(float, 0, above=True), number(float, 0)
    for names, kind, text in (
        (("--batch_size",), number(int, 2), "images per step"),
        (("--n_epochs", "--epochs"), number(int, 1), "epochs of --epoch_itrs iterations"),
        (("--epoch_itrs",), number(int, 1), "iterations of an epoch, behind which comes a test"),
        (("--k",), number(int, 1), "student steps of an iteration"),
        (("--lr_S",), positive, "learning rate of the student (SGD, momentum 0.9)"),
        (("--lr_G",), positive, "learning rate of the generator (Adam)"),
        (("--weight_decay",), weight, "of the student"),
        (("--nz",), number(int, 1), "length of a latent"),
    ):
        p.add_argument(*names, type=kind, metavar="X", help=f"{text} (default: see above)")
    p.add_argument("--optimizer_G", choices=("adam", "adamw"), help="(default: see above)")
    p.add_argument("--scheduler", action="store_true", help="both learning rates x0.1 at --milestones")
    p.add_argument(
        "--milestones",
        type=number(float, 0, 1),
        nargs="*",
        metavar="FRACTION",
        help="with --scheduler: fractions of the epochs (default: see above)",
    )
    p.add_argument(
        "--step_size", type=number(int, 1), metavar="N", help="with --scheduler: x0.1 every N epochs instead"
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
        help="where the teachers' weights are (default: %(default)s)",
    )
    p.add_argument(
        "--sample_every",
        type=number(int, 0),
        default=10,
        metavar="N",
        help="write a grid of generated images each N epochs, 0 for never (default: %(default)s)",
    )


def train_epoch(
    epoch, generator, teacher, student, optimizer_S, optimizer_G, args, runtime, tick, log_space=False
):
    """args.epoch_itrs iterations of the game; returns the mean of both losses.

    The student stays in train mode throughout, as published.

    Args:
        log_space: the generator maximises log(1 + L1) instead of L1 (segmentation).
    """
    generator.train()
    student.train()
    fall = lr_fall(epoch, args)
    set_lr(optimizer_S, args.lr_S * fall)
    set_lr(optimizer_G, args.lr_G * fall)
    total_S = total_G = 0.0
    for _ in range(args.epoch_itrs):
        for _ in range(args.k):
            z = generator.latents(args.batch_size, device=runtime.device)
            loss_S = student_step(z, generator, teacher, student, optimizer_S, runtime.autocast)
            total_S += loss_S / args.k
            tick(loss_S)
        z = generator.latents(args.batch_size, device=runtime.device)
        loss_G = generator_step(z, generator, teacher, student, optimizer_G, runtime.autocast, log_space)
        total_G += loss_G
        tick(loss_S)
    return {"loss_S": total_S / args.epoch_itrs, "loss_G": total_G / args.epoch_itrs}


def student_step(z, generator, teacher, student, optimizer_S, autocast):
    """The student imitates: min_S E_z |T(G(z)) - S(G(z))|. Returns the loss before the update."""
    with autocast():
        with torch.no_grad():
            x = generator(z)
            t_logits = teacher(x)
        s_logits = student(x)
    loss_S = l1_loss(s_logits, t_logits)
    optimizer_S.zero_grad()
    loss_S.backward()
    optimizer_S.step()
    return loss_S.detach()


def generator_step(z, generator, teacher, student, optimizer_G, autocast, log_space=False):
    """The generator looks for what the student cannot do yet: max_G E_z |T(G(z)) - S(G(z))|."""
    student.requires_grad_(False)
    with autocast():
        x = generator(z)
        t_logits, s_logits = teacher(x), student(x)
    loss_G = -l1_loss(s_logits, t_logits)
    if log_space:
        loss_G = -(1 - loss_G).log()
    optimizer_G.zero_grad()
    loss_G.backward()
    optimizer_G.step()
    student.requires_grad_(True)
    return loss_G.detach()


def lr_fall(epoch, args):
    """What --scheduler multiplies both learning rates by in an epoch (from 0)."""
    if not args.scheduler:
        return 1.0
    if args.step_size:
        return 0.1 ** (epoch // args.step_size)
    return lr_at(epoch, 1.0, args.n_epochs, args.milestones)


def play(
    args,
    name,
    runtime,
    teacher,
    student,
    generator,
    evaluate,
    card,
    pictures,
    cells,
    facts,
    log_space=False,
    score="Acc@1",
):
    """The whole run of a script: the game, tests, record; returns the content of result.json.

    Args:
        name: of the run's folder.
        evaluate: network -> test score in percent, and further columns of metrics.csv.
        card: what the student's checkpoint says of it. pictures: () -> images in 0..1.
        cells: the published ones. facts: what the script adds to result.json.
        log_space: see `train_epoch`. score: what the test score is called.
    """
    run = Run(args, name, runtime, score)
    optimizer_S = make_optimizer("sgd", student.parameters(), args.lr_S, args.weight_decay)
    optimizer_G = make_optimizer(args.optimizer_G, generator.parameters(), args.lr_G)
    start = run.start(student=student, generator=generator, optimizer_S=optimizer_S, optimizer_G=optimizer_G)
    (teacher_score, _), more = evaluate(teacher), {}
    run.log(
        f"teacher {args.teacher}: {teacher_score:.2f} %; student {args.student}; "
        f"{runtime.precision} on {runtime.device}; published: {describe(cells)}"
    )
    run.progress([args.epoch_itrs * (args.k + 1)] * args.n_epochs, args.batch_size)
    for epoch in range(start, args.n_epochs):
        losses = train_epoch(
            epoch, generator, teacher, student, optimizer_S, optimizer_G, args, runtime, run.tick, log_space
        )
        percent, more = evaluate(student)
        run.end_epoch(epoch, percent, losses, student, card, **more)
        last = epoch + 1 == args.n_epochs
        if args.sample_every and (last or (epoch + 1) % args.sample_every == 0):
            run.images(f"epoch{epoch + 1:04}", pictures())
    return run.finish(
        method="DFAD",
        teacher=args.teacher,
        student=args.student,
        teacher_accuracy=teacher_score,
        published=cells,
        last_scores=more,
        generated_images=args.n_epochs * args.epoch_itrs * (args.k + 1) * args.batch_size,
        **facts,
    )


def distil_classifier(args, script, generator, get_dataset, get_model, get_generator):
    """What main does in the scripts for classifiers; returns the content of result.json.

    Args:
        script: name of the script. generator: registry name.
        get_dataset, get_model, get_generator: of data/ and models/.
    """
    runtime = setup(args)
    data = get_dataset(args.dataset, args.data_root, img_size=args.img_size, mean=args.mean, std=args.std).to(
        runtime.device
    )
    student = get_model(args.student, data.num_classes, data.channels)
    name = f"{script}-{args.dataset}-{args.teacher}-{args.student}"
    name += "" if args.variant == "dfad" else f"-{args.variant}"
    if args.evaluate_only:
        return evaluate_checkpoint(args, name, student, args.student, data, runtime)
    teacher, card = checkpoint.load_teacher(args, get_model, data)
    try:
        generator = get_generator(generator, args.nz, data.img_size, data.channels)
    except ValueError as error:
        raise UsageError(f"{error}: choose another --img_size") from error
    runtime.place(teacher, student, generator)
    transform = Transform.of(data, card)
    z_shown = generator.latents(64, device=runtime.device)

    @torch.no_grad()
    def pictures():
        generator.eval()
        return transform.denormalize(generator(z_shown).float())

    return play(
        args,
        name,
        runtime,
        fold_batch_norm(teacher),
        student,
        generator,
        evaluate=lambda network: (test_accuracy(network, data, transform, runtime), {}),
        card=checkpoint.card(args.student, data, transform),
        pictures=pictures,
        cells=published(args.dataset, ("DFAD",), args.teacher, args.student),
        facts={"dataset": data.name, "fingerprint": data.fingerprint},
    )


def parse_segmenter(argv, card, preset, models):
    """The command line of a script for segmentation; the arguments are as `parse_classifier`'s.

    Args:
        preset: flag -> default, with the data set's name.
    """
    p = Parser(card.format(presets=describe_presets({preset["dataset"]: preset})))
    for role in ("teacher", "student"):
        p.add_argument(
            f"--{role}",
            choices=sorted(models),
            metavar="NAME",
            help=f"one of {', '.join(sorted(models))} (default: {preset[role]})",
        )
    add_game_arguments(p)
    p.add_argument(
        "--img_size",
        type=number(int, 16),
        default=128,
        help="side of the generated images (default: %(default)s)",
    )
    p.add_argument(
        "--save_img",
        type=number(int, 0),
        nargs="?",
        const=10**9,
        default=0,
        metavar="N",
        help="at the end write N test images (all without a number) beside "
        "ground truth, teacher's and student's classes",
    )
    add_run_arguments(p)
    args = p.parse_args(argv)
    args.argv = argv
    args.dataset = preset["dataset"]
    fill_defaults(args, preset)
    return args


def distil_segmenter(args, script, get_segmentation, get_segmenter, get_generator):
    """What main does in the scripts for segmentation; returns the content of result.json."""
    runtime = setup(args)
    data = get_segmentation(args.dataset, args.data_root, args.mean, args.std)
    student = get_segmenter(args.student, data.num_classes)
    name = f"{script}-{args.dataset}-{args.teacher}-{args.student}"
    if args.evaluate_only:
        return evaluate_checkpoint(args, name, student, args.student, data, runtime, mean_iou, "mIoU")
    teacher, card = checkpoint.load_teacher(
        args, lambda name, n, _: get_segmenter(name, n), data, "teacher_train_seg.py"
    )
    try:
        generator = get_generator("generator_b", args.nz, args.img_size, data.channels)
    except ValueError as error:
        raise UsageError(f"{error}: choose another --img_size") from error
    runtime.place(teacher, student, generator)
    transform = Transform.of(data, card)
    z_shown = generator.latents(16, device=runtime.device)

    @torch.no_grad()
    def pictures():
        generator.eval()
        return transform.denormalize(generator(z_shown).float())

    def evaluate(network):
        scores = segmentation_scores(network, data, transform, runtime)
        return scores.pop("mIoU"), scores

    result = play(
        args,
        name,
        runtime,
        fold_batch_norm(teacher),
        student,
        generator,
        evaluate,
        card=checkpoint.card(args.student, data, transform),
        pictures=pictures,
        cells=published(args.dataset, ("DFAD",), args.teacher, args.student),
        facts={"dataset": data.name, "fingerprint": data.fingerprint},
        log_space=True,
        score="mIoU",
    )
    if args.save_img:
        networks = {"teacher": teacher, "student": student}
        side_by_side(run_folder(args, name) / "samples", networks, data, transform, runtime, args.save_img)
    return result
