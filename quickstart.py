"""Data-free distillation end to end on the embedded digits, in minutes on two CPU cores.

Five runs with the scripts that everything else uses: the teacher (LeNet-5), the student
(LeNet-5-HALF) trained on the real digits, the student taught on noise images, and the student
taught on generated images, by DAFL and by Fast-Datafree. Then a table, a grid of generated digits
and a plot.
"""

import csv
from pathlib import Path

import DAFL_train
import datafree_kd
import teacher_train
import vanilla_kd
from datafree.cli import Parser, cli, number
from datafree.plots import plot_accuracy


def parse_args(argv=None):
    p = Parser(__file__, __doc__)
    text = "where everything is written (default: %(default)s)"
    p.add_argument("--out", default="./runs/quickstart", metavar="DIR", help=text)
    p.add_argument("--seed", type=number(int, 0), default=0, help="(default: %(default)s)")
    text = "a tenth of the epochs: shows that it runs, not how good it gets"
    p.add_argument("--short", action="store_true", help=text)
    return p.parse_args(argv)


def main(args):
    """Run all five; returns the rows of the table."""
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
    }
    rows = []
    for label, r in results.items():
        row = {"run": label, "network": r.get("student") or r["model"], "last %": f"{r['last']:.2f}"}
        row |= {"best %": f"{r['best']:.2f}", "seconds": f"{r['seconds']:.0f}"}
        rows.append(row | {"generated images": str(r.get("generated_images", 0))})
    plot, table = out / "accuracy.png", out / "table.csv"
    plot_accuracy(plot, {label: out / r["name"] / "metrics.csv" for label, r in results.items()})
    with table.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    widths = {k: max(len(k), *(len(r[k]) for r in rows)) for k in rows[0]}
    print()
    for row in ({k: k for k in widths}, *rows):
        words = (row[k].ljust(w) if k in ("run", "network") else row[k].rjust(w) for k, w in widths.items())
        print("  ".join(words))
    grids = sorted((out / results["student, DAFL"]["name"] / "samples").glob("*.png"))
    print(f"\ntable:            {table}\ngenerated digits: {grids[-1]}\naccuracy plot:    {plot}")
    return rows


if __name__ == "__main__":
    cli(main, parse_args)
