"""Rows of the tables as jobs that submitit runs, on this machine or on Slurm.

A row is a cell and a seed; its job is `reproduce.py CELL ... --seed N`, which trains the teacher first and claims each
run. One that --time_limit stopped, or that met another's claim, ends with exit code 75 and comes again: here behind the
other rows, on Slurm by `scontrol requeue`.
"""

import contextlib
import math
import os
import platform
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType

import torch

from datafree import checkpoint
from datafree.claims import Claims
from datafree.errors import UsageError

AGAIN = 75  # EX_TEMPFAIL
POLL = 5  # seconds between two looks at the jobs of this machine
MARGIN = 10  # minutes that Slurm grants beyond --time_limit, in which a script starts and saves


@dataclass(frozen=True)
class Row:
    """A job, as it is pickled: a command that ends with 0, with 75 if it is to come again, or that fails.

    name: for people. command: the program and its arguments. runs: the run folders that it still has to make.
    gpus: what CUDA_VISIBLE_DEVICES is to be. slurm: whether it requeues itself.
    """

    name: str
    command: tuple[str, ...]
    runs: tuple[str, ...]
    gpus: str | None = None
    slurm: bool = False

    def left(self, out: str | Path) -> list[str]:
        """Those of its runs that are not finished."""
        return [run for run in self.runs if not (Path(out) / run / "result.json").is_file()]

    def __call__(self) -> int:
        gpus = {} if self.gpus is None else {"CUDA_VISIBLE_DEVICES": self.gpus}
        process = subprocess.Popen(self.command, env={**os.environ, **gpus}, start_new_session=True)
        try:
            code = process.wait()
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)  # no script outlives its job
        if self.slurm and code == AGAIN:
            from submitit import JobEnvironment

            signal.raise_signal(getattr(signal, f"SIG{JobEnvironment.USR_SIG}"))  # as Slurm's own warning does
        if self.slurm and code:
            sys.exit(code)  # Slurm calls it failed
        return code

    def checkpoint(self):
        """What submitit submits again: the same, since the scripts resume."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)


def load_submitit() -> ModuleType:
    """The package, told to pickle this module by value: jobs start in any folder. Raises UsageError without it."""
    try:
        import cloudpickle
        import submitit
    except ImportError as error:
        raise UsageError(f"--executor needs submitit: {sys.executable} -m pip install submitit") from error
    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    return submitit


@contextlib.contextmanager
def _stderr_to(file: Path) -> Iterator[None]:
    """Processes that the block starts complain there: Ctrl-C is answered in one line, by this one."""
    own = os.dup(2)
    with file.open("w") as stream:
        os.dup2(stream.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(own, 2)
        os.close(own)


def gpus() -> list[str]:
    """The GPUs of this machine, as CUDA_VISIBLE_DEVICES names them."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return [*filter(None, named.split(","))] if named is not None else [*map(str, range(torch.cuda.device_count()))]


def run_here(rows: Sequence[Row], out: str | Path, at_once: int, one_gpu: bool = True) -> list[str]:
    """Run rows on this machine, and say what becomes of them; returns the names of those that failed.

    Args:
        rows: none is started while another process has a run that it needs. out: the parent of the run folders.
        at_once: jobs. one_gpu: whether a job sees one GPU, the least used, or all.
    """
    submitit, devices = load_submitit(), gpus()
    logs = Path(out).absolute() / ".jobs"
    checkpoint.check_writable(logs, "--out")

    def start(row: Row) -> None:
        used = [other.gpus for other in running]
        row = replace(row, gpus=min(devices, key=used.count) if devices and one_gpu else ",".join(devices))
        folder = Path(tempfile.mkdtemp(prefix=f"{row.name.replace(' ', '-')}-", dir=logs))
        executor = submitit.LocalExecutor(folder)
        executor.update_parameters(timeout_min=10**6)  # the scripts keep --time_limit themselves
        with _stderr_to(folder / "controller.txt"):
            running[row] = job = executor.submit(row)
        where = f"{platform.node()}{f', GPU {row.gpus}' if row.gpus else ''}, process {job.job_id}"
        print(f"{row.name}: runs on {where}: {job.paths.stdout}", flush=True)

    def end(row: Row) -> None:
        job = running.pop(row)
        code = "none" if job.exception() else job.result()
        if code not in (0, AGAIN):
            failed.append(row.name)
            last = (job.stderr() or "").strip().splitlines() or ["it says nothing"]
            print(f"{row.name}: failed, exit code {code}: {last[-1]} ({job.paths.stderr})", flush=True)
            return
        if code == AGAIN:
            waiting[row] = ""
        print(f"{row.name}: {'stopped, comes again' if code else 'done'}", flush=True)
        shutil.rmtree(job.paths.folder)

    claims, waiting, running, failed = Claims(out), dict.fromkeys(rows, ""), {}, []  # waiting: row -> what was said
    try:
        while waiting or running:
            taken = claims.running() | {run: "this command" for row in running for run in row.left(out)}
            for row in [*waiting]:
                left = row.left(out)
                other = next((f"{run} is run by {taken[run]}" for run in left if run in taken), "")
                if row.runs[-1] not in left:
                    del waiting[row]
                    print(f"{row.name}: done", flush=True)
                elif not other and len(running) < at_once:
                    del waiting[row]
                    start(row)
                    taken |= dict.fromkeys(left, "this command")
                elif other and waiting[row] != other:
                    waiting[row] = other
                    print(f"{row.name}: waits, {other}", flush=True)
            for row in [row for row, job in running.items() if job.done()]:
                end(row)
            time.sleep(POLL)
    finally:
        for job in running.values():
            job.cancel()
    return failed


def run_on_slurm(
    rows: Sequence[Row], out: str | Path, time_limit: float, at_once: int, options: dict[str, str], dry_run: bool
) -> None:
    """Submit rows as one job array, or with `dry_run` print its batch file and what each task runs.

    Args:
        time_limit: of a job, in minutes. at_once: jobs. options: further ones of sbatch, by its long names.

    Raises:
        UsageError: Slurm is not here, or refuses.
    """
    load_submitit()
    from submitit.core.utils import FailedJobError
    from submitit.slurm.slurm import SlurmExecutor, _make_sbatch_string

    folder = (Path(out) / ".jobs" / "slurm").absolute()
    settings = dict(job_name="datafree", time=math.ceil(time_limit) + MARGIN, array_parallelism=at_once)
    settings["additional_parameters"] = {"requeue": True} | {k.replace("-", "_"): v for k, v in options.items()}
    if dry_run:
        command = f"{shlex.quote(sys.executable)} -u -m submitit.core._submit {shlex.quote(str(folder))}"
        print(_make_sbatch_string(command, folder, map_count=len(rows) if len(rows) > 1 else None, **settings))
        for task, row in enumerate(rows):
            print(f"# {task}: {row.name}: {shlex.join(row.command)}")
        return
    if not (shutil.which("sbatch") and shutil.which("srun")):
        raise UsageError("--executor slurm: sbatch and srun are not here: go where they are, or give --dry-run")
    executor = SlurmExecutor(folder, max_num_timeout=10**6)
    executor.update_parameters(**settings)
    try:
        submitted = executor.submit_array([replace(row, slurm=True) for row in rows])
    except (FailedJobError, OSError) as error:
        raise UsageError(f"--executor slurm: sbatch refuses: {error}") from error
    for row, job in zip(rows, submitted, strict=True):
        print(f"{row.name}: job {job.job_id}: {job.paths.stdout}")
