"""Checkpoints and records: written whole or not at all, loaded without running code."""

import argparse
import io
import json
import os
import pickle
import platform
import re
import warnings
from collections import OrderedDict
from collections.abc import Container
from pathlib import Path

import torch
from torch import Tensor, nn

from datafree.distributed import speaks
from datafree.errors import UsageError


def write(path: str | Path, content: bytes) -> None:
    """Write a file atomically: a full disk or a kill in mid-write leaves the old one as it was.

    Raises:
        UsageError: it cannot be written.
    """
    if not speaks():
        return
    path = Path(path)
    temporary = path.with_name(f"{path.name}.{platform.node()}-{os.getpid()}.tmp")  # its own, on a shared disk too
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


def check_writable(folder: str | Path, flag: str) -> None:
    """Make the folder if it is missing. Raises UsageError if it cannot be written to."""
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise PermissionError(13, "Permission denied")
    except OSError as error:
        raise UsageError(f"cannot write to {folder} ({error.strerror}): choose another {flag}") from error


def write_json(path: str | Path, content: dict) -> None:
    """Write plain values as an indented JSON file, atomically."""
    write(path, (json.dumps(content, indent=1, default=str) + "\n").encode())


def save(state: dict, path: str | Path) -> None:
    """Write `state` (tensors and plain values) to `path`, atomically."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    write(path, buffer.getbuffer())


def read(path: str | Path, device: str | torch.device = "cpu"):
    """The content of a checkpoint file, or of a .safetensors file.

    Raises:
        UsageError: the file is missing, unreadable, truncated, no checkpoint, or would execute code.
    """
    path = Path(path)
    if not path.is_file():
        cure = "name a file of weights" if path.exists() else "make it first, or name another"
        raise UsageError(f"checkpoint {path} {'is no file' if path.exists() else 'does not exist'}: {cure}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what is wrong is said below, in one line
            if path.suffix == ".safetensors":
                from safetensors.torch import load_file

                return load_file(path, str(device))
            return torch.load(path, map_location=device, weights_only=True)
    except ImportError as error:
        raise UsageError(f"checkpoint {path} needs safetensors: pip install safetensors") from error
    except PermissionError as error:
        raise UsageError(f"checkpoint {path} cannot be read ({error.strerror}): change its permissions") from error
    except (torch.OutOfMemoryError, MemoryError):
        raise
    except Exception as error:  # a damaged pickle raises whatever its bytes spell
        with path.open("rb") as file:
            pickled = file.read(1) == b"\x80"
        if isinstance(error, pickle.UnpicklingError) and ("GLOBAL" in str(error) or pickled):
            raise UsageError(
                f"checkpoint {path} holds code, not only weights, and was not loaded: save its state_dict() alone"
            ) from error
        if "TorchScript" in str(error) or path.suffix == ".pt2":
            raise UsageError(f"checkpoint {path} holds a whole network: give it as --teacher, alone") from error
        raise UsageError(f"checkpoint {path} is damaged or no checkpoint: make it again") from error


WRAPPED = re.compile(r"^((module|_orig_mod)\.)+")  # what DataParallel and torch.compile put in front of names


def weights(content: object, path: str | Path, names: Container[str] = ()) -> dict[str, Tensor]:
    """The state dict in a checkpoint's content: bare, or under a usual name; 'module.' and '_orig_mod.' are stripped.

    Args:
        names: keys that are right as they are.

    Raises:
        UsageError: there is none, or a tensor is not a plain one of finite real numbers.
    """
    if isinstance(content, dict):
        for key in ("state_dict", "model_state_dict", "model", "model_state", "net", "network"):
            if isinstance(content.get(key), dict):
                content = content[key]
                break
        if content and all(isinstance(k, str) and isinstance(v, Tensor) for k, v in content.items()):
            for key, value in content.items():
                if not is_plain(value) or value.is_complex() or not value.isfinite().all():
                    what = "is no plain tensor of finite numbers: export the weights again"
                    raise UsageError(f"checkpoint {path}: {key} {what}")
            state = OrderedDict((k if k in names else WRAPPED.sub("", k), v) for k, v in content.items())
            # The versions of its layers, by which they read older files.
            found = getattr(content, "_metadata", None)
            known = [(k, v) for k, v in found.items() if _is_version(k, v)] if isinstance(found, dict) else []
            state._metadata = dict(known) | {WRAPPED.sub("", f"{k}.").rstrip("."): v for k, v in known}
            return state
    keys = f" under {', '.join(map(str, list(content)[:9]))}" if isinstance(content, dict) and content else ""
    raise UsageError(f"checkpoint {path} holds no state dict{keys}: save model.state_dict()")


def _is_version(name: object, about: object) -> bool:
    return isinstance(name, str) and isinstance(about, dict) and isinstance(about.get("version"), int)


def is_plain(value: Tensor) -> bool:
    """Whether a tensor is dense, has values, and is neither nested nor quantised."""
    return value.layout == torch.strided and not (value.is_nested or value.is_quantized or value.is_meta)


def load_weights(model: nn.Module, content: object, path: str | Path, architecture: str) -> None:
    """Load a checkpoint's content into `model`.

    Raises:
        UsageError: the weights belong to another architecture or another number of classes.
    """
    own = model.state_dict()
    state, metadata = weights(content, path, own), metadata_of(content, path)
    made_for = f"a {metadata['model']}" if "model" in metadata else "another architecture"
    cure = "name the architecture that it was trained with"
    try:
        missing, unexpected = model.load_state_dict(state, strict=False)
    except (RuntimeError, ValueError) as error:
        wrong = [k for k, v in state.items() if k in own and own[k].shape != v.shape]
        last = next((k for k in reversed(own) if k.endswith("weight")), "")
        if wrong and last in state and state[last].dim() and all(k.startswith(last.rpartition(".")[0]) for k in wrong):
            text = f"checkpoint {path} has {len(state[last])} classes, the data set {len(own[last])}"
            raise UsageError(f"{text}: use weights trained for this data set") from error
        size = f" ({wrong[0]} is {list(state[wrong[0]].shape)}, not {list(own[wrong[0]].shape)})" if wrong else ""
        raise UsageError(f"checkpoint {path} is for {made_for}, not {architecture}{size}: {cure}") from error
    if missing or unexpected:
        lack = f"it lacks {len(missing)} of its tensors and has {len(unexpected)} others"
        raise UsageError(f"checkpoint {path} is for {made_for}, not {architecture} ({lack}): {cure}")


def rng_state(device: torch.device) -> dict:
    """The states of the random generators that a run on this device draws from."""
    return {"cpu": torch.get_rng_state(), "cuda": [torch.cuda.get_rng_state(device)] if device.type == "cuda" else []}


def restore_rng(state: dict, device: torch.device) -> None:
    """Set them again; a run that goes on on another kind of device keeps that device's own state."""
    torch.set_rng_state(state["cpu"].cpu())
    if state["cuda"] and device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"][0].cpu(), device)


def metadata(model: str, data, transform, **more) -> dict:
    """What a network was trained for, kept beside its weights: plain values only.

    Args:
        model: its name, as the command line gives it.
        data: with name, num_classes, class_names, img_size, channels.
        transform: with mean and std, one value per channel.
    """
    known = ("num_classes", "img_size", "channels")
    about = {"model": model, "dataset": data.name, "class_names": list(data.class_names)}
    about |= {k: getattr(data, k) for k in known} | {k: list(getattr(transform, k)) for k in ("mean", "std")}
    return about | more


def _statistic(values: object, low: float) -> bool:
    return isinstance(values, list | tuple) and all(isinstance(v, int | float) and low < v <= 1 for v in values)


# What may stand in a file's metadata, where it stands there.
POSSIBLE = {
    **dict.fromkeys("model dataset run recipe".split(), lambda v: isinstance(v, str)),
    **dict.fromkeys("num_classes img_size channels".split(), lambda v: isinstance(v, int) and 0 < v <= 2**20),
    **dict.fromkeys("accuracy mIoU agreement".split(), lambda v: isinstance(v, int | float) and 0 <= v <= 100),
    "mean": lambda v: _statistic(v, -1e-9),
    "std": lambda v: _statistic(v, 0),
    "class_names": lambda v: isinstance(v, list | tuple) and all(isinstance(name, str | int) for name in v),
    "epoch": lambda v: isinstance(v, int),
}


def metadata_of(content: object, path: str | Path, args: argparse.Namespace | None = None) -> dict:
    """The metadata in a checkpoint's content, without what the user gives anew in args.mean and args.std.

    Raises:
        UsageError: there is nonsense in it.
    """
    found = content.get("metadata", content.get("card")) if isinstance(content, dict) else None  # card: its older name
    if found is None:
        return {}
    if not isinstance(found, dict):
        found, wrong = {}, ["all of it"]
    else:
        found = {k: v for k, v in found.items() if not (k in ("mean", "std") and getattr(args, k, None))}
        wrong = [str(k) for k, v in found.items() if k in POSSIBLE and not POSSIBLE[k](v)]
    if wrong:
        cure = "save its weights anew, and give --mean and --std"
        raise UsageError(f"checkpoint {path}: what it says of itself is damaged ({', '.join(wrong)}): {cure}")
    return found
