"""Data-free distillation end to end on the embedded digits, in minutes on two CPU cores.

Six runs with the scripts that everything else uses: the teacher (LeNet-5), the student (LeNet-5-HALF) trained on the
real digits, the student taught on noise images, and the student taught on generated images, by DAFL, by Fast-Datafree
and by NAYER. Then a table, a grid of generated digits and a plot.
"""

import datafree.interrupt  # noqa: F401

import csv
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

import DAFL_train
import datafree_kd
import teacher_train
import vanilla_kd
from datafree.cli import FOLDER, Parser, cli, number
from datafree.plots import plot_accuracy


def parse_args(argv: Sequence | None = None) -> Namespace:
    p = Parser(__file__, __doc__)
    p.add(
        ("--out", "where everything is written (default: %(default)s)", FOLDER | dict(default="./runs/quickstart")),
        ("--seed", "(default: %(default)s)", dict(type=number(int, 0), default=0)),
        ("--short", "a tenth of the epochs: shows that it runs, not how good it gets", dict(action="store_true")),
    )
    return p.parse_args(argv)


def main(args: Namespace) -> list[dict[str, str]]:
    """Run all six; returns the rows of the table."""
    out = Path(args.out)
    common = ["--dataset", "digits", "--out", out, "--checkpoints", out / "checkpoints", "--seed", args.seed]

    def run(script, *flags):
        parsed = script.parse_args([*common, *flags])
        if args.short:
            parsed = script.parse_args([*common, *flags, "--n_epochs", max(1, parsed.n_epochs // 10)])
        return script.main(parsed)

    results = {
        "teacher": run(teacher_train, "--model", "lenet5"),
        "student, real data": run(teacher_train, "--model", "lenet5_half"),
        "student, noise": run(vanilla_kd, "--transfer_set", "noise"),
        "student, DAFL": run(DAFL_train),
        "student, Fast-5": run(datafree_kd, "--method", "fast_meta", "--g_steps", 5),
        "student, NAYER": run(datafree_kd, "--method", "nayer"),
    }
    columns = ("run", "network", "last %", "best %", "seconds", "generated images")
    lines = ((label, r.get("student") or r["model"], f"{r['last']:.2f}", f"{r['best']:.2f}", f"{r['seconds']:.0f}",
              str(r.get("generated_images", 0))) for label, r in results.items())  # fmt: skip
    rows = [dict(zip(columns, line, strict=True)) for line in lines]
    plot, table = out / "accuracy.png", out / "table.csv"
    plot_accuracy(plot, {label: out / r["name"] / "metrics.csv" for label, r in results.items()})
    with table.open("w", newline="") as file:
        csv.writer(file).writerows([columns, *(row.values() for row in rows)])
    print()
    for row in (dict(zip(columns, columns, strict=True)), *rows):
        print("{run:18}  {network:11}  {last %:>6}  {best %:>6}  {seconds:>7}  {generated images:>16}".format(**row))
    grids = sorted((out / results["student, DAFL"]["name"] / "samples").glob("*.png"))
    print(f"\ntable:            {table}\ngenerated digits: {grids[-1]}\naccuracy plot:    {plot}")
    return rows


if __name__ == "__main__":
    cli(main, parse_args)
