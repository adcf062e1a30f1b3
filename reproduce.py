"""Every published cell by one command.

    bash scripts/reproduce.sh --list                 # all cells: name, published value, command
    bash scripts/reproduce.sh --missing              # those without evidence under results/ or runs/
    bash scripts/reproduce.sh dafl-13 --dry-run      # the commands of one cell, teacher first
    bash scripts/reproduce.sh dafl-13                # runs them; again after an interruption
    bash scripts/reproduce.sh dafl-13 --seeds 3      # seeds 0, 1, 2, one after the other, by one teacher
    bash scripts/reproduce.sh dafl-13 --time_limit 60         # stops with a checkpoint in time, exit code 75
    bash scripts/reproduce.sh dafl-13 --check        # exit code 1 unless its records reach the published value
    bash scripts/reproduce.sh dafl-13 --n_epochs 50  # any further flags go to the cell's own script
    bash scripts/reproduce.sh --select dataset=cifar10 method=Fast-5,Fast-10 --dry-run         # cells by their columns
    bash scripts/reproduce.sh dfd10-mnist-nayer --seeds 3     # a row of the benchmark, see benchmarks/README.md
    bash scripts/reproduce.sh --missing --seeds 3 --executor local --jobs 2    # each cell and seed is a job
    bash scripts/reproduce.sh --missing --seeds 3 --executor slurm --time_limit 240 --slurm partition=gpu gres=gpu:1

Cells are the rows of results/paper_tables.csv, named after their paper and counted in its order; papers.py has their
commands. A teacher whose file is in checkpoints/ or pretrained/ is not trained again. Runs that were stopped are
resumed, finished ones are left alone. Data sets, transfer and wild sets are looked for, or downloaded, below
--data_root. With --dataset none a cell's command reads no image: its score is the agreement with the teacher,
beyond chance. `compare.py` puts what came out beside the published values.

--executor (which needs submitit) makes a job of each cell and seed, its teacher first, and with --missing of those
without evidence below --results. One that --time_limit stopped comes again until it is done: an epoch must fit into it.
Any number of machines may do this with one shared --out and --checkpoints: each run is claimed by one process, which
renews its claim every minute; that of a process that died is taken over, on another machine once it was silent for five
minutes. Who runs what now is said at the end of --list. A failed row leaves the others alone; the exit code is then 1.
"""

import datafree.interrupt  # noqa: F401

import shlex
import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path

import jobs
import papers
from datafree.claims import Claims, claimed
from datafree.cli import FOLDER, STARTED, Parser, cli, count, positive, weight
from datafree.errors import TimeLimit, UsageError
from datafree.records import read_records
from datafree.teachers import SHIPPED, teacher_file

HERE = Path(__file__).resolve().parent
FLAG = dict(action="store_true")
SHARED = dict(data_root="./datasets", checkpoints="./checkpoints", out="./runs", device=None, gpu=None)
ALIASES = dict(data_root=("--data",), out=("--output_dir",))  # as the scripts have them


def parse_args(argv: Sequence | None = None) -> Namespace:
    p = Parser(__file__, __doc__)
    p.usage = "%(prog)s [CELL ...] [--select KEY=VALUE ...] [options] [flags of the cells' scripts]"
    p.add(
        ("--select", "the cells with this paper, dataset, teacher, student or method, as the tables or the registry "
         "call them; commas between values", dict(nargs="+", metavar="KEY=VALUE")),
        ("--list", "print cells and their commands (default: all cells)", FLAG),
        ("--missing", "print those without evidence (default: of all cells)", FLAG),
        ("--dry-run", "print the cells' commands, run nothing", FLAG),
        ("--check", "compare the records with the published values, run nothing", FLAG),
        ("--margin", "by how much the best score of runs as published may fall short in --check (default: %(default)s)",
         dict(type=weight, default=papers.MARGIN, metavar="POINTS")),
        ("--seeds", "run seeds 0 to N - 1 (default: %(default)s)", dict(type=count, default=1, metavar="N")),
        ("--time_limit", "stop with a checkpoint before so many minutes have passed, exit code 75",
         dict(type=positive, metavar="MINUTES")),
        ("--executor", "make each cell and seed a job of this machine, or of Slurm; --dry-run prints the batch file",
         dict(choices=("local", "slurm"))),
        ("--jobs", "so many jobs at once (default: 1 on this machine, 256 on Slurm)", dict(type=count, metavar="N")),
        ("--slurm", "further options of sbatch, by their long names", dict(nargs="+", metavar="KEY=VALUE")),
        ("--results", "where the records are, beside those in --out (default: results/ beside this script)",
         FOLDER | dict(default=str(HERE / "results"))),
    )  # fmt: skip
    group = p.add_argument_group("for all commands, the teachers' included")
    for flag, default in SHARED.items():
        text = "(default: %(default)s)" if default else "as the scripts have it"
        names = (f"--{flag}", *ALIASES.get(flag, ()))
        group.add_argument(*names, help=text, default=default, metavar="DIR" if default else "X")
    args, rest = p.parse_known_args(argv)
    # Cells come first; what follows the first unknown flag is the scripts'.
    first = next((i for i, word in enumerate(rest) if word.startswith("-")), len(rest))
    args.cell, args.flags = rest[:first], rest[first:]
    if not (args.list or args.missing or args.cell or args.select):
        p.error("name a cell, or give --list")
    if args.executor and (args.list or args.check):
        p.error("--executor runs rows: leave --list and --check out")
    if args.jobs and not args.executor or args.slurm and args.executor != "slurm":
        p.error("--jobs is for --executor, --slurm for --executor slurm")
    if args.executor == "slurm" and not args.time_limit:
        p.error("--executor slurm needs --time_limit MINUTES: after so many a job stops, and is queued again")
    if wrong := [word for word in args.slurm or () if not all(word.partition("="))]:
        p.error(f"--slurm {wrong[0]}: it takes KEY=VALUE")
    if args.flags and (args.list or args.check or args.missing and not args.executor):
        p.error(f"these flags are for running a cell: {' '.join(args.flags)}")
    if args.seeds > 1 and any(flag.split("=")[0] == "--seed" for flag in args.flags):
        p.error("--seeds and --seed exclude each other")
    return args


def chosen(args: Namespace) -> list[papers.Cell]:
    """The cells that are named or selected; those of a selection without a command only to be listed."""
    named = [papers.find(name) for name in args.cell]
    if args.select:
        found = papers.select(args.select)
        named += found if args.list else [c for c in found if c.script]
        if not named:
            raise UsageError(f"no command for {', '.join(c.name for c in found)}: {found[0].reason}")
    return named or list(papers.cells())


def show(cells: Sequence[papers.Cell], records: Sequence[dict], running: Mapping[str, str]) -> None:
    """Print each table's heading and its cells, then which run is whose now."""
    heading = None
    for cell in cells:
        row = cell.row
        if heading != (heading := f"{row['source']}, {row['table']}"):
            print(f"\n# {heading}")
        n, command = sum(map(len, papers.runs_of(cell, records).values())), cell.command or f"none: {cell.reason}"
        name = f"{cell.name:11}{row['value']:>7}  {f'{n} runs' if n else '':7} {cell.dataset:10}"
        print(f"{name} {row['method'][:34]:34} {cell.teacher} -> {cell.student}:  {command}")
    if running:
        print("\n# running now", *(f"{name}: {who}" for name, who in running.items()), sep="\n")


def check(cell: papers.Cell, records: Sequence[dict], margin: float) -> bool:
    """Print how a cell's records compare with its value; whether it is reproduced, or of the benchmark measured."""
    found = papers.verdict(cell, records, margin)
    value = cell.row["value"] or "nothing" if cell.value is None else f"{cell.value:.2f}"
    print(f"{cell.name}: {found}, published {value}")
    for differs, runs in papers.runs_of(cell, records).items():
        for r in runs:
            error = f", standard error {r['standard_error']:.2f}" if r.get("standard_error") else ""
            told = f", differs: {differs}" if differs else ""
            print(f"  best {r['best']:.2f}, last {r['last']:.2f}{error}: {r['file']}{told}")
    return found in ("reproduced", "measured")


def commands(cell: papers.Cell, args: Namespace) -> list[list[str]]:
    """The scripts and flags that are to be run: the teacher's, if its file is missing, and the cell's, seed by seed.

    A teacher's further seeds have a folder of weights each: students learn from the first one's.
    """
    shared = [word for flag in SHARED if (value := getattr(args, flag)) for word in (f"--{flag}", value)]
    flags = [*cell.flags, *args.flags]
    own = papers.parse(cell.script, flags)  # a wrong flag ends it here, before hours of work
    if own.dataset not in (cell.dataset, "none"):
        raise UsageError(f"{cell.name} is of {cell.dataset}, not {own.dataset}: only --dataset none may replace it")
    made = []
    if cell.training and not own.teacher_ckpt:
        found = papers.parse(cell.training[0], cell.training[1:])
        file = teacher_file(args.checkpoints, found.dataset, found.model, getattr(found, "recipe", None))
        file = next((place for place in (file, SHIPPED / file.name) if place.exists()), file)
        made += [] if file.exists() else [cell.training]
        flags += ["--teacher_ckpt", str(file)] if own.dataset == "none" else []
    made = [[*command, *shared] for command in made]
    for seed in range(args.seeds):
        more = ["--seed", str(seed)] if seed else []
        if cell.script.startswith("teacher_train") and (seed := seed or own.seed):
            more += ["--checkpoints", str(Path(args.checkpoints) / f"seed{seed}")]
        made.append([cell.script, *flags, *shared, *more])
    return [[*command, "--resume"] for command in made]


def run(command: Sequence[str], out: str, time_limit: float | None) -> None:
    """Run a script, if nobody else does; its exit code, unless 0, is ours."""
    with claimed(out, name := run_name(command)):
        # To resume what is not there would be to go on with a shorter run, which may be another cell's.
        if not any((Path(out) / name / file).exists() for file in ("last.pt", "result.json")):
            command = [word for word in command if word != "--resume"]
        if time_limit:
            left = time_limit - (time.monotonic() - STARTED) / 60
            if left <= 0:
                raise TimeLimit("time limit: the same command goes on")
            command = [*command, "--time_limit", f"{left:.2f}"]
        if code := subprocess.run([sys.executable, HERE / command[0], *command[1:]]).returncode:
            if code < 0:  # it could not say so itself
                print(f"{name} was ended by signal {-code} (9: perhaps for lack of memory)", file=sys.stderr)
            sys.exit(code if code > 0 else 128 - code)


def run_name(command: Sequence[str]) -> str:
    """The name of the run that a script and its flags make."""
    return papers.parse(command[0], command[1:]).run_name


def rows(cells: Sequence[papers.Cell], args: Namespace) -> list[jobs.Row]:
    """Each cell and seed as a job, whose command is this script's."""
    ours = [word for flag in (*SHARED, "time_limit") if (value := getattr(args, flag)) for word in (f"--{flag}", value)]
    made = []
    for cell in cells:
        for seed in range(args.seeds):
            flags = [*args.flags, *(["--seed", str(seed)] if seed else [])]
            runs = [run_name(c) for c in commands(cell, Namespace(**{**vars(args), "seeds": 1, "flags": flags}))]
            command = [sys.executable, HERE / "reproduce.py", cell.name, *ours, *flags]
            name = f"{cell.name} seed {seed}" if args.seeds > 1 else cell.name
            made.append(jobs.Row(name, tuple(map(str, command)), tuple(runs)))
    return made


def execute(cells: Sequence[papers.Cell], args: Namespace) -> list[list[str]]:
    """Hand the rows to submitit; returns their commands."""
    every = rows(cells, args)
    todo = [row for row in every if row.runs[-1] in row.left(args.out)]
    if len(todo) < len(every) or not every:
        print(f"{len(every) - len(todo)} of {len(every)} rows are done already", file=sys.stderr)
    if not todo:
        return []
    if args.executor == "slurm":
        options = dict(word.split("=", 1) for word in args.slurm or ())
        jobs.run_on_slurm(todo, args.out, args.time_limit, args.jobs or 256, options, args.dry_run)
    elif args.dry_run:
        print("\n".join(f"# {row.name}\n{shlex.join(row.command)}" for row in todo))
    elif failed := jobs.run_here(todo, args.out, args.jobs or 1, one_gpu=args.gpu is None):
        print(f"{len(failed)} of {len(todo)} rows failed: {', '.join(failed)}", file=sys.stderr)
        sys.exit(1)
    return [[*row.command] for row in todo]


def main(args: Namespace) -> list[list[str]] | None:
    """List, check, show or run; returns the commands that were, or would be, run."""
    cells = chosen(args)
    if args.list or args.missing or args.check:
        # What --out has of the rows of --missing, each job sees for itself, seed by seed.
        more = [args.out] if Path(args.out).is_dir() and not args.executor else []
        records = read_records(args.results, *more)
    if args.check:
        reached = [check(cell, records, args.margin) for cell in cells]
        return [] if all(reached) else sys.exit(1)
    if args.missing and not args.list:
        cells = [c for c in cells if c.script and not papers.runs_of(c, records)]
    if args.executor:
        return execute(cells, args)
    if args.list or args.missing:
        return show(cells, records, Claims(args.out).running())
    every = {shlex.join(command): command for cell in cells for command in commands(cell, args)}
    for command in every.values():  # one teacher serves several cells
        print(shlex.join(["python", *command]), flush=True)
        if not args.dry_run:
            run(command, args.out, args.time_limit)
    return [*every.values()]


if __name__ == "__main__":
    cli(main, parse_args)
