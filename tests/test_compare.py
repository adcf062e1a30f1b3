"""RESULTS.md is what compare.py makes of results/; every published cell has its command."""

import csv
import io
import json
import re
from pathlib import Path

import pytest

import compare
import reproduce

ROOT = Path(__file__).parent.parent
CELLS = {cell.name: cell for cell in reproduce.cells()}


def test_every_cell_is_there_once_and_has_a_command_that_parses():
    rows = (ROOT / "results" / "paper_tables.csv").read_text().splitlines()
    assert len(CELLS) == len(rows) - 1 == 210
    for cell in CELLS.values():
        if cell.script is None:
            assert cell.reason and cell.command is None
            continue
        assert (ROOT / cell.script).is_file()
        args = cell.args()
        assert args.get("dataset") == cell.dataset
        for script, _, target in cell.prepare:
            assert (ROOT / script).is_file() and Path(target).name.startswith(cell.dataset)
    assert sum(cell.script is None for cell in CELLS.values()) == 9


@pytest.mark.parametrize(
    ("name", "command"),
    [
        ("dafl-13", "python DAFL_train.py --dataset mnist --teacher lenet5 --student lenet5_half"),
        (
            "dfad-18",
            "python vanilla_kd.py --dataset cifar10 --teacher resnet34 --student resnet18 "
            "--transfer_set noise",
        ),
        (
            "mmrazor-01",
            "python DFAD_cifar.py --dataset cifar10 --teacher resnet34 --student resnet18 --variant mmrazor",
        ),
        (
            "fast-45",
            "python datafree_kd.py --dataset cifar10 --teacher wrn40_2 --student wrn16_2 "
            "--method fast_meta --g_steps 2",
        ),
    ],
)
def test_commands(name, command):
    assert CELLS[name].command == command


def test_list_prints_every_cell(capsys):
    reproduce.main(reproduce.parse_args(["--list"]))
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.split(" ")[0] in CELLS for line in lines) == 210
    assert sum(line.startswith("# ") for line in lines) == len(
        {(c.row["source"], c.row["table"]) for c in CELLS.values()}
    )


def test_dry_run_shows_the_teacher_first_and_runs_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(reproduce.subprocess, "run", None)
    flags = ["dafl-13", "--dry-run", "--seed", "1", "--data_root=elsewhere"]
    teacher, student = reproduce.main(reproduce.parse_args(flags))
    assert teacher[:5] == ["teacher_train.py", "--dataset", "mnist", "--model", "lenet5"]
    assert teacher[-3:] == ["--data_root", "elsewhere", "--resume"]
    assert student[0] == "DAFL_train.py" and student[-5:] == [
        "--seed",
        "1",
        "--data_root",
        "elsewhere",
        "--resume",
    ]
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "mnist-lenet5.pt").touch()
    assert len(reproduce.main(reproduce.parse_args(flags))) == 1
    assert "is there already" in capsys.readouterr().out


def test_cells_that_cannot_be_run(refused):
    assert "did you mean dafl-1" in refused(reproduce, "dafl-133")
    assert "has no command: another paper's method" in refused(reproduce, "dafl-11")
    assert "name a cell" in refused(reproduce)


def result(cell, **changes):
    """What a run of a cell leaves, with other values where `changes` says."""
    args = json.loads(json.dumps(CELLS[cell].args(), default=str))
    args |= {k: v for k, v in changes.items() if k in args}
    facts = {
        "name": f"run-{args['seed']}",
        "last": 97.0,
        "best": 98.0,
        "seconds": 120.0,
        "teacher_accuracy": 99.0,
        "hardware": "a machine",
        "seed": args["seed"],
        "command": CELLS[cell].command,
        "args": args,
    }
    return facts | {k: v for k, v in changes.items() if k not in args}


@pytest.fixture
def folder(tmp_path):
    """Results: DAFL on MNIST with three seeds and once shorter, a student from scratch, and a run
    of no cell."""
    runs = [
        *(result("dafl-13", seed=s, best=98.0 + s) for s in (0, 1, 2)),
        result("dafl-13", n_epochs=50, best=95.0),
        result("dafl-03", best=98.7),
        result("dafl-13", dataset="digits", name="stray"),
    ]
    for i, run in enumerate(runs):
        (tmp_path / f"{i}.json").write_text(json.dumps(run))
    (tmp_path / "bench.json").write_text('{"ratio": 7}')
    return tmp_path


def records_of(folder):
    return compare.collect(compare.read_results(folder))


def test_seeds_are_averaged_and_shorter_runs_stand_apart(folder):
    records, others = records_of(folder)
    full, short = (r for r in records if r["cell"] == "dafl-13")
    assert (full["n"], full["best"], full["best_std"], full["differs"]) == (3, 99.0, 1.0, "")
    assert full["best_minus_paper"] == pytest.approx(99.0 - 98.2)
    assert (full["teacher_score"], full["scratch_score"], full["minutes"]) == (99.0, 98.7, 2.0)
    assert (short["n"], short["best"], short["best_std"]) == (1, 95.0, None)
    assert short["differs"] == "--n_epochs 50 (200)"
    assert [r["name"] for r in others] == ["stray"]
    # The same command stands in DFAD's table as well, and 208 other cells have nothing.
    assert {r["cell"] for r in records if r["n"]} == {"dafl-03", "dafl-13", "dfad-21"}
    assert len({r["cell"] for r in records}) == 210
    assert all(r["note"] for r in records if not r["n"])


def test_segmentation_is_a_fraction_as_in_the_paper(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps(result("dfad-41", best=53.0)))
    record = next(r for r in records_of(tmp_path)[0] if r["n"])
    assert record["cell"] == "dfad-41" and record["best"] == pytest.approx(0.53)
    assert record["best_minus_paper"] == pytest.approx(0.53 - 0.535)


def test_markdown_names_everything(folder):
    text = compare.markdown(*records_of(folder))
    assert "98.20 | 97.00 ± 0.00 | 99.00 ± 1.00 | 3 | +0.80" in text
    assert "3 of 210 published cells" in text and "| stray |" in text
    assert all(f"| {name} |" in text for name in CELLS)
    assert "How `datafree_kd.py` differs from the published code (--as_published brings" in text
    assert re.search(r"How `DAFL_train.py` differs .*:\n\n1\. .*\n2\. .*\n3\. .*\n4\. ", text)
    rows = [line for line in text.splitlines() if line.startswith("| dafl-")]
    assert len({line.count("|") for line in rows}) == 1


def test_formats_and_filters(folder, capsys):
    def run(*flags):
        compare.main(compare.parse_args(["--results", str(folder), *flags]))
        return capsys.readouterr().out

    table = list(csv.DictReader(io.StringIO(run("--format", "csv", "--dataset", "MNIST"))))
    assert {r["dataset"] for r in table} == {"MNIST"}
    assert len(json.loads(run("--format", "json"))["cells"]) == 212
    text = run("--dataset", "MNIST", "--method", "DAFL")
    assert "| dafl-14 |" in text and "dafl-01" not in text and "stray" not in text


def test_a_file_and_plots(folder, tmp_path, capsys):
    out = tmp_path / "new" / "RESULTS.md"
    out.parent.mkdir()
    compare.main(compare.parse_args(["--results", str(folder), "--out", str(out)]))
    assert out.read_text().startswith("# Results")
    assert (out.parent / "results" / "plots" / "synthesis-cifar-10.png").stat().st_size > 5000
    metrics = sorted(str(p) for p in (ROOT / "results" / "mnist").glob("*.metrics.csv"))
    picture = tmp_path / "curves.png"
    compare.main(compare.parse_args(["--curves", *metrics, "--out", str(picture)]))
    assert picture.stat().st_size > 5000


def test_what_cannot_be_compared(folder, refused):
    assert "no dataset 'MNISTS'" in refused(compare, "--dataset", "MNISTS")
    assert "needs --out" in refused(compare, "--curves", "a.csv")
    assert "does not exist" in refused(compare, "--curves", "a.csv", "--out", "b.png")
    (folder / "0.json").write_text('{"last": ')
    assert "0.json is damaged" in refused(compare, "--results", folder)


def test_results_file_is_up_to_date():
    records, others = records_of(ROOT / "results")
    assert (ROOT / "RESULTS.md").read_text() == compare.markdown(records, others), (
        "results/ changed: run `python compare.py`"
    )
