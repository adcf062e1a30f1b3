"""Command lines: a parser whose flags have one home, names of runs, and how a script ends."""

import argparse
import contextlib
import hashlib
import io
import os
import re
import shlex
import sys
import textwrap
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NoReturn, TextIO

from data import DATASETS, SOURCES, TEST_SETS, DataError
from data.splits import printable
from datafree import distributed
from datafree.errors import TimeLimit, UsageError
from datafree.teachers import recipe_for, weights_of
from models import MODELS, NetworkError, agree_on_size, check_name, defaults_of, is_program, word_of

STARTED = time.monotonic()
# Flags that do not change what a run computes: they are not in its name, and may differ on --resume.
FREE = {
    "resume", "out", "tag", "data_root", "wild_root", "transfer_root", "checkpoints", "device", "gpu", "visdom",
    "evaluate_only", "ckpt", "export_images", "save_dir", "pool_size", "memory", "sample_every", "save_img",
    "time_limit", "script", "run_name", "any_teacher", "bn_is_default", "command",
}  # fmt: skip


def number(kind: type, low: float, high: float = 10**9) -> Callable:
    """An argparse type: an int or float from `low` to `high`."""

    def parse(text: str):
        value = kind(text)
        if not low <= value <= high:  # NaN as well
            raise argparse.ArgumentTypeError(f"{text:.40} is impossible: it must be at least {low} and at most {high}")
        return value

    parse.__name__ = kind.__name__  # argparse names the type in "invalid int value"
    return parse


def one_line(message: object) -> str:
    """A message as one line of at most 2000 characters, with what cannot be printed as its code."""
    text = printable(" ".join(str(message).split()))
    return text if len(text) <= 2000 else f"{text[:998]} ... {text[-997:]}"


def path(text: str) -> str:
    """An argparse type: a path that a file can have."""
    if not text or "\0" in text or max(map(len, os.fsencode(text).split(b"/"))) > 255:
        raise argparse.ArgumentTypeError(f"{text[:40]!r} is no path that a file can have")
    with contextlib.suppress(OSError):
        if Path(text).is_fifo():
            raise argparse.ArgumentTypeError(f"{text} is a pipe, at which this would wait: name a file")
    return text


def network(table: Mapping, program: bool = False) -> Callable[[str], str]:
    """An argparse type: the name of a network in `table`, or from outside; `program`: a saved one, too."""

    def parse(text: str) -> str:
        try:
            check_name(text, table)
        except (ValueError, OSError) as error:
            raise argparse.ArgumentTypeError(f"invalid choice: {text[:80]!r}: {error}") from error
        if is_program(text) and not program:
            raise argparse.ArgumentTypeError(f"{text} is a saved program, which cannot be trained: name a network")
        return text

    parse.__name__ = "network"
    return parse


count, positive, weight = number(int, 1), number(float, 1e-12), number(float, 0)
batch, fraction, switch = number(int, 2, 10**6), number(float, 0, 1), dict(type=int, choices=(0, 1))
fractions = dict(type=fraction, nargs="*", metavar="FRACTION")
# The type of every flag that a recipe sets, by its name; what is not here is a weight of a loss.
TYPES = {
    **dict.fromkeys("batch_size synthesis_batch_size num_select".split(), batch),
    "n_epochs": number(int, 1, 10**6),
    **dict.fromkeys("epoch_itrs iterations k ep_steps kd_steps g_steps z_rounds nz ngf bank_size n_neg "
                    "head_dim".split(), count),
    **dict.fromkeys("lr lr_S lr_G lr_Q lr_g lr_z meta_lr_g meta_lr_z T cr_T reptile_factor".split(), positive),
    **dict.fromkeys("warmup phase1_rounds".split(), number(int, 0)),
    **dict.fromkeys("bn_mmt gamma".split(), fraction),
    **dict.fromkeys("is_maml reset_l0 reset_bn".split(), switch),
    **dict.fromkeys("optimizer optimizer_S".split(), dict(choices=("adam", "adamw", "sgd"))),
    "optimizer_G": dict(choices=("adam", "adamw")),
    "milestones": fractions,
    "crop": number(int, 32, 256),
    "schedule": dict(choices=("steps", "cosine")),
}  # fmt: skip
ALIASES = {"n_epochs": "--epochs", "nz": "--latent_dim"}
# The flags that every training script has: names, help, and what else argparse is told.
DEVICE = (
    ("--seed", "(default: 0)", dict(type=number(int, 0, 2**63 - 1), default=0)),
    ("--device", "auto takes a GPU if there is one; several: start the script by torchrun; on a CPU one process with "
     "its threads is as fast (default: auto)",
     dict(choices=("auto", "cpu", "cuda"), default="auto")),
    ("--gpu", "the same as --device cuda on GPU number N", dict(type=number(int, 0), metavar="N")),
    ("--precision", "auto takes bfloat16 autocast where the hardware has it; fp32 is float32 throughout, without TF32 "
     "(default: the preset's, else auto)", dict(choices=("auto", "fp32", "bf16"))),
    ("--compile", "let torch.compile make one program of each network that is run as it is (on a GPU, CUDA graphs): a "
     "minute of waiting; a teacher whose layers are watched stays as it was, and so does all that several processes do",
     dict(action="store_true")),
)  # fmt: skip
FOLDER = dict(metavar="DIR")
STATISTIC = dict(type=fraction, nargs="+", metavar="X")
RUN = (
    ("--data_root --data", "where data sets are, and are downloaded to (default: %(default)s)",
     FOLDER | dict(default="./datasets")),
    ("--mean", "the mean of each channel, of pixels in 0..1 (default: the teacher file's, else the data's)", STATISTIC),
    ("--std", "the standard deviation of each channel, likewise", STATISTIC),
    ("--out --output_dir", "parent of the run folders, whose names follow from the flags (default: %(default)s)",
     FOLDER | dict(default="./runs")),
    ("--tag --log_tag", "suffix of the run folder's name", dict(default="")),
    ("--resume", "continue the run's last checkpoint, if there is one; without it, an earlier run of the same name is "
     "set aside as NAME.1, NAME.2 ...", dict(action="store_true")),
    ("--time_limit", "stop with a checkpoint before so many minutes have passed, exit code 75 (0 where torchrun would "
     "start it again); --resume goes on",
     dict(type=positive, metavar="MINUTES")),
    ("--evaluate_only --test_only", "score the run's best checkpoint (or --ckpt) and stop", dict(action="store_true")),
    ("--ckpt", "weights for --evaluate_only", dict(metavar="FILE")),
    ("--visdom", "live curves and images on a visdom server at this port (15550 if none is given); without a server, a "
     "log to replay later", dict(type=number(int, 1, 65535), nargs="?", const=15550, metavar="PORT")),
    *DEVICE,
)  # fmt: skip
PICTURES = ("--sample_every", "write a grid of images each N epochs, 0 for never (default: %(default)s)",
            dict(type=number(int, 0), default=10, metavar="N"))  # fmt: skip
TEACHER = (
    ("--teacher_ckpt --teacher_dir", "the teacher's weights: a file, or a run folder (default: "
     "<dataset>-<teacher>-<recipe>.pt in --checkpoints or pretrained/)", dict(metavar="FILE")),
    ("--teacher_recipe", "the recipe that made them (default: the paper's, else the only one that is there)",
     dict(metavar="NAME")),
)  # fmt: skip
FEATURES = ("--feature_layer", "the layer whose input are the teacher's features, which L_a reads (default: the one "
            "that makes the logits; of a LeNet-5 fc1)", dict(metavar="NAME"))  # fmt: skip
CHECKPOINTS = ("--checkpoints", "where teachers' weights are (default: %(default)s)",
               FOLDER | dict(default="./checkpoints"))  # fmt: skip
NONE = (
    ("--num_classes", "with --dataset none (default: the teacher file's)", dict(type=count)),
    (
        "--channels",
        "with --dataset none or folder (default: the teacher file's, else as many as --mean has values, else 3)",
        dict(type=int, choices=(1, 3)),
    ),
)


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line, and whose help keeps the script's docstring.

    Args:
        script: the script's file, whose stem begins the names of its runs.
        docstring: its own. paper: whose teachers it wants by default (see `teachers.recipe_for`).
    """

    def __init__(self, script: str, docstring: str, paper: str = "fast"):
        formatter = argparse.RawDescriptionHelpFormatter
        super().__init__(description=docstring, formatter_class=formatter, allow_abbrev=False)
        self.script, self.paper = Path(script).stem, paper

    def error(self, message: str) -> NoReturn:
        distributed.complain(f"{self.prog}: error: {one_line(message)} (see --help)")
        self.exit(2)

    def add(self, *rows: tuple[str, str, dict], group: argparse._ActionsContainer | None = None) -> None:
        """Flags of a table: names, help, and what else argparse is told."""
        for names, text, options in rows:
            kind = dict(type=path) if options.get("metavar") in ("FILE", "DIR", "PATH", "SET") else {}
            (group or self).add_argument(*names.split(), help=text, **(kind | options))

    def add_dataset(self, default: str = "digits", none: bool = True) -> None:
        """The data set whose test images score the student; `none`: also without any."""
        text = "the teacher's data set; only its test images are used; none: no images at all, the score is the "
        text += "agreement with the teacher, beyond chance, on images that the student has not seen"
        text = f"{text if none else 'the data set'} (default: %(default)s)"
        choices = TEST_SETS() if none else tuple(DATASETS)
        self.add(
            ("--dataset", text, dict(choices=choices, default=default)),
            ("--img_size", "(default: the network's or the data's)", dict(type=number(int, 8, 4096))),
            ("--attribute", "CelebA: the attribute (default: the most balanced)", {}),
            *(NONE if none else ()),
        )

    def add_networks(self, models: Mapping = MODELS, roles: Sequence[str] = ("teacher", "student")) -> None:
        """The networks by name, and where the teacher's weights are."""
        names, program = f"one of {', '.join(sorted(models))}", ""
        if models is MODELS:
            names += "; or torchvision:NAME, timm:NAME, or FILE.py:FUNCTION, which is run and returns a torch.nn.Module"
            program = "; or FILE.pt2 or FILE.pt, which torch.export or TorchScript saved, weights included, and is run"
        for role in roles:
            text = f"{names if role == roles[0] else 'likewise'}{program * (role == 'teacher')}"
            kind = dict(type=network(models, role == "teacher"), metavar="NAME")
            self.add((f"--{role}", f"{text} (default: the data set's, see above)", kind))
        self.add(*(TEACHER if "teacher" in roles else ()), CHECKPOINTS)

    def add_recipe(self, **flags: str) -> None:
        """Flags of the recipe, name -> help; left out, each is the preset's."""
        group = self.add_argument_group("recipe", "left out, each is the preset's, see above")
        for name, text in flags.items():
            kind = TYPES.get(name, weight)
            options = dict(kind) if isinstance(kind, dict) else dict(type=kind, metavar="X")
            names = (f"--{name}", ALIASES[name]) if name in ALIASES else (f"--{name}",)
            group.add_argument(*names, help=text, **options)

    def add_run(self) -> None:
        """The flags that every training script has."""
        self.add(*RUN, group=self.add_argument_group("run"))

    def parse_args(
        self, args: Sequence | None = None, namespace: argparse.Namespace | None = None
    ) -> argparse.Namespace:
        argv = sys.argv[1:] if args is None else [str(a) for a in args]
        found = super().parse_args(argv, namespace)
        found.script, found.command = f"{self.script}.py", shlex.join(["python", f"{self.script}.py", *argv])
        return found

    def complete(self, args: argparse.Namespace, preset: Mapping, words: Sequence[str] = (), named: Sequence[str] = ()):
        """Give flags that were left out their preset's value, agree on the image size, name the run.

        Args:
            preset: flag -> value. words: what the name says after data and networks, of the flags `named`.
        """
        source = SOURCES.get(args.dataset, SOURCES["folder"])
        pair = dict(zip(("teacher", "student"), source.pair, strict=True))
        preset = {"precision": "auto", "teacher_recipe": None} | pair | dict(preset)
        if "teacher_recipe" in args and preset["teacher_recipe"] is None:
            preset["teacher_recipe"] = recipe_for(self.paper, args.dataset)
        args.any_teacher = getattr(args, "teacher_recipe", None) is None
        networks = [key for key in ("teacher", "student", "model") if key in args]
        for key, value in preset.items():
            if getattr(args, key, 0) is None:
                setattr(args, key, value)
        if "img_size" in args:
            try:
                usual = [name for key in networks if (name := getattr(args, key)) in MODELS]
                known = defaults_of(args.teacher).get("img_size") if "teacher" in args else None
                preset["img_size"] = agree_on_size(usual) or known or preset.get("img_size") or source.img_size
                args.img_size = agree_on_size(usual, args.img_size or known)
            except ValueError as error:
                self.error(str(error))
        if set(args.tag) & set("/\\\0") or args.tag.startswith(".") or len(args.tag) > 80:
            self.error(f"--tag {args.tag[:80]!r} is no part of a file name: leave out / and \\, and be short")
        names = [word_of(getattr(args, key)) for key in networks]
        args.run_name = self._name(args, preset, names, words, {*named, *networks})
        return args

    def _name(self, args: argparse.Namespace, preset, networks, words, named) -> str:
        """<script>-<data>-<networks>-<words>-<flags that are not the preset's>[-<tag>]."""
        data = args.dataset if args.dataset != "folder" else f"folder_{path_word(args.data_root)}"
        parts, changed = [self.script, data, *networks, *words], []
        for action in self._actions:
            key = action.dest
            default = preset.get(key, action.default)
            value = getattr(args, key, None)
            if key in FREE or key in named or key == "dataset" or value is None or value == default:
                continue
            changed.append((key, value))
        words = [self._word(args, key, value) for key, value in changed]
        # The length stays readable: --resume finds the run that a longer one goes on from.
        rest = [word for word in words if not re.fullmatch(r"n_epochs\d+", word)]
        if len(rest) > 4 or len("-".join(rest)) > 80:
            digest = hashlib.sha256(repr(rest).encode()).hexdigest()[:8]
            words = [f"x{digest}", *(word for word in words if word not in rest)]
        name = "-".join(str(part) for part in (*parts, *words, args.tag) if str(part))
        name = "".join(c if c.isalnum() or c in "-_.+" else "_" for c in name)
        # A file name has up to 255 bytes, and endings follow.
        return name if len(name) < 200 else f"{name[:180]}-x{hashlib.sha256(name.encode()).hexdigest()[:8]}"

    def _word(self, args: argparse.Namespace, key, value) -> str:
        if key == "teacher_ckpt":  # its content, wherever it lies
            path = weights_of(value)
            content = path.read_bytes() if path.is_file() else os.fsencode(value)
            return f"teacher_{hashlib.sha256(content).hexdigest()[:6]}"
        if value is True:
            return key
        if isinstance(value, list):
            value = "_".join(map(str, value)) or "none"
        elif isinstance(value, float):
            value = str(value)
        elif isinstance(value, str):
            value = path_word(value)
        return f"{key}{'' if isinstance(value, int) else '_'}{value}"


def path_word(path: str) -> str:
    """A word or a path as it was given, as a word: a path's last part, and a hash that tells it from its namesakes."""
    if not set(path) & set("/\\"):
        return path
    return f"{Path(path).name}_{hashlib.sha256(os.fsencode(path)).hexdigest()[:4]}"


def set_word(name: str, root: str | None, data_root: str) -> str:
    """An image set, see `data.get_wild`, as a word of a run's name; of the sets below other roots each has its own."""
    if name == "folder":
        return f"folder-{path_word(root or data_root)}"
    own = not root or name in (*DATASETS, "original", "noise")
    return path_word(name if own else str(Path(root) / name))


def describe_presets(presets: Mapping[str, Mapping]) -> str:
    """Presets (name -> flag -> value) as indented lines for --help; equal ones stand together."""
    texts = {}
    for name, values in presets.items():
        text = " ".join(
            f"--{k} {' '.join(map(str, v)) if isinstance(v, list) else v}" for k, v in values.items() if v != []
        )
        texts.setdefault(text, []).append(name)
    indent = " " * 8
    return "\n".join(
        f"    {', '.join(names)}:\n" + textwrap.fill(text, 98, initial_indent=indent, subsequent_indent=indent)
        for text, names in texts.items()
    )


class Nowhere(io.TextIOBase):
    """Takes any text, as /dev/null."""

    def write(self, text: str) -> int:
        return len(text)


class Stream:
    """Standard output or error whose text always goes somewhere: a reader that has gone ends no training."""

    def __init__(self, stream: TextIO | None):
        self.stream = stream or Nowhere()  # None: it was closed before the start
        with contextlib.suppress(AttributeError, ValueError):  # what tests and notebooks put there
            self.stream.reconfigure(errors="backslashreplace")

    def __getattr__(self, name: str):
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        return self._try(self.stream.write, text) or len(text)

    def flush(self) -> None:
        self._try(self.stream.flush)

    def _try(self, do: Callable, *args):
        try:
            return do(*args)
        except (OSError, ValueError):
            self.stream = Nowhere()


# Where torch says that memory is short in a RuntimeError of no class of its own.
NO_MEMORY = re.compile("can't allocate memory|out of memory|Storage size calculation overflowed|DataLoader worker")


def cli(main: Callable, parse_args: Callable) -> None:
    """Run `main(parse_args())`; a mistake of the user's ends in one line and exit code 2."""
    sys.stdout, sys.stderr = Stream(sys.stdout), Stream(sys.stderr)
    args = argparse.Namespace()
    try:
        args = parse_args()
        with contextlib.nullcontext() if distributed.speaks() else silence():
            main(args)
    except (UsageError, DataError, NetworkError) as error:
        _stop(error, 2)
    except TimeLimit as limit:
        # torchrun would start a job that fails again.
        _stop(limit, 0 if distributed.RESTARTS < distributed.MOST_RESTARTS else 75)
    except OSError as error:
        cure = "see that it is there and can be read and written, that there is room"
        cure += ", or choose another --out; what is saved is whole, --resume goes on from it" * ("resume" in args)
        _stop(f"{error.strerror or error}: {error.filename or 'a file of this run'}: {cure}", 2)
    except (MemoryError, RuntimeError) as error:  # torch.OutOfMemoryError is one
        if distributed.lost(error):
            # torchrun reports the one that fails first, and ends the others: that is not to be this one.
            _stop("another process of this run is gone; --resume goes on from the last whole epoch", 1, delay=10)
        if isinstance(error, RuntimeError) and not NO_MEMORY.search(str(error)):
            raise
        flags = "batch_size", "synthesis_batch_size", "pool_size", "bank_size", "memory", "img_size", "nz", "ngf"
        names = [f"--{k}" for k in flags if k in args]
        _stop(f"the device's memory is too small for this: lower {' or '.join(names) or 'the sizes'}", 2)
    except KeyboardInterrupt:
        on = "; the same command with --resume goes on from the last whole epoch" * ("resume" in args)
        _stop(f"interrupted{on}", 130)


@contextlib.contextmanager
def silence() -> Iterator[None]:
    """Nothing of what the block prints is shown."""
    with contextlib.redirect_stdout(Nowhere()), contextlib.redirect_stderr(Nowhere()):
        yield


def _stop(message: str, code: int, delay: float = 0) -> None:
    distributed.complain(f"{Path(sys.argv[0]).name}: {one_line(message)}")
    time.sleep(delay)
    sys.exit(code)
