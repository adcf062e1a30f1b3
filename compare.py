"""What was measured beside what was published: writes RESULTS.md and its plots.

    python compare.py                                       # RESULTS.md, results/plots/*.png
    python compare.py --dataset MNIST --method DAFL         # a part of it, on the screen
    python compare.py --format csv                          # or json
    python compare.py --curves runs/*/metrics.csv --out curves.png      # accuracy over epochs

Reads results/**/*.json, the result.json files of finished runs, and results/paper_tables.csv. A run
belongs to a cell if it is a run of the cell's script with the flags that make the cell what it is
(data, networks, method, steps ...: `reproduce.py` has them). Flags that differ otherwise, such as
fewer epochs, stand beside the number. Runs that differ in their seed only are one row: mean and,
from two on, standard deviation. Best is the best epoch on the test set, as the papers report, last
is what one gets; "best - paper" compares the former.
"""

import ast
import csv
import io
import json
import re
import statistics
import sys
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from datafree.log import FREE_ON_RESUME, plot_accuracy
from datafree.runtime import Parser, UsageError, cli
from reproduce import cells

ROOT = Path(__file__).resolve().parent
# What makes a run a run of a cell; a run of an older version may lack some.
IDENTITY = (
    "dataset",
    "model",
    "recipe",
    "pretrained",
    "teacher",
    "student",
    "method",
    "g_steps",
    "is_maml",
    "variant",
    "transfer_set",
    "scratch",
    "alpha",
    "beta",
    "selection",
)
UNIMPORTANT = (FREE_ON_RESUME - {"n_epochs"}) | {"seed", "tag", "checkpoints", "save_img"}
# Why cells of a data set have no run: what the machine they were made on lacks.
MISSING = {
    "MNIST": "not run yet",
    "CIFAR-10": "needs a GPU",
    "CIFAR-100": "needs a GPU and the data",
    "CelebA": "needs the data",
    "Caltech101": "needs a GPU and the data",
    "CamVid": "needs a GPU",
    "NYUv2": "needs a GPU and the data",
    "ImageNet": "needs a GPU and the data",
}
COLUMNS = (
    "cell",
    "source",
    "table",
    "dataset",
    "method",
    "teacher",
    "student",
    "paper",
    "paper_std",
    "last",
    "last_std",
    "best",
    "best_std",
    "n",
    "best_minus_paper",
    "teacher_score",
    "scratch_score",
    "minutes",
    "synthesis_minutes",
    "hardware",
    "differs",
    "command",
    "note",
)


def parse_args(argv=None):
    p = Parser(__doc__)
    p.add_argument(
        "--results",
        default=str(ROOT / "results"),
        metavar="DIR",
        help="where the result files are (default: results/ beside this script)",
    )
    p.add_argument("--dataset", help="only this data set, as the papers call it")
    p.add_argument("--method", help="only this method, as the papers call it")
    p.add_argument("--format", choices=("md", "csv", "json"), default="md", help="(default: %(default)s)")
    p.add_argument(
        "--out",
        metavar="FILE",
        help="where it goes (default: RESULTS.md beside this "
        "script, or the screen if a part or another format is asked for)",
    )
    p.add_argument(
        "--curves",
        nargs="+",
        metavar="FILE",
        help="draw the test accuracy of these metrics.csv files over the epochs, and nothing else",
    )
    args = p.parse_args(argv)
    if args.curves and not args.out:
        p.error("--curves needs --out FILE.png")
    return args


def read_results(folder):
    """The content of every result file below `folder`, with its "file", sorted by it.

    Raises:
        UsageError: a file is damaged.
    """
    results = []
    for path in sorted(Path(folder).rglob("*.json")):
        try:
            content = json.loads(path.read_text())
        except ValueError as error:
            raise UsageError(f"{path} is damaged ({error}): delete it or copy it again") from error
        if isinstance(content, dict) and {"last", "best", "args"} <= content.keys():
            results.append({**content, "file": path.relative_to(folder).as_posix()})
    return results


def script_of(result):
    return result["command"].split()[1]


def belongs(result, cell, args):
    """Whether a run made this cell, whose command has the parsed flags `args`."""
    own = result["args"]
    return script_of(result) == cell.script and all(
        own[key] == args[key] for key in IDENTITY if key in own and key in args
    )


def differences(result, args):
    """The flags, as text, in which a run differs from the cell's command."""
    own = result["args"]
    changed = {
        k: own[k]
        for k, v in args.items()
        if k in own and k not in UNIMPORTANT and k not in IDENTITY and own[k] != v
    }
    return ", ".join(f"--{k} {v} ({args[k]})" for k, v in sorted(changed.items()))


def mean_std(values):
    """Mean and standard deviation (None for one value) without those that are None."""
    values = [v for v in values if v is not None]
    if not values:
        return None, None
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None


def scratch_score(results, dataset, student):
    """The best score of the student trained on the data: mean over the runs of most epochs."""
    runs = [
        r
        for r in results
        if script_of(r).startswith("teacher_train")
        and r["args"]["dataset"] == dataset
        and r["args"]["model"] == student
    ]
    most = max((r["args"]["n_epochs"] for r in runs), default=None)
    return mean_std([r["best"] for r in runs if r["args"]["n_epochs"] == most])[0]


def collect(results):
    """One record (COLUMNS) for each cell and way of running it, and the runs of no cell."""
    records, used = [], set()
    for cell in cells():
        row = cell.row
        unit = 100 if row["metric"] == "mIoU" else 1  # the table has fractions
        paper = float(row["value"]) if re.fullmatch(r"[\d.]+", row["value"]) else None
        common = dict.fromkeys(COLUMNS) | {
            "cell": cell.name,
            **{k: row[k] for k in ("source", "table", "dataset", "method", "teacher", "student")},
            "paper": row["value"] if paper is None else paper,
            "paper_std": float(row["std"]) if row["std"] else None,
            "command": cell.command,
            "n": 0,
            "note": missing(cell),
        }
        groups = {}
        if cell.script:
            args = json.loads(json.dumps(cell.args(), default=str))
            for result in results:
                if belongs(result, cell, args):
                    groups.setdefault(differences(result, args), []).append(result)
                    used.add(result["file"])
        scratch = scratch_score(results, cell.dataset, cell.student)
        for differs, runs in sorted(groups.items(), key=lambda group: group[0].count("--")):
            record = dict(common) | {
                "n": len(runs),
                "differs": differs,
                "note": "",
                "scratch_score": scratch and scratch / unit,
            }
            for name, key, scale in (
                ("last", "last", unit),
                ("best", "best", unit),
                ("teacher_score", "teacher_accuracy", unit),
                ("minutes", "seconds", 60),
                ("synthesis_minutes", "synthesis_seconds", 60),
            ):
                mean, std = mean_std([r.get(key) for r in runs])
                record[name] = None if mean is None else mean / scale
                if name in ("last", "best"):
                    record[f"{name}_std"] = None if std is None else std / scale
            if paper is not None:
                record["best_minus_paper"] = record["best"] - paper
            record["hardware"] = ", ".join(sorted({r["hardware"] for r in runs}))
            records.append(record)
        if not groups:
            records.append(common)
    return records, [r for r in results if r["file"] not in used]


def missing(cell):
    """Why a cell has no run."""
    if cell.script is None:
        return cell.reason
    flags = dict(zip(cell.flags[::2], cell.flags[1::2], strict=False))
    other = flags.get("--transfer_set", "noise") not in ("original", "noise")
    return "needs the transfer set" if other else MISSING[cell.row["dataset"]]


def deviations(script):
    """How a script differs from the published code, as its docstring says: Markdown lines."""
    card = ast.get_docstring(ast.parse((ROOT / script).read_text()))
    found = re.search(r"^Differences from the published code([^:]*):(.*?)(?=\n\n|\Z)", card, re.S | re.M)
    if not found:
        return []
    remark, text = found.groups()
    items = [" ".join(item.split()) for item in re.split(r"^ *\d+\. ", text, flags=re.M)]
    return [
        f"How `{script}` differs from the published code{remark}:",
        "",
        *(f"{i}. {item}" for i, item in enumerate(filter(None, items), 1)),
        "",
    ]


def figure_of(value, std=None, digits=2, sign=""):
    """A number for the table: '97.9 +- 0.2', or nothing."""
    if value is None:
        return ""
    text = value if isinstance(value, str) else f"{value:{sign}.{digits}f}"
    return text if std is None else f"{text} ± {std:.{digits}f}"


def markdown(records, others):
    """RESULTS.md as text."""
    run = {r["cell"] for r in records if r["n"]}
    every = {r["cell"] for r in records}
    lines = [
        "# Results beside the papers'",
        "",
        f"Written by `python compare.py` from the files under `results/`: {len(run)} of "
        f'{len(every)} published cells have a run of ours. "Last" is the last epoch, "best" '
        "the best one on the test set, which is what the papers report; ± is the standard "
        "deviation over n seeds. Acc(T) is the teacher's score in these runs, Acc(S) the "
        'student\'s when it is trained on the data itself. "Differs" names the flags in which '
        "a run is not the published one, with the published value in brackets. "
        "`bash scripts/reproduce.sh CELL` runs a cell, its teacher first.",
        "",
    ]
    tables = {}
    for record in records:
        tables.setdefault((record["source"], record["table"]), []).append(record)
    for (source, table), rows in tables.items():
        lines += [f"## {source}, {table}", ""]
        head = [
            "cell",
            "data",
            "method",
            "teacher → student",
            "paper",
            "last",
            "best",
            "n",
            "best − paper",
            "Acc(T)",
            "Acc(S)",
            "minutes (synthesis)",
            "hardware",
            "differs",
            "command",
        ]
        lines += ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
        for r in rows:
            digits = 3 if isinstance(r["paper"], float) and r["paper"] < 1 else 2
            minutes = figure_of(r["minutes"], digits=1)
            if r["synthesis_minutes"] is not None:
                minutes += f" ({figure_of(r['synthesis_minutes'], digits=1)})"
            lines.append(
                "| "
                + " | ".join(
                    [
                        r["cell"],
                        r["dataset"],
                        r["method"],
                        f"{r['teacher']} → {r['student']}",
                        figure_of(r["paper"], r["paper_std"], digits),
                        figure_of(r["last"], r["last_std"], digits),
                        figure_of(r["best"], r["best_std"], digits),
                        str(r["n"] or ""),
                        figure_of(r["best_minus_paper"], None, digits, "+"),
                        figure_of(r["teacher_score"], None, digits),
                        figure_of(r["scratch_score"], None, digits),
                        minutes,
                        r["hardware"] or "",
                        r["note"] if not r["n"] else r["differs"],
                        f"`{r['command']}`" if r["command"] else "none",
                    ]
                )
                + " |"
            )
        lines.append("")
        scripts = dict.fromkeys(r["command"].split()[1] for r in rows if r["command"])
        for script in scripts:
            lines += deviations(script)
    if others:
        lines += [
            "## Runs that are no published cell",
            "",
            "| run | last | best | Acc(T) | minutes | command | file |",
            "|---|---|---|---|---|---|---|",
        ]
    for r in others:
        lines.append(
            f"| {r['name']} | {figure_of(r['last'])} | {figure_of(r['best'])} | "
            f"{figure_of(r.get('teacher_accuracy'))} | "
            f"{figure_of(r['seconds'] / 60, digits=1)} | `{r['command']}` | "
            f"{r['file']} |"
        )
    return "\n".join(lines).rstrip() + "\n"


def as_csv(records):
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(records)
    return buffer.getvalue()


def plot_synthesis(records, folder):
    """Accuracy against synthesis time, a picture per data set of Fast-Datafree's tables.

    The published points are hollow, ours full. Returns the paths.
    """
    hours = {cell.name: cell.row["synthesis_hours"] for cell in cells()}
    paths = []
    for dataset in ("CIFAR-10", "CIFAR-100"):
        figure = Figure(figsize=(7, 4.5), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.add_subplot(
            xscale="log",
            xlabel="hours of synthesis",
            ylabel=f"{dataset}: test accuracy (%), WRN40-2 to WRN16-1",
        )
        rows = [
            r for r in records if r["dataset"] == dataset and r["student"] == "WRN16-1" and hours[r["cell"]]
        ]
        for i, method in enumerate(dict.fromkeys(r["method"] for r in rows)):
            own = [r for r in rows if r["method"] == method]
            colour = f"C{i}"
            axes.plot(
                float(hours[own[0]["cell"]]),
                own[0]["paper"],
                "o",
                color=colour,
                fillstyle="none",
                label=method,
            )
            for r in own:
                if r["n"]:
                    axes.plot(r["synthesis_minutes"] / 60, r["best"], "o", color=colour)
        axes.plot([], [], "ko", fillstyle="none", label="published")
        axes.plot([], [], "ko", label="ours")
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small", ncols=2)
        path = folder / f"synthesis-{dataset.lower()}.png"
        folder.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=120)
        paths.append(path)
    return paths


def curves(paths, out):
    """Draw metrics.csv files; a file's label is its name, or its folder's."""
    for path in map(Path, paths):
        if not path.is_file():
            raise UsageError(f"{path} does not exist: name the metrics.csv of a run")
    plot_accuracy(
        out,
        {
            p.parent.name if p.name == "metrics.csv" else p.name.removesuffix(".metrics.csv"): p
            for p in map(Path, paths)
        },
        over="epoch",
    )
    print(out)


def main(args):
    """Write or print the comparison; returns the records."""
    if args.curves:
        return curves(args.curves, args.out)
    results = read_results(args.results)
    records, others = collect(results)
    known = {k: sorted({r[k] for r in records}) for k in ("dataset", "method")}
    part = {k: v for k in known if (v := getattr(args, k))}
    for key, value in part.items():
        if value not in known[key]:
            raise UsageError(f"no {key} '{value}' in the tables; they have: " + ", ".join(known[key]))
    records = [r for r in records if all(r[k] == v for k, v in part.items())]
    others = [] if part else others
    if args.format == "md":
        text = markdown(records, others)
    elif args.format == "csv":
        text = as_csv(records)
    else:
        text = json.dumps({"cells": records, "others": [r["file"] for r in others]}, indent=1)
    whole = args.format == "md" and not part
    out = args.out or (ROOT / "RESULTS.md" if whole else None)
    if out is None:
        sys.stdout.write(text if text.endswith("\n") else text + "\n")
        return records
    Path(out).write_text(text)
    paths = [out, *(plot_synthesis(records, Path(out).parent / "results" / "plots") if whole else [])]
    print(
        f"{sum(bool(r['n']) for r in records)} rows with runs, {len(others)} runs of no cell: "
        + ", ".join(map(str, paths))
    )
    return records


if __name__ == "__main__":
    cli(main, parse_args)
