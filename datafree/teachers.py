"""Teachers: the recipes that train them, their files, and how a student's run loads one."""

import argparse
import contextlib
import hashlib
import math
import socket
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torchvision.models import MobileNet_V2_Weights, ResNet18_Weights, ResNet34_Weights, ResNet50_Weights

from data import SOURCES
from datafree import checkpoint
from datafree.distributed import speaks
from datafree.errors import UsageError
from datafree.inputs import trial_images
from datafree.runtime import Runtime
from models import NetworkError, Program, is_program, said, word_of

# fmt: off
SGD = dict(optimizer="sgd", lr=0.1, weight_decay=5e-4, batch_size=128, n_epochs=200, schedule="steps",
           milestones=[0.4, 0.6], gamma=0.1)
ADAM = SGD | dict(optimizer="adam", lr=1e-3, weight_decay=0.0, batch_size=256, n_epochs=10, milestones=[])
# fmt: on
RECIPES = {
    "dafl-mnist": ADAM,
    "dfad-mnist": ADAM | dict(optimizer="sgd", lr=0.01, weight_decay=1e-4),
    "dafl": SGD,
    "dfad": SGD | dict(milestones=[0.4, 0.8]),
    "fast": SGD | dict(weight_decay=1e-4, batch_size=256, milestones=[0.6, 0.75, 0.9], gamma=0.2),
    "nayer": SGD | dict(batch_size=256, schedule="cosine", milestones=[]),
    "dfad-caltech101": SGD | dict(n_epochs=150, milestones=[1 / 3, 2 / 3]),
    "imagenet": SGD | dict(weight_decay=1e-4, batch_size=256, n_epochs=90, milestones=[1 / 3, 2 / 3]),
    # Ours: the paper names none for CelebA, and the digits are not in it.
    "celeba": ADAM | dict(lr=1e-4, batch_size=128, n_epochs=20, milestones=[0.5]),
    "digits": ADAM | dict(lr=2e-3, batch_size=64, n_epochs=40, milestones=[0.6, 0.85], gamma=0.2),
}
# ImageNet's weights of the networks that torchvision has under the same parameter names.
PRETRAINED = {
    "resnet18_imagenet": ResNet18_Weights.IMAGENET1K_V1,
    "resnet34_imagenet": ResNet34_Weights.IMAGENET1K_V1,
    "resnet50_imagenet": ResNet50_Weights.IMAGENET1K_V1,
    "mobilenetv2": MobileNet_V2_Weights.IMAGENET1K_V1,
}
DOWNLOAD_TIMEOUT = 20  # seconds without a byte
SHIPPED = Path(__file__).resolve().parent.parent / "pretrained"


def recipe_for(paper: str, dataset: str) -> str | None:
    """The recipe of the teachers that a paper takes for a data set, else the nearest; None for segmentation.

    On ImageNet that is "torchvision": the weights that `teacher_train.py --pretrained` fetches.
    """
    if dataset == "imagenet":
        return "torchvision"
    if dataset not in SOURCES:
        return None
    source = SOURCES[dataset]
    for name in (dataset, source.like):
        for recipe in (f"{paper}-{name}", f"dafl-{name}", f"dfad-{name}", name):
            if recipe in RECIPES and recipe != paper:
                return recipe
    return paper


def teacher_file(folder: str | Path, dataset: str, model: str, recipe: str | None) -> Path:
    """Where the best weights of a teacher lie: named after data, network and recipe."""
    return Path(folder) / ("-".join(filter(None, (dataset, word_of(model), recipe))) + ".pt")


def save_teacher(best: Path, target: Path) -> str:
    """Copy a run's best weights to where students look for them; returns a line that says what they replace."""
    if not speaks():
        return ""
    text = f"weights of the best epoch: {target}"
    if target.exists():
        found = {}
        with contextlib.suppress(UsageError):  # damaged, or no teacher: good that it goes
            found = checkpoint.metadata_of(checkpoint.read(target), target)
        score = found.get("accuracy", found.get("mIoU", math.nan))
        known = f"{found.get('run', 'a run')}, epoch {found.get('epoch', '?')}, {score:.2f} %" if found else "unknown"
        text += f", in place of others ({known})"
    checkpoint.save(checkpoint.read(best), target)
    return text


def weights_of(path: str | Path) -> Path:
    """A file of weights, or the best ones of a run's folder."""
    return Path(path) / "best.pt" if Path(path).is_dir() else Path(path)


def own_weights(args: argparse.Namespace) -> Path:
    """What --evaluate_only scores: --ckpt, else the run's best weights. Raises UsageError if there are none."""
    path = weights_of(args.ckpt) if args.ckpt else Path(args.out) / args.run_name / "best.pt"
    if not path.exists():
        raise UsageError(f"{path} does not exist: give the flags of the run, or its weights as --ckpt FILE")
    return path


def find_teacher(args: argparse.Namespace, segmentation: bool = False) -> Path:
    """The teacher's file: --teacher_ckpt, else the recipe's in --checkpoints, else the one that is shipped.

    Raises:
        UsageError: there is none; it says how to make it. Or --teacher is a program, which has weights, and so is this.
    """
    if is_program(args.teacher):
        if args.teacher_ckpt:
            raise UsageError(f"--teacher {args.teacher} has weights of its own: leave --teacher_ckpt out")
        return Path(args.teacher)
    if args.teacher_ckpt:
        path = weights_of(args.teacher_ckpt)
        if not path.exists():
            raise UsageError(f"teacher {path} does not exist: give --teacher_ckpt the file of its weights")
        return path
    if args.dataset == "none":
        raise UsageError("--dataset none says nothing of the teacher: name its weights with --teacher_ckpt FILE")
    path = teacher_file(args.checkpoints, args.dataset, args.teacher, args.teacher_recipe)
    for place in (path, SHIPPED / path.name):
        if place.exists():
            return place
    if args.any_teacher and args.teacher_recipe:
        others = {
            recipe: file
            for folder in (SHIPPED, path.parent)
            for recipe in (*RECIPES, "torchvision")
            if (file := teacher_file(folder, args.dataset, args.teacher, recipe)).exists()
        }
        if len(others) == 1:
            (file,) = others.values()
            print(f"there is no {path}: {file}, of another recipe, is the teacher")
            return file
        if others:
            raise UsageError(f"there is no {path}: take another recipe's, --teacher_recipe {' or '.join(others)}")
    recipe = f" --recipe {args.teacher_recipe}" if args.teacher_recipe else ""
    if args.teacher_recipe == "torchvision":
        recipe = " --pretrained" if args.teacher in PRETRAINED else " --recipe imagenet"
    command = f"python teacher_train{'_seg' * segmentation}.py --dataset {args.dataset} --model {args.teacher}{recipe}"
    raise UsageError(f"teacher {path} does not exist: make it with `{command}`, or give --teacher_ckpt FILE")


def load_teacher(
    args: argparse.Namespace, path: Path, content: dict, build: Callable[[str, int, int], nn.Module], data
) -> tuple[nn.Module, dict]:
    """The frozen teacher in eval mode, and what a record says of its weights.

    Args:
        path, content: its file, and what `checkpoint.read` found in it; None for a program.
        build: (name, num_classes, channels) -> module. data: with num_classes, channels, img_size, class_names.

    Raises:
        UsageError: another network, number of classes, image size or other classes than the data's.
    """
    teacher = build(args.teacher, data.num_classes, data.channels)
    if content is not None:
        checkpoint.load_weights(teacher, content, path, args.teacher)
    known = checkpoint.metadata_of(content, path, args)
    if (size := known.get("img_size", data.img_size)) != data.img_size:
        text = f"teacher {path} was trained on images of {size} pixels, not {data.img_size}"
        raise UsageError(f"{text}: give --img_size {size}")
    names = known.get("class_names")
    if names and "none" not in (data.name, known.get("dataset")) and list(names) != list(data.class_names):
        classes = f"{_few(names)} of {known.get('dataset')}, not {_few(data.class_names)} of {args.dataset}"
        cure = "name its own data set (or --attribute), or another teacher"
        raise UsageError(f"teacher {path} knows the classes {classes}: {cure}")
    record = dict(file=path.name, sha256=hashlib.sha256(path.read_bytes()).hexdigest())
    record |= {k: known.get(k) for k in ("recipe", "run", "epoch")}
    return teacher.eval().requires_grad_(False), record | {"score": known.get("accuracy", known.get("mIoU"))}


@torch.no_grad()
def check_network(network: nn.Module, what: str, data, runtime: Runtime) -> None:
    """Let a classifier, in eval mode, look at two images of the data's size, and a program at three.

    One that cannot take images in channels_last, as where `view` flattens them, is brought back to PyTorch's order.

    Args:
        what: its flag and name. data: with num_classes, channels, img_size. runtime: where it lies.

    Raises:
        UsageError: it cannot take them, or what it makes of them are no logits of the data's classes.
    """
    training, program = network.training, isinstance(network, Program)
    network.eval()

    def look() -> tuple[Tensor, Tensor]:
        with runtime.autocast():
            logits = network(images[:2])
            return logits, network(images)[:2] if program else logits

    try:
        images = trial_images(data, runtime.device, 3)
        images[2] *= 5  # unlike the others
        before = images.clone()
        try:
            logits, again = look()
        except torch.OutOfMemoryError:
            raise
        except RuntimeError:
            network.to(memory_format=torch.contiguous_format).register_forward_pre_hook(_contiguous)
            logits, again = look()
    except NetworkError as error:
        raise UsageError(f"{what} {error}") from error
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever a network's code raises
        size = f"{data.channels}x{data.img_size}x{data.img_size}"
        text = f"{what} cannot take images of {size} ({said(error, 0)}): give --img_size, or data, as it was made for"
        more = ", and export it for any number of images (dynamic_shapes)" * program
        raise UsageError(text + more) from error
    network.train(training)
    if not torch.equal(images, before):
        raise UsageError(f"{what} changes its images in place: write x = x - mean for x -= mean")
    logits, again = logits.float(), again.float()
    if logits.shape != (2, data.num_classes):
        text = f"{what} makes values of shape {list(logits.shape)} of two images, not [2, {data.num_classes}]"
        raise UsageError(f"{text}, as {data.name} has classes: name its own data, or let it take num_classes")
    if not logits.isfinite().all():
        raise UsageError(f"{what} makes NaN or infinite logits: look at its weights")
    if (logits >= 0).all() and ((logits.sum(1) - 1).abs() < 1e-3).all():
        raise UsageError(f"{what} makes probabilities: let it return the logits, from before the softmax")
    if not torch.allclose(logits, again, rtol=0, atol=0.05 * logits.abs().max().item()):
        text = "answers otherwise where other images are in the batch, as networks do in training"
        raise UsageError(f"{what} {text}: save it from model.eval()")


def _contiguous(_network: nn.Module, given: tuple) -> tuple:
    return given[0].contiguous(), *given[1:]


def check_gradient(teacher: nn.Module, what: str, data, device: torch.device) -> None:
    """Raises UsageError unless a teacher tells a generator how to change the images; arguments as `check_network`'s."""
    try:
        passed = teacher(trial_images(data, device).requires_grad_()).requires_grad
        text = "take no_grad out of its forward"
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever a network's code raises
        passed, text = False, f"its forward ends in {said(error, 0)}"
    if not passed:
        raise UsageError(f"{what} passes no gradient on to the images, which teaches the generator: {text}")


def _few(names) -> str:
    return ", ".join(map(str, names[:3])) + (" ..." if len(names) > 3 else "")


def fetch(model: str) -> dict[str, torch.Tensor]:
    """The state dict of `model` in PRETRAINED: downloaded once, by torch.hub.

    Raises:
        UsageError: it could not be had.
    """
    pretrained = PRETRAINED[model]
    timeout = socket.getdefaulttimeout()
    try:
        socket.setdefaulttimeout(DOWNLOAD_TIMEOUT)
        return pretrained.get_state_dict(progress=False)
    except Exception as error:  # whatever urllib, the hub or the disk raise
        raise UsageError(
            f"{pretrained} could not be had ({type(error).__name__}): run once with a network, or put "
            f"{pretrained.url} into {Path(torch.hub.get_dir()) / 'checkpoints'}"
        ) from error
    finally:
        socket.setdefaulttimeout(timeout)
