"""What was measured beside what was published: RESULTS.md, results/<paper>.md, results/results.csv and plots.

    python compare.py                                       # writes all of them anew
    python compare.py --readme                              # the verdicts in README.md
    python compare.py --dataset MNIST --method DAFL         # a part of the full tables, on the screen
    python compare.py --format csv                          # or json
    python compare.py --curves runs/*/metrics.csv --out curves.png      # scores over epochs
    python compare.py --benchmark                           # results/dfd10/README.md, see benchmarks/README.md

Reads results/**/*.json, the result.json files of finished runs, and the cells of papers.py, which say what makes a run
a run of a cell. Flags that differ otherwise, such as fewer epochs, stand beside the number. Runs that differ in their
seed only, or in the precision that the hardware chose, are one row: mean and, from two on, standard deviation. Best is
the best epoch on the test set, as the papers report, last is what one gets; scores are in percent, mIoU too. Why runs
differ from the paper is told by hand in results/why.csv: cells (or "METHOD on DATA" of no cell), and in words what it
is and how it was tested.
"""

import datafree.interrupt  # noqa: F401

import ast
import csv
import json
import re
import statistics
import sys
from argparse import Namespace
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from operator import itemgetter
from pathlib import Path

import papers
from datafree.cli import FREE, Parser, cli
from datafree.errors import UsageError
from datafree.plots import plot_accuracy, plot_lines, plot_points
from datafree.records import command_of, precision_of, read_records, teacher_of
from datafree.tables import as_csv, as_markdown, figure_of

ROOT = Path(__file__).resolve().parent
WHY = ROOT / "results" / "why.csv"  # why runs are not where the paper is: cells, or "METHOD on DATA" of none, in words
MARKS = "<!-- results -->", "<!-- /results -->"
PICTURES = ".png", ".svg", ".pdf"
COLUMNS = (
    "cell source table dataset method teacher student verdict paper paper_std last last_std best best_std "
    "standard_error mean n best_minus_paper teacher_score scratch_score minutes synthesis_minutes precision hardware "
    "differs command note"
).split()
# Column -> key of the records.
MEASURED = {k: k for k in ("last", "best", "standard_error", "mean")} | dict(
    teacher_score="teacher_accuracy", minutes="seconds", synthesis_minutes="synthesis_seconds"
)
PAGES = sorted({*papers.PAPERS.values()})
RULE = f"""**reproduced**: the best epoch of runs with the cell's own flags, in the mean, is at least the published
score less {papers.MARGIN:g} point; **partly**: there are runs, but shorter or otherwise different ones, or they fall
short; **not yet**: no run. The number is our best beside the published one, of the runs nearest to it, ± their standard
deviation. A row of several teacher-student pairs has the number of the first one that was run, and is "partly" unless
all pairs have the same verdict; a teacher's run counts for each cell that names the teacher."""
TOP = """# Results beside the papers'

Written by `python compare.py` from the records under `results/`: {coverage} have a run of ours. All
cells with their commands, each run with its seed, and how each script differs from the published code: {pages};
for machines, [results.csv](results/results.csv).

## Verdicts

{rule}

{verdicts}
## Measured

"Last" is the last epoch, "best" the best one on the test set, which is what the papers report, ± the standard
deviation over n runs; s.e. is the standard error that so many test images leave in a score, the mean is over all
epochs. "Differs" names the flags in which runs are not the published one, with the published value in brackets.
CIFAR-10 over student steps: [a picture](results/plots/steps-cifar10.png).

{measured}"""
PAGE_TOP = """# {}: every cell and run

Written by `python compare.py`. Acc(T) is the teacher's score in these runs, Acc(S) the student's when \
it is trained on the data itself; the rest is as in [RESULTS.md](../RESULTS.md).
"""
END = """## Running the others

```bash
bash scripts/reproduce.sh --missing             # the cells without a run, and their commands
bash scripts/reproduce.sh fast-53 --dry-run     # what one of them runs, its teacher first
bash scripts/reproduce.sh fast-53 --seeds 3     # runs it; again after an interruption
bash scripts/reproduce.sh fast-53 --check       # beside the published value
cp runs/NAME/result.json results/NAME.json && python compare.py       # puts it into this page
```
"""


def parse_args(argv: Sequence | None = None) -> Namespace:
    p = Parser(__file__, __doc__)
    p.add(
        ("--results", "where the records are (default: results/ beside this script)",
         dict(default=str(ROOT / "results"), metavar="DIR")),
        ("--dataset", "only this data set, as the papers call it", {}),
        ("--method", "only this method, as the papers call it", {}),
        ("--format", "(default: %(default)s)", dict(choices=("md", "csv", "json"), default="md")),
        ("--out", "where it goes; what belongs to RESULTS.md goes to results/ beside it (default: RESULTS.md beside "
         "this script, or the screen for a part or another format)", dict(metavar="FILE")),
        ("--readme", f"write the verdicts between {' and '.join(MARKS)} of README.md", dict(action="store_true")),
        ("--benchmark", "write the benchmark's page and pictures to dfd10/ below --results, from the records there and "
         "the metrics.csv beside them", dict(action="store_true")),
        ("--curves", "draw the scores of these metrics.csv files over the epochs, and nothing else",
         dict(nargs="+", metavar="FILE")),
    )  # fmt: skip
    args = p.parse_args(argv)
    modes = [k for k in ("curves", "benchmark", "readme") if getattr(args, k)]
    if args.curves and Path(args.out or "").suffix not in PICTURES:
        p.error(f"--curves needs --out FILE{' or FILE'.join(PICTURES)}")
    given = [k for k, v in dict(dataset=None, method=None, format="md", out=None).items() if getattr(args, k) != v]
    if wrong := modes[1:] + [k for k in given if modes and (modes[0], k) != ("curves", "out")]:
        p.error(f"--{modes[0]} goes without --{' --'.join(wrong)}")
    return args


def mean_std(values: Iterable[float]) -> tuple[float | None, float | None]:
    """Mean (None of nothing) and standard deviation (None of one value)."""
    values = list(values)
    return statistics.fmean(values) if values else None, statistics.stdev(values) if len(values) > 1 else None


def measured(runs: Sequence[dict]) -> dict:
    """What a row says of runs that differ in their seed only."""
    row = {"n": len(runs), "runs": runs}
    for name, key in MEASURED.items():
        scale = 60 if key.endswith("seconds") else 1
        row[name], std = mean_std(r[key] / scale for r in runs if r.get(key) is not None)
        row |= {f"{name}_std": std} if f"{name}_std" in COLUMNS else {}
    return row | {key: ", ".join(sorted({r[key] for r in runs})) for key in ("precision", "hardware")}


def scratch_score(cell: papers.Cell, records: Sequence[dict]) -> float | None:
    """The mean best score of a cell's student when it is trained on the data itself, by the longest such runs."""
    found = [r for r in records if r["script"].startswith("teacher_train") and r["dataset"] == cell.dataset]
    found = [r for r in found if r["args"]["model"] == cell.student]
    longest = max((r["epochs"] for r in found), default=None)
    return mean_std(r["best"] for r in found if r["epochs"] == longest)[0]


def collect(records: Sequence[dict]) -> tuple[list[dict], list[list[dict]]]:
    """One row (COLUMNS and "runs") for each cell and way of running it; the runs of no cell, other seeds together."""
    rows = []
    for cell in papers.cells():
        common = dict.fromkeys(COLUMNS) | {k: v for k, v in cell.row.items() if k in COLUMNS} | dict(
            cell=cell.name, verdict=papers.verdict(cell, records) if cell.script else "no command",
            paper=cell.row["value"] if cell.value is None else cell.value,
            paper_std=float(cell.row["std"]) if cell.row["std"] else None,
            command=cell.command, n=0, runs=(), note=cell.reason,
        )  # fmt: skip
        found = papers.runs_of(cell, records)
        for differs, runs in found.items():
            row = common | measured(runs) | dict(differs=differs, scratch_score=scratch_score(cell, records))
            rows.append(row | dict(best_minus_paper=None if cell.value is None else row["best"] - cell.value))
        rows += [] if found else [common]
    used, others = {r["file"] for row in rows for r in row["runs"]}, {}
    for record in records:
        if record["file"] not in used and not papers.of_benchmark(record):
            # Older records lack flags that are off, and name a wild set's images by another fingerprint.
            free = FREE - {"script"} | {"seed", "wild_fingerprint"}
            told = papers.flags_of(record).items()
            told = {k: v for k, v in told if k not in free and v is not None and v is not False}
            others.setdefault(json.dumps(told, sort_keys=True), []).append(record)
    return rows, list(others.values())


def minutes_of(row: Mapping) -> str:
    """Minutes of a row's runs, those of synthesis in brackets."""
    synthesis = figure_of(row["synthesis_minutes"], digits=1)
    return figure_of(row["minutes"], digits=1) + (f" ({synthesis})" if synthesis else "")


# The tables' columns, see `as_markdown`.
VERDICTS = {k: itemgetter(i) for i, k in enumerate(("paper", "method", "data", "verdict", "best / published"))}
SUMMARY = {
    "cell": "cell", "data": "dataset", "method": "method",
    "network": lambda r: r["teacher" if r["method"] == "Teacher" else "student"], "published": "paper", "last": "last",
    "best": "best", "s.e.": "standard_error", "mean": "mean", "n": "n", "differs": "differs",
}  # fmt: skip
OTHERS = {
    "method": lambda r: r["runs"][0]["method"], "data": lambda r: r["runs"][0]["dataset"], "last": "last",
    "best": "best", "s.e.": "standard_error", "n": "n", "Acc(T)": "teacher_score",
    "command": lambda r: f"`{command_of(r['runs'][0])}`",
}  # fmt: skip
FULL = {
    "cell": "cell", "data": "dataset", "method": "method", "teacher → student": "{teacher} → {student}".format_map,
    "verdict": "verdict", "published": "paper", "last": "last", "best": "best", "n": lambda r: str(r["n"] or ""),
    "best − published": lambda r: figure_of(r["best_minus_paper"], sign="+"), "Acc(T)": "teacher_score",
    "Acc(S)": "scratch_score", "minutes (synthesis)": minutes_of, "hardware": "hardware",
    "differs": lambda r: r["differs"] or r["note"],
    "command": lambda r: f"`{r['command']}`" if r["command"] else "none",
}  # fmt: skip
RUNS = {
    "run": lambda r: f"[{Path(r['file']).stem}]({r['file']})", "seed": "seed", "epochs": "epochs", "last": "last",
    "best (epoch)": lambda r: f"{figure_of(r['best'])} ({r['best_epoch']})", "mean": "mean", "variance": "variance",
    "s.e.": "standard_error", "Acc(T)": lambda r: figure_of(r.get("teacher_accuracy")),
    "teacher's weights": teacher_of, "precision": precision_of,
    "minutes": lambda r: figure_of(r["seconds"] / 60, digits=1), "hardware": "hardware", "commit": "commit",
}  # fmt: skip


def coverage(rows: Sequence[dict]) -> str:
    """'14 of 220 published cells': those with runs."""
    return f"{len({r['cell'] for r in rows if r['n']})} of {len({r['cell'] for r in rows})} published cells"


def verdicts(rows: Sequence[dict]) -> list[tuple[str, ...]]:
    """Paper, method, data set, verdict and the number that matters; data sets without runs share a line."""
    groups, lines = {}, {}
    for row in rows:
        groups.setdefault((row["source"], row["method"], row["dataset"]), {}).setdefault(row["cell"], row)
    for (source, method, dataset), cells in groups.items():
        found = [row["verdict"] for row in cells.values()]
        # Of a cell's rows the first is the nearest to the published run, of the cells the one that was run.
        row = max(cells.values(), key=lambda r: r["n"] > 0)
        verdict = found[0] if len(set(found)) == 1 else "partly"
        number = row["note"]
        if row["n"]:
            number = f"{figure_of(row['best'], row['best_std'])} / {figure_of(row['paper'])}"
            number += f"; differs: {row['differs']}" if row["differs"] else ""
            number += f"; {sum(r['n'] > 0 for r in cells.values())} of {len(cells)} pairs run" if len(cells) > 1 else ""
        lines.setdefault((source, method, verdict, number, dataset if row["n"] else ""), []).append(dataset)
    return [(*key[:2], ", ".join(datasets), *key[2:4]) for key, datasets in lines.items()]


def reasons(rows: Sequence[dict], others: Sequence[Sequence[dict]]) -> str:
    """The sentences of why.csv about what was run, in Markdown; empty if there are none."""
    run = {r["cell"] for r in rows if r["n"]} | {f"{runs[0]['method']} on {runs[0]['dataset']}" for runs in others}
    with WHY.open(newline="") as file:
        told = [f"- **{r['rows']}**: {r['why']}" for r in csv.DictReader(file) if run & {*r["rows"].split(", ")}]
    return "\n".join(["## Why they differ", "", *told, ""]) if told else ""


def markdown(rows: Sequence[dict], others: Sequence[Sequence[dict]]) -> str:
    """RESULTS.md as text."""
    pages, summary = ", ".join(f"[{p}](results/{p}.md)" for p in PAGES), as_markdown(VERDICTS, verdicts(rows))
    lines = as_markdown(SUMMARY, [r for r in rows if r["n"]])
    text = TOP.format(coverage=coverage(rows), pages=pages, rule=RULE, verdicts=summary, measured=lines)
    rest = f"## Runs of no published cell\n\n{as_markdown(OTHERS, map(measured, others))}"
    why = reasons(rows, others)
    return "\n".join([text, *filter(None, [why, rest if others else ""]), END])


def deviations(script: str) -> str:
    """How a script differs from the published code, as its docstring says, in Markdown; empty if it does not say."""
    card = ast.get_docstring(ast.parse((ROOT / script).read_text()))
    found = re.search(r"^Differences from the published code([^:]*):(.*?)(?=\n\n|\Z)", card, re.S | re.M)
    if not found:
        return ""
    remark, text = found.groups()
    items = [" ".join(item.split()) for item in re.split(r"^ *\d+\. ", text, flags=re.M)]
    items = [f"{i}. {item}" for i, item in enumerate(filter(None, items), 1)]
    return "\n".join([f"How `{script}` differs from the published code{remark}:", "", *items, ""])


def page(paper: str, rows: Sequence[dict], others: Sequence[Sequence[dict]]) -> str:
    """results/<paper>.md as text: full tables, every run, deviations."""
    home, tables = papers.homes(), {}
    own = [r for r in rows if papers.PAPERS[r["source"]] == paper]
    for row in own:
        tables.setdefault((row["source"], row["table"]), []).append(row)
    parts = [PAGE_TOP.format(", ".join(dict.fromkeys(r["source"] for r in own)))]
    parts += [f"## {source}, {name}\n\n{as_markdown(FULL, part)}" for (source, name), part in tables.items()]
    runs = [r for row in own for r in row["runs"]]
    runs += [r for runs in others for r in runs if home.get(r["script"]) == paper]
    if runs:
        parts.append(f"## Runs\n\n{as_markdown(RUNS, {r['file']: r for r in runs}.values())}")
    scripts = [s for s in dict.fromkeys(r["command"].split()[1] for r in own if r["command"]) if deviations(s)]
    told = [deviations(s) for s in scripts if home[s] == paper]
    parts += ["## Deviations\n", *told] if told else []
    away = ", ".join(f"`{s}`: [{home[s]}]({home[s]}.md)" for s in scripts if home[s] != paper)
    return "\n".join([*parts, f"Told elsewhere: {away}.\n"] if away else parts)


def pages(records: Sequence[dict]) -> dict[str, str]:
    """File, from RESULTS.md's folder, -> its text: all that `python compare.py` writes but the plots."""
    rows, others = collect(records)
    made = {"RESULTS.md": markdown(rows, others), "results/results.csv": as_csv(COLUMNS, rows)}
    return made | {f"results/{p}.md": page(p, rows, others) for p in PAGES}


def with_verdicts(readme: str, rows: Sequence[dict]) -> str:
    """README.md's text with the verdicts of what was run between the marks.

    Raises:
        UsageError: the marks are not in it.
    """
    first, last = MARKS
    if not (found := re.search(f"{first}.*?{last}", readme, re.S)):
        raise UsageError(f"README.md lacks the marks {first} and {last}: put them where the verdicts belong")
    known = {(r["source"], r["method"], r["dataset"]) for r in rows if r["n"]}
    lines = as_markdown(VERDICTS, [line for line in verdicts(rows) if line[:3] in known])
    text = f"{first}\n{RULE}\n\n{lines}\n{coverage(rows)} have a run; [RESULTS.md](RESULTS.md) has them all.\n{last}"
    return readme[: found.start()] + text + readme[found.end() :]


def plot_synthesis(rows: Sequence[dict], folder: Path) -> None:
    """Accuracy against synthesis time, a picture per table of Fast-Datafree's."""
    hours = {cell.name: float(cell.row["synthesis_hours"]) for cell in papers.cells() if cell.row["synthesis_hours"]}
    folder.mkdir(parents=True, exist_ok=True)
    for dataset in ("CIFAR-10", "CIFAR-100"):
        points = {}
        for r in rows:
            if r["dataset"] == dataset and r["student"] == "WRN16-1" and r["cell"] in hours:
                _, ours = points.setdefault(r["method"], ((hours[r["cell"]], r["paper"]), []))
                ours += [(r["synthesis_minutes"] / 60, r["best"])] if r["synthesis_minutes"] else []
        label = f"{dataset}: test accuracy (%), WRN40-2 to WRN16-1"
        plot_points(folder / f"synthesis-{dataset.lower()}.png", points, "hours of synthesis", label)


def steps_of(record: Mapping) -> tuple[int, int]:
    """A data-free run's student steps of an epoch, and its epochs of warm-up, which have none; (0, 0) of other runs."""
    args, script = record["args"], record["script"]
    if script == "datafree_kd.py":
        return args["ep_steps"] // args["kd_steps"] * args["kd_steps"], args["warmup"]
    if script == "DFND_train.py":
        return -(-record["selected"] // args["batch_size"]), 0
    if "epoch_itrs" in args:
        return args["epoch_itrs"] * args["k"], 0
    return args.get("iterations", 0), 0


def plot_steps(records: Sequence[dict], results: Path, folder: Path, dataset: str = "cifar10") -> None:
    """Accuracy over student steps, of the data-free runs on a data set that have their metrics.csv beside them.

    Args:
        results: where the records are. folder: where the picture goes; what is published for the runs is a line in it.
    """
    runs, values = {}, {}
    for record in records:
        file = results / record["file"].replace(".json", ".metrics.csv")
        steps, warmup = steps_of(record) if record["dataset"] == dataset and file.is_file() else (0, 0)
        if steps and not papers.of_benchmark(record):
            with file.open(newline="") as lines:
                rows = [(int(row["epoch"]), float(row["accuracy"])) for row in csv.DictReader(lines)]
            runs[file.name.removesuffix(".metrics.csv")] = [((e - warmup) * steps, y) for e, y in rows if e > warmup]
            values |= {
                f"{c['method']}, {c['source']}, {c['cell']}": c["value"] for c in record["published"] if c["value"]
            }
    if runs:
        plot_lines(folder / f"steps-{dataset}.png", runs, values, "student steps", f"{dataset}: accuracy (%)")


def curves(files: Sequence[Path], out: str) -> None:
    """Draw metrics.csv files; a file's label is its name, or its folder's, or where that repeats its path."""
    for path in files:
        if not path.is_file():
            raise UsageError(f"{path} does not exist: name the metrics.csv of a run")
    columns = files[0].read_text(errors="replace").partition("\n")[0].split(",")
    column = next((name for name in ("mIoU", "agreement") if name in columns), "accuracy")
    labels = [f.parent.name if f.name == "metrics.csv" else f.name.removesuffix(".metrics.csv") for f in files]
    labels = [name if labels.count(name) == 1 else str(f) for name, f in zip(labels, files, strict=True)]
    plot_accuracy(out, dict(zip(labels, files, strict=True)), column, over="epoch")
    print(out)


BENCHMARK_TOP = """# DFD-10: what each method reaches in the same few steps

Written by `python compare.py --benchmark` from the records in this folder; [the protocol](../../benchmarks/README.md)
says what is fixed. In percent of the test images, ± the standard deviation over n seeds; "last tenth" is the mean ± the
standard deviation over the last tenth of the epochs, of all seeds. "Agrees" is how often the student says what the
teacher says of test images. Seconds are those of synthesis, and of all the rest; a script whose images serve one step
only makes them in the rest. They and the memory are means over the seeds that ran on the hardware named, the first
seed's. On mnist most rows have other seeds from other hardware, which rounds and draws differently: ± holds that, too.
On the H200 up to nine other runs were on the same GPU, and some on the EPYC were stopped now and then while other
things were timed: such seconds are upper bounds. A picture has one hardware's runs; there is another where that lacks
methods.
"""
BENCHMARK = {
    "method": "method", "last": "last", "last tenth": "tenth", "best": "best", "s.e.": "standard_error", "n": "n",
    "agrees": "agreement", "images made": lambda r: f"{r['images']:,.0f}" if r["images"] else "",
    "seconds": lambda r: f"{r['synthesis'] or 0:.0f} + {r['seconds'] - (r['synthesis'] or 0):.0f}",
    "GB": lambda r: figure_of(r["peak_memory"] and r["peak_memory"] / 1e9, digits=1), "hardware": "hardware",
}  # fmt: skip


def benchmark_row(cell: papers.Cell, runs: Sequence[dict], metrics: Sequence[Path]) -> dict:
    """What the table says of a method: of its runs, and of their metrics.csv."""
    row, tenth = dict(method=cell.row["method"], n=len(runs), hardware=runs[0]["hardware"]), []
    same = dict.fromkeys(("last", "best", "standard_error", "agreement", "seconds", "peak_memory"))
    alike = [r for r in runs if r["hardware"] == row["hardware"]]
    for name, key in (same | dict(synthesis="synthesis_seconds", images="generated_images")).items():
        of = alike if name in ("seconds", "peak_memory", "synthesis") else runs
        row[name], row[f"{name}_std"] = mean_std(r[key or name] for r in of if r.get(key or name) is not None)
    for path in metrics:
        with path.open(newline="") as file:
            scores = [float(line["accuracy"]) for line in csv.DictReader(file)]
        tenth += scores[-max(1, len(scores) // 10) :]
    row["tenth"], row["tenth_std"] = mean_std(tenth)
    return row


def benchmark(folder: Path) -> list[dict]:
    """Write the benchmark's README.md, and a picture of each track, to the folder of its records; returns the rows."""
    records, text, rows = read_records(folder), [BENCHMARK_TOP], []
    for track, (teacher, student, _) in papers.TRACKS.items():
        found, files, missing = [], defaultdict(dict), []
        for cell in (c for c in papers.benchmark() if c.dataset == track):
            runs = sorted(papers.runs_of(cell, records).get("", ()), key=itemgetter("seed"))
            paths = [(folder / r["file"]).with_suffix(".metrics.csv") for r in runs]
            if lost := [path for path in paths if not path.is_file()]:
                raise UsageError(f"{lost[0]} is missing: copy the run's metrics.csv there")
            if runs:
                found.append(benchmark_row(cell, runs, paths))
                for run, path in reversed(list(zip(runs, paths, strict=True))):
                    files[run["hardware"]][cell.row["method"]] = path
            else:
                missing.append(cell.row["method"])
        found.sort(key=itemgetter("last"), reverse=True)
        text.append(f"## {track}: {teacher} to {student}\n")
        if found:
            text.append(as_markdown(BENCHMARK, found))
            name, seen = track, set()
            for hardware, drawn in sorted(files.items(), key=lambda item: -len(item[1])):
                if not drawn.keys() <= seen:
                    methods = [row["method"] for row in found if row["method"] in drawn]
                    plot_accuracy(folder / f"{name}.png", {method: drawn[method] for method in methods}, log=True)
                    text.append(f"![Accuracy over seconds on {hardware}]({name}.png)\n")
                    name, seen = f"{name}-more", seen | drawn.keys()
        text += [f"Not run yet: {', '.join(missing)}.\n"] if missing else []
        rows += found
    (folder / "README.md").write_text("\n".join(text))
    return rows


def main(args: Namespace) -> list[dict] | None:
    """Write or print the comparison; returns its rows."""
    if args.curves:
        return curves([Path(path) for path in args.curves], args.out)
    if args.benchmark:
        return benchmark(Path(args.results) / "dfd10")
    records = read_records(args.results)
    if not records:
        raise UsageError(f"{args.results} has no records: copy result.json files of runs there")
    rows, others = collect(records)
    if args.readme:
        readme = ROOT / "README.md"
        readme.write_text(with_verdicts(readme.read_text(), rows))
        return rows
    part = {k: v for k, v in (("dataset", args.dataset), ("method", args.method)) if v}
    for key, value in part.items():
        if value not in (known := sorted({r[key] for r in rows})):
            raise UsageError(f"no {key} '{value}' in the tables; they have: {', '.join(known)}")
    rows = [r for r in rows if all(r[k] == v for k, v in part.items())]
    if args.format == "md" and not part:
        top = Path(args.out or ROOT / "RESULTS.md")
        for name, text in pages(records).items():
            path = top if name == "RESULTS.md" else top.parent / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        plot_synthesis(rows, top.parent / "results" / "plots")
        plot_steps(records, Path(args.results), top.parent / "results" / "plots")
        print(f"{len({r['cell'] for r in rows if r['n']})} cells with runs, {len(others)} kinds of other runs: {top}")
        return rows
    text = as_markdown(FULL, rows) if args.format == "md" else as_csv(COLUMNS, rows)
    if args.format == "json":
        told = [{k: row[k] for k in COLUMNS} for row in rows]
        text = json.dumps({"cells": told, "others": [r["file"] for runs in others for r in runs]}, indent=1) + "\n"
    if args.out:
        Path(args.out).write_text(text)
    else:
        sys.stdout.write(text)
    return rows


if __name__ == "__main__":
    cli(main, parse_args)
