"""Whatever a command line or a file holds: it is taken, or refused by an error of ours, and nothing else happens."""

import argparse
import contextlib
import copy
import csv
import functools
import io
import json
import math
import shutil
from pathlib import Path

import pytest
import storm
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from datafree import checkpoint
from datafree.errors import UsageError
from datafree.plots import plot_accuracy
from datafree.records import read_records
from datafree.run import LOCKS, Run, finished
from datafree.runtime import Runtime

QUICK = settings(
    max_examples=80, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck)
)
FLAGS = sorted({flag for name in storm.scripts() for a in storm.parser_of(name)._actions for flag in a.option_strings})
VALUES = sorted({v for a in storm.parser_of("datafree_kd")._actions for v in map(str, a.choices or ())})
WORDS = st.one_of(
    st.sampled_from(FLAGS),
    st.sampled_from([*VALUES, *storm.NUMBERS, *storm.TEXTS]),
    st.builds("{}={}".format, st.sampled_from(FLAGS), st.sampled_from([*VALUES, *storm.NUMBERS, *storm.TEXTS])),
    st.text(max_size=20),
    st.integers().map(str),
    st.floats().map(str),
)
PLAIN = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5), st.just(10**9), st.just(10**400)
)
JSON = st.recursive(
    PLAIN, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
)
TENSORS = st.sampled_from([
    torch.zeros(()), torch.zeros(0), torch.full((4, 3), math.nan), torch.zeros(4, 3, dtype=torch.complex64),
    torch.zeros(4, 3, dtype=torch.int8), torch.zeros(3, 4), torch.zeros(4, 3).to_sparse(),
    torch.zeros(10, dtype=torch.uint8), torch.zeros(2, 2, 2, dtype=torch.float64), nn.Parameter(torch.ones(4)),
])  # fmt: skip


@QUICK
@given(st.sampled_from(sorted(storm.scripts())), st.lists(WORDS, max_size=6))
def test_any_command_line_is_taken_or_refused_in_one_line(name, words):
    if {"-h", "--help"} & set(words):
        return
    args, error = storm.parsed(name, [*storm.NEEDS.get(name, ()), *words])
    assert args is not None or storm.is_line(error), error


@st.composite
def spoilt(draw, content: bytes) -> bytes:
    """Some bytes of a file, changed, cut off or doubled."""
    for _ in range(draw(st.integers(1, 3))):
        i = draw(st.integers(0, max(0, len(content) - 1)))
        kind = draw(st.sampled_from("change cut insert drop all".split()))
        if kind == "change":
            content = content[:i] + bytes([draw(st.integers(0, 255))]) + content[i + 1 :]
        elif kind == "cut":
            content = content[:i]
        elif kind == "insert":
            content = content[:i] + draw(st.binary(max_size=9)) + content[i:]
        elif kind == "drop":
            content = content[:i] + content[i + draw(st.integers(1, 99)) :]
        else:
            content = draw(st.binary(max_size=99))
    return content


def parts(content, path: tuple = ()) -> list[tuple]:
    """The paths of keys to all parts of a nested content."""
    items = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    return [path] * bool(path) + [p for key, value in items for p in parts(value, (*path, key))]


DROPPED = object()
PLACES = st.integers(0, 10**4)


def twisted(content, place: int, value):
    """A content whose part of that number is dropped, or is the value."""
    content = copy.deepcopy(content)
    places = parts(content)
    *way, key = places[place % len(places)]
    inner = functools.reduce(lambda found, step: found[step], way, content)
    if value is DROPPED:
        del inner[key]
    else:
        inner[key] = value
    return content


ANYTHING = st.one_of(JSON, TENSORS, st.just(DROPPED))


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))


def open_run(out: Path, resume: bool):
    """A run of three epochs of a small network: the run, its network, the epoch that it starts with."""
    args = argparse.Namespace(
        out=str(out), run_name="run", resume=resume, n_epochs=3, visdom=None, time_limit=None, seed=0, tag="",
        command="python x.py", script="x.py",
    )  # fmt: skip
    model = network()
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.rand(5, 3)).sum().backward()
    optimizer.step()
    run = Run(args, Runtime(torch.device("cpu"), "fp32"))
    return run, model, run.start(student=model, optimizer=optimizer)


def end_epoch(run, model, epoch):
    run.end_epoch(epoch, 50.0, {"loss": 0.5}, model, {"model": "small", "mean": [0.5], "std": [0.5]})


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder of a run that has two of its three epochs."""
    out = tmp_path_factory.mktemp("whole")
    run, model, _ = open_run(out, False)
    end_epoch(run, model, 0)
    end_epoch(run, model, 1)
    return out / "run"


def goes_on(whole: Path, out: Path, name: str, content: bytes) -> None:
    """Resume the run with another file of that name: it goes on, or is refused and left as it is."""
    shutil.rmtree(out, ignore_errors=True)
    shutil.copytree(whole, out / "run")
    (out / "run" / name).write_bytes(content)
    before = {path: path.read_bytes() for path in (out / "run").glob("*.*")}
    try:
        run, model, epoch = open_run(out, True)
    except UsageError:
        assert before == {path: path.read_bytes() for path in (out / "run").glob("*.*")}
        return
    if epoch < 3:
        try:
            end_epoch(run, model, epoch)
        except UsageError as error:  # what the file held was not finite
            assert "NaN" in str(error)
    with (out / "run" / "metrics.csv").open(newline="") as file:
        assert all(None not in row and None not in row.values() for row in csv.DictReader(file))


@QUICK
@given(PLACES, ANYTHING)
def test_any_last_pt_goes_on_or_is_refused(whole, tmp_path_factory, place, value):
    state = checkpoint.read(whole / "last.pt")
    buffer = io.BytesIO()
    torch.save(twisted(state, place, value), buffer)
    goes_on(whole, tmp_path_factory.getbasetemp() / "twisted", "last.pt", buffer.getvalue())


@QUICK
@given(st.data(), st.sampled_from(["last.pt", "metrics.csv", "args.json", "best.pt"]))
def test_any_bytes_in_a_run_go_on_or_are_refused(whole, tmp_path_factory, data, name):
    content = data.draw(spoilt((whole / name).read_bytes()))
    goes_on(whole, tmp_path_factory.getbasetemp() / "spoilt", name, content)


@QUICK
@given(PLACES, JSON | st.just(DROPPED), st.booleans())
def test_any_args_json_beside_a_longer_run(whole, tmp_path_factory, place, value, all_of_it):
    """A shorter run's args.json is read when a longer one looks for what it goes on from."""
    out = tmp_path_factory.getbasetemp() / "shorter"
    shutil.rmtree(out, ignore_errors=True)
    shutil.copytree(whole, out / "run-n_epochs2")
    flags = json.loads((whole / "args.json").read_text()) | {"n_epochs": 2}
    content = None if value is DROPPED else value if all_of_it else twisted(flags, place, value)
    (out / "run-n_epochs2" / "args.json").write_text(json.dumps(content))
    try:
        with contextlib.suppress(UsageError):
            open_run(out, True)
    finally:
        for held in LOCKS.values():
            held.release(force=True)


RESULT = {
    "name": "run", "script": "x.py", "score": "Acc@1", "last": 50.0, "best": 51.0, "best_epoch": 1, "seconds": 1.5,
    "seed": 0, "command": "python x.py", "args": {"n_epochs": 2}, "pieces": [{"epochs": [1, 2]}], "published": [],
}  # fmt: skip


@QUICK
@given(
    st.one_of(st.builds(twisted, st.just(RESULT), PLACES, JSON | st.just(DROPPED)), JSON)
    .map(json.dumps)
    .map(str.encode)
    | spoilt(json.dumps(RESULT).encode())
)
def test_any_result_json_is_read_or_refused(tmp_path_factory, content):
    folder = tmp_path_factory.getbasetemp() / "results" / "run"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "result.json").write_bytes(content)
    args = argparse.Namespace(out=str(folder.parent), run_name="run", resume=True)
    for read in (lambda: finished(args), lambda: read_records(folder)):
        with contextlib.suppress(UsageError):
            read()
    assert (folder / "result.json").read_bytes() == content


@QUICK
@given(st.data(), PLACES, ANYTHING, st.booleans())
def test_any_teacher_is_loaded_or_refused(whole, tmp_path_factory, data, place, value, some_bytes):
    path = tmp_path_factory.getbasetemp() / "teacher.pt"
    torch.save(twisted(checkpoint.read(whole / "best.pt"), place, value), path)
    if some_bytes:
        path.write_bytes(data.draw(spoilt((whole / "best.pt").read_bytes())))
    model = network()
    try:
        content = checkpoint.read(path)
        checkpoint.metadata_of(content, path)
        checkpoint.load_weights(model, content, path, "small")
    except UsageError:
        return
    assert all(value.isfinite().all() for value in model.state_dict().values())


ROWS = b"epoch,seconds,accuracy,loss\r\n1,0.5,50.0,0.5\r\n2,1.5,51.0,0.25\r\n"
CELLS = st.lists(st.lists(st.text(max_size=5) | st.floats().map(str), max_size=5).map(",".join), max_size=4)


@settings(QUICK, max_examples=25)
@given(spoilt(ROWS) | CELLS.map(lambda rows: "\n".join(["epoch,seconds,accuracy", *rows]).encode(errors="replace")))
def test_any_metrics_csv_is_drawn_or_refused(tmp_path_factory, content):
    folder = tmp_path_factory.getbasetemp()
    (folder / "metrics.csv").write_bytes(content)
    with contextlib.suppress(UsageError):
        plot_accuracy(folder / "curves.png", {"run": folder / "metrics.csv"}, over="epoch")
