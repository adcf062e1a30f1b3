"""Command line, seeds, devices and precision: what every script does before its first line."""

import argparse
import ctypes
import errno
import math
import platform
import subprocess
import sys
import textwrap
import time
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch


class UsageError(Exception):
    """Something that the user can mend: one line that names the cure. `cli` exits with 2."""


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line, and whose help keeps the script's docstring."""

    def __init__(self, card, **kwargs):
        super().__init__(
            description=card,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
            **kwargs,
        )

    def error(self, message):
        self.exit(2, f"{self.prog}: error: {message} (see --help)\n")

    def image_size(self, models, img_size, agree):
        """The side of the images that all of `models` take, by `agree`; None if any will do."""
        try:
            return agree(models, img_size)
        except ValueError as error:
            self.error(error)


def number(kind, low, high=None, above=False):
    """An argparse type: an int or float of at least `low` (above it if `above`), at most `high`."""

    def parse(text):
        value = kind(text)
        possible = low < value if above else low <= value  # False for NaN as well
        if not possible or value > (sys.float_info.max if high is None else high):
            bound = f"{'above' if above else 'at least'} {low}"
            bound += "" if high is None else f" and at most {high}"
            raise argparse.ArgumentTypeError(f"{text} is impossible: it must be {bound}")
        return value

    parse.__name__ = kind.__name__  # argparse names the type in "invalid int value"
    return parse


def add_device_arguments(group):
    """The flags that `setup` reads."""
    group.add_argument("--seed", type=number(int, 0), default=0, help="(default: %(default)s)")
    group.add_argument(
        "--device",
        choices=("auto", "cpu", "cuda"),
        default="auto",
        help="auto takes a GPU if there is one (default: %(default)s)",
    )
    group.add_argument(
        "--gpu", type=number(int, 0), metavar="N", help="the same as --device cuda on GPU number N"
    )
    group.add_argument(
        "--precision",
        choices=("auto", "fp32", "bf16"),
        default="auto",
        help="auto takes bfloat16 autocast where the hardware has it "
        "(default: auto, unless a preset above names another)",
    )


def add_run_arguments(parser):
    """The flags that every training script has."""
    group = parser.add_argument_group("run")
    group.add_argument(
        "--data_root",
        "--data",
        default="./datasets",
        metavar="DIR",
        help="where data sets are, and are downloaded to (default: %(default)s)",
    )
    for name in ("mean", "std"):
        group.add_argument(
            f"--{name}",
            type=number(float, 0, 1),
            nargs="+",
            metavar="X",
            help=f"the {name} of each channel, of pixels in 0..1 (default: the "
            "teacher file's, else the data set's; a folder's are computed once)",
        )
    group.add_argument(
        "--out",
        "--output_dir",
        default="./runs",
        metavar="DIR",
        help="parent of the run folders (default: %(default)s)",
    )
    group.add_argument("--tag", "--log_tag", default="", help="suffix of the run folder's name")
    group.add_argument(
        "--resume",
        action="store_true",
        help="continue the run's last checkpoint, if there is one; without it, an "
        "earlier run of the same name is set aside as NAME.1, NAME.2 ...",
    )
    group.add_argument(
        "--evaluate_only",
        "--test_only",
        action="store_true",
        help="score the run's best checkpoint (or --ckpt) on the test set and stop",
    )
    group.add_argument("--ckpt", metavar="FILE", help="weights for --evaluate_only")
    group.add_argument(
        "--visdom",
        type=number(int, 1, 65535),
        nargs="?",
        const=15550,
        metavar="PORT",
        help="live curves and images on a visdom server at this "
        "port (15550 if none is given); without a server, a log to replay later",
    )
    add_device_arguments(group)


def fill_defaults(args, defaults):
    """Give every flag that was left out its preset value."""
    for key, value in defaults.items():
        if getattr(args, key) is None:
            setattr(args, key, value)


def describe_presets(presets):
    """Presets (name -> flag -> value) as indented lines for --help; equal ones stand together."""
    texts = {}
    for name, values in presets.items():
        text = " ".join(
            f"--{k} {' '.join(map(str, v)) if isinstance(v, list) else v}"
            for k, v in values.items()
            if v != []
        )
        texts.setdefault(text, []).append(name)
    return "\n".join(
        f"    {', '.join(names)}:\n"
        + textwrap.fill(text, 98, initial_indent=" " * 8, subsequent_indent=" " * 8)
        for text, names in texts.items()
    )


def cli(main, parse_args, *data_errors):
    """Run `main(parse_args())`; a mistake of the user's ends in one line and exit code 2.

    Args:
        data_errors: exception types beside UsageError whose message is meant for the user.
    """
    args = parse_args()
    try:
        main(args)
    except (UsageError, *data_errors) as error:
        _stop(error, 2)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS, errno.EPERM):
            raise
        _stop(
            f"{error.strerror}: {error.filename or 'a file of this run'}: make room or choose "
            "another --out; what is saved is whole, --resume goes on from it",
            2,
        )
    except torch.OutOfMemoryError:
        _stop("the device's memory is too small for this: lower --batch_size", 2)
    except KeyboardInterrupt:
        _stop("interrupted; the same command with --resume goes on from the last whole epoch", 130)


def _stop(message, code):
    print(f"{Path(sys.argv[0]).name}: {' '.join(str(message).split())}", file=sys.stderr)
    sys.exit(code)


def has_bf16(device):
    """Whether bfloat16 arithmetic is in the device's hardware (emulation is slower than fp32)."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    probes = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, probe, bool)() for probe in probes)


@dataclass
class Runtime:
    """Where and how a run computes: `device`, and `precision` ("fp32" or "bf16")."""

    device: torch.device
    precision: str

    def autocast(self):
        """The context of a network's forward pass; losses belong outside it."""
        if self.precision == "fp32":
            return nullcontext()
        return torch.autocast(self.device.type, torch.bfloat16)

    def place(self, *modules):
        """Move modules to the device, their convolutions' weights to channels_last."""
        for module in modules:
            module.to(self.device, memory_format=torch.channels_last)


def keep_memory(keep=True):
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


def setup(args):
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
        index = args.gpu or 0
        if index >= found:
            raise UsageError(
                f"GPU {index} was asked for and {found} can be used: choose another --gpu, or --device cpu"
            )
        device = torch.device("cuda", index)
        torch.cuda.set_device(device)
        torch.backends.cudnn.benchmark = True
    else:
        device = torch.device("cpu")
        keep_memory()
    precision = args.precision
    if precision == "auto":
        precision = "bf16" if has_bf16(device) else "fp32"
    elif precision == "bf16" and not has_bf16(device):
        raise UsageError(
            f"--precision bf16: {device_name(device)} has no bfloat16 arithmetic: "
            "use --precision fp32 (auto chooses it here)"
        )
    return Runtime(device, precision)


class Stopwatch:
    """Adds up the time of its `with` blocks, on a GPU without waiting for it; resumable."""

    def __init__(self, device):
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

    def seconds(self):
        if self.open and self.cuda:
            torch.cuda.synchronize()
        for start, *end in self.open:
            for stop in end:  # none for a block that is still open
                self.total += start.elapsed_time(stop) / 1000 if self.cuda else stop - start
        self.open.clear()
        return self.total

    def state_dict(self):
        return {"seconds": self.seconds()}

    def load_state_dict(self, state):
        self.total = state["seconds"]


def cosine_at(epoch, lr, n_epochs, lowest):
    """Cosine schedule (Loshchilov and Hutter 2017) from lr at epoch 0 to `lowest` at n_epochs.

    Before epoch 0 it is lr. A rate that starts below `lowest` stays.
    """
    lowest = min(lr, lowest)
    return lowest + (lr - lowest) * (1 + math.cos(math.pi * max(0, epoch) / n_epochs)) / 2


def lr_at(epoch, lr, n_epochs, milestones=(), gamma=0.1):
    """Step schedule: lr x gamma for each milestone (a fraction of n_epochs) behind `epoch`.

    A pure function of the epoch, so that a resumed run needs no scheduler state. `epoch` counts
    from 0; the tolerance keeps 0.6 x 200 from becoming 119.99.
    """
    return lr * gamma ** sum(epoch + 1e-9 >= m * n_epochs for m in milestones)


def set_lr(optimizer, lr):
    for group in optimizer.param_groups:
        group["lr"] = lr


def make_optimizer(name, parameters, lr, weight_decay=None):
    """adam, adamw, or sgd (momentum 0.9): fused, one kernel for all parameters.

    A weight decay of None is PyTorch's default: 0.01 for adamw, none for the others.
    """
    decay = {} if weight_decay is None else {"weight_decay": weight_decay}
    if name == "sgd":
        return torch.optim.SGD(parameters, lr, 0.9, fused=True, **decay)
    kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[name]
    return kind(parameters, lr, fused=True, **decay)


def device_name(device):
    """The GPU's or the processor's name and number of threads, for people."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        models = [line for line in cpuinfo.read_text().splitlines() if "model name" in line]
        name = models[0].split(":", 1)[1].strip() if models else name
    return f"{name}, {torch.get_num_threads()} threads"


def commit():
    """The code's commit, with a + if files differ from it; None outside a git checkout."""
    here = Path(__file__).resolve().parent.parent
    command = ["git", "-C", str(here), "describe", "--always", "--abbrev=12", "--dirty=+", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
