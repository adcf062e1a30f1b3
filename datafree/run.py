"""A run's folder and its record: progress, metrics, checkpoints, pictures, result.

runs/<name>/  args.json  metrics.csv  log.txt  last.pt  best.pt  accuracy.png  result.json
              samples/*.png  visdom.log
"""

import argparse
import contextlib
import csv
import datetime
import io
import json
import math
import os
import platform
import re
import statistics
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
import torchvision
from filelock import FileLock, Timeout
from torch import Tensor, nn
from torchvision.utils import make_grid, save_image
from tqdm import tqdm

from datafree import checkpoint, distributed
from datafree.cli import FREE, STARTED
from datafree.distributed import fetch, from_first, speaks
from datafree.errors import TimeLimit, UsageError
from datafree.plots import plot_accuracy
from datafree.resume import ABOUT, damage
from datafree.runtime import Runtime, commit, device_name, peak_memory
from datafree.visdom import Visdom

SAY_EVERY = 60  # seconds between the lines of a log that is no terminal
LOCKS: dict[Path, FileLock] = {}  # the runs of this process


def run_folder(args: argparse.Namespace) -> Path:
    """The folder of the run with these flags."""
    return Path(args.out) / args.run_name


def lock(args: argparse.Namespace, folder: Path | None = None) -> None:
    """Keep a run's folder (default: that of args) to this process until it ends or the run is finished.

    Raises:
        UsageError: another process has it, or --out cannot be written.
    """
    folder = folder or run_folder(args)
    path = folder.parent / ".locks" / folder.name
    holder = path.with_name(f"{path.name}.txt")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        LOCKS[folder] = FileLock(f"{path}.lock", is_singleton=True)  # the system lets go of it when the process dies
        LOCKS[folder].acquire(blocking=False)
        checkpoint.write(holder, f"process {os.getpid()} on {platform.node()}".encode())
    except Timeout as error:
        who = holder.read_text(errors="replace") if holder.is_file() else "another process"
        cure = "wait for it, or give this run a --tag or another --seed"
        raise UsageError(f"{folder} is being written by {who}: {cure}") from error
    except OSError as error:
        raise UsageError(f"cannot write to {args.out} ({error.strerror}): choose another --out") from error


def finished(args: argparse.Namespace) -> dict | None:
    """The record of this run if it is finished, with --resume: nothing of it is touched, unless for more epochs."""
    path = run_folder(args) / "result.json"
    if not args.resume or not path.is_file():
        return None
    try:
        result = json.loads(path.read_text())
        if result["epochs"] < (args.n_epochs or 0):  # a shorter one's folder, renamed
            return None
        print(f"{path.parent} is finished: last {result['last']:.2f}, best {result['best']:.2f}; nothing is changed")
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise UsageError(f"{path} is damaged ({error}): delete it to finish the run again") from error
    return result


class Run:
    """One training run: its folder, its checkpoints and its record.

    Args:
        args: the script's namespace, with run_name; stored, and compared on --resume.
        runtime: device and precision.
        score: what the test score, in percent, is called: "Acc@1", "mIoU" or "agreement".

    Raises:
        UsageError: the folder cannot be written, or --resume with other flags than the run's.
    """

    def __init__(self, args: argparse.Namespace, runtime: Runtime, score: str = "Acc@1"):
        self.args, self.runtime, self.score, self.column = args, runtime, score, column_of(score)
        self.folder = run_folder(args)
        self.name = self.folder.name
        self.last, self.best = self.folder / "last.pt", self.folder / "best.pt"
        self.best_score, self.best_epoch, self.next_epoch = -math.inf, None, 0
        self.pieces, self.rows, self.bar, self.visdom, self.percent = [], [], None, None, None
        self.longest, self.epoch_started, self.still = 0.0, time.monotonic(), []
        lock(args)
        try:
            if args.resume and not self.last.exists():
                self._stretch()
            elif args.resume and (self.folder / "result.json").exists():
                self._keep_result(json.loads((self.folder / "result.json").read_text())["name"])
            elif self.last.exists() and not args.resume:
                self._set_aside(" (--resume would have continued it)")
            (self.folder / "samples").mkdir(parents=True, exist_ok=True)
            with (self.folder / "log.txt").open("a"):
                pass
        except OSError as error:
            raise UsageError(f"cannot write to {self.folder} ({error.strerror}): choose another --out") from error

    def _set_aside(self, hint: str = "") -> None:
        n = 1
        while (old := self.folder.with_name(f"{self.name}.{n}")).exists():
            n += 1
        self.folder.rename(old)
        print(f"an earlier run of this name is now {old}{hint}")

    def _keep_result(self, name: str) -> None:
        """Put a shorter run's record by, under its name."""
        result = self.folder / "result.json"
        if result.exists():
            result.rename(self.folder / f"result-{name}.json")

    def _stretch(self) -> None:
        """Go on with the run that differs in being shorter only, if there is just one."""
        plain = re.compile(r"-n_epochs\d+")
        others = [p.parent for p in self.folder.parent.glob("*/last.pt")]
        others = [p for p in others if plain.sub("", p.name) == plain.sub("", self.name) and self._may_stretch(p)]
        if len(others) > 1:
            names = " or ".join(p.name for p in others)
            raise UsageError(f"--resume: which run is to go on, {names}? Rename its folder to {self.name}")
        for other in others:
            lock(self.args, other)
            if self.folder.exists():  # stopped before its first checkpoint
                self._set_aside()
            other.rename(self.folder)
            self._keep_result(other.name)
            print(f"{other.name} goes on as {self.name}: its schedule stretches")

    def _may_stretch(self, folder: Path) -> bool:
        """Whether a run's flags, data and teacher are this one's but for fewer epochs; one that says nothing is not."""
        with contextlib.suppress(OSError, ValueError, TypeError, LookupError, AttributeError, RecursionError):
            old = json.loads((folder / "args.json").read_text())
            if old["n_epochs"] < self.args.n_epochs:
                if changed := self._changed(old):
                    others = ", ".join(changed)
                    print(f"{folder.name} is shorter, but of another {others}: this run does not go on from it")
                return not changed
        return False

    @property
    def flags(self) -> dict:
        """The run's flags as its files have them."""
        now = {k: v for k, v in vars(self.args).items() if k not in ("script", "run_name", "command")}
        return json.loads(json.dumps(now, default=str))

    def _changed(self, old: dict) -> list[str]:
        """The flags, and what stands for data and teacher, that are not those of `old`."""
        free, flags = FREE | {"n_epochs", "teacher_ckpt", "cmi_init"}, self.flags
        return [k for k, v in old.items() if k not in free and flags.get(k, v) != v]

    def start(self, **states) -> int:
        """Begin, or with --resume restore the named states; returns the epoch to start with.

        Args:
            states: everything that a checkpoint must hold: objects with state_dict() and load_state_dict(). One
                that has `flush()` keeps more in files of its own, which that writes.
        """
        self.states = states
        if self.args.resume:
            fetch(self.last)
        if self.args.resume and self.last.exists():
            self._restore()
        checkpoint.write_json(self.folder / "args.json", self.flags)
        self.started = time.perf_counter()
        # Plain strings: a checkpoint holds no code.
        versions = {"torch": str(torch.__version__), "torchvision": str(torchvision.__version__)}
        versions["python"] = platform.python_version()
        about = self.args.command, commit(), versions, device_name(self.runtime.device), self.runtime.precision
        epochs = [self.next_epoch + 1, self.next_epoch]
        self.pieces.append(dict(zip(ABOUT, about, strict=True)) | dict(epochs=epochs, seconds=0.0))
        if self.args.visdom and speaks():
            self.visdom = Visdom(self.args.visdom, self.name, self.folder / "visdom.log", self.log, self.rows)
        return self.next_epoch

    def _restore(self) -> None:
        content = checkpoint.read(self.last, self.runtime.device)
        state = content.get("run") if isinstance(content, dict) else None
        if state is None:
            raise UsageError(f"{self.last} holds weights and no run: leave --resume out")
        if not (wrong := damage(content, self.states, self.args.n_epochs, self.column)):
            self._compare(state["args"])
            try:
                for name, value in self.states.items():
                    value.load_state_dict(state["states"][name])
                checkpoint.restore_rng(state["rng"], self.runtime.device)
            except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
                wrong = str(error).partition("\n")[0]
        if wrong:
            text = f"{self.last} is damaged or of another version ({wrong}); {self.best.name} and earlier results are"
            raise UsageError(f"{text} untouched: leave --resume out to start again, which sets this run aside")
        self.next_epoch, self.percent = content["epoch"] + 1, content["metadata"].get(self.column)
        self.best_score, self.best_epoch = state["best_score"], state["best_epoch"]
        self.pieces, self.rows = state["pieces"], state["rows"]
        self._write_rows()  # as the checkpoint knows them, whatever became of the file
        first = "before the end of what precedes the first epoch"
        self.log(f"resumed {f'after epoch {self.next_epoch}' if self.next_epoch else first}")

    def _compare(self, old: dict) -> None:
        """Raise UsageError where a flag, the data or the teacher is not the run's."""
        names = {"teacher_sha256": "the teacher's weights (SHA-256)", "fingerprint": "the data (fingerprint)",
                 "wild_fingerprint": "the wild set (fingerprint)",
                 "transfer_fingerprint": "the transfer set (fingerprint)"}  # fmt: skip
        flags = self.flags
        changed = ", ".join(f"{names.get(k, f'--{k}')} was {old[k]}, not {flags[k]}" for k in self._changed(old))
        if changed:
            cure = "give the same again, or leave --resume out"
            raise UsageError(f"--resume with something else than the run's: {changed}: {cure}")

    def seconds(self) -> float:
        """Wall time of this run, earlier pieces included."""
        return sum(p["seconds"] for p in self.pieces[:-1]) + time.perf_counter() - self.started

    def log(self, text: str) -> None:
        """A line for people, on the screen and in log.txt."""
        tqdm.write(text)
        with (self.folder / "log.txt").open("a", encoding="utf-8", errors="backslashreplace") as file:
            file.write(text + "\n")

    def progress(self, iterations: int | list[int], batch_size: int, done: int = 0) -> None:
        """Open the progress bar of the whole run: images/s, ETA, loss and score.

        Args:
            iterations: of an epoch, or of each one. batch_size: images of an iteration. done: iterations of the next
                epoch that are done.
        """
        iterations = [iterations] * self.args.n_epochs if isinstance(iterations, int) else iterations
        done += sum(iterations[: self.next_epoch])
        look = dict(unit=" images", unit_scale=True, dynamic_ncols=True, desc=self.name, smoothing=0.05, disable=None)
        self.bar = tqdm(total=sum(iterations) * batch_size, initial=done * batch_size, **look)
        self.iterations, self.done, self.begun = sum(iterations), done, time.monotonic()
        self.images_per_iteration, self.first = batch_size, done
        self.facts, self.shown = {}, time.monotonic()

    def tick(self, loss: Tensor) -> None:
        """One iteration is done. `loss` (0-d tensor) is read twice a second, not each time."""
        self.bar.update(self.images_per_iteration)
        self.done += 1
        now = time.monotonic()
        if now - self.shown < (SAY_EVERY if self.bar.disable else 0.5):
            return
        self.shown = now
        if not self.bar.disable:
            self.facts["loss"] = f"{float(loss):.3f}"
            self.bar.set_postfix(self.facts, refresh=False)
            return
        rate = (self.done - self.first) / (now - self.begun)
        left = datetime.timedelta(seconds=round((self.iterations - self.done) / rate))
        text = f"epoch {self.next_epoch + 1}: {100 * self.done / self.iterations:.1f} % of the run, "
        text += f"{rate * self.images_per_iteration:.0f} images/s, {left} left, loss {float(loss):.3f}"
        self.log(text)

    def end_epoch(self, epoch: int, percent: float, losses: Mapping, model: nn.Module, metadata: dict, **more) -> None:
        """Record an epoch: checks, metrics.csv, best.pt, last.pt, the curves; in that order.

        Args:
            epoch: from 0. percent: the test score.
            losses: name -> mean over the epoch (0-d tensor or number).
            model: what best.pt keeps; `metadata` (plain values) says what it is.
            more: further columns of metrics.csv.

        Raises:
            UsageError: a loss or a weight is not finite; nothing is saved of this epoch.
            TimeLimit: another epoch would not fit into --time_limit.
        """
        losses = {k: float(v) for k, v in losses.items()}
        states = self._states(epoch, losses)
        before, old = self.still, self.rows[-1] if self.rows else {}
        self.still = [k for k, v in losses.items() if v and v == old.get(k)]
        row = {"epoch": epoch + 1, "seconds": round(self.seconds(), 3), self.column: percent, **losses, **more}
        self.rows.append(row)
        self._write_rows()
        metadata = {**metadata, self.column: percent, "epoch": epoch + 1}
        if percent > self.best_score:
            self.best_score, self.best_epoch = percent, epoch + 1
            checkpoint.save({"state_dict": model.state_dict(), "metadata": metadata}, self.best)
        self._save(epoch, states, model, metadata)
        self.next_epoch, self.percent = epoch + 1, percent
        if self.bar is not None:
            self.facts["score"] = f"{percent:.2f}"
        shown = " ".join(f"{k}={v:.4f}" for k, v in losses.items())
        self.log(f"[Eval] Epoch={epoch + 1} {self.score}={percent:.2f} Best={self.best_score:.2f} {shown}")
        if self.still and not before:
            # A saturated generator has no gradient: it makes one image for ever, and the student learns nothing more.
            cure = "what they train has died: another --seed or a lower learning rate may help"
            self.log(f"{', '.join(self.still)} to the last bit as in the epoch before: {cure}")
        if self.visdom:
            for name, value in {self.column: percent, **losses}.items():
                self.visdom.curve(name, epoch + 1, value)
        if self.next_epoch < self.args.n_epochs:
            self.check_time()

    def save_first(self, losses: Mapping, model: nn.Module, metadata: dict) -> None:
        """Keep what was made so far for the first epoch; the arguments are as `end_epoch`'s."""
        self._save(-1, self._states(0, {k: float(v) for k, v in losses.items()}), model, metadata)
        self.check_time()

    def check_time(self) -> None:
        """Stop where what was longest between two checkpoints would not fit any more.

        Raises:
            TimeLimit: as its name says.
        """
        now = time.monotonic()
        self.longest, self.epoch_started = max(self.longest, now - self.epoch_started), now
        passed = now - STARTED + distributed.earlier
        late = passed + 1.1 * self.longest > 60 * (self.args.time_limit or math.inf)
        if self.args.time_limit and from_first(lambda: late):
            text = f"time limit: stopped with a checkpoint after epoch {self.next_epoch}; --resume goes on"
            self.log(text)
            raise TimeLimit(text)

    def _states(self, epoch: int, losses: Mapping[str, float]) -> dict:
        """The states to save, once they are known to be finite."""
        states = {k: v.state_dict() for k, v in self.states.items()}
        bad = [k for k, v in losses.items() if not math.isfinite(v)]
        for name, state in states.items():
            finite = {}  # by device, so that the host waits once for each
            for t in _leaves(state):
                if isinstance(t, Tensor) and t.is_floating_point():
                    finite.setdefault(t.device, []).append(t.isfinite().all())
            bad += [name] * any(not torch.stack(answers).all() for answers in finite.values())
        if bad:
            kept = f"{self.last} is kept" if self.last.exists() else "nothing was saved yet"
            kept = f"epoch {epoch} is kept in {self.last}" if epoch else kept
            what = f"{', '.join(bad)} became NaN or infinite in epoch {epoch + 1}; {kept}"
            raise UsageError(f"{what}: lower the learning rate, or try --precision fp32")
        return states

    def _save(self, epoch: int, states: dict, model: nn.Module, metadata: dict) -> None:
        for state in self.states.values():
            if hasattr(state, "flush"):
                state.flush()
        piece = self.pieces[-1]
        piece["epochs"][1], piece["seconds"] = epoch + 1, round(time.perf_counter() - self.started, 1)
        best = dict(best_score=self.best_score, best_epoch=self.best_epoch)
        rng = checkpoint.rng_state(self.runtime.device)
        run = dict(states=states, rng=rng, pieces=self.pieces, rows=self.rows, args=self.flags, **best)
        checkpoint.save(dict(state_dict=model.state_dict(), metadata=metadata, epoch=epoch, run=run), self.last)

    def _write_rows(self) -> None:
        """metrics.csv as a whole: a killed run leaves no half row."""
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, list(dict.fromkeys(k for row in self.rows for k in row)))
        writer.writeheader()
        writer.writerows(self.rows)
        checkpoint.write(self.folder / "metrics.csv", text.getvalue().encode())

    def images(self, name: str, x: Tensor) -> None:
        """Write a grid of images (N, C, H, W) in 0..1, if there are any, to samples/<name>.png, and to visdom."""
        if not len(x):
            return
        grid = make_grid(x.detach().float().cpu(), nrow=math.isqrt(len(x)))
        picture = io.BytesIO()
        save_image(grid, picture, format="png")
        checkpoint.write(self.folder / "samples" / f"{name}.png", picture.getvalue())
        if self.visdom:
            self.visdom.images("samples", grid, f"samples {name}")

    def finish(self, **facts) -> dict:
        """Close the run: accuracy.png and result.json, whose content is returned.

        Args:
            facts: what the script adds, plain values.
        """
        if self.bar is not None:
            self.bar.close()
        plot_accuracy(self.folder / "accuracy.png", {self.name: self.folder / "metrics.csv"}, self.column)
        scores = [float(row[self.column]) for row in self.rows]
        pieces = [p for p in self.pieces if p["epochs"][1] >= p["epochs"][0]] or self.pieces[-1:]
        together = {
            k: " then ".join(dict.fromkeys(str(p[k]) for p in pieces)) for k in ("precision", "hardware", "commit")
        }
        result = {
            "name": self.name, "script": self.args.script, "score": self.score, "last": self.percent,
            "best": self.best_score, "best_epoch": self.best_epoch, "epochs": self.next_epoch,
            "mean": statistics.fmean(scores), "variance": statistics.pvariance(scores), **facts,
            "seconds": round(self.seconds(), 1), "peak_memory": peak_memory(self.runtime.device),
            "seed": self.args.seed, **together, "command": self.args.command,
            "versions": pieces[-1]["versions"], "pieces": pieces, "args": self.flags,
        }  # fmt: skip
        checkpoint.write_json(self.folder / "result.json", result)
        LOCKS[self.folder].release(force=True)
        scores = f"last {self.percent:.2f} %, best {self.best_score:.2f} % (epoch {self.best_epoch})"
        self.log(f"{scores}, {self.seconds():.0f} s: {self.folder / 'result.json'}")
        return result


def column_of(score: str) -> str:
    """The name of a score, as people read it, in metrics.csv and checkpoints."""
    return "accuracy" if score == "Acc@1" else score


def _leaves(state) -> Iterator:
    """The values in nested dictionaries, lists and tuples."""
    if isinstance(state, dict | list | tuple):
        for value in state.values() if isinstance(state, dict) else state:
            yield from _leaves(value)
    else:
        yield state
