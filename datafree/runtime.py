"""Where and how a run computes: seeds, device, precision, schedules and optimisers."""

import argparse
import ctypes
import math
import platform
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook

try:
    import resource
except ImportError:  # Windows
    resource = None

from datafree.distributed import LOCAL_RANK, SIZE, add_up, gather
from datafree.errors import UsageError


def has_bf16(device: torch.device) -> bool:
    """Whether bfloat16 arithmetic is in the device's hardware (emulation is slower than fp32)."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    probes = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, probe, bool)() for probe in probes)


@dataclass
class Runtime:
    """Where and how a run computes: `device`, `precision` ("fp32" or "bf16"), and whether networks are compiled."""

    device: torch.device
    precision: str
    compiles: bool = False

    def autocast(self) -> AbstractContextManager:
        """The context of a network's forward pass; losses belong outside it."""
        if self.precision == "fp32":
            return nullcontext()
        return torch.autocast(self.device.type, torch.bfloat16)

    def place(self, module: nn.Module) -> nn.Module:
        """Move a module to the device, its convolutions' weights to channels_last; returns it."""
        return module.to(self.device, memory_format=torch.channels_last)

    def compile(self, module: nn.Module) -> nn.Module:
        """Let a module's calls be compiled, with --compile, in place: the same but for rounding; returns it.

        Its copies are not, nor is a call whose kind of input is new for the ninth time.
        """
        if self.compiles:
            module.compile(mode="reduce-overhead", dynamic=False)
        return module

    def eagerly(self) -> AbstractContextManager:
        """A context in which nothing is compiled: for what is done once, or in batches of many sizes."""
        return torch.compiler.set_stance("force_eager") if self.compiles else nullcontext()


def keep_gradients(network: nn.Module) -> None:
    """Copy a network's gradients: those of a compiled one lie where its next backward pass writes."""
    for parameter in network.parameters():
        if parameter.grad is not None:
            parameter.grad = parameter.grad.clone()


def keep_memory(keep: bool = True) -> None:
    """Let the C library keep freed memory for the next step instead of giving it back.

    Returning each activation to the kernel and faulting its pages in again takes about a third
    of a training step on a CPU. It costs some memory; glibc only, elsewhere nothing happens.
    `keep=False` is what the library comes to by itself after a few large allocations.
    """
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if hasattr(libc, "mallopt"):
        M_MMAP_MAX, M_MMAP_THRESHOLD, M_TRIM_THRESHOLD = -4, -3, -1
        libc.mallopt(M_MMAP_MAX, 0 if keep else 65536)
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1 if keep else 2**26)
        if not keep:
            libc.mallopt(M_MMAP_THRESHOLD, 2**25)
            libc.malloc_trim(0)


def setup(args: argparse.Namespace) -> Runtime:
    """Seed everything and settle device and precision.

    Raises:
        UsageError: no such GPU, or no bf16 hardware.
    """
    torch.manual_seed(args.seed)
    wanted = "cuda" if args.gpu is not None else args.device
    if wanted == "auto":
        wanted = "cuda" if torch.cuda.is_available() else "cpu"
    if wanted == "cuda":
        found = torch.cuda.device_count()
        if SIZE > 1 and args.gpu is not None:
            raise UsageError("--gpu names one GPU, and each process takes one of its own: leave it out")
        index = args.gpu or LOCAL_RANK
        if index >= found:
            text = f"GPU {index} was asked for and {found} can be used"
            raise UsageError(f"{text}: choose another --gpu, or --device cpu")
        device = torch.device("cuda", index)
        torch.cuda.set_device(device)
        torch.cuda.reset_peak_memory_stats(device)  # of an earlier run in this process
        if len(names := sorted({*gather([device_name(device)])})) > 1:
            text = f"the processes have unlike GPUs ({', '.join(names)}), which draw unlike random numbers"
            raise UsageError(f"{text}: let them have the same")
        torch.backends.cudnn.benchmark = True
    else:
        device = torch.device("cpu")
        keep_memory()
    # fp32 is float32: TF32, which cuDNN's convolutions take by default, has 10 bits of mantissa.
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    precision = args.precision or "auto"
    if precision == "auto":
        precision = "bf16" if has_bf16(device) else "fp32"
    elif precision == "bf16" and not has_bf16(device):
        text = f"--precision bf16: {device_name(device)} has no bfloat16 arithmetic"
        raise UsageError(f"{text}: use --precision fp32 (auto chooses it here)")
    compiles = args.compile and can_compile(device)
    if compiles and device.type == "cuda":
        # A CUDA graph's outputs lie where its next call writes: what networks returned is needed until an update ends.
        # Without a first mark, each call would count as a step.
        torch.compiler.cudagraph_mark_step_begin()
        register_optimizer_step_post_hook(lambda *_: torch.compiler.cudagraph_mark_step_begin())
    return Runtime(device, precision, compiles)


def can_compile(device: torch.device) -> bool:
    """Whether torch.compile works here; what speaks against it is printed."""
    if SIZE > 1:
        return False
    try:
        torch.compile(torch.neg)(torch.ones(2, device=device))
    except Exception as error:  # whatever its back ends raise: no compiler, no Triton, a Python that is too new
        print(f"--compile does not work here, networks run as they are: {' '.join(str(error).split())[:200]}")
        return False
    return True


class Stopwatch:
    """Adds up the time of its `with` blocks, on a GPU without waiting for it; resumable."""

    def __init__(self, device: torch.device):
        self.cuda = device.type == "cuda"
        self.total, self.open = 0.0, []

    def _now(self):
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def __enter__(self):
        self.open.append([self._now()])

    def __exit__(self, *error):
        self.open[-1].append(self._now())

    def seconds(self) -> float:
        if self.open and self.cuda:
            torch.cuda.synchronize()
        for start, *end in self.open:
            for stop in end:  # none for a block that is still open
                self.total += start.elapsed_time(stop) / 1000 if self.cuda else stop - start
        self.open.clear()
        return self.total

    def state_dict(self) -> dict[str, float]:
        return {"seconds": self.seconds()}

    def load_state_dict(self, state: dict[str, float]) -> None:
        self.total = state["seconds"]


def cosine_at(epoch: float, lr: float, n_epochs: int, lowest: float) -> float:
    """Cosine schedule (Loshchilov and Hutter 2017) from lr at epoch 0 to `lowest` at n_epochs.

    Before epoch 0 it is lr. A rate that starts below `lowest` stays.
    """
    lowest = min(lr, lowest)
    return lowest + (lr - lowest) * (1 + math.cos(math.pi * max(0, epoch) / n_epochs)) / 2


def lr_at(epoch: float, lr: float, n_epochs: int, milestones: Sequence[float] = (), gamma: float = 0.1) -> float:
    """Step schedule: lr x gamma for each milestone (a fraction of n_epochs) behind `epoch`.

    A pure function of the epoch, so that a resumed run needs no scheduler state. `epoch` counts
    from 0; the tolerance keeps 0.6 x 200 from becoming 119.99.
    """
    return lr * gamma ** sum(epoch + 1e-9 >= m * n_epochs for m in milestones)


def set_lr(optimizer: Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr


def make_optimizer(
    name: str, parameters: Iterable, lr: float, weight_decay: float | None = None, of_share: bool = True
) -> Optimizer:
    """adam, adamw, or sgd (momentum 0.9): fused, one kernel for all parameters.

    A weight decay of None is PyTorch's default: 0.01 for adamw, none for the others. `of_share`: whether the parameters
    see a rank's share of the batch, so that their gradients are to be added up, and not the whole of it.
    """
    decay = {} if weight_decay is None else {"weight_decay": weight_decay}
    if name == "sgd":
        optimizer = torch.optim.SGD(parameters, lr, 0.9, fused=True, **decay)
    else:
        kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[name]
        optimizer = kind(parameters, lr, fused=True, **decay)
    return add_up(optimizer) if of_share else optimizer


def device_name(device: torch.device) -> str:
    """The GPU's or the processor's name and number of threads, for people."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        models = [line for line in cpuinfo.read_text().splitlines() if "model name" in line]
        name = models[0].split(":", 1)[1].strip() if models else name
    return f"{name}, {torch.get_num_threads()} threads"


def peak_memory(device: torch.device) -> int | None:
    """The most bytes that this process has had so far: of a GPU's memory PyTorch's, else of the host's, if known."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if resource is None:
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def commit() -> str | None:
    """The code's commit, with a + if files differ from it; None outside a git checkout."""
    here = Path(__file__).resolve().parent.parent
    command = ["git", "-C", str(here), "describe", "--always", "--abbrev=12", "--dirty=+", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
