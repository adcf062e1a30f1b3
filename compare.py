"""What was measured beside what was published: RESULTS.md, results/<paper>.md, results/results.csv and plots.

    python compare.py                                       # writes all of them anew
    python compare.py --readme                              # the verdicts in README.md
    python compare.py --dataset MNIST --method DAFL         # a part of the full tables, on the screen
    python compare.py --format csv                          # or json
    python compare.py --curves runs/*/metrics.csv --out curves.png      # scores over epochs

Reads results/**/*.json, the result.json files of finished runs, and the cells of papers.py, which say what makes a run
a run of a cell. Flags that differ otherwise, such as fewer epochs, stand beside the number. Runs that differ in their
seed only are one row: mean and, from two on, standard deviation. Best is the best epoch on the test set, as the papers
report, last is what one gets; scores are in percent, mIoU too.
"""

import ast
import csv
import io
import json
import re
import shlex
import statistics
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from matplotlib.figure import Figure

import papers
from datafree.cli import FREE, Parser, cli
from datafree.errors import UsageError
from datafree.plots import plot_accuracy
from datafree.records import read_records

ROOT = Path(__file__).resolve().parent
MARKS = "<!-- results -->", "<!-- /results -->"
COLUMNS = (
    "cell", "source", "table", "dataset", "method", "teacher", "student", "verdict", "paper", "paper_std", "last",
    "last_std", "best", "best_std", "standard_error", "mean", "n", "best_minus_paper", "teacher_score",
    "scratch_score", "minutes", "synthesis_minutes", "precision", "hardware", "differs", "command", "note",
)  # fmt: skip
# Column, key of the records and what it is divided by.
MEASURED = (
    ("last", "last", 1), ("best", "best", 1), ("standard_error", "standard_error", 1), ("mean", "mean", 1),
    ("teacher_score", "teacher_accuracy", 1), ("minutes", "seconds", 60),
    ("synthesis_minutes", "synthesis_seconds", 60),
)  # fmt: skip
HEAD = "paper | method | data | verdict | best / published"
RULE = f"""**reproduced**: the best score of runs with the cell's own flags is at least the published one less
{papers.MARGIN:g} point; **partly**: there are runs, but shorter or otherwise different ones, or they fall short; **not
yet**: no run. The number is our best beside the published one, of the run nearest to it."""
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

{measured}"""
END = """## Running the others

```bash
bash scripts/reproduce.sh --missing             # the cells without a run, and their commands
bash scripts/reproduce.sh fast-53 --dry-run     # what one of them runs, its teacher first
bash scripts/reproduce.sh fast-53 --seeds 3     # runs it; again after an interruption
bash scripts/reproduce.sh fast-53 --check       # beside the published value
cp runs/NAME/result.json results/NAME.json && python compare.py       # puts it into this page
```
"""


def parse_args(argv=None):
    p = Parser(__file__, __doc__)
    # fmt: off
    p.add(
        ("--results", "where the records are (default: results/ beside this script)",
         dict(default=str(ROOT / "results"), metavar="DIR")),
        ("--dataset", "only this data set, as the papers call it", {}),
        ("--method", "only this method, as the papers call it", {}),
        ("--format", "(default: %(default)s)", dict(choices=("md", "csv", "json"), default="md")),
        ("--out", "where it goes; what belongs to RESULTS.md goes to results/ beside it (default: RESULTS.md beside "
         "this script, or the screen for a part or another format)", dict(metavar="FILE")),
        ("--readme", f"write the verdicts between {' and '.join(MARKS)} of README.md", dict(action="store_true")),
        ("--curves", "draw the scores of these metrics.csv files over the epochs, and nothing else",
         dict(nargs="+", metavar="FILE")),
    )
    # fmt: on
    args = p.parse_args(argv)
    if args.curves and not args.out:
        p.error("--curves needs --out FILE.png")
    return args


def mean_std(values: Iterable[float | None]) -> tuple[float | None, float | None]:
    """Mean and standard deviation (None for one value) of those that are there."""
    values = [v for v in values if v is not None]
    if not values:
        return None, None
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None


def measured(runs: Sequence[dict]) -> dict:
    """What a row says of runs that differ in their seed only."""
    row = {"n": len(runs), "runs": runs}
    for name, key, scale in MEASURED:
        mean, std = mean_std(None if (value := r.get(key)) is None else value / scale for r in runs)
        row |= {name: mean} | ({f"{name}_std": std} if f"{name}_std" in COLUMNS else {})
    return row | {key: ", ".join(sorted({r[key] for r in runs})) for key in ("precision", "hardware")}


def collect(records: Sequence[dict]) -> tuple[list[dict], list[list[dict]]]:
    """One row (COLUMNS and "runs") for each cell and way of running it; the runs of no cell, other seeds together."""
    rows = []
    for cell in papers.cells():
        common = dict.fromkeys(COLUMNS) | {
            "cell": cell.name,
            **{k: cell.row[k] for k in ("source", "table", "dataset", "method", "teacher", "student")},
            "verdict": papers.verdict(cell, records) if cell.script else "no command",
            "paper": cell.row["value"] if cell.value is None else cell.value,
            "paper_std": float(cell.row["std"]) if cell.row["std"] else None,
            "command": cell.command, "n": 0, "runs": (), "note": cell.reason,
        }  # fmt: skip
        scratch = [r for r in records if r["script"].startswith("teacher_train") and r["dataset"] == cell.dataset
                   and r["args"]["model"] == cell.student]  # fmt: skip
        longest = max((r["epochs"] for r in scratch), default=None)
        common["scratch_score"] = mean_std(r["best"] for r in scratch if r["epochs"] == longest)[0]
        found = papers.runs_of(cell, records)
        for differs, runs in found.items():
            row = common | measured(runs) | {"differs": differs}
            rows.append(row | {"best_minus_paper": None if cell.value is None else row["best"] - cell.value})
        rows += [] if found else [common | {"scratch_score": None}]
    used, others = {r["file"] for row in rows for r in row["runs"]}, {}
    for record in records:
        if record["file"] not in used:
            told = {k: v for k, v in papers.flags_of(record).items() if k == "script" or k not in FREE | {"seed"}}
            others.setdefault(json.dumps(told, sort_keys=True), []).append(record)
    return rows, list(others.values())


def figure_of(value: float | str | None, std: float | None = None, digits: int = 2, sign: str = "") -> str:
    """A number for a table: '97.90 ± 0.20', or nothing."""
    if value is None:
        return ""
    text = value if isinstance(value, str) else f"{value:{sign}.{digits}f}"
    return text if std is None else f"{text} ± {std:.{digits}f}"


def figures(row: dict, *names: str) -> list[str]:
    """Columns of a row, each with its standard deviation where it has one."""
    return [figure_of(row[name], row.get(f"{name}_std")) for name in names]


def table(head: str, lines: Iterable[Sequence[str]]) -> str:
    """A Markdown table; `head` has its columns' names with ' | ' between."""
    rule = "|" + "---|" * (head.count(" | ") + 1)
    return "\n".join([f"| {head} |", rule, *(f"| {' | '.join(line)} |" for line in lines), ""])


def coverage(rows: Sequence[dict]) -> str:
    """'14 of 220 published cells': those with runs."""
    return f"{len({r['cell'] for r in rows if r['n']})} of {len({r['cell'] for r in rows})} published cells"


def short_command(record: dict) -> str:
    """A run's command without the flags that do not matter, and the seed."""
    kept, keep = [], True
    for word in shlex.split(record["command"]):
        if word.startswith("--"):
            keep = word.lstrip("-").split("=")[0] not in FREE | {"seed"}
        kept += [word] if keep else []
    return shlex.join(kept)


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
        key = (source, method, verdict, number if not row["n"] else dataset)
        lines.setdefault(key, ([], number))[0].append(dataset)
    return [(source, method, ", ".join(datasets), verdict, number)
            for (source, method, verdict, _), (datasets, number) in lines.items()]  # fmt: skip


def markdown(rows: Sequence[dict], others: Sequence[Sequence[dict]]) -> str:
    """RESULTS.md as text."""
    head = "cell | data | method | network | published | last | best | s.e. | mean | n | differs"
    lines = table(head, [[
        r["cell"], r["dataset"], r["method"], r["teacher" if r["method"] == "Teacher" else "student"],
        *figures(r, "paper", "last", "best", "standard_error", "mean"), str(r["n"]), r["differs"],
    ] for r in rows if r["n"]])  # fmt: skip
    pages = ", ".join(f"[{p}](results/{p}.md)" for p in sorted({*papers.PAPERS.values()}))
    text = TOP.format(coverage=coverage(rows), pages=pages, rule=RULE, verdicts=table(HEAD, verdicts(rows)),
                      measured=lines)  # fmt: skip
    return "\n".join([text, *([f"## Runs of no published cell\n\n{other_runs(others)}"] if others else []), END])


def other_runs(others: Sequence[Sequence[dict]]) -> str:
    lines = [[runs[0]["method"], runs[0]["dataset"], *figures(row, "last", "best", "standard_error"), str(row["n"]),
              *figures(row, "teacher_score"), f"`{short_command(runs[0])}`"]
             for runs in others for row in [measured(runs)]]  # fmt: skip
    return table("method | data | last | best | s.e. | n | Acc(T) | command", lines)


def homes() -> dict[str, str]:
    """Script -> the paper whose page has its deviations: the one of its name, else the one with most of its cells."""
    counts = {}
    for cell in papers.cells():
        if cell.script:
            own = cell.script.lower().startswith(cell.paper)
            counts.setdefault(cell.script, Counter())[cell.paper] += 1000 if own else 1
    return {script: counter.most_common(1)[0][0] for script, counter in counts.items()}


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
    home, tables = homes(), {}
    own = [r for r in rows if papers.PAPERS[r["source"]] == paper]
    for row in own:
        tables.setdefault((row["source"], row["table"]), []).append(row)
    parts = [f"# {', '.join(dict.fromkeys(r['source'] for r in own))}: every cell and run\n",
             "Written by `python compare.py`. Acc(T) is the teacher's score in these runs, Acc(S) the student's when "
             "it is trained on the data itself; the rest is as in [RESULTS.md](../RESULTS.md).\n",
             *(f"## {source}, {name}\n\n{full_table(part)}" for (source, name), part in tables.items())]  # fmt: skip
    runs = [r for row in own for r in row["runs"]] + [r for runs in others for r in runs if home[r["script"]] == paper]
    if runs:
        parts.append(f"## Runs\n\n{run_table({r['file']: r for r in runs}.values())}")
    scripts = [s for s in dict.fromkeys(r["command"].split()[1] for r in own if r["command"]) if deviations(s)]
    told = [deviations(script) for script in scripts if home[script] == paper]
    parts += ["## Deviations\n", *told] if told else []
    away = ", ".join(f"`{s}`: [{home[s]}]({home[s]}.md)" for s in scripts if home[s] != paper)
    return "\n".join([*parts, f"Told elsewhere: {away}.\n"] if away else parts)


def full_table(rows: Sequence[dict]) -> str:
    lines = []
    for r in rows:
        minutes = figure_of(r["minutes"], digits=1)
        minutes += f" ({figure_of(r['synthesis_minutes'], digits=1)})" if r["synthesis_minutes"] is not None else ""
        lines.append([
            r["cell"], r["dataset"], r["method"], f"{r['teacher']} → {r['student']}", r["verdict"],
            *figures(r, "paper", "last", "best"), str(r["n"] or ""), figure_of(r["best_minus_paper"], sign="+"),
            *figures(r, "teacher_score", "scratch_score"), minutes, r["hardware"] or "",
            r["differs"] or r["note"] or "", f"`{r['command']}`" if r["command"] else "none",
        ])  # fmt: skip
    head = "cell | data | method | teacher → student | verdict | published | last | best | n | best − published"
    return table(f"{head} | Acc(T) | Acc(S) | minutes (synthesis) | hardware | differs | command", lines)


def run_table(runs: Iterable[dict]) -> str:
    lines = []
    for r in runs:
        teacher = r.get("teacher_weights") or {}
        made = [f"{p['epochs'][0]}-{p['epochs'][1]} {p['precision']}" for p in r["pieces"] or ()]
        lines.append([
            f"[{Path(r['file']).stem}]({r['file']})", str(r["seed"]), str(r["epochs"]), figure_of(r["last"]),
            f"{figure_of(r['best'])} ({r['best_epoch']})", *figures(r, "mean", "variance", "standard_error"),
            figure_of(r.get("teacher_accuracy")),
            f"{teacher['file']} ({teacher.get('recipe') or 'no recipe'})" if teacher else "",
            ", ".join(made) if len(made) > 1 else r["precision"], figure_of(r["seconds"] / 60, digits=1),
            r["hardware"], r["commit"],
        ])  # fmt: skip
    head = "run | seed | epochs | last | best (epoch) | mean | variance | s.e. | Acc(T) | teacher's weights"
    return table(f"{head} | precision | minutes | hardware | commit", lines)


def as_csv(rows: Sequence[dict]) -> str:
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(COLUMNS)
    writer.writerows([round(v, 4) if isinstance(v, float) else v for v in map(row.get, COLUMNS)] for row in rows)
    return buffer.getvalue()


def pages(records: Sequence[dict]) -> dict[str, str]:
    """File, from RESULTS.md's folder, -> its text: all that `python compare.py` writes but the plots."""
    rows, others = collect(records)
    made = {"RESULTS.md": markdown(rows, others), "results/results.csv": as_csv(rows)}
    return made | {f"results/{p}.md": page(p, rows, others) for p in sorted({*papers.PAPERS.values()})}


def with_verdicts(readme: str, rows: Sequence[dict]) -> str:
    """README.md's text with the verdicts of what was run between the marks.

    Raises:
        UsageError: the marks are not in it.
    """
    first, last = MARKS
    if not re.search(f"{first}.*{last}", readme, re.S):
        raise UsageError(f"README.md lacks the marks {first} and {last}: put them where the verdicts belong")
    known = {(r["source"], r["method"], r["dataset"]) for r in rows if r["n"]}
    lines = table(HEAD, [line for line in verdicts(rows) if line[:3] in known])
    text = f"{first}\n{RULE}\n\n{lines}\n{coverage(rows)} have a run; [RESULTS.md](RESULTS.md) has them all.\n{last}"
    return readme[: readme.index(first)] + text + readme[readme.index(last) + len(last) :]


def plot_synthesis(rows: Sequence[dict], folder: Path) -> None:
    """Accuracy against synthesis time, a picture per table of Fast-Datafree's: published hollow, ours full."""
    hours = {cell.name: cell.row["synthesis_hours"] for cell in papers.cells()}
    folder.mkdir(parents=True, exist_ok=True)
    for dataset in ("CIFAR-10", "CIFAR-100"):
        figure = Figure(figsize=(7, 4.5), layout="constrained")
        label = f"{dataset}: test accuracy (%), WRN40-2 to WRN16-1"
        axes = figure.add_subplot(xscale="log", xlabel="hours of synthesis", ylabel=label)
        found = [r for r in rows if r["dataset"] == dataset and r["student"] == "WRN16-1" and hours[r["cell"]]]
        for i, method in enumerate(dict.fromkeys(r["method"] for r in found)):
            own = [r for r in found if r["method"] == method]
            point = dict(color=f"C{i}", marker="o", linestyle="none")
            axes.plot(float(hours[own[0]["cell"]]), own[0]["paper"], **point, fillstyle="none", label=method)
            run = [r for r in own if r["synthesis_minutes"]]
            axes.plot([r["synthesis_minutes"] / 60 for r in run], [r["best"] for r in run], **point)
        axes.plot([], [], "ko", fillstyle="none", label="published")
        axes.plot([], [], "ko", label="ours")
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small", ncols=2)
        figure.savefig(folder / f"synthesis-{dataset.lower()}.png", dpi=120)


def curves(files: Sequence[Path], out: str) -> None:
    """Draw metrics.csv files; a file's label is its name, or its folder's."""
    for path in files:
        if not path.is_file():
            raise UsageError(f"{path} does not exist: name the metrics.csv of a run")
    with files[0].open() as file:
        columns = file.readline().strip().split(",")
    column = next((name for name in ("mIoU", "agreement") if name in columns), "accuracy")
    labels = [f.parent.name if f.name == "metrics.csv" else f.name.removesuffix(".metrics.csv") for f in files]
    plot_accuracy(out, dict(zip(labels, files, strict=True)), column, over="epoch")
    print(out)


def main(args):
    """Write or print the comparison; returns its rows."""
    if args.curves:
        return curves([Path(path) for path in args.curves], args.out)
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
        print(f"{len({r['cell'] for r in rows if r['n']})} cells with runs, {len(others)} kinds of other runs: {top}")
        return rows
    cells = [{k: row[k] for k in COLUMNS} for row in rows]
    told = {"cells": cells, "others": [r["file"] for runs in others for r in runs]}
    made = {"md": lambda: full_table(rows), "csv": lambda: as_csv(rows),
            "json": lambda: json.dumps(told, indent=1) + "\n"}  # fmt: skip
    text = made[args.format]()
    if args.out:
        Path(args.out).write_text(text)
    else:
        sys.stdout.write(text)
    return rows


if __name__ == "__main__":
    cli(main, parse_args)
