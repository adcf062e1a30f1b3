"""Pictures for people: curves of a score, and segmentations side by side."""

import csv
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator
from torch import nn
from torchvision.utils import save_image
from tqdm import tqdm

from data import Segmentation
from datafree.distributed import apart, speaks
from datafree.errors import UsageError
from datafree.runtime import Runtime

Point = tuple[float, float]


def plot_accuracy(
    path: Path, runs: Mapping[str, Path], column: str = "accuracy", over: str = "seconds", log: bool = False
) -> None:
    """Draw a test score over seconds or epochs, logarithmic with `log`: `runs` maps a label to its metrics.csv.

    Raises:
        UsageError: a file that is none.
    """
    if not speaks():
        return
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot(xlabel=over, ylabel=f"test {column} (%)")
    if log:
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_formatter("")
    for i, (label, source) in enumerate(runs.items()):
        try:
            with Path(source).open(newline="", encoding="utf-8") as file:
                rows = list(csv.DictReader(file))
            x, y = ([float(row[key]) for row in rows] for key in (over, column))
        except (ValueError, TypeError, LookupError, csv.Error) as error:
            raise UsageError(f"{source} is no metrics.csv with {over} and {column} ({error}): name another") from error
        look = dict(color=f"C{i % 10}", linestyle=("-", "--", ":")[i // 10 % 3])
        axes.plot(x, y, **look, label=label, marker="." if len(rows) < 30 else "")
    axes.grid(alpha=0.3)
    if len(runs) > 5 and max(map(len, runs)) < 30:
        figure.legend(fontsize="x-small", loc="outside right upper")
    else:  # long names would leave no room to the axes
        axes.legend(fontsize="x-small").set_in_layout(False)
    figure.savefig(path, dpi=120)


def plot_points(path: Path, methods: Mapping[str, tuple[Point, Sequence[Point]]], x: str, y: str) -> None:
    """Draw what is published for each method, hollow, and our own points, full, over a logarithmic axis x."""
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot(xscale="log", xlabel=x, ylabel=y)
    for i, (method, (published, ours)) in enumerate(methods.items()):
        look = dict(color=f"C{i}", marker="o", linestyle="none")
        axes.plot(*published, **look, fillstyle="none", label=method)
        axes.plot([x for x, _ in ours], [y for _, y in ours], **look)
    axes.plot([], [], "ko", fillstyle="none", label="published")
    axes.plot([], [], "ko", label="ours")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small", ncols=2)
    figure.savefig(path, dpi=120)


def plot_lines(
    path: Path, lines: Mapping[str, Sequence[Point]], levels: Mapping[str, float], x: str, y: str
) -> None:  # fmt: skip
    """Draw a line through the points of each of `lines`, over a logarithmic axis x, and dashed `levels`.

    Names that differ in an ending -seedN share a colour.
    """
    figure = Figure(figsize=(7, 6), layout="constrained")
    axes = figure.add_subplot(xscale="log", xlabel=x, ylabel=y)
    drawn = {}
    for name, points in lines.items():
        label = re.sub(r"-seed\d+$", "", name)
        look = dict(color=drawn[label]) if label in drawn else dict(color=f"C{len(drawn)}", label=label)
        drawn[label] = look["color"]
        axes.plot(*zip(*points, strict=True), marker="." if len(points) < 100 else "", linewidth=1, **look)
    for i, (label, value) in enumerate(levels.items()):
        axes.axhline(value, color=f"C{len(drawn) + i}", linestyle="--", label=f"{value:g}: {label}")
    axes.grid(alpha=0.3)
    figure.legend(fontsize="x-small", loc="outside lower left")
    figure.savefig(path, dpi=120)


@torch.no_grad()
def side_by_side(
    folder: Path, networks: Mapping[str, nn.Module], data: Segmentation, transform: Callable, runtime: Runtime,
    count: int,
) -> None:  # fmt: skip
    """Write the first `count` test images of `data` to `folder` as test0000.png ...

    From left to right: image, ground truth, then the classes that each of `networks` (in eval mode afterwards) sees.
    """
    for network in networks.values():
        network.eval()
    if not speaks():
        return
    count = min(count, len(data.test))
    images = tqdm(data.test.whole(runtime.device), "side by side", total=count, leave=False, disable=None)
    for i, (x, y) in zip(range(count), images, strict=False):
        with apart(), runtime.eagerly(), runtime.autocast():
            labels = [network(transform(x)).argmax(1) for network in networks.values()]
        parts = [x.float().cpu() / 255, *(data.paint(label) for label in (y, *labels))]
        save_image(torch.cat(parts, dim=3), folder / f"test{i:04}.png")
