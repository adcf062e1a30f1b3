"""A trained classifier, without its data, becomes a small network that can be deployed.

    python compress.py --teacher wrn40_2 --teacher_ckpt my_teacher.pt --num_classes 10 --img_size 32 \\
        --mean 0.485 0.456 0.406 --std 0.229 0.224 0.225 --student wrn16_1 --out small
    python compress.py --dataset digits --student lenet5_half --int8 --out small   # embedded data; --minutes 5
    python compress.py --dataset digits --student same --int8 --out small          # no student: the teacher in int8

 1. The teacher is looked at: its logits, whether it has BatchNorm, whether {steps} steps make images of each class.
    A network that was never trained, or whose weights are not its own, is found here, not after an hour;
    teacher_check.png shows the images. Other statistics than those of its training need not show: take care.
 2. The student learns from images that a generator makes: by fast_meta (datafree_kd.py, Fast-5) where the teacher has
    BatchNorm, whose statistics it reads, else by dafl (DAFL_train.py, without L_a), or by --method. The recipe is
    the published one; for grey images, or a student without BatchNorm, which diverges at its learning rates, that
    of the digits, dafl's in MNIST's length. A few steps are measured, and the recipe is shortened to --minutes; the
    card says how far. --n_epochs sets the length instead.
 3. student.pt is for the other scripts (--teacher_ckpt, --ckpt), student.safetensors the same without pickle.
    student.onnx takes pixels, its normalisation is inside, in batches of any size; its logits are compared with
    PyTorch's. --int8 adds student.int8.onnx, for which the ranges of activations are measured on {calibration}
    images of --calibrate_on. What lacks a package is left out: pip install -r requirements-export.txt.
 4. README.md and card.json say what it is: sizes, work, time on this CPU, and how often each network agrees with the
    teacher on synthetic images that the student has not seen. That is no accuracy: --test_images DIR (with
    test/<class>/*.png, classes in the teacher's order) or --dataset tells it. No choice depends on it: the last
    epoch is what one gets.

--student auto takes the network of the most parameters (multiply-adds, if only --max_macs is given) within the limits.
"""

import datafree.interrupt  # noqa: F401

import csv
import io
import json
import math
import tempfile
from argparse import Namespace
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from copy import deepcopy
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor, nn
from torchvision.utils import make_grid, save_image

import DAFL_train
import datafree_kd
import DFAD_cifar
import DFAD_mnist
from data import get_wild
from datafree import checkpoint, distributed, export
from datafree.card import describe, measure, versions
from datafree.cli import DEVICE, FOLDER, RUN, Parser, batch, cli, count, network, positive
from datafree.errors import UsageError
from datafree.hooks import BatchNormHooks
from datafree.inversion import alone, class_images, of_run
from datafree.run import run_folder
from datafree.runtime import commit, device_name
from datafree.session import Session
from datafree.synthesis import METHODS, Fast
from datafree.teachers import check_network, find_teacher
from models import MODELS, get_model, is_program

CHECK_STEPS, CALIBRATION = 20, 512
SHARED = (
    "dataset data_root img_size attribute channels mean std teacher teacher_ckpt teacher_recipe checkpoints seed "
    "device gpu precision compile"
).split()


def student(text: str) -> str:
    """An argparse type: the name of a network, same, or auto."""
    return text if text in ("same", "auto") else network(MODELS)(text)


student.__name__ = "network"
# fmt: off
OWN = (
    ("--student", "a network, same or auto, see above (default: the data set's)", dict(type=student, metavar="NAME")),
    ("--max_params", "auto: the most parameters", dict(type=count, metavar="N")),
    ("--max_macs", "auto: the most multiply-adds of an image", dict(type=count, metavar="N")),
    ("--method", "(default: see above)", dict(choices=("fast_meta", "fast", "dfq", "dafl", "dfad"))),
    ("--minutes", "about how long the student learns (default: 5)", dict(type=positive, metavar="X")),
    ("--n_epochs --epochs", "instead of --minutes", dict(type=count, metavar="N")),
    ("--steps", "with --n_epochs: steps of an epoch (default: the recipe's)", dict(type=count, metavar="N")),
    ("--batch_size", "images of a step (default: the recipe's)", dict(type=batch, metavar="N")),
    ("--test_images", "images to score the networks on, see above", FOLDER),
    ("--onnx_input", "what student.onnx takes: float pixels in 0..1, or bytes (default: %(default)s)",
     dict(choices=("float", "uint8"), default="float")),
    ("--int8", "write student.int8.onnx, too", dict(action="store_true")),
    ("--calibrate_on", "with --int8: synthetic, noise, or a folder, zip or data set of images (default: synthetic)",
     dict(metavar="SET")),
    ("--out --output_dir", "where everything is written (default: %(default)s)", FOLDER | dict(default="./small")),
)
# fmt: on


def parse_args(argv: Sequence | None = None) -> Namespace:
    p = Parser(__file__, __doc__.format(steps=CHECK_STEPS, calibration=CALIBRATION))
    p.add_dataset(default="none")
    p.add_networks(roles=("teacher",))
    p.add(*OWN)
    p.add(*(row for row in RUN if row[0].split()[0] in ("--data_root", "--mean", "--std", "--resume")), *DEVICE)
    args = p.parse_args(argv)
    lacking = export.missing(export.ONNX_TOOLS)
    for wrong, text in (
        (args.test_images and args.dataset != "none", "--test_images and --dataset exclude each other"),
        (args.n_epochs and args.minutes, "--n_epochs and --minutes exclude each other"),
        (args.steps and not args.n_epochs, "--steps goes with --n_epochs: give both, or --minutes"),
        (args.calibrate_on and not args.int8, "--calibrate_on is for --int8: give that, too"),
        ((args.student == "auto") != bool(args.max_params or args.max_macs),
         "--student auto and a limit, --max_params or --max_macs, go together"),
        (args.student == "same" and lacking, f"--student same writes nothing but ONNX: {lacking}"),
    ):  # fmt: skip
        if wrong:
            p.error(text)
    args.images_root = args.data_root
    if args.test_images:
        args.dataset, args.data_root = "folder", args.test_images
    return args


def words(values: dict) -> list[str]:
    """Flags as the words of a command line; what is None, False or an empty list is left out."""
    given = {k: v for k, v in values.items() if v is not None and v is not False and v != []}
    lists = {k: v if isinstance(v, list) else [v][v is True :] for k, v in given.items()}
    return [str(word) for k, v in lists.items() for word in (f"--{k}", *v)]


def shared(args: Namespace, name: str | None) -> list[str]:
    """The flags of the scripts that distil, with a student's name."""
    classes = args.num_classes if args.dataset == "none" else None  # a data set has its own
    return words({k: getattr(args, k) for k in SHARED} | dict(num_classes=classes, student=name))


def check_teacher(s: Session, out: Path, resume: bool) -> dict:
    """What can be known of a teacher without data, if need be from an earlier command; kept in `out`, with a picture.

    Raises UsageError where no image is made that it takes for any class.
    """
    name, norms, picture = s.args.teacher, len(BatchNormHooks(s.teacher).layers), out / "teacher_check.png"
    about = {"sha256": s.teacher_record["sha256"], "mean": list(s.transform.mean), "std": list(s.transform.std)}
    about["for"] = shared(s.args, None)
    if resume and (old := read_json(out / "teacher_check.json")).items() >= about.items():
        return old
    images, targets, sure = class_images(s, CHECK_STEPS)
    write_grid(picture, images)
    confidence = {s.data.class_names[c]: round(sure[targets == c].mean().item(), 4) for c in targets.unique().tolist()}
    print(f"teacher {name}: {export.parameters(s.teacher):,} parameters, {norms or 'no'} BatchNorms; {sure.mean():.0%} "
          f"sure of images of {len(confidence)} classes after {CHECK_STEPS} steps: {picture}", flush=True)  # fmt: skip
    if sure.max() < 0.5:
        text = f"{name} takes none of {len(sure)} images for any class (at most {sure.max():.0%} sure)"
        raise UsageError(f"{text}: it is not trained, or the weights, --mean and --std are not its own")
    if weak := [name for name, value in confidence.items() if value < 0.5]:
        print(f"warning: it is hardly sure of {', '.join(weak[:9])}: the student may miss {len(weak)} classes")
    facts = about | dict(batch_norms=norms, steps=CHECK_STEPS, confidence=confidence)
    checkpoint.write_json(out / "teacher_check.json", facts)
    return facts


def read_json(path: Path) -> dict:
    """What an earlier command left; nothing where there is none. Raises UsageError if it is damaged."""
    try:
        return json.loads(path.read_text()) if path.is_file() else {}
    except ValueError as error:
        raise UsageError(f"{path} is damaged ({error}): delete it, or leave --resume out") from error


def write_grid(path: Path, images: Tensor) -> None:
    """Write images (N, C, H, W) in 0..1 as one picture."""
    content = io.BytesIO()
    save_image(make_grid(images.float().cpu(), nrow=math.ceil(math.sqrt(len(images)))), content, format="png")
    checkpoint.write(path, content.getvalue())


def choose_student(args: Namespace, data) -> str:
    """The largest network within --max_params and --max_macs. Raises UsageError if there is none."""
    found, limits = {}, (args.max_params or math.inf, args.max_macs or math.inf)
    for name in MODELS:
        try:
            with torch.device("meta"):
                net = get_model(name, data.num_classes, data.channels).eval()
                x = torch.empty(1, data.channels, data.img_size, data.img_size)
                found[name] = export.parameters(net), export.multiply_adds(net, x)
        except (RuntimeError, ValueError):  # it does not take such images
            continue
    fit = [name for name, size in found.items() if size[0] <= limits[0] and size[1] <= limits[1]]
    if not fit:
        least = min(found, key=found.get)
        text = f"the smallest network, {least}, has {found[least][0]:,} parameters, {found[least][1]:,} multiply-adds"
        raise UsageError(f"{text}: raise --max_params or --max_macs")
    return max(fit, key=lambda name: found[name][0 if args.max_params else 1])


def recipe_of(method: str, teacher: str, small: bool) -> tuple[ModuleType, str, dict]:
    """A method's script, the name of its steps of an epoch, and its recipe; `small`: that of the small grey sets."""
    if method == "dafl":
        length = dict(n_epochs=DAFL_train.PRESETS["mnist" if small else "cifar10"]["n_epochs"])
        return DAFL_train, "iterations", DAFL_train.PRESETS["digits" if small else "cifar10"] | length | dict(a=0.0)
    if method == "dfad":
        presets = DFAD_mnist.PRESETS["mnist"] | dict(batch_size=128), DFAD_cifar.PRESETS["cifar10"]
        return DFAD_cifar, "epoch_itrs", presets[not small] | dict(scheduler=True)
    g_steps = 5 if issubclass(METHODS[method].family, Fast) else METHODS[method].recipe["g_steps"]
    recipe = {**METHODS[method].recipe, **METHODS[method].adjust("", teacher, g_steps), "g_steps": g_steps}
    recipe = datafree_kd.for_small(recipe, datafree_kd.SMALL["digits"]) if small else recipe
    return datafree_kd, "ep_steps", recipe | dict(method=method)


def distil(args: Namespace, s: Session) -> tuple[Namespace, dict]:
    """Run the method's script below --out; returns the flags of that run, and how the student was made."""
    net = get_model(args.student, s.data.num_classes, s.data.channels)
    small = s.data.channels == 1 or not BatchNormHooks(net).layers
    method = args.method or ("fast_meta" if BatchNormHooks(s.teacher).layers else "dafl")
    script, unit, recipe = recipe_of(method, args.teacher, small)
    most = recipe["n_epochs"], recipe[unit]
    changed = dict.fromkeys(("batch_size", "synthesis_batch_size"), args.batch_size) if args.batch_size else {}
    changed |= {} if BatchNormHooks(s.teacher).layers else dict(bn=0.0)
    recipe = recipe | {k: v for k, v in changed.items() if k in recipe}
    common = words({k: v for k, v in recipe.items() if k not in ("student", "teacher", "warmup", "kd_steps")})

    def parsed(n_epochs: int, steps: int, **more) -> Namespace:
        own = {"n_epochs": n_epochs, unit: steps, **more}
        if script is datafree_kd:
            own |= dict(kd_steps=min(recipe["kd_steps"], steps), warmup=recipe["warmup"] * n_epochs // most[0])
        return script.parse_args([*shared(args, args.student), *common, *words(own)])

    place, plan = Path(args.out) / "plan.json", {"for": common + shared(args, args.student) + [args.minutes or 5.0]}
    if args.n_epochs:
        plan |= dict(n_epochs=args.n_epochs, steps=args.steps or most[1])
    elif args.resume and (old := read_json(place)).get("for") == plan["for"]:
        plan = old
    else:
        print(f"{method}: measuring a few steps", flush=True)
        if s.runtime.device.type == "cuda" or s.runtime.compiles:
            run_seconds(script, parsed, 1)  # what is made once, kernels and programs, is no step's
        # Where an epoch has several rounds, their images are a part of what a step costs.
        first = kd_steps if (kd_steps := recipe.get("kd_steps", 1)) <= 10 else 1
        costs = [run_seconds(script, parsed, steps) for steps in (first, first + 10)]
        plan |= dict(zip(("n_epochs", "steps"), lengths(args.minutes or 5.0, *costs, most, first), strict=True))
        whole = most[0] * (costs[0] + (most[1] - first) * max(costs[1] - costs[0], 0) / 10) / 60
        print(f"all of the recipe takes about {whole:,.0f} minutes here: --minutes says how many of them", flush=True)
    checkpoint.write_json(place, plan)
    n_epochs, steps = plan["n_epochs"], plan["steps"]
    share = n_epochs * steps / (most[0] * most[1])
    print(f"{method}: {n_epochs} epochs of {steps} steps, {share:.2%} of the recipe's length", flush=True)
    run = parsed(n_epochs, steps, out=args.out, resume=args.resume)
    result = script.main(run)
    made = dict(method=method, n_epochs=n_epochs, steps=steps, share_of_recipe=share, seconds=result["seconds"])
    return run, made | dict(run=result["name"], generated_images=result["generated_images"])


def run_seconds(script: ModuleType, parsed: Callable[..., Namespace], steps: int) -> float:
    """Seconds of an epoch of so many steps, its test included."""
    with tempfile.TemporaryDirectory() as folder, redirect_stdout(io.StringIO()):
        result = script.main(parsed(1, steps, out=folder, sample_every=0))
        with (Path(folder) / result["name"] / "metrics.csv").open(newline="") as file:
            return float(next(csv.DictReader(file))["seconds"])


def lengths(minutes: float, short: float, longer: float, most: tuple[int, int], first: int = 1) -> tuple[int, int]:
    """Epochs, and steps of each, that take `minutes`, at most those of the recipe.

    Args:
        short, longer: seconds of an epoch of `first` and of `first` + 10 steps; what an epoch has besides, images of
            its one round and the test, has 0.3 of the time.
    """
    seconds, step = 60 * minutes, max((longer - short) / 10, short / 1000)
    rest = max(short - first * step, 1e-3)
    n_epochs = min(most[0], int(max(2, 0.3 * seconds / rest)))
    steps = max(1, min(most[1], int((seconds / n_epochs - rest) / step)))
    if steps == most[1]:
        n_epochs = max(1, min(most[0], int(seconds / (rest + steps * step))))
    return n_epochs, steps


def kept_images(args: Namespace, s: Session, place: Path) -> list[Tensor]:
    """The images of `alone`; with --resume those that an earlier command left in the file `place`."""
    about = shared(args, "same") + [s.teacher_record["sha256"]]
    content = checkpoint.read(place) if args.resume and place.exists() else {}
    if not isinstance(content, dict) or content.get("for") != about:
        content = dict(zip(("synthetic", "unseen"), (x.cpu() for x in alone(s, CALIBRATION)), strict=True))
        checkpoint.save(content | {"for": about}, place)
    return [content[name].to(s.runtime.device) for name in ("synthetic", "unseen")]


def calibration_images(args: Namespace, s: Session) -> Tensor | None:
    """CALIBRATION images uint8 (N, C, H, W) of --calibrate_on, None if these are the synthetic ones."""
    if args.calibrate_on in (None, "synthetic"):
        return None
    shape, seeded = (s.data.channels, s.data.img_size, s.data.img_size), torch.Generator().manual_seed(args.seed)
    if args.calibrate_on == "noise":  # normal as the networks see it, as vanilla_kd.py's
        return (s.transform.denormalize(torch.randn(CALIBRATION, *shape, generator=seeded)) * 255).round().byte()
    split, _ = get_wild(args.calibrate_on, args.images_root, s.data.img_size, s.data.channels)
    rows = torch.randperm(len(split), generator=seeded)[:CALIBRATION]
    return next(iter(split.take(rows).batches(CALIBRATION)))[0]


def write_files(
    args: Namespace, s: Session, network: nn.Module, metadata: dict, images: Tensor, calibration: Tensor
) -> tuple[dict[str, bytes], float | None]:
    """Write what there are packages for; returns the contents, and how far ONNX's logits are from PyTorch's.

    Args:
        images: to compare these on. calibration: to measure int8's ranges on; uint8 (N, C, H, W), both.
    """
    files, difference, lacking, out = {}, None, export.missing(export.ONNX_TOOLS), Path(args.out)

    def write(name: str, content: bytes) -> None:
        checkpoint.write(out / name, content)
        files[name] = content

    for name in ("student.safetensors", "student.onnx", "student.int8.onnx"):
        (out / name).unlink(missing_ok=True)  # an earlier command's may be of another network
    checkpoint.save(dict(state_dict=network.state_dict(), metadata=metadata), out / "student.pt")
    if lacks := export.missing(["safetensors"]):
        print(f"student.safetensors is left out: {lacks}")
    else:
        write("student.safetensors", export.to_safetensors(network.state_dict(), metadata))
    if lacking:
        print(f"student.onnx is left out: {lacking}")
    else:
        plain = export.Deployed(deepcopy(network).cpu(), s.transform.mean, s.transform.std)
        pixels = images[:64].cpu() if args.onnx_input == "uint8" else images[:64].cpu() / 255
        try:
            content, difference = export.to_onnx(plain, pixels)
            write("student.onnx", content)
            print(f"student.onnx: its logits differ from PyTorch's by {difference:.1e} at most", flush=True)
        except UsageError as error:
            if args.student == "same":  # there is nothing else to write
                raise
            print(f"student.onnx is left out: {error}")
    if args.int8 and "student.onnx" in files:
        write("student.int8.onnx", export.to_int8(files["student.onnx"], calibration.cpu()))
    return files, difference


def main(args: Namespace) -> dict:
    """All four steps; returns the content of card.json."""
    distributed.alone("compress.py")
    same, known = args.student == "same", args.student not in ("same", "auto")
    # Any network stands in for a student that there is not, or that is not known yet.
    s = Session(datafree_kd.parse_args(shared(args, args.student if known else "wrn16_1")))
    args.teacher, out, made = s.args.teacher, Path(args.out), None
    if not is_program(args.teacher):  # the scripts that distil may each look for another recipe's
        args.teacher_ckpt = str(find_teacher(s.args))
    if args.num_classes not in (None, s.data.num_classes):
        text = f"--num_classes {args.num_classes}, but the data set has {s.data.num_classes} classes"
        raise UsageError(f"{text}: give the teacher's own data set, or none")
    calibration = calibration_images(args, s)
    checkpoint.check_writable(out, "--out")
    check = check_teacher(s, out, args.resume)
    if same:
        network, metadata = s.teacher, s.metadata | dict(model=args.teacher)
        synthetic, unseen = kept_images(args, s, out / "images.pt")
    else:
        args.student = s.args.student if known else choose_student(args, s.data)
        run, made = distil(args, s)
        network = get_model(args.student, s.data.num_classes, s.data.channels)
        content = checkpoint.read(run_folder(run) / "last.pt", s.runtime.device)
        network.load_state_dict(content["state_dict"])
        s.runtime.place(network.eval())
        check_network(network, f"--student {args.student}", s.data, s.runtime)
        metadata = content["metadata"]
        synthetic, unseen = of_run(s, run, CALIBRATION)
    write_grid(out / "images.png", synthetic[:64] / 255)
    calibration = synthetic if calibration is None else calibration
    files, difference = write_files(args, s, network, metadata, unseen, calibration)
    statistics = list(s.transform.mean), list(s.transform.std)
    networks = {"teacher": export.Deployed(s.teacher, *statistics).to(s.runtime.device)}
    if not same:
        networks["student"] = export.Deployed(network, *statistics).to(s.runtime.device)
    networks |= {name: export.OnnxNetwork(content) for name, content in files.items() if ".onnx" in name}
    card = dict(
        teacher=args.teacher, student=args.student, classes=s.data.num_classes, dataset=s.data.name,
        test_images=len(s.data.test or ()), image=[s.data.channels, s.data.img_size, s.data.img_size],
        mean=statistics[0], std=statistics[1], networks=measure(networks, s.data, unseen),
        bytes={name: (out / name).stat().st_size for name in ("student.pt", *files)}, onnx_input=args.onnx_input,
        opset=export.OPSET, onnx_difference=difference, calibrated_on=args.int8 and (args.calibrate_on or "synthetic"),
        made=made, check=check, teacher_weights=s.teacher_record, seed=args.seed, command=args.command, commit=commit(),
        versions=versions(), hardware=device_name(torch.device("cpu")),
    )  # fmt: skip
    checkpoint.write_json(out / "card.json", card)
    checkpoint.write(out / "README.md", describe(card).encode())
    print(describe(card).partition("\n\n![")[0] + f"\n\n{out / 'README.md'}")
    return card


if __name__ == "__main__":
    cli(main, parse_args)
