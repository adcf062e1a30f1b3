"""Checkpoints and records: written whole or not at all, loaded without running code."""

import io
import json
import os
import pickle
import warnings
from pathlib import Path

import torch
from torch import nn

from datafree.errors import UsageError


def write(path: str | Path, content: bytes) -> None:
    """Write a file atomically: a full disk or a kill in mid-write leaves the old one as it was.

    Raises:
        UsageError: it cannot be written.
    """
    path = Path(path)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise UsageError(
            f"cannot write {path} ({error.strerror}): make room or choose another --out; the file from "
            "before is untouched"
        ) from error


def write_json(path: str | Path, content: dict) -> None:
    """Write plain values as an indented JSON file, atomically."""
    write(path, (json.dumps(content, indent=1, default=str) + "\n").encode())


def save(state: dict, path: str | Path) -> None:
    """Write `state` (tensors and plain values) to `path`, atomically."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    write(path, buffer.getbuffer())


def read(path: str | Path, device: str | torch.device = "cpu"):
    """The content of a checkpoint file.

    Raises:
        UsageError: the file is missing, truncated, no checkpoint, or would execute code.
    """
    path = Path(path)
    if not path.is_file():
        raise UsageError(f"checkpoint {path} {'is no file' if path.exists() else 'does not exist'}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what is wrong is said below, in one line
            return torch.load(path, map_location=device, weights_only=True)
    except pickle.UnpicklingError as error:
        if "Unsupported" in str(error) or "global" in str(error).lower():
            raise UsageError(
                f"checkpoint {path} holds code, not only weights, and was not loaded: save its state_dict() alone"
            ) from error
        raise UsageError(f"checkpoint {path} is damaged or no checkpoint: make it again") from error
    except PermissionError as error:
        raise UsageError(f"checkpoint {path} cannot be read ({error.strerror}): change its permissions") from error
    except (RuntimeError, EOFError, ValueError, KeyError, OSError) as error:
        raise UsageError(f"checkpoint {path} is damaged or no checkpoint: make it again") from error


def weights(content, path: str | Path) -> dict[str, torch.Tensor]:
    """The state dict in a checkpoint's content: bare, or under a usual name; 'module.' is stripped."""
    if isinstance(content, dict):
        for key in ("state_dict", "model", "model_state"):
            if isinstance(content.get(key), dict):
                content = content[key]
                break
        if content and all(isinstance(v, torch.Tensor) for v in content.values()):
            return {k.removeprefix("module."): v for k, v in content.items()}
    raise UsageError(f"checkpoint {path} holds no state dict: save model.state_dict()")


def load_weights(model: nn.Module, content, path: str | Path, architecture: str) -> None:
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
                f"checkpoint {path} has {len(state[last])} classes, the data set {len(own[last])}: use "
                "weights trained for this data set"
            ) from error
        raise UsageError(
            f"checkpoint {path} is for {made_for}, not {architecture}: name the architecture that it was trained with"
        ) from error
    if missing or unexpected:
        raise UsageError(
            f"checkpoint {path} is for {made_for}, not {architecture} (it lacks {len(missing)} of its "
            f"tensors and has {len(unexpected)} others): name the architecture that it was trained with"
        )


def rng_state(device: torch.device) -> dict:
    """The states of the random generators that a run on this device draws from."""
    return {"cpu": torch.get_rng_state(), "cuda": [torch.cuda.get_rng_state(device)] if device.type == "cuda" else []}


def restore_rng(state: dict, device: torch.device) -> None:
    """Set them again; a run that goes on on another kind of device keeps that device's own state."""
    torch.set_rng_state(state["cpu"].cpu())
    if state["cuda"] and device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"][0].cpu(), device)


def card(model: str, data, transform, **more) -> dict:
    """What a network was trained for, kept beside its weights: plain values only.

    Args:
        model: registry name.
        data: with name, num_classes, class_names, img_size, channels.
        transform: with mean and std, one value per channel.
    """
    known = ("num_classes", "img_size", "channels")
    about = {"model": model, "dataset": data.name, "class_names": list(data.class_names)}
    about |= {k: getattr(data, k) for k in known} | {k: list(getattr(transform, k)) for k in ("mean", "std")}
    return about | more


def card_of(args, content) -> dict:
    """The card in a checkpoint's content, without what the user gives anew in --mean and --std."""
    given = [key for key in ("mean", "std") if getattr(args, key)]
    found = content.get("card") if isinstance(content, dict) else None
    return {k: v for k, v in (found or {}).items() if k not in given}
