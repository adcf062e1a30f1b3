"""Chooses the student's learning rate of each row of benchmarks/dfd10.csv, without any image of the data.

    python bench_rates.py --track mnist             # all its rows, one after the other; again to go on
    python bench_rates.py --track mnist --method fast nayer

A quarter of a row's run, with seed 100, is made with {factors} times the row's own rate and --dataset none. The rate
whose student agrees most with the teacher, beyond chance, on images that were made as the run's are and that it has not
seen is the best; a run that becomes infinite agrees never. What came out goes to benchmarks/rates.csv; a row whose
rates are all there, and whose own is not the best, gets a second one, NAME-searched. Rows that learn from images
(noise, real, wild) keep theirs: there is none to try it on.
"""

import datafree.interrupt  # noqa: F401

import importlib
import io
from argparse import Namespace
from collections.abc import Iterator, Sequence
from contextlib import redirect_stdout

from filelock import FileLock

import papers
from compress import words
from datafree import checkpoint
from datafree.cli import DEVICE, FOLDER, FREE, Parser, cli
from datafree.errors import UsageError
from datafree.tables import as_csv
from datafree.teachers import SHIPPED, teacher_file

SEED, SHARE = 100, 4  # of the run's epochs a quarter
COLUMNS = ("track", "method", "rate", "agreement")


def parse_args(argv: Sequence | None = None) -> Namespace:
    p = Parser(__file__, __doc__.format(factors=", ".join(f"{f:g}" for f in papers.FACTORS)))
    p.add(
        ("--track", "(default: %(default)s)", dict(choices=papers.TRACKS, default="mnist")),
        ("--method", "of dfd10.csv (default: all of the track)", dict(nargs="*", metavar="NAME")),
        ("--out", "where the runs go (default: %(default)s)", FOLDER | dict(default="./runs/rates")),
        *DEVICE[1:3],
    )
    return p.parse_args(argv)


def without_data(cell: papers.Cell, factor: float) -> list[str]:
    """The flags of a short run of a cell without images, with so many times its learning rate."""
    module = importlib.import_module(cell.script.removesuffix(".py"))
    own = papers.parse(cell.script, cell.flags)
    file = teacher_file(SHIPPED, cell.dataset, cell.teacher, own.teacher_recipe)
    flags = ["--dataset", "none", "--teacher", cell.teacher, "--student", cell.student, "--teacher_ckpt", str(file)]
    flags += ["--method", own.method] if "method" in own else []
    rate = papers.rate_of(own)
    settings = vars(own) | {rate: factor * getattr(own, rate), "n_epochs": own.n_epochs // SHARE}
    settings |= {"warmup": own.warmup // SHARE} if cell.script == "datafree_kd.py" else {}
    plain = vars(module.parse_args(flags))
    left = {*FREE, "dataset", "teacher", "student", "teacher_ckpt", "teacher_recipe", "method", "seed"}
    changed = {k: v for k, v in settings.items() if k in plain and k not in left and plain[k] != v}
    none = [f"--{k}" for k, v in changed.items() if v == []]  # which words leaves out
    return [*flags, *words(changed), *none, "--seed", str(SEED)]


def tries(cells: Sequence[papers.Cell], out: str, more: Sequence[str]) -> Iterator[dict]:
    """Run what is not in rates.csv; yields a line of it for each rate."""
    for cell in cells:
        method = cell.row["method"]
        for factor in papers.FACTORS:
            flags = [*without_data(cell, factor), "--out", out, "--resume", *more]
            args = papers.parse(cell.script, flags)
            rate = f"{getattr(args, papers.rate_of(args)):g}"
            key = cell.dataset, method, rate
            if key in {tuple(line[k] for k in COLUMNS[:3]) for line in papers.known_rates()}:
                continue
            try:
                with redirect_stdout(io.StringIO()):
                    agreement = importlib.import_module(cell.script.removesuffix(".py")).main(args)["last"]
            except UsageError as error:
                if "is being written by" in str(error):
                    print(f"{method}: another search is at rate {rate}", flush=True)
                    continue
                if "NaN or infinite" not in str(error):
                    raise
                agreement = 0.0
            yield dict(zip(COLUMNS, (*key, f"{agreement:.2f}"), strict=True))


def main(args: Namespace) -> None:
    """Search, and write each try as soon as it is known."""
    rows = {c.row["method"]: c for c in papers.benchmark(searched=False) if c.dataset == args.track}
    known = {method: cell for method, cell in rows.items() if method not in ("noise", "real", "wild")}
    if wrong := [m for m in args.method or () if m not in known]:
        raise UsageError(f"no {wrong[0]} to search for in {args.track}: choose from {', '.join(known)}")
    where = ["--device", args.device, *(["--gpu", str(args.gpu)] if args.gpu is not None else [])]
    for line in tries([known[m] for m in args.method or known], args.out, where):
        with FileLock(f"{papers.RATES}.lock"):  # another search may write, too
            lines = [old for old in papers.known_rates() if any(old[k] != line[k] for k in COLUMNS[:3])]
            checkpoint.write(papers.RATES, as_csv(COLUMNS, [*lines, line]).encode())
        print("{track} {method}: rate {rate}, agreement {agreement}".format(**line), flush=True)


if __name__ == "__main__":
    cli(main, parse_args)
