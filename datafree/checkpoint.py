"""Checkpoints: written whole or not at all, loaded without running code."""

import io
import os
import pickle
import socket
import warnings
from pathlib import Path

import torch
from torchvision.models import MobileNet_V2_Weights, ResNet18_Weights, ResNet34_Weights, ResNet50_Weights

from datafree.runtime import UsageError

DOWNLOAD_TIMEOUT = 20  # seconds without a byte
# ImageNet's weights of the models that torchvision has under the same parameter names.
PRETRAINED = {
    "resnet18_imagenet": ResNet18_Weights.IMAGENET1K_V1,
    "resnet34_imagenet": ResNet34_Weights.IMAGENET1K_V1,
    "resnet50_imagenet": ResNet50_Weights.IMAGENET1K_V1,
    "mobilenetv2": MobileNet_V2_Weights.IMAGENET1K_V1,
}


def save(state, path):
    """Write `state` (tensors and plain values) to `path` atomically.

    A full disk or a kill in mid-write leaves the old file as it was.
    """
    path = Path(path)
    buffer = io.BytesIO()
    torch.save(state, buffer)
    temporary = path.with_name(path.name + ".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            file.write(buffer.getbuffer())
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise UsageError(
            f"cannot write {path} ({error.strerror}): make room or choose another "
            "--out; the file from before is untouched"
        ) from error


def read(path, device="cpu"):
    """The content of a checkpoint file.

    Raises:
        UsageError: the file is missing, truncated, no checkpoint, or would execute code.
    """
    path = Path(path)
    if not path.is_file():
        raise UsageError(f"checkpoint {path} does not exist")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what is wrong is said below, in one line
            return torch.load(path, map_location=device, weights_only=True)
    except pickle.UnpicklingError as error:
        if "Unsupported" in str(error) or "global" in str(error).lower():
            raise UsageError(
                f"checkpoint {path} holds code, not only weights, and was not "
                "loaded: save its state_dict() alone"
            ) from error
        raise UsageError(f"checkpoint {path} is damaged or no checkpoint: make it again") from error
    except (RuntimeError, EOFError, ValueError, KeyError, OSError) as error:
        raise UsageError(f"checkpoint {path} is damaged or no checkpoint: make it again") from error


def weights(content, path):
    """The state dict in a checkpoint's content: bare, under 'state_dict', 'module.' stripped."""
    if isinstance(content, dict):
        for key in ("state_dict", "model"):
            if isinstance(content.get(key), dict):
                content = content[key]
                break
        if content and all(isinstance(v, torch.Tensor) for v in content.values()):
            return {k.removeprefix("module."): v for k, v in content.items()}
    raise UsageError(f"checkpoint {path} holds no state dict: save model.state_dict()")


def load_weights(model, content, path, architecture):
    """Load a checkpoint's content into `model`.

    Raises:
        UsageError: the weights belong to another architecture or another number of classes.
    """
    state = weights(content, path)
    card = content.get("card") or {}
    made_for = f"a {card['model']}" if "model" in card else "another architecture"
    own = model.state_dict()
    try:
        missing, unexpected = model.load_state_dict(state, strict=False)
    except RuntimeError as error:
        wrong = [k for k, v in state.items() if k in own and own[k].shape != v.shape]
        last = [k for k in own if k.endswith("weight")][-1]
        if wrong and all(k.startswith(last.rpartition(".")[0]) for k in wrong):
            raise UsageError(
                f"checkpoint {path} has {len(state[last])} classes, the data set "
                f"{len(own[last])}: use weights trained for this data set"
            ) from error
        raise UsageError(
            f"checkpoint {path} is for {made_for}, not {architecture}: name the "
            "architecture that it was trained with"
        ) from error
    if missing or unexpected:
        raise UsageError(
            f"checkpoint {path} is for {made_for}, not {architecture} (it lacks "
            f"{len(missing)} of its tensors and has {len(unexpected)} others): name "
            "the architecture that it was trained with"
        )


def fetch(model):
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
            f"{pretrained} could not be had ({type(error).__name__}): run once with a "
            f"network, or put {pretrained.url} into "
            f"{Path(torch.hub.get_dir()) / 'checkpoints'}"
        ) from error
    finally:
        socket.setdefaulttimeout(timeout)


def rng_state():
    """The states of every random generator that a run draws from."""
    return {
        "cpu": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def restore_rng(state):
    torch.set_rng_state(state["cpu"].cpu())
    if state["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all([s.cpu() for s in state["cuda"]])


def card(model, data, transform):
    """What a network was trained for, kept beside its weights: plain values only.

    Args:
        model: registry name.
        data: with name, num_classes, class_names, img_size, channels.
        transform: with mean and std, one value per channel.
    """
    return {
        "model": model,
        "dataset": data.name,
        "num_classes": data.num_classes,
        "class_names": list(data.class_names),
        "img_size": data.img_size,
        "channels": data.channels,
        "mean": list(transform.mean),
        "std": list(transform.std),
    }


def card_of(args, content):
    """The card in a checkpoint's content, without what the user gives anew in --mean and --std."""
    given = [key for key in ("mean", "std") if getattr(args, key)]
    return {k: v for k, v in (content.get("card") or {}).items() if k not in given}


def teacher_file(folder, dataset, model):
    """Where teacher_train.py leaves the best weights, and the distillation scripts look."""
    return Path(folder) / f"{dataset}-{model}.pt"


def load_teacher(args, build, data, script="teacher_train.py"):
    """The frozen teacher of a distillation script, in eval mode, and the card beside its weights.

    Args:
        args: with teacher (registry name), teacher_ckpt (file, folder or None), checkpoints,
            dataset, mean and std (where None, the card's count).
        build: (name, num_classes, channels) -> module.
        data: the data set, with num_classes, channels and img_size.
        script: what makes such a teacher.

    Raises:
        UsageError: no such file, damaged, another architecture, number of classes or image size.
    """
    path = Path(args.teacher_ckpt or teacher_file(args.checkpoints, args.dataset, args.teacher))
    path = path / "best.pt" if path.is_dir() else path
    if not path.exists():
        ready = args.dataset == "imagenet" and args.teacher in PRETRAINED
        raise UsageError(
            f"teacher {path} does not exist: make it with `python {script} "
            f"--dataset {args.dataset} --model {args.teacher}"
            f"{' --pretrained' * ready}`, or give --teacher_ckpt FILE"
        )
    content = read(path)
    teacher = build(args.teacher, data.num_classes, data.channels)
    load_weights(teacher, content, path, args.teacher)
    card = card_of(args, content)
    if card.get("img_size", data.img_size) != data.img_size:
        raise UsageError(
            f"teacher {path} was trained on images of {card['img_size']} pixels, not "
            f"{data.img_size}: give --img_size {card['img_size']}"
        )
    return teacher.eval().requires_grad_(False), card
