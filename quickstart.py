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
from data import DataError
from datafree.log import plot_accuracy
from datafree.runtime import Parser, cli, number


def parse_args(argv=None):
    p = Parser(__doc__)
    p.add_argument(
        "--out",
        default="./runs/quickstart",
        metavar="DIR",
        help="where everything is written (default: %(default)s)",
    )
    p.add_argument("--seed", type=number(int, 0), default=0, help="(default: %(default)s)")
    p.add_argument(
        "--short", action="store_true", help="a tenth of the epochs: shows that it runs, not how good it gets"
    )
    return p.parse_args(argv)


def main(args):
    """Run all five; returns the rows of the table."""
    out = Path(args.out)
    common = ["--dataset", "digits", "--out", str(out), "--seed", str(args.seed)]
    teachers = ["--checkpoints", str(out / "checkpoints")]

    def run(script, *flags):
        argv = [*common, *teachers, *flags]
        parsed = script.parse_args(argv)
        if args.short:
            epochs = max(1, parsed.n_epochs // 10)
            parsed = script.parse_args([*argv, "--n_epochs", str(epochs)])
        return script.main(parsed)

    results = {
        "teacher": run(teacher_train, "--model", "lenet5"),
        "student, real data": run(teacher_train, "--model", "lenet5_half"),
        "student, noise": run(vanilla_kd, "--transfer_set", "noise"),
        "student, DAFL": run(DAFL_train),
        "student, Fast-5": run(datafree_kd, "--method", "fast_meta", "--g_steps", "5"),
    }
    rows = [
        {
            "run": label,
            "network": r.get("student") or r["model"],
            "last %": f"{r['last']:.2f}",
            "best %": f"{r['best']:.2f}",
            "seconds": f"{r['seconds']:.0f}",
            "generated images": r.get("generated_images", 0),
        }
        for label, r in results.items()
    ]
    plot = out / "accuracy.png"
    plot_accuracy(plot, {label: out / r["name"] / "metrics.csv" for label, r in results.items()})
    table = out / "table.csv"
    with table.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    widths = {k: max(len(k), *(len(str(r[k])) for r in rows)) for k in rows[0]}
    print()
    for row in ({k: k for k in widths}, *rows):
        print(
            "  ".join(
                str(row[k]).ljust(w) if k in ("run", "network") else str(row[k]).rjust(w)
                for k, w in widths.items()
            )
        )
    grids = sorted((out / results["student, DAFL"]["name"] / "samples").glob("*.png"))
    print(f"\ntable:            {table}\ngenerated digits: {grids[-1]}\naccuracy plot:    {plot}")
    return rows


if __name__ == "__main__":
    cli(main, parse_args, DataError)
