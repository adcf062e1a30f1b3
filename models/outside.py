"""Networks from outside the registry, by a text that says where: a Python file, torchvision, timm, a saved program.

    FILE.py:FUNCTION       what the function returns; it is told `num_classes` and `channels` where it takes them
    torchvision:resnet18   a classifier of torchvision      timm:NAME   one of timm, if that is installed
    FILE.pt2, FILE.pt      what `torch.export.save` or TorchScript wrote: layers and weights in one

Each becomes images (N, C, H, W) -> logits (N, num_classes), under its own parameter names. Files are run: take those
of people whom you trust. Nothing is downloaded. torchvision's weights of inception_v3 and googlenet want --mean and
--std of 0.5 0.5 0.5: only when it loads them itself does it bring images of ImageNet's statistics to that.
"""

import hashlib
import inspect
import logging
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from types import ModuleType

import torch
import torchvision
from torch import Tensor, fx, nn
from torch.nn.parameter import is_lazy

PROGRAMS = (".pt2", ".pt", ".pth", ".ts")


class NetworkError(ValueError):
    """What is wrong with a network from outside, in one line that names the cure."""


def place_of(name: str) -> tuple[str, str] | None:
    """Where a network is, "torchvision", "timm" or a file, and what it is called there; None: not outside."""
    place, _, inner = name.rpartition(":")
    if place in ("torchvision", "timm") or place.endswith(".py"):
        return place, inner
    return (name, "") if name.endswith((".py", *PROGRAMS)) else None


def is_program(name: str) -> bool:
    """Whether a network's name is a file that holds its weights, too."""
    return (place_of(name) or (name,))[0].endswith(PROGRAMS)


def check_outside(name: str) -> None:
    """Raises NetworkError unless `name` is in torchvision or timm, or its file is there; runs nothing."""
    place, inner = place_of(name)
    if place in ("torchvision", "timm"):
        names = torchvision.models.list_models(torchvision.models) if place == "torchvision" else _timm().list_models()
        if inner not in names and not (place == "timm" and _timm().is_model(inner)):
            close = get_close_matches(inner, names)
            hint = f"did you mean {' or '.join(close)}?" if close else f"see {place}'s list_models()"
            raise NetworkError(f"{place} has no classifier {inner!r}: {hint}")
    elif not Path(place).is_file():
        raise NetworkError(f"{place} does not exist or is no file: name the file of the network")
    elif place.endswith(".py") and not inner.isidentifier():
        raise NetworkError(f"{name} names no function: give FILE.py:FUNCTION, which returns the network")


def word_of(name: str) -> str:
    """A network's name as a part of a file's name: files by a hash of their content, so that two are never one."""
    if not (found := place_of(name)):
        return name
    place, inner = found
    if place not in ("torchvision", "timm"):
        content = Path(place).read_bytes()
        inner = f"{inner}_" * bool(inner) + hashlib.sha256(content).hexdigest()[:6]
    return f"{Path(place).stem}_{inner}"


def defaults_of(name: str) -> dict:
    """What timm says of the images that a network's weights were trained on: mean, std and img_size; else nothing."""
    place, inner = place_of(name) or ("", "")
    try:
        config = _timm().get_pretrained_cfg(inner) if place == "timm" else None
    except RuntimeError as error:
        cure = "leave out what follows the dot, or see timm's list_pretrained()"
        raise NetworkError(f"{name}: {said(error)}: {cure}") from error
    return {"mean": config.mean, "std": config.std, "img_size": config.input_size[-1]} if config else {}


def build_outside(name: str, num_classes: int, channels: int | None = None) -> nn.Module:
    """The network, in train mode, whose output is made the logits (N, num_classes); a program stays as it is.

    Raises NetworkError if it cannot be had.
    """
    check_outside(name)
    place, inner = place_of(name)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            warnings.simplefilter("ignore", DeprecationWarning)
            if is_program(name):
                network = _load_program(place)
            elif place == "timm":
                network = _timm().create_model(inner, num_classes=num_classes, in_chans=channels or 3)
            elif place == "torchvision":
                network = torchvision.models.get_model(inner, weights=None, num_classes=num_classes)
            else:
                network = _call(_run(Path(place)), name, inner, num_classes=num_classes, channels=channels)
        if network.train() is not network:
            raise NetworkError(f"{name} has a train() of its own that returns something else: end it with return self")
    except NetworkError:
        raise
    except ImportError as error:
        cure = "see that it runs by itself"
        if (error.name or "").partition(".")[0] in ("models", "data", "datafree", "papers"):
            cure = f"{error.name} is these scripts' own: put the network into one file"
        raise NetworkError(f"{name} makes no network ({said(error)}): {cure}") from error
    except (Exception, SystemExit) as error:  # whatever somebody's code raises
        raise NetworkError(f"{name} makes no network ({said(error)}): see that it runs by itself") from error
    network.register_forward_hook(partial(_read, num_classes=num_classes))
    return network


def said(error: BaseException, line: int = -1) -> str:
    """An error's class and a line of its text, the last one by default."""
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[line]}".removesuffix(": ")


def logits_of(output: object, num_classes: int) -> Tensor:
    """The logits (N, num_classes) in what a network returns.

    That is a tensor, or in an object `.logits`, in a dictionary "logits", "out" or the only tensor, in a tuple or list
    the first tensor (N, num_classes). Raises NetworkError where there is none.
    """
    found = output
    if isinstance(output, Mapping):
        tensors = [v for v in output.values() if isinstance(v, Tensor)]
        found = output.get("logits", output.get("out", tensors[0] if len(tensors) == 1 else None))
    elif hasattr(output, "logits"):
        found = output.logits
    elif isinstance(output, Sequence):
        fits = (v for v in output if isinstance(v, Tensor) and v.shape[1:] == (num_classes,))
        found = next(fits, None)
    if not isinstance(found, Tensor):
        keys = f" of {', '.join(map(str, output))}" if isinstance(output, Mapping) else ""
        text = f"returns a {type(output).__name__}{keys}, in which the logits (N, {num_classes}) are not found"
        raise NetworkError(f"{text}: return them alone")
    return found


class Program(nn.Module):
    """A saved program, images -> logits, that is run as it was saved: its layers are not seen, nor trained."""

    def __init__(self, program: nn.Module):
        super().__init__()
        self.program = program

    def forward(self, x: Tensor) -> object:
        return self.program(x)

    def train(self, mode: bool = True) -> "Program":
        self.training = False
        return self

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Program":
        """What `to`, `cpu` and `cuda` do with tensors, of a network that holds a program, too."""
        if isinstance(self.program, fx.GraphModule):
            device = fn(torch.empty(0)).device
            for node in self.program.graph.nodes:
                if "device" in node.kwargs:  # of what it makes itself
                    node.kwargs = {**node.kwargs, "device": device}
            self.program.recompile()
        return super()._apply(fn, recurse)


def _read(network: nn.Module, given: tuple, output: object, num_classes: int) -> Tensor:
    return logits_of(output, num_classes)


def _load_program(path: str) -> Program:
    logging.disable(logging.WARNING)  # what is wrong is said in one line
    try:
        if path.endswith(".pt2"):
            program = torch.export.load(path).module()
            for node in program.graph.nodes:
                # It says on which device and in which precision it was saved, not what its layers can take.
                if node.target is torch.ops.aten._assert_tensor_metadata.default:
                    program.graph.erase_node(node)
            program.recompile()
            return Program(program)
        return Program(torch.jit.load(path, map_location="cpu").eval())
    except Exception as error:  # whatever a damaged archive leads to
        text = f"{path} is damaged or no saved program: if it holds weights alone, give them as --teacher_ckpt"
        raise NetworkError(f"{text}, and as --teacher the network that they belong to") from error
    finally:
        logging.disable(logging.NOTSET)


def _run(path: Path) -> ModuleType:
    """The module that a Python file is; what lies beside the file can be imported by it, after what is installed."""
    if (folder := str(path.resolve().parent)) not in sys.path:
        sys.path.append(folder)
    code = path.read_bytes()
    module = ModuleType(f"{path.stem}_{hashlib.sha256(code).hexdigest()[:6]}")
    module.__file__ = str(path)
    sys.modules[module.__name__] = module  # where its classes are looked up
    exec(compile(code, path, "exec"), vars(module))
    return module


def _call(module: ModuleType, name: str, function: str, **offered: int | None) -> nn.Module:
    build = getattr(module, function, None)
    if not callable(build):
        names = [k for k, v in vars(module).items() if callable(v) and getattr(v, "__module__", "") == module.__name__]
        text = f"{module.__file__} has no function {function}"
        raise NetworkError(f"{text}: give FILE.py:FUNCTION, one of {', '.join(names) or 'none that it has'}")
    takes = inspect.signature(build).parameters
    network = build(**{k: v for k, v in offered.items() if k in takes and v is not None})
    if not isinstance(network, nn.Module) or isinstance(network, torch.jit.ScriptModule):
        cure = "let it return a torch.nn.Module, or save a program and give its file as --teacher"
        raise NetworkError(f"{name} returns a {type(network).__name__}: {cure}")
    if not any(True for _ in network.parameters()) or any(map(is_lazy, network.parameters())):
        raise NetworkError(f"{name} has no weights yet: let its function run it once, so that all layers have a size")
    return network


def _timm() -> ModuleType:
    try:
        import timm
    except ImportError as error:
        raise NetworkError("timm is not installed: pip install timm") from error
    return timm
