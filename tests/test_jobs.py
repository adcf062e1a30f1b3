"""Rows as jobs: claims that machines share, submitit's local executor, Slurm's batch file; most rows are tiny."""

import contextlib
import os
import re
import shlex
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

import jobs
import reproduce
from datafree import claims
from datafree.claims import Busy, Claims, claimed
from datafree.cli import cli

ROOT = Path(__file__).resolve().parent.parent
# A job of the runs named: each stops once, as by a time limit, and says in log.txt what it did.
WORK = f"""
import os, pathlib, sys
sys.path.insert(0, {str(ROOT)!r})
from datafree.claims import Busy, claimed
for run in sys.argv[1:]:
    folder = pathlib.Path(run)
    try:
        with claimed(".", run):
            with (folder / "log.txt").open("a") as log:
                if (folder / "result.json").exists():
                    continue
                stopped = (folder / "log.txt").stat().st_size > 0
                log.write(("done " if stopped else "stopped ") + os.environ.get("CUDA_VISIBLE_DEVICES", "all") + "\\n")
            if not stopped:
                sys.exit(75)
            (folder / "result.json").touch()
    except Busy:
        sys.exit(75)
"""


@contextlib.contextmanager
def forked(work, *args):
    """A process that does `work(*args)`; its number."""
    if not (pid := os.fork()):
        try:
            work(*args)
        finally:
            os._exit(0)
    try:
        yield pid
    except BaseException:
        os.kill(pid, signal.SIGKILL)
        raise
    finally:
        os.waitpid(pid, 0)


# Claims


def take_all(out, runs, name, start=0.0):
    time.sleep(max(0.0, start - time.monotonic()))
    for run in runs:
        with contextlib.suppress(Busy), claimed(out, run):
            if not (out / f"{run}.done").exists():
                time.sleep(0.01)  # as other work would, it lets the other run
                with (out / f"{run}.made").open("a") as file:
                    file.write(f"{name}\n")
                (out / f"{run}.done").touch()


def test_processes_that_race_never_have_the_same_run(tmp_path, monkeypatch):
    monkeypatch.setattr(claims, "WAIT", 0)
    runs = [f"run{n}" for n in range(100)]
    start = time.monotonic() + 0.5
    with forked(take_all, tmp_path, runs, "a", start), forked(take_all, tmp_path, runs, "b", start):
        pass
    take_all(tmp_path, runs, "c")  # those at which both had let the other go first
    made = [(tmp_path / f"{run}.made").read_text().split() for run in runs]
    assert all(len(names) == 1 for names in made) and {"a", "b"} <= {name for (name,) in made}
    assert Claims(tmp_path).running() == {} and not [*(tmp_path / ".locks").iterdir()]


def die_with(out, run):
    claim = claims._claim(out, run)
    claim.acquire()
    os._exit(9)  # before it could let go


def hold(out, run):
    with claimed(out, run):
        (out / "ready").touch()
        appears(out / "enough")


def appears(file):
    while not file.exists():
        time.sleep(0.05)


def test_a_dead_process_on_this_machine_has_nothing(tmp_path):
    with forked(die_with, tmp_path, "a.b") as pid:
        pass
    assert f"pid={pid}" in (tmp_path / ".locks" / "a.b.claim").read_text()
    assert Claims(tmp_path).running() == {}
    with forked(die_with, tmp_path, "a.b"):
        pass
    with claimed(tmp_path, "a.b"):
        assert str(os.getpid()) in Claims(tmp_path).running()["a.b"]


def test_so_on_a_disk_that_exchanges_no_files(tmp_path, monkeypatch):
    """As NFS, where filelock takes no dead process's place."""
    if not hasattr(claims.SoftFileLease, "_take_over"):
        pytest.skip("this filelock exchanges none anywhere")
    module = sys.modules[claims.SoftFileLease._take_over.__module__]
    monkeypatch.setattr(module, "exchange_names", lambda source, target: False)
    with forked(die_with, tmp_path, "a.b"):
        pass
    Claims(tmp_path).running()  # frees it
    with forked(hold, tmp_path, "a.b"):
        appears(tmp_path / "ready")
        assert "a.b" in Claims(tmp_path).running()
        (tmp_path / "enough").touch()
    assert Claims(tmp_path).running() == {} and not [*(tmp_path / ".locks").iterdir()]


def test_a_silent_process_elsewhere_loses_its_claim_and_a_living_one_does_not(tmp_path, monkeypatch):
    for name, seconds in (("LEASE", 3.0), ("BEAT", 0.3), ("WAIT", 0)):
        monkeypatch.setattr(claims, name, seconds)
    with forked(die_with, tmp_path, "dead"):
        pass
    file = tmp_path / ".locks" / "dead.claim"
    file.write_text(re.sub(r"host=.*", "host=elsewhere", file.read_text()))
    looks, started = Claims(tmp_path), time.monotonic()
    with forked(hold, tmp_path, "alive") as pid:
        appears(tmp_path / "ready")
        assert looks.running()["dead"].endswith("on elsewhere")
        with pytest.raises(Busy, match="dead is run by process [0-9]+ on elsewhere"), claimed(tmp_path, "dead"):
            pass
        while "dead" in looks.running():
            assert time.monotonic() - started < 60
            time.sleep(0.1)
        assert time.monotonic() - started >= claims.LEASE
        with claimed(tmp_path, "dead"):
            assert f"process {pid} " in looks.running()["alive"]
            with pytest.raises(Busy, match=f"alive is run by process {pid}"), claimed(tmp_path, "alive"):
                pass
        (tmp_path / "enough").touch()
    assert looks.running() == {}


def test_who_was_silent_for_too_long_stops(tmp_path, monkeypatch, request):
    monkeypatch.setattr(claims, "LEASE", 1.0)
    monkeypatch.setattr(claims, "BEAT", 0.1)
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # as it is in the background
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, before))
    with pytest.raises(Busy, match="a went to another process"), claimed(tmp_path, "a"):
        file, other = tmp_path / ".locks" / "a.claim", tmp_path / "other"
        other.write_text("another's")
        other.replace(file)  # at once: a sign of life must meet a claim, ours or another's
        subprocess.run(["sleep", "60"])
    assert file.read_text() == "another's"


# Executors


def row(name, *runs):
    return jobs.Row(name, (sys.executable, "-c", WORK, *runs), runs)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    pytest.importorskip("submitit")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(jobs, "POLL", 0.1)
    for run in ("teacher", "one", "two", "free"):
        Path(run).mkdir()
    return tmp_path


def test_local_jobs_come_again_until_each_is_done_once(folder, monkeypatch, capfd):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    broken = jobs.Row("broken", (sys.executable, "-c", "import sys; sys.exit('there is no such teacher')"), ("broken",))
    rows = [row("a", "teacher", "one"), row("b", "teacher", "two"), broken]
    assert jobs.run_here(rows, folder, at_once=2) == ["broken"]
    for run in ("teacher", "one", "two"):
        assert re.fullmatch(r"stopped [35]\ndone [35]\n", (folder / run / "log.txt").read_text()), run
    out, err = capfd.readouterr()
    assert out.count("b: waits, teacher is run by ") >= 1 and err == ""
    assert out.count("a: runs on ") + out.count("b: runs on ") == 5 and "GPU 3" in out and "GPU 5" in out
    assert out.count("stopped, comes again") == 3 and out.count("a: done\n") == out.count("b: done\n") == 1
    failed = re.search(r"broken: failed, exit code 1: there is no such teacher \((.*)\)", out)
    assert "no such teacher" in Path(failed[1]).read_text()
    assert [p.name for p in (folder / ".jobs").iterdir()] == [Path(failed[1]).parent.name]  # the others' logs are gone


def test_what_another_has_is_left_alone_until_it_is_done(folder, capfd):
    def other():
        with claimed(folder, "one"):
            (folder / "ready").touch()
            appears(folder / "free" / "result.json")
            (folder / "one" / "result.json").touch()

    with forked(other) as pid:
        appears(folder / "ready")
        assert jobs.run_here([row("a", "one"), row("b", "free")], folder, at_once=1) == []
    out = capfd.readouterr().out
    assert f"a: waits, one is run by process {pid} on " in out and "a: runs" not in out and "a: done\n" in out
    assert not (folder / "one" / "log.txt").exists()


SLURM = {
    "sbatch": 'cp "$1" batch.sh; echo Submitted batch job 7',
    "srun": 'while [[ $1 == --* ]]; do [[ $1 == --unbuffered ]] || shift; shift; done; exec "$@"',
    "scontrol": 'echo "$@" >>requeued.txt',
}


def test_slurm_requeues_what_stopped(folder, monkeypatch, capsys):
    for name, text in SLURM.items():
        file = folder / "bin" / name
        file.parent.mkdir(exist_ok=True)
        file.write_text(f"#!/bin/bash\n{text}\n")
        file.chmod(stat.S_IRWXU)
    rows, options = [row("a", "one"), row("b", "two")], {"partition": "gpu", "gpus-per-node": "1"}
    jobs.run_on_slurm(rows, folder, 230.5, 8, options, dry_run=True)
    shown = capsys.readouterr().out
    monkeypatch.setenv("PATH", f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}")
    jobs.run_on_slurm(rows, folder, 230.5, 8, options, dry_run=False)
    assert "a: job 7_0: " in capsys.readouterr().out
    batch = (folder / "batch.sh").read_text()
    assert shown.startswith(batch) and shlex.join(rows[1].command) in shown  # what was shown is what is submitted
    for line in ("array=0-1%2", "gpus-per-node=1", "partition=gpu", "requeue", "time=241"):
        assert f"#SBATCH --{line}\n" in batch
    task = dict(SLURM_JOB_ID="8", SLURM_ARRAY_JOB_ID="7", SLURM_ARRAY_TASK_ID="1", SLURM_PROCID="0")
    for says in ("stopped", "done"):
        done = subprocess.run(["bash", "batch.sh"], env=os.environ | task, capture_output=True, text=True)
        assert (done.returncode == 0) == (says == "done"), done.stderr
        assert says in (folder / "two" / "log.txt").read_text()
    assert (folder / "requeued.txt").read_text() == "requeue 7_1\n" and not (folder / "one" / "log.txt").exists()


# The command line


def test_rows_are_commands_of_reproduce(tmp_path, capsys):
    pytest.importorskip("submitit")
    where = ("--out", tmp_path, "--checkpoints", tmp_path)
    flags = ("dafl-13", "--seeds", 2, "--executor", "slurm", "--time_limit", 60, "--dry-run", "--n_epochs", 5, *where)
    first, second = reproduce.main(reproduce.parse_args([*map(str, flags)]))
    shown, runs = capsys.readouterr().out, []
    assert "#SBATCH --time=70\n" in shown and "#SBATCH --array=0-1%2\n" in shown
    assert f"# 1: dafl-13 seed 1: {shlex.join(second)}\n" in shown
    for seed, (_python, script, *argv) in enumerate((first, second)):
        args = reproduce.parse_args(argv)
        assert Path(script) == ROOT / "reproduce.py" and (args.cell, args.time_limit) == (["dafl-13"], 60)
        command = reproduce.commands(reproduce.chosen(args)[0], args)[-1]
        assert command[1 + command.index("--n_epochs")] == "5" and (seed == 0 or "--seed 1" in " ".join(command))
        runs.append(tmp_path / reproduce.run_name(command))
    for run, left in ((runs[1], [first]), (runs[0], [])):
        run.mkdir()
        (run / "result.json").touch()
        assert reproduce.main(reproduce.parse_args([*map(str, flags)])) == left
        assert f"{2 - len(left)} of 2 rows are done already" in capsys.readouterr().err


def test_missing_rows_are_those_without_a_result(tmp_path, capsys):
    flags = "--missing", "--executor", "local", "--dry-run", "--results", tmp_path, "--out", tmp_path
    every = reproduce.main(reproduce.parse_args([*map(str, flags)]))
    assert len(every) == len([c for c in reproduce.papers.cells() if c.script])
    assert shlex.join(every[-1]) in capsys.readouterr().out


def test_a_run_that_another_has_is_not_started(tmp_path, monkeypatch, capsys):
    calls, flags = [], ("dafl-13", "--checkpoints", str(tmp_path), "--out", str(tmp_path))
    monkeypatch.setattr(reproduce.subprocess, "run", calls.append)
    monkeypatch.setattr(reproduce, "SHIPPED", tmp_path)
    training, _ = reproduce.main(reproduce.parse_args([*flags, "--dry-run"]))
    with forked(hold, tmp_path, reproduce.run_name(training)) as pid:
        appears(tmp_path / "ready")
        reproduce.main(reproduce.parse_args(["dafl-13", "--list", "--out", str(tmp_path)]))
        assert f"# running now\n{reproduce.run_name(training)}: process {pid} on " in capsys.readouterr().out
        with pytest.raises(SystemExit) as stop:
            cli(reproduce.main, lambda: reproduce.parse_args(flags))
        (tmp_path / "enough").touch()
    assert stop.value.code == 75 and not calls
    assert f"is run by process {pid} on " in capsys.readouterr().err


def test_slurm_that_is_not_here(refused, tmp_path, monkeypatch):
    pytest.importorskip("submitit")
    monkeypatch.setenv("PATH", "")
    argv = ("dafl-13", "--executor", "slurm", "--time_limit", "9", "--out", str(tmp_path))
    assert "sbatch and srun are not here" in refused(reproduce, *argv)


def test_mistakes(refused, tmp_path, monkeypatch):
    slurm = ("dafl-13", "--executor", "slurm", "--out", str(tmp_path))
    assert "needs --time_limit" in refused(reproduce, *slurm)
    assert "leave --list and --check out" in refused(reproduce, *slurm, "--list")
    assert "--jobs is for --executor" in refused(reproduce, "dafl-13", "--jobs", "2")
    local = ("dafl-13", "--executor", "local", "--out", str(tmp_path))
    assert "--slurm for --executor slurm" in refused(reproduce, *local, "--slurm", "partition=gpu")
    assert "--slurm gpu: it takes KEY=VALUE" in refused(reproduce, *slurm, "--time_limit", "9", "--slurm", "gpu")
    monkeypatch.setitem(sys.modules, "submitit", None)
    for flags in (slurm, local):
        error = refused(reproduce, *flags, "--time_limit", "9")
        assert f"--executor needs submitit: {sys.executable} -m pip install submitit" in error
