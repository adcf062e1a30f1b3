"""Every flag of every script with hostile values and files; runs that are killed, and runs that meet.

What is tried is generated from the parsers: a new flag or script is covered as it stands.
"""

import math
import os
import platform
import random
import signal
import time
from pathlib import Path

import pytest
import storm

KILLABLE = [  # segmentation takes too long here: scripts/storm.sh kills it, too
    name
    for name in storm.scripts()
    if {"resume", "n_epochs"} <= {action.dest for action in storm.parser_of(name)._actions}
    and "digits" in storm.tiny(name)
]


@pytest.fixture(scope="module")
def place(tmp_path_factory, forks):
    return storm.Storm(tmp_path_factory.mktemp("storm"), forks)


@pytest.mark.parametrize("name", storm.scripts())
def test_flags_are_refused_in_one_line_or_make_sense(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    wrong, needs = [], storm.NEEDS.get(name, [])
    strangers = [[text] for text in storm.TEXTS] + [[f"--no_such{text}"] for text in storm.TEXTS]
    for words in strangers + [words for action in storm.flags_of(name) for words in storm.words_for(action)]:
        try:
            args, error = storm.parsed(name, [*needs, *words])
        except Exception as error:
            wrong.append((words, repr(error)[:200]))
            continue
        values = [] if args is None else [v for v in vars(args).values() if isinstance(v, float)]
        if args is None and not storm.is_line(error) or not all(map(math.isfinite, values)):
            wrong.append((words, error[:200]))
    assert not wrong, f"{len(wrong)}: {wrong[:5]}"
    assert not list(Path().iterdir())


@pytest.mark.parametrize("name", storm.scripts())
def test_runs_with_hostile_values(name, place):
    """A value of each flag of a path, and of two others: scripts/storm.sh tries all."""
    rng, wrong = random.Random(name), []
    flags = storm.hostile_flags(name)
    paths = [action for action in flags if storm.kind_of(action) == "path"]
    others = [action for action in flags if action not in paths]
    for action in paths + rng.sample(others, min(2, len(others))):
        for words in rng.sample(storm.run_words(action), 1):
            if fault := place.attempt(name, words)[1]:
                wrong.append((words, fault[-500:]))
    assert not wrong, wrong


@pytest.mark.parametrize("name", KILLABLE)
def test_killed_runs_end_as_undisturbed_ones(name, place):
    """Three kills of each script at random file operations, in interpreters that had done nothing before."""
    assert 3 * len(KILLABLE) >= 30
    assert place.interrupt(name, 3, random.Random(name), moments=False) == (3, None)


def test_second_run_of_a_name_is_refused(place, tmp_path):
    place.teach("DAFL_train")
    argv = place.argv("DAFL_train", "--n_epochs=100000", f"--out={tmp_path}")
    job = place.server.start("DAFL_train", argv)
    while not list(tmp_path.glob("*/last.pt")):
        assert not (job / "end.json").exists(), place.server.wait(job)
        time.sleep(0.01)
    process = int((job / "pid").read_text())
    os.kill(process, signal.SIGSTOP)
    try:
        before = storm.stat_of(tmp_path)
        for more in ([], ["--resume"]):
            end = place.server.run("DAFL_train", [*argv, *more])
            assert end.code == 2 and storm.is_line(end.stderr), end
            assert f"process {process} on {platform.node()}" in end.stderr
        assert storm.stat_of(tmp_path) == before
    finally:
        os.kill(process, signal.SIGKILL)
        place.server.wait(job)
