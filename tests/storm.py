"""Hostile inputs and kills -9 over all scripts: test_matrix.py tries some, this as many as time allows.

    bash scripts/storm.sh --minutes 30 --seed 1        # writes storm.json

Commands run in forks of one interpreter that has imported the scripts and done nothing else, so that each starts as a
new process does, without the seconds that the imports take; there is no network in them.
"""

import argparse
import contextlib
import csv
import dataclasses
import datetime
import functools
import gc
import hashlib
import importlib
import io
import json
import os
import pickle
import random
import re
import resource
import runpy
import shlex
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import time
import traceback
import zipfile
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from unittest import mock

import numpy as np
import torch
from PIL import Image
from scipy.io import savemat

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [] if str(ROOT) in sys.path else [str(ROOT)]
from data import SOURCES, Raw, Source  # noqa: E402
from datafree import inversion  # noqa: E402
from datafree.runtime import commit  # noqa: E402

MEMORY = 8 * 2**30  # bytes of addresses that a command may take
LIMIT = 60  # seconds that it may take
# fmt: off
NUMBERS = (
    "0", "-1", "0\n", "nan", "inf", "-inf", "1e300", "1e-300", "1000000000000", "18446744073709551616", "9" * 5000,
    "many", "", " ", "1\n2", "1.5", "0x10", "\0", "\udcff", "\N{ARABIC-INDIC DIGIT THREE}",
)
TEXTS = (
    "", " ", "-", ".", "..", "../x", "/", "x" * 300, "x" * 5000, "a\nb", "a\rb", "a\u2028b", "\0", "\udcff", "%s",
    "{0}", "none", "\N{SNOWMAN}", "CON", "-1", "a,b=c",
)
NAMES = ("unknown", "torchvision:", "timm:\0", ".py:", "no.py:f", "no.pt2", f"{'x' * 300}.py:f", ":")
PATHS = ("FILE", "DIR", "PATH", "SET")  # metavars
# A run of seconds, where a script has these flags and takes them: of several values the last one that it takes.
NETWORKS = ("deeplabv3_mobilenet", "resnet8")
TINY = dict(
    dataset=("camvid", "digits"), teacher=NETWORKS, student=NETWORKS, model=NETWORKS, crop=32, n_epochs=1,
    img_size=16, batch_size=16, synthesis_batch_size=16, num_select=64, kd_steps=1, ep_steps=1, g_steps=1,
    iterations=1, epoch_itrs=1, nz=8, ngf=8, z_rounds=2, phase1_rounds=1, sample_every=0, images=8, steps=1,
    repeats=2, precision="fp32", device="cpu",
)
# fmt: on
# What a script cannot do without, or must not do in a test, and with what a flag's value is looked at.
NEEDS = {
    "DFND_train": ["--wild", "digits"],
    "reproduce": ["mmrazor-01", "--dry-run"],
    "compare": ["--format", "csv", "--out", "table.csv"],
    # A smaller batch, or one that makes fewer steps of an epoch: sixteen would take seconds.
    "bench": ["--batch_size", "2"],
    "teacher_train": ["--batch_size", "256"],
    "vanilla_kd": ["--batch_size", "256"],
    # The teacher that ships, as one that has learnt nothing is refused, and a student of few layers to export.
    "compress": ["--teacher", "lenet5", "--student", "lenet5_half", "--img_size", "32"],
}
NOT_RUN = {"readme", "benchmark", "compile"}  # write into this repository; take half a minute
LONG = {
    "quickstart": 3,
    "bench_rates": 3,
}  # what has no short run, and the seconds after which it is taken to be at work
WITH = {
    "ckpt": ["--evaluate_only"],
    "cmi_init": ["--method", "cmi", "--teacher", "resnet8", "--student", "resnet8"],
    "save_dir": ["--export_images", "npz"],
    "transfer_root": ["--transfer_set", "images"],
    "wild_root": ["--wild", "images"],
    "calibrate_on": ["--int8"],
    "test_images": ["--dataset", "none", "--teacher_ckpt", str(ROOT / "pretrained" / "digits-lenet5-digits.pt")],
    "label_embedding": ["--method", "nayer", "--teacher", "resnet8", "--student", "resnet8"],
    "curves": ["--out", "curves.png"],
}


class Evil:
    def __reduce__(self):
        return (os.system, ("touch executed",))


def few_digits() -> Source:
    """The digits with a fifth of their test images, as scoring all 500 takes a third of a tiny run's time."""
    whole = SOURCES["digits"]

    def load(*args) -> Raw:
        raw = whole.load(*args)
        return dataclasses.replace(raw, test=raw.test.take(torch.arange(0, len(raw.test), 5)))

    return dataclasses.replace(whole, load=load)


# What scripts have, and what may be said to them


@functools.cache
def scripts() -> dict[str, ModuleType]:
    """The scripts with a command line, by name."""
    found = {path.stem: importlib.import_module(path.stem) for path in sorted(ROOT.glob("*.py"))}
    return {name: module for name, module in found.items() if hasattr(module, "parse_args")}


@functools.cache
def parser_of(name: str) -> argparse.ArgumentParser:
    """The parser that a script builds."""
    found = []

    def keep(self, *_):
        found.append(self)
        raise InterruptedError

    with mock.patch.object(argparse.ArgumentParser, "parse_known_args", keep), contextlib.suppress(InterruptedError):
        scripts()[name].parse_args([])
    return found[0]


def flags_of(name: str) -> list[argparse.Action]:
    """Those that take a value."""
    return [a for a in parser_of(name)._actions if a.nargs != 0 and a.dest not in NOT_RUN]


def kind_of(action: argparse.Action) -> str:
    """What a flag takes: "choice", "number", "path" or "text"."""
    if action.choices or getattr(action.type, "__name__", "") == "network":
        return "choice"
    if action.metavar in PATHS or action.dest == "label_embedding":
        return "path"
    return "number" if action.type else "text"


def words_for(action: argparse.Action) -> list[list[str]]:
    """Hostile values of a flag that need no file, each as the words of a command line."""
    flag, kind = action.option_strings[0], kind_of(action)
    values = {"number": NUMBERS, "choice": (*TEXTS, *NAMES)}.get(kind, TEXTS)
    found = [[f"{flag}={value}"] if action.nargs is None else [flag, value] for value in values]
    counts = (2, 7) if action.nargs in ("+", "*") else ()
    return [*found, [flag], *([flag, *["0.5"] * n] for n in counts)]


def parsed(name: str, argv: list[str]) -> tuple[argparse.Namespace | None, str]:
    """A script's flags, None if it refuses them, and what it says on stderr; other errors than its own come through."""
    error = io.StringIO()
    with contextlib.redirect_stderr(error), contextlib.redirect_stdout(io.StringIO()):
        try:
            return scripts()[name].parse_args(argv), error.getvalue()
        except SystemExit as end:
            if end.code != 2:
                raise AssertionError(f"exit code {end.code}") from end
            return None, error.getvalue()


@functools.cache
def tiny(name: str) -> tuple[str, ...]:
    """The flags of a script's shortest run."""
    argv, have = list(NEEDS.get(name, ())), {action.dest: action for action in flags_of(name)}
    free = [dest for dest in TINY if dest in have and f"--{dest}" not in argv]
    for dest in free:
        for value in TINY[dest] if isinstance(TINY[dest], tuple) else (TINY[dest],):
            more = [f"--{dest}", str(value)]
            if (have[dest].choices or have[dest].type) and parsed(name, argv + more)[0]:
                argv += more
    return tuple(argv)


def hostile_files(folder: Path) -> dict[str, str]:
    """Makes what no flag of a path should fall over; kind -> path."""
    folder.mkdir(parents=True)
    made = {"missing": "missing/file", "null": "/dev/null", "zero": "/dev/zero", "loop": "loop", "long": "x" * 300}
    (folder / "folder" / "inner").mkdir(parents=True)
    os.mkfifo(folder / "fifo")
    (folder / "loop").symlink_to("loop")
    (folder / "empty").touch()
    (folder / "text").write_text("epoch,seconds,accuracy\n1,nan,many\n2\n\n")
    (folder / "binary.csv").write_bytes(b"epoch,seconds,accuracy\n\xff\xfe\0,1,2\n")
    (folder / "wrong.json").write_text('[{"last": null}]')
    (folder / "code.pt").write_bytes(pickle.dumps(Evil()))
    torch.save({"state_dict": {}, "card": Evil()}, folder / "code_inside.pt")
    torch.save([torch.zeros(3), "x"], folder / "list.pt")
    torch.save({1: torch.zeros(3), "card": 5}, folder / "numbers.pt")
    torch.save(torch.zeros(3), folder / "tensor.pt")
    torch.save({"state_dict": {"x": torch.tensor(float("nan"))}, "card": {"mean": "x", "img_size": "y"}, "epoch": {},
                "run": {"args": 5}}, folder / "card.pt")  # fmt: skip
    (folder / "truncated.pt").write_bytes((folder / "list.pt").read_bytes()[:-200])
    Image.new("RGB", (8, 8)).save(folder / "picture.png")
    (folder / "broken").mkdir()
    (folder / "broken" / "0.png").write_bytes(b"\x89PNG\r\n\x1a\n, and then nothing")
    with zipfile.ZipFile(folder / "broken.zip", "w") as archive:
        archive.writestr("0.png", b"\x89PNG\r\n\x1a\n, and then nothing")
    (folder / "wrong.npz").write_bytes(b"PK\x03\x04 and then nothing")
    made |= {path.name: path.name for path in folder.iterdir()}
    if os.getuid():  # root may read all
        (folder / "secret").touch(0o000)
        (folder / "closed").mkdir(0o000)
        made |= {"secret": "secret", "closed": "closed"}
    return {kind: str(folder / path) for kind, path in sorted(made.items())}


# Running commands in forks


def is_line(text: str) -> bool:
    """Whether a text is one line, to whatever reads it."""
    return text.endswith("\n") and len(text.splitlines()) == 1 and bool(text.strip())


@dataclasses.dataclass
class End:
    """How a command ended: exit code (-9: killed), whether its time was up, file operations, seconds, what it wrote."""

    code: int
    late: bool
    events: int
    seconds: float
    busy: float  # seconds of a CPU
    stdout: str
    stderr: str

    def complaint(self, may_last: bool = False) -> str | None:
        """What is wrong if it should have succeeded, or refused its input in one line; None if it did."""
        last = self.stderr.strip().rpartition("\n")[2]
        if self.late and not (may_last and self.busy > 0.1 * self.seconds):
            return f"hangs: {self.busy:.0f} of {self.seconds:.0f} s at work"
        if "Traceback (most recent call last)" in self.stderr:
            return f"traceback: {last}"
        if self.code not in (0, 2) and not self.late:
            return f"exit code {self.code}: {last}"
        if self.code == 2 and not is_line(self.stderr):
            return f"{len(self.stderr.splitlines())} lines: {self.stderr!r}"
        return None


class Server:
    """An interpreter that has imported all scripts and run none: `run` runs a command in a fork of it.

    A command is a script's name, or any Python file's path without its suffix, and its flags.
    """

    def __init__(self, folder: Path):
        self.folder, self.n = folder, 0
        command, environment = [sys.executable, __file__, "--serve"], os.environ | {"OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                                        env=environment)  # fmt: skip
        assert self.process.stdout.readline() == "ready\n"

    def new_job(self) -> Path:
        self.n += 1
        job = self.folder / f"job{self.n}"
        job.mkdir(parents=True)
        return job

    def start(
        self, name: str | Path, argv: Sequence, seconds: float = LIMIT, kill_at: int = 0, job: Path | None = None
    ) -> Path:
        """Begin a command in its own folder; it is killed after `seconds`, or at its `kill_at`-th file operation."""
        job = job or self.new_job()
        for stream in ("stdout", "stderr"):
            (job / stream).touch()
        about = dict(script=str(name), argv=list(map(str, argv)), job=str(job), seconds=seconds, kill_at=kill_at)
        self.process.stdin.write(json.dumps(about) + "\n")
        self.process.stdin.flush()
        return job

    def wait(self, job: Path) -> End:
        while not (job / "end.json").exists():
            assert self.process.poll() is None, "the server is gone"
            time.sleep(0.002)
        read = {name: (job / name).read_text(errors="replace") for name in ("stdout", "stderr")}
        return End(**json.loads((job / "end.json").read_text()), **read)

    def run(self, *args, **kwargs) -> End:
        return self.wait(self.start(*args, **kwargs))

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()


def serve() -> None:
    """Start what comes as lines of JSON on stdin."""

    def offline(*_, **__):
        raise OSError(101, "Network is unreachable")

    socket.socket.connect = socket.getaddrinfo = offline
    torch.set_num_threads(1)
    scripts()
    # compress.py's look at a teacher would take seconds.
    inversion.maker_of, inversion.UNSEEN = functools.partial(inversion.maker_of, ngf=8), 100
    importlib.import_module("sklearn.datasets")  # what runs import later
    gc.freeze()  # else each fork's collections would look at all of it, and so copy it
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    print("ready", flush=True)
    for line in sys.stdin:
        if os.fork() == 0:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            _watch(**json.loads(line))
            os._exit(0)


def _watch(script: str, argv: list[str], job: str, seconds: float, kill_at: int) -> None:
    job = Path(job)
    begun, child = time.monotonic(), os.fork()
    if child == 0:
        _work(script, argv, job, kill_at)
    (job / "pid").write_text(str(child))
    done = 0, 0
    while done[0] == 0 and time.monotonic() - begun < seconds:
        time.sleep(0.002)
        done = os.waitpid(child, os.WNOHANG)
    late = done[0] == 0
    if late:
        os.kill(child, signal.SIGKILL)
        done = os.waitpid(child, 0)
        late = os.WIFSIGNALED(done[1])  # it may have ended by itself just before
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)  # its workers
    usage, count = resource.getrusage(resource.RUSAGE_CHILDREN), job / "events"
    end = dict(
        code=os.waitstatus_to_exitcode(done[1]), late=late, events=int(count.read_text()) if count.exists() else 0
    )
    end |= dict(seconds=time.monotonic() - begun, busy=usage.ru_utime + usage.ru_stime)
    (job / "end.tmp").write_text(json.dumps(end))
    (job / "end.tmp").rename(job / "end.json")


def _work(script: str, argv: list[str], job: Path, kill_at: int) -> None:
    """The command, as the shell would run it."""
    os.setsid()
    os.chdir(job)
    for number, name in enumerate(("/dev/null", "stdout", "stderr")):
        os.dup2(os.open(name, os.O_RDWR | os.O_CREAT, 0o644), number)
    sys.stdin, sys.stdout = os.fdopen(0, "r"), os.fdopen(1, "w")
    sys.stderr = os.fdopen(2, "w", errors="backslashreplace")
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    sys.argv, events, code = [str(ROOT / f"{script}.py"), *argv], 0, 0

    def count(event: str, args: tuple) -> None:
        nonlocal events
        writes = event == "open" and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR)
        if writes or event in ("os.rename", "os.remove", "os.truncate", "os.mkdir"):
            events += 1
            if events == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(count)
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
        if code != end.code is not None:
            print(end.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
        code = 1
    finally:
        kill_at = 0
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.flush()
            sys.stderr.flush()
        (job / "events").write_text(str(events))
        os._exit(code)


# Many of them


def segmentation_data(folder: Path) -> None:
    """CamVid and NYUv2 in their layouts: 16 images for training, one for the test."""

    def write(path: Path, classes: int) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.tile(np.arange(16, dtype=np.uint8) % classes, (12, 1))).save(path)

    def picture(path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.linear_gradient("L").resize((16, 12)).convert("RGB").save(path)

    nyu, parts = folder / "nyuv2", {"train": range(1, 17), "test": range(17, 18)}
    for part, numbers in parts.items():
        for i in numbers:
            picture(folder / "CamVid" / part / f"{i}.png")
            write(folder / "CamVid" / f"{part}annot" / f"{i}.png", 12)
            picture(nyu / "480_640" / "IMAGE" / f"{i - 1}.png")
            write(nyu / "nyuv2-meta-data" / f"{part}_labels_13" / f"new_nyu_class13_{i:04}.png", 14)
    savemat(nyu / "splits.mat", {f"{part}Ndxs": np.array(numbers)[:, None] for part, numbers in parts.items()})


def stat_of(folder: Path) -> dict[str, tuple]:
    """Size, time and mode of every file below a folder."""
    found = ((str(path), path.lstat()) for path in folder.rglob("*"))
    return {name: (s.st_size, s.st_mtime_ns, s.st_mode) for name, s in found if not stat.S_ISDIR(s.st_mode)}


def finish_of(out: Path) -> dict[str, str]:
    """What a run leaves and no interruption may change: weights, states, scores; name -> digest or value."""
    (result,) = out.glob("*/result.json")
    found = {key: json.loads(result.read_text())[key] for key in ("last", "best", "best_epoch", "mean", "variance")}
    with result.with_name("metrics.csv").open(newline="") as file:
        found["rows"] = [{k: v for k, v in row.items() if "seconds" not in k} for row in csv.DictReader(file)]

    def add(value, name: str) -> None:
        if isinstance(value, dict | list | tuple):
            for key, part in value.items() if isinstance(value, dict) else enumerate(value):
                if key not in ("pieces", "args", "timer", "rows"):  # with seconds, or folders
                    add(part, f"{name}.{key}")
        elif isinstance(value, torch.Tensor):
            value = value.detach().cpu().contiguous()
            data = value.reshape(-1).view(torch.uint8).numpy().tobytes()
            found[name] = f"{list(value.shape)} {value.dtype} {hashlib.sha256(data).hexdigest()}"
        else:
            found[name] = str(value)

    for name in ("last.pt", "best.pt"):
        add(torch.load(result.with_name(name), weights_only=True), name)
    return found


class Storm:
    """Where scripts run and are stopped: a server, data, and the teachers that the scripts ask for."""

    def __init__(self, folder: Path, server: Server):
        self.folder, self.server, self.outs = folder, server, 0
        self.checkpoints, self.ready, self.wholes = folder / "checkpoints", set(), {}
        segmentation_data(folder / "data")

    def argv(self, name: str, *more) -> list[str]:
        """The shortest run of a script, with the shared teachers; what makes teachers puts them into its own folder."""
        have = {action.dest for action in flags_of(name)}
        places = dict(data_root=self.folder / "data") | (
            dict(checkpoints=self.checkpoints) if "teacher" in have else {}
        )
        return [*tiny(name), *(f"--{dest}={path}" for dest, path in places.items() if dest in have), *map(str, more)]

    def teach(self, name: str) -> None:
        """Make the teacher that a script's shortest run asks for."""
        if name in self.ready or "teacher_ckpt" not in {action.dest for action in flags_of(name)}:
            return
        end = self.server.run(name, self.argv(name, "--out=/dev/null/none"))  # which is refused with a teacher, too
        if asked := re.search(r"make it with `python (\w+)\.py (.+?)`", end.stderr):
            made = self.server.run(
                asked[1], self.argv(asked[1], *shlex.split(asked[2]), f"--checkpoints={self.checkpoints}")
            )
            assert made.code == 0, made
        self.ready.add(name)

    def whole(self, name: str) -> tuple[End, dict]:
        """An undisturbed run of two epochs, and what it leaves."""
        if name not in self.wholes:
            self.teach(name)
            argv, out = self.goes_on(name)
            end = self.server.run(name, argv, 10 * LIMIT)
            assert end.code == 0, end
            self.wholes[name] = end, finish_of(out)
        return self.wholes[name]

    def goes_on(self, name: str) -> tuple[list[str], Path]:
        """The command line of a run of two epochs that goes on where it was stopped, and its new folder."""
        self.outs += 1
        out = self.folder / f"out{self.outs}"
        own = [] if "teacher" in {action.dest for action in flags_of(name)} else [f"--checkpoints={out / 'teachers'}"]
        return self.argv(name, "--n_epochs=2", f"--out={out}", *own, "--resume"), out

    def interrupt(self, name: str, kills: int, rng: random.Random, moments: bool = True) -> tuple[int, str | None]:
        """Kill a run that many times if it lasts, at a file operation or (`moments`) at any time; then let it end.

        Returns:
            How often it was killed, and what is wrong with its end.
        """
        whole, finish = self.whole(name)
        (argv, out), killed = self.goes_on(name), 0
        for _ in range(kills):
            when = dict(kill_at=rng.randint(1, whole.events // kills))
            if moments and rng.random() < 0.5:
                when = dict(seconds=rng.uniform(0, whole.seconds / kills))
            end = self.server.run(name, argv, **when)
            killed += end.code == -signal.SIGKILL
            if end.code != -signal.SIGKILL and (wrong := end.complaint()):
                return killed, f"{when}: {wrong}"
        end = self.server.run(name, argv, 10 * LIMIT)
        if end.code != 0:
            return killed, f"resumed: exit code {end.code}: {end.stderr}"
        found = finish_of(out)
        other = [key for key in finish.keys() | found.keys() if finish.get(key) != found.get(key)]
        shutil.rmtree(out)
        return killed, f"other {', '.join(sorted(other))}" if other else None

    def attempt(self, name: str, words: Sequence[str]) -> tuple[End, str | None]:
        """Add words to a script's shortest run, in a folder with hostile files in evil/; its end, and what is wrong."""
        self.teach(name)
        job = self.server.new_job()
        hostile_files(job / "evil")
        before, teachers = stat_of(job / "evil"), stat_of(self.checkpoints)
        end = self.server.run(name, self.argv(name, *words), LONG.get(name, LIMIT), job=job)
        may_last = name in LONG or any(re.search(r"\d{5}|1e300", word) for word in words)
        wrong = end.complaint(may_last)
        if wrong is None and (job / "executed").exists():
            wrong = "ran code of a file"
        if wrong is None and teachers != stat_of(self.checkpoints):
            wrong = "changed a teacher's file"
        if wrong is None and end.code == 2 and before != stat_of(job / "evil"):
            wrong = "changed files though it refused"
        if wrong is None:
            shutil.rmtree(job, ignore_errors=True)
        return end, wrong


def hostile_flags(name: str) -> list[argparse.Action]:
    """The flags to try in runs of a script."""
    return [action for action in flags_of(name) if action.option_strings]


def run_words(action: argparse.Action) -> list[list[str]]:
    """Hostile values of a flag as the words of a command line, those with files included, which are in evil/."""
    found = [words for words in words_for(action) if "\0" not in "".join(words)]  # no system passes it on
    if kind_of(action) not in ("path", "text"):
        return found
    with tempfile.TemporaryDirectory() as folder:
        places = [path.replace(f"{folder}/", "") for path in hostile_files(Path(folder) / "evil").values()]
    return [*([*WITH.get(action.dest, ()), f"{action.option_strings[0]}={path}"] for path in places), *found]


def storm(minutes: float, seed: int, folder: Path) -> dict:
    """Hostile inputs and kills over random scripts for some minutes; returns the record."""
    rng, begun, said = random.Random(seed), time.monotonic(), 0.0
    counts = dict.fromkeys("inputs one_liners accepted tracebacks hangs kills finishes identical".split(), 0)
    record = dict(date=datetime.datetime.now().astimezone().isoformat(), seed=seed, minutes=minutes, commit=commit())
    failures, server = [], Server(folder / "jobs")
    place = Storm(folder, server)
    killable = [n for n in scripts() if {"resume", "n_epochs"} <= {a.dest for a in parser_of(n)._actions}]
    words = functools.cache(lambda name, i: run_words(hostile_flags(name)[i]))
    while time.monotonic() - begun < 60 * minutes:
        if rng.random() < 0.3:
            name, kills = rng.choice(killable), rng.randint(1, 4)
            about = dict(script=name, kills=kills)
            try:
                killed, wrong = place.interrupt(name, kills, rng)
            except AssertionError as error:
                killed, wrong = 0, f"undisturbed: {error}"
            counts["kills"] += killed
            counts["finishes"] += 1
            counts["identical"] += wrong is None
        else:
            name = rng.choice(list(scripts()))
            flags = range(len(hostile_flags(name)))
            tried = rng.sample(flags, min(len(flags), rng.choice((1, 1, 1, 2, 3))))
            argv = [word for i in tried for word in rng.choice(words(name, i))]
            about = dict(script=name, argv=[ascii(word)[1:-1][:300] for word in argv])
            end, wrong = place.attempt(name, argv)
            counts["inputs"] += 1
            counts["one_liners"] += wrong is None and end.code == 2
            counts["accepted"] += wrong is None and end.code != 2
            counts["tracebacks"] += bool(wrong) and wrong.startswith("traceback")
            counts["hangs"] += bool(wrong) and wrong.startswith("hangs")
        if wrong:
            failures.append(about | dict(what=wrong[:2000]))
            print("FAILURE", json.dumps(failures[-1]), flush=True)
        if time.monotonic() - said > 30:
            said = time.monotonic()
            print(
                f"{(said - begun) / 60:.1f} min: {', '.join(f'{n} {name}' for name, n in counts.items())}", flush=True
            )
    server.close()
    return record | counts | dict(failures=failures)


def main() -> int:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--minutes", type=float, default=30)
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--out", default="storm.json", help="the record (default: %(default)s)")
    args = p.parse_args()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        record = storm(args.minutes, args.seed, Path(folder))
    Path(args.out).write_text(json.dumps(record, indent=1) + "\n")
    print(f"{len(record['failures'])} failures: {args.out}")
    return int(bool(record["failures"]))


if __name__ == "__main__":
    if sys.argv[1:] == ["--serve"]:
        serve()
    else:
        sys.exit(main())
