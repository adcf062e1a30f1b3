"""A run's folder and everything that a run says: progress bar, CSV, pictures, visdom, result.

runs/<name>/  args.json  metrics.csv  log.txt  last.pt  best.pt  accuracy.png
              result.json  samples/*.png  visdom.log
"""

import csv
import json
import logging
import math
import platform
import shlex
import sys
import time
from pathlib import Path

import torch
import torchvision
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torchvision.utils import make_grid, save_image
from tqdm import tqdm

from datafree import checkpoint
from datafree.augment import Transform
from datafree.metrics import test_accuracy
from datafree.runtime import UsageError, commit, device_name

# Flags that may differ between a run and its continuation: where, how loud, how long.
FREE_ON_RESUME = {
    "resume",
    "out",
    "data_root",
    "device",
    "gpu",
    "visdom",
    "n_epochs",
    "argv",
    "sample_every",
    "teacher_ckpt",
    "checkpoints",
    "evaluate_only",
    "ckpt",
    "export_images",
    "save_dir",
    "pool_size",
    "cmi_init",
    "memory",
    "wild_root",
}


def run_folder(args, name):
    """The folder of the run `name` with these flags."""
    return Path(args.out) / (f"{name}-{args.tag}" if args.tag else name)


def evaluate_checkpoint(
    args, name, model, architecture, data, runtime, evaluate=test_accuracy, score="Acc@1"
):
    """What --evaluate_only does: load the run's best weights, or --ckpt, and print their score.

    Args:
        evaluate: (model, data, transform, runtime) -> percent. score: what that is called.

    Returns:
        {"weights": the file, "accuracy" (or the score's name): percent}.
    """
    path = Path(args.ckpt) if args.ckpt else run_folder(args, name) / "best.pt"
    content = checkpoint.read(path)
    checkpoint.load_weights(model, content, path, architecture)
    runtime.place(model)
    transform = Transform.of(data, checkpoint.card_of(args, content))
    percent = evaluate(model, data, transform, runtime)
    print(f"[Eval] {path} {score}={percent:.2f}")
    return {"weights": str(path), column_of(score): percent}


def column_of(score):
    """The name of a score, as people read it, in metrics.csv and checkpoints."""
    return "accuracy" if score == "Acc@1" else score


class Run:
    """One training run: its folder, its checkpoints and its record.

    Args:
        args: the script's namespace; stored, and compared on --resume.
        name: the folder's name below args.out, without the tag.
        runtime: device and precision.
        score: what the test score, in percent, is called: "Acc@1" or "mIoU".

    Raises:
        UsageError: the folder cannot be written, or --resume with other flags than the run's.
    """

    def __init__(self, args, name, runtime, score="Acc@1"):
        self.args, self.runtime = args, runtime
        self.score, self.column = score, column_of(score)
        self.folder = run_folder(args, name)
        self.name = self.folder.name
        self.last, self.best = self.folder / "last.pt", self.folder / "best.pt"
        self.best_score, self.best_epoch, self.next_epoch = -math.inf, None, 0
        self.seconds_before, self.columns, self.visdom = 0.0, None, None
        self.rows_before, self.accuracy, self.bar = [], None, None
        try:
            if self.last.exists() and not args.resume:
                self._set_aside()
            (self.folder / "samples").mkdir(parents=True, exist_ok=True)
            with (self.folder / "log.txt").open("a"):
                pass
        except OSError as error:
            raise UsageError(
                f"cannot write to {self.folder} ({error.strerror}): choose another --out"
            ) from error

    def _set_aside(self):
        number = 1
        while (old := self.folder.with_name(f"{self.name}.{number}")).exists():
            number += 1
        self.folder.rename(old)
        print(f"an earlier run of this name is now {old} (--resume would have continued it)")

    def start(self, **states):
        """Begin, or with --resume restore the named states; returns the epoch to start with.

        Args:
            states: everything that a checkpoint must hold: objects with state_dict() and
                load_state_dict().
        """
        self.states = states
        if self.args.resume and self.last.exists():
            self._restore()
        (self.folder / "args.json").write_text(json.dumps(vars(self.args), indent=1, default=str))
        if self.args.visdom:
            self.visdom = Visdom(
                self.args.visdom, self.name, self.folder / "visdom.log", self.log, self.rows_before
            )
        self.started = time.perf_counter()
        return self.next_epoch

    def _restore(self):
        content = checkpoint.read(self.last, self.runtime.device)
        state = content.get("run")
        if state is None:
            raise UsageError(f"{self.last} holds weights and no run: leave --resume out")
        now = json.loads(json.dumps(vars(self.args), default=str))
        changed = [k for k, v in state["args"].items() if k not in FREE_ON_RESUME and now.get(k) != v]
        if changed:
            raise UsageError(
                "--resume with other flags than the run's: "
                + ", ".join(f"--{k} was {state['args'][k]}" for k in changed)
                + ": give the same flags, or leave --resume out"
            )
        for name, value in self.states.items():
            value.load_state_dict(state["states"][name])
        checkpoint.restore_rng(state["rng"])
        self.next_epoch, self.accuracy = content["epoch"] + 1, content["card"].get(self.column)
        self.best_score, self.best_epoch = state["best_score"], state["best_epoch"]
        self.seconds_before = state["seconds"]
        self._cut_metrics()
        self.log(
            f"resumed after epoch {self.next_epoch}"
            if self.next_epoch
            else "resumed before the end of what precedes the first epoch"
        )

    def _cut_metrics(self):
        """Drop the rows of epochs behind the checkpoint: they are run again."""
        path = self.folder / "metrics.csv"
        if path.exists():
            with path.open(newline="") as file:
                reader = csv.DictReader(file)
                rows = [r for r in reader if int(r["epoch"]) <= self.next_epoch]
                self.columns = reader.fieldnames
            self.rows_before = rows
            shortened = path.with_name("metrics.csv.tmp")
            with shortened.open("w", newline="") as file:
                writer = csv.DictWriter(file, self.columns)
                writer.writeheader()
                writer.writerows(rows)
            shortened.replace(path)

    def seconds(self):
        """Wall time of this run, earlier parts included."""
        return self.seconds_before + time.perf_counter() - self.started

    def log(self, text):
        """A line for people, on the screen and in log.txt."""
        tqdm.write(text)
        with (self.folder / "log.txt").open("a") as file:
            file.write(text + "\n")

    def progress(self, iterations, batch_size, done=0):
        """Open the progress bar of the whole run: images/s, ETA, loss and accuracy.

        Args:
            iterations: of each epoch, a list. batch_size: images of an iteration.
            done: iterations of the next epoch that are done.
        """
        done += sum(iterations[: self.next_epoch])
        self.bar = tqdm(
            total=sum(iterations) * batch_size,
            unit=" images",
            unit_scale=True,
            initial=done * batch_size,
            disable=None,
            dynamic_ncols=True,
            desc=self.name,
            smoothing=0.05,
        )
        self.images_per_iteration = batch_size
        self.facts, self.shown = {}, 0.0

    def tick(self, loss):
        """One iteration is done. `loss` (0-d tensor) is read twice a second, not each time."""
        self.bar.update(self.images_per_iteration)
        now = time.perf_counter()
        if not self.bar.disable and now - self.shown > 0.5:
            self.shown = now
            self.facts["loss"] = f"{float(loss):.3f}"
            self.bar.set_postfix(self.facts, refresh=False)

    def end_epoch(self, epoch, accuracy, losses, model, card, **more):
        """Record an epoch: checks, metrics.csv, best.pt, last.pt, the curves; in that order.

        Args:
            epoch: from 0.
            accuracy: the test score in percent.
            losses: name -> mean over the epoch (0-d tensor or number).
            model: what best.pt keeps; `card` (plain values) says what it is.
            more: further columns of metrics.csv.

        Raises:
            UsageError: a loss or a weight is not finite; nothing is saved of this epoch.
        """
        losses = {k: float(v) for k, v in losses.items()}
        self._check_finite(epoch, losses)
        row = {
            "epoch": epoch + 1,
            "seconds": round(self.seconds(), 3),
            self.column: accuracy,
            **losses,
            **more,
        }
        self._write_row(row)
        card = {**card, self.column: accuracy, "epoch": epoch + 1}
        if accuracy > self.best_score:
            self.best_score, self.best_epoch = accuracy, epoch + 1
            checkpoint.save({"state_dict": model.state_dict(), "card": card}, self.best)
        self._save(epoch, model, card)
        self.next_epoch, self.accuracy = epoch + 1, accuracy
        self.facts["acc"] = f"{accuracy:.2f}"
        self.log(
            f"[Eval] Epoch={epoch + 1} {self.score}={accuracy:.2f} Best={self.best_score:.2f} "
            + " ".join(f"{k}={v:.4f}" for k, v in losses.items())
        )
        if self.visdom:
            for name, value in {self.column: accuracy, **losses}.items():
                self.visdom.curve(name, epoch + 1, value)

    def save_first(self, losses, model, card):
        """Keep what was made so far for the first epoch; the arguments are as `end_epoch`'s."""
        self._check_finite(0, losses)
        self._save(-1, model, card)

    def _save(self, epoch, model, card):
        checkpoint.save(
            {
                "state_dict": model.state_dict(),
                "card": card,
                "epoch": epoch,
                "run": {
                    "states": {k: v.state_dict() for k, v in self.states.items()},
                    "rng": checkpoint.rng_state(),
                    "best_score": self.best_score,
                    "best_epoch": self.best_epoch,
                    "seconds": self.seconds(),
                    "args": json.loads(json.dumps(vars(self.args), default=str)),
                },
            },
            self.last,
        )

    def _check_finite(self, epoch, losses):
        bad = [k for k, v in losses.items() if not math.isfinite(v)]
        for name, state in self.states.items():
            tensors = [
                t
                for t in state.state_dict().values()
                if isinstance(t, torch.Tensor) and t.is_floating_point()
            ]
            if tensors and not torch.stack([t.isfinite().all() for t in tensors]).all():
                bad.append(name)
        if bad:
            kept = (
                f"epoch {epoch} is kept in {self.last}"
                if epoch
                else f"{self.last} is kept"
                if self.last.exists()
                else "nothing was saved yet"
            )
            raise UsageError(
                f"{', '.join(bad)} became NaN or infinite in epoch {epoch + 1}; "
                f"{kept}: lower the learning rate, or try --precision fp32"
            )

    def _write_row(self, row):
        path = self.folder / "metrics.csv"
        new = self.columns is None
        self.columns = self.columns or list(row)
        with path.open("w" if new else "a", newline="") as file:
            writer = csv.DictWriter(file, self.columns)
            if new:
                writer.writeheader()
            writer.writerow(row)

    def command(self):
        """The command that makes this run."""
        argv = sys.argv[1:] if self.args.argv is None else self.args.argv
        return shlex.join(["python", self.name.split("-")[0] + ".py", *argv])

    def images(self, name, x):
        """Write a grid of images (N, C, H, W) in 0..1 to samples/<name>.png, and to visdom."""
        grid = make_grid(x.detach().float().cpu(), nrow=math.isqrt(len(x)))
        path = self.folder / "samples" / f"{name}.png"
        save_image(grid, path)
        if self.visdom:
            self.visdom.images("samples", grid, f"samples {name}")
        return path

    def finish(self, **facts):
        """Close the run: accuracy.png and result.json, whose content is returned.

        Args:
            facts: what the script adds, plain values.
        """
        if self.bar is not None:
            self.bar.close()
        plot_accuracy(self.folder / "accuracy.png", {self.name: self.folder / "metrics.csv"}, self.column)
        result = {
            "name": self.name,
            "last": self.accuracy,
            "best": self.best_score,
            "best_epoch": self.best_epoch,
            **facts,
            "seconds": round(self.seconds(), 1),
            "seed": self.args.seed,
            "precision": self.runtime.precision,
            "hardware": device_name(self.runtime.device),
            "command": self.command(),
            "commit": commit(),
            "versions": {
                "python": platform.python_version(),
                "torch": torch.__version__,
                "torchvision": torchvision.__version__,
            },
            "args": json.loads(json.dumps(vars(self.args), default=str)),
        }
        (self.folder / "result.json").write_text(json.dumps(result, indent=1) + "\n")
        self.log(
            f"last {self.accuracy:.2f} %, best {self.best_score:.2f} % (epoch "
            f"{self.best_epoch}), {self.seconds():.0f} s: {self.folder / 'result.json'}"
        )
        return result


class Visdom:
    """Curves and image grids on a visdom server, or in a log file to replay on one later.

    Nothing is imported or connected before the first object is made, and a missing package or
    server costs one line, never the run.

    Args:
        port: the server's, on this machine.
        env: the environment to draw in: the run's name.
        path: the log file.
        log: function that shows people a line.
        rows: a resumed run's rows of metrics.csv, with which its curves begin.
    """

    def __init__(self, port, env, path, log, rows=()):
        self.port, self.env, self.path, self.log = port, env.replace("_", "-"), path, log
        self.rows, self.client = rows, None
        self.curves, self.pictures, self.in_log = {}, {}, {}
        try:
            self.Client = self._client_class()
        except ImportError:
            log("visdom is not installed: no live curves (pip install visdom)")
            return
        logging.getLogger("visdom").setLevel(logging.CRITICAL)
        try:
            self.client = self.Client(
                port=port, env=self.env, raise_exceptions=True, use_incoming_socket=False
            )
            log(f"live curves: http://localhost:{port}/env/{self.env}")
        except Exception:  # the client raises whatever requests or its sockets do
            self._go_offline(
                f"no visdom server answers at port {port} (python -m visdom.server -port {port} starts one)"
            )

    @staticmethod
    def _client_class():
        import visdom

        class Client(visdom.Visdom):
            def _handle_post(self, url, data=None):
                # visdom itself would ask a proxy for this machine, wait for ever, and take an
                # error page for success.
                self.session.trust_env = False
                answer = self.session.post(url, data=data, timeout=10)
                answer.raise_for_status()
                return answer.text

        return Client

    def _go_offline(self, reason):
        self.client = self.Client(offline=True, log_to_filename=str(self.path), env=self.env)
        self.log(
            f"{reason}: curves go to {self.path}, visdom.Visdom(port={self.port}).replay_log(FILE) shows them"
        )
        # What a lost server was shown is lost with it.
        for name in self.curves:
            self._draw_curve(name)
        for name in self.pictures:
            self._draw_images(name)

    def _send(self, draw, name):
        if self.client is None:
            return
        try:
            draw(name)
        except Exception:  # a server that went away must not end the run
            self._go_offline("the visdom server went away")

    def curve(self, name, x, y):
        """Append the point (x, y) to the window `name`."""
        if name not in self.curves:
            self.curves[name] = [(int(r["epoch"]), float(r[name])) for r in self.rows if r.get(name)]
        self.curves[name].append((x, y))
        self._send(self._draw_curve, name)

    def _draw_curve(self, name):
        # A server gets the whole curve each time: it may hold none of it, or another run's, or
        # epochs that were run again. A log has what was written, and grows by the new points.
        start = self.in_log.get(name, 0)
        points = self.curves[name][start:]
        # A lone point shows by its marker only; with markers visdom offers no smoothing.
        self.client.line(
            [y for _, y in points],
            [x for x, _ in points],
            win=name,
            update="append" if start else None,
            opts={
                "title": name if "loss" in name else f"test {name} (%)",
                "xlabel": "epoch",
                "markers": len(points) < 30,
                "markersize": 4,
            },
        )
        if self.client.offline:
            self.in_log[name] = len(self.curves[name])

    def images(self, name, grid, title):
        """Show one picture (C, H, W) in 0..1 in the window `name`."""
        self.pictures[name] = (grid, title)
        self._send(self._draw_images, name)

    def _draw_images(self, name):
        grid, title = self.pictures[name]
        height, width = grid.shape[1:]
        scale = 380 / max(height, width)  # about as large as a curve
        self.client.image(
            grid.numpy(),
            win=name,
            opts={"title": title, "width": round(width * scale), "height": round(height * scale)},
        )


def plot_accuracy(path, runs, column="accuracy", over="seconds"):
    """Draw a test score over seconds or epochs: `runs` maps a label to its metrics.csv."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot(xlabel=over, ylabel=f"test {column} (%)")
    for label, source in runs.items():
        with Path(source).open(newline="") as file:
            rows = list(csv.DictReader(file))
        axes.plot(
            [float(r[over]) for r in rows],
            [float(r[column]) for r in rows],
            label=label,
            marker="." if len(rows) < 30 else "",
        )
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)


@torch.no_grad()
def side_by_side(folder, networks, data, transform, runtime, count):
    """Write the first `count` test images to `folder` as test0000.png ...

    From left to right: image, ground truth, then the classes that each of `networks` (name ->
    network) sees, in the data set's colours.
    """
    for network in networks.values():
        network.eval()
    for i, (x, y) in enumerate(
        tqdm(
            data.test.whole(runtime.device),
            "side by side",
            leave=False,
            total=min(count, len(data.test)),
            disable=None,
        )
    ):
        if i == count:
            break
        with runtime.autocast():
            labels = [network(transform(x)).argmax(1) for network in networks.values()]
        parts = [x.float().cpu() / 255, *(data.paint(label) for label in (y, *labels))]
        save_image(torch.cat(parts, dim=3), folder / f"test{i:04}.png")
