"""compare.py puts records beside the published cells, and what it wrote is up to date."""

import csv
import io
import json
import os
import re
import shutil
from pathlib import Path

import pytest
from test_papers import CELLS, record

import compare
import papers
from datafree import plots
from datafree.errors import UsageError
from datafree.records import read_records

ROOT = Path(__file__).parent.parent


@pytest.fixture
def folder(tmp_path):
    """Records: DAFL on MNIST with three seeds and once shorter, a student from scratch, and two runs of no cell."""
    runs = [
        *(record("dafl-13", seed=s, best=98.0 + s) for s in (0, 1, 2)),
        record("dafl-13", n_epochs=50, best=95.0, pieces=[
            dict(epochs=[1, 30], precision="fp32"), dict(epochs=[31, 50], precision="bf16")
        ]) | dict(precision="fp32 then bf16"),
        record("dafl-03", best=98.7, method="Teacher"),
        *(record("dafl-13", dataset="digits", seed=s, command=f"python DAFL_train.py --dataset digits --seed {s}")
          for s in (0, 1)),
    ]  # fmt: skip
    out = tmp_path / "records"
    out.mkdir()
    for i, run in enumerate(runs):
        (out / f"{i}.json").write_text(json.dumps(run))
    (out / "bench.json").write_text('{"ratio": 7}')
    return out


def collected(folder):
    return compare.collect(read_records(folder))


def test_seeds_are_averaged_and_other_runs_stand_apart(folder):
    rows, others = collected(folder)
    full, short = (r for r in rows if r["cell"] == "dafl-13")
    assert (full["n"], full["best"], full["best_std"], full["differs"]) == (3, 99.0, 1.0, "")
    assert full["best_minus_paper"] == pytest.approx(99.0 - 98.2)
    assert (full["teacher_score"], full["scratch_score"], full["minutes"]) == (99.0, 98.7, 2.0)
    assert (full["standard_error"], full["mean"], full["verdict"]) == (pytest.approx(0.1), 90.0, "reproduced")
    assert (short["n"], short["best"], short["best_std"]) == (1, 95.0, None)
    assert short["differs"] == "--n_epochs 50 (200), fp32 then bf16 (fp32)"
    assert [[r["seed"] for r in runs] for runs in others] == [[0, 1]]
    assert {r["cell"] for r in rows if r["n"]} == {"dafl-03", "dafl-13"}
    assert {r["cell"] for r in rows} == {*CELLS}
    assert all(r["note"] for r in rows if r["verdict"] == "no command")


def test_a_score_of_segmentation_is_in_percent(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps(record("dfad-41", best=53.0, score="mIoU")))
    row = next(r for r in collected(tmp_path)[0] if r["n"])
    assert (row["cell"], row["paper"], row["best"]) == ("dfad-41", 53.5, 53.0)
    assert row["best_minus_paper"] == pytest.approx(-0.5) and row["verdict"] == "reproduced"


def test_verdicts(folder):
    lines = compare.verdicts(collected(folder)[0])
    assert ("DAFL", "DAFL", "MNIST", "partly", "99.00 ± 1.00 / 98.20; 1 of 2 pairs run") in lines
    assert ("Fast-Datafree", "Fast-10", "CIFAR-10, CIFAR-100", "not yet", "") in lines
    assert ("NAYER", "NAYER-100", "CIFAR-100", "not yet", "") in lines
    kinds = {(source, method, data) for source, method, datas, *_ in lines for data in datas.split(", ")}
    assert kinds == {tuple(c.row[k] for k in ("source", "method", "dataset")) for c in CELLS.values()}


def test_benchmark(tmp_path, capsys, monkeypatch):
    """Its rows stand in the order of their last scores; the last tenth is of all seeds' metrics.csv."""
    folder = tmp_path / "dfd10"
    folder.mkdir()
    for name, seed, last in (
        ("mnist-fast", 0, 90.0),
        ("mnist-fast", 1, 92.0),
        ("mnist-dafl", 0, 95.0),
        ("mnist-dfq", 0, 80.0),
    ):
        cell = papers.find(f"dfd10-{name}")
        run = record("dafl-13", seed=seed, best=96.0) | dict(script=cell.script, args=cell.args | dict(seed=seed))
        run |= dict(last=last, agreement=last + 1, synthesis_seconds=60.0, generated_images=1000, peak_memory=2e9)
        run |= dict(precision="fp32", name=f"{name}-{seed}", teacher_weights=None)
        (folder / f"{name}-{seed}.json").write_text(json.dumps(run))
        scores = "".join(f"{i},{last + i % 2}\n" for i in range(20))
        (folder / f"{name}-{seed}.metrics.csv").write_text("seconds,accuracy\n" + scores)
    # A picture has the runs of the hardware that most methods ran on; other hardware's if it has others.
    for name, hardware in (("fast-0", "another one"), ("fast-1", "a third one"), ("dfq-0", "another one")):
        run = json.loads((folder / f"mnist-{name}.json").read_text())
        (folder / f"mnist-{name}.json").write_text(json.dumps(run | dict(hardware=hardware)))
    drawn, plot = {}, compare.plot_accuracy
    monkeypatch.setattr(
        compare, "plot_accuracy", lambda path, runs, **look: (drawn.update({path.name: runs}), plot(path, runs, **look))
    )
    rows = compare.main(compare.parse_args(["--benchmark", "--results", str(tmp_path)]))
    assert {picture: {name: path.name for name, path in runs.items()} for picture, runs in drawn.items()} == {
        "mnist.png": {"fast": "mnist-fast-0.metrics.csv", "dfq": "mnist-dfq-0.metrics.csv"},
        "mnist-more.png": {"dafl": "mnist-dafl-0.metrics.csv"},
    }
    assert [(r["method"], r["n"], r["last"], r["agreement"]) for r in rows] == [
        ("dafl", 1, 95, 96),
        ("fast", 2, 91, 92),
        ("dfq", 1, 80, 81),
    ]
    assert (rows[1]["tenth"], rows[1]["last_std"]) == (91.5, pytest.approx(2**0.5)) and rows[0]["tenth_std"] > 0
    text = (folder / "README.md").read_text()
    assert "| fast | 91.00 ± 1.41 |" in text and "| 60 + 60 | 2.0 |" in text and "Not run yet: zskt" in text
    assert (folder / "mnist.png").stat().st_size > 10_000 and not (folder / "cifar10.png").exists()
    (folder / "mnist-dafl-0.metrics.csv").unlink()
    with pytest.raises(UsageError, match="copy the run's metrics.csv there"):
        compare.benchmark(folder)


def test_the_committed_page_of_the_benchmark_is_up_to_date(tmp_path):
    shutil.copytree(ROOT / "results" / "dfd10", tmp_path / "dfd10")
    compare.benchmark(tmp_path / "dfd10")
    assert (tmp_path / "dfd10" / "README.md").read_text() == (ROOT / "results" / "dfd10" / "README.md").read_text()


def test_accuracy_over_student_steps(tmp_path, monkeypatch):
    """Of runs with their metrics.csv, epochs of warm-up left out, and the published value of each."""
    drawn = []
    monkeypatch.setattr(compare, "plot_lines", lambda path, *what: drawn.append((path.name, *what)))
    fast, dfnd, dfad = CELLS["fast-53"].args, dict(batch_size=256, n_epochs=2), dict(epoch_itrs=50, k=5)
    runs = {
        "a": dict(script="datafree_kd.py", args=fast | dict(warmup=1), published=[
            dict(cell="fast-53", method="Fast-10", source="Fast-Datafree", value=89.29)
        ]),
        "b": dict(script="DFND_train.py", args=dfnd, selected=10_000, published=[]),
        "c": dict(script="DFAD_cifar.py", args=dfad, published=[]),
        "d": dict(script="teacher_train.py", args={}, published=[]),
        "e": dict(script="DFAD_cifar.py", args=dfad, published=[]),
        "f": dict(script="DFAD_cifar.py", args=dfad, published=[], dataset="cifar100"),
    }  # fmt: skip
    for name in "abcdf":
        (tmp_path / f"{name}.metrics.csv").write_text("epoch,accuracy\n1,10\n2,20\n")
    records = [dict(dataset="cifar10", file=f"{name}.json", precision="bf16") | run for name, run in runs.items()]
    compare.plot_steps(records, tmp_path, tmp_path)
    ((name, lines, levels, *_),) = drawn
    assert name == "steps-cifar10.png" and levels == {"Fast-10, Fast-Datafree, fast-53": 89.29}
    assert lines == {"a": [(400, 20)], "b": [(40, 10), (80, 20)], "c": [(250, 10), (500, 20)]}


def test_pages(folder):
    pages = compare.pages(read_records(folder))
    assert set(pages) == {"RESULTS.md", "results/results.csv"} | {
        f"results/{p}.md" for p in ("dafl", "dfad", "dfnd", "fast", "mmrazor", "nayer")
    }
    top = pages["RESULTS.md"]
    assert len(top.encode()) < 25_000 and "2 of 220 published cells" in top
    assert (
        "| dafl-13 | MNIST | DAFL | LeNet-5-HALF | 98.20 | 97.00 ± 0.00 | 99.00 ± 1.00 | 0.10 | 90.00 | 3 |  |" in top
    )
    assert "| `python DAFL_train.py --dataset digits` |" in top
    every = "".join(pages.values())
    for name, cell in CELLS.items():
        assert len(re.findall(rf"^\| {name} \|", pages[f"results/{cell.paper}.md"], re.M)) == (
            2 if name == "dafl-13" else 1
        )
    for script in {c.script for c in CELLS.values()} - {None}:
        assert every.count(f"How `{script}` differs") == bool(compare.deviations(script))
    dafl = pages["results/dafl.md"]
    assert re.search(r"How `DAFL_train.py` differs .*:\n\n1\. .*\n2\. .*\n3\. .*\n4\. ", dafl)
    assert "`vanilla_kd.py`: [dfad](dfad.md)" in dafl and "| 1-30 fp32, 31-50 bf16 |" in dafl
    assert [dafl.count(f"]({i}.json)") for i in range(7)] == [1] * 7  # every seed's run
    for page in pages.values():  # each table's lines are of one width
        for block in re.findall(r"(?:^\|.*\n)+", page, re.M):
            assert len({line.count(" | ") for line in block.splitlines() if "---" not in line}) == 1
    assert not re.search(r"needs a GPU|needs the data", every)


def test_formats_and_filters(folder, capsys):
    def run(*flags):
        compare.main(compare.parse_args(["--results", str(folder), *flags]))
        return capsys.readouterr().out

    table = list(csv.DictReader(io.StringIO(run("--format", "csv", "--dataset", "MNIST"))))
    assert {r["dataset"] for r in table} == {"MNIST"}
    found = json.loads(run("--format", "json"))
    assert len(found["cells"]) == 221 and found["others"] == ["5.json", "6.json"]
    text = run("--dataset", "MNIST", "--method", "DAFL")
    assert "| dafl-14 |" in text and "dafl-01" not in text


def test_files_and_plots(folder, tmp_path, capsys):
    out = tmp_path / "new" / "RESULTS.md"
    compare.main(compare.parse_args(["--results", str(folder), "--out", str(out)]))
    for name, text in compare.pages(read_records(folder)).items():
        assert (out.parent / name).read_text() == text
    assert (out.parent / "results" / "plots" / "synthesis-cifar-10.png").stat().st_size > 5000
    for pattern in ("mnist/*.metrics.csv", "camvid/*.metrics.csv"):
        metrics = sorted(str(p) for p in (ROOT / "results").glob(pattern))
        picture = tmp_path / "curves.png"
        compare.main(compare.parse_args(["--curves", *metrics, "--out", str(picture)]))
        assert picture.stat().st_size > 5000
        picture.unlink()


def test_curves_of_runs_of_one_name(tmp_path, monkeypatch):
    files = [tmp_path / folder / "run" / "metrics.csv" for folder in "ab"]
    for file in files:
        file.parent.mkdir(parents=True)
        file.write_text("epoch,accuracy\n1,50\n")
    drawn = {}
    monkeypatch.setattr(compare, "plot_accuracy", lambda out, runs, *args, **kwargs: drawn.update(runs))
    compare.curves(files, "a.png")
    assert drawn == {str(file): file for file in files}


def test_seeds_are_one_row_and_one_colour(tmp_path):
    """Also where an older record lacks a flag that is off."""
    records = [r for r in read_records(ROOT / "results") if "wild_tiny-all" in r["file"]]
    _, (found,) = compare.collect(records)
    assert sorted(r["seed"] for r in found) == [0, 1, 2]
    assert len({"compile" in r["args"] for r in found}) == 2
    plots.plot_lines(tmp_path / "a.svg", {name: [(1, 1), (2, 3)] for name in ("a", "a-seed1", "b")}, {}, "x", "y")
    strokes = re.findall(r"fill: none; stroke: (#1f77b4|#ff7f0e|#2ca02c)", (tmp_path / "a.svg").read_text())
    assert strokes == ["#1f77b4", "#1f77b4", "#ff7f0e", "#1f77b4", "#ff7f0e"]  # lines, then the legend's


def test_readme_between_the_marks(folder, tmp_path, monkeypatch, refused):
    monkeypatch.setattr(compare, "ROOT", tmp_path)
    readme, flags = tmp_path / "README.md", ("--readme", "--results", str(folder))
    readme.write_text("before\n<!-- results -->\nold\n<!-- /results -->\nafter\n")
    for _ in range(2):  # a second time changes nothing
        compare.main(compare.parse_args(flags))
        text = readme.read_text()
        assert text.startswith("before\n<!-- results -->\n") and text.endswith("\n<!-- /results -->\nafter\n")
        assert "old" not in text and text.count("| DAFL | DAFL | MNIST | partly | 99.00 ± 1.00 / 98.20;") == 1
        assert "2 of 220 published cells" in text and "Fast-10" not in text
    readme.write_text("no marks")
    assert "lacks the marks" in refused(compare, *flags) and readme.read_text() == "no marks"


def test_what_cannot_be_compared(folder, tmp_path, refused):
    before = (ROOT / "RESULTS.md").read_bytes()
    assert "no dataset 'MNISTS'" in refused(compare, "--results", folder, "--dataset", "MNISTS")
    assert "needs --out" in refused(compare, "--curves", "a.csv")
    os.mkfifo(folder / "fifo")
    assert "is a pipe, at which this would wait" in refused(compare, "--out", folder / "fifo")
    assert "does not exist" in refused(compare, "--curves", "a.csv", "--out", "b.png")
    assert "no/such does not exist" in refused(compare, "--results", "no/such")
    (tmp_path / "empty").mkdir()
    assert "has no records" in refused(compare, "--results", tmp_path / "empty")
    (folder / "0.json").write_text('{"last": ')
    assert "0.json is damaged" in refused(compare, "--results", folder)
    assert (ROOT / "RESULTS.md").read_bytes() == before


def test_what_it_wrote_is_up_to_date():
    records = read_records(ROOT / "results")
    for name, text in compare.pages(records).items():
        assert (ROOT / name).read_text() == text, f"{name} is old: run `python compare.py`"
    readme = (ROOT / "README.md").read_text()
    assert compare.with_verdicts(readme, collected(ROOT / "results")[0]) == readme, "run `python compare.py --readme`"


def test_why_is_said_of_each_cell_that_falls_short():
    rows, others = collected(ROOT / "results")
    with compare.WHY.open(newline="") as file:
        told = [name for line in csv.DictReader(file) for name in line["rows"].split(", ") if line["why"].endswith(".")]
    names = {r["cell"] for r in rows if r["n"]} | {f"{runs[0]['method']} on {runs[0]['dataset']}" for runs in others}
    assert len(told) == len({*told}) and {*told} <= names
    assert {r["cell"] for r in rows if r["verdict"] == "partly"} <= {*told}


def test_records_tell_what_is_known_of_them():
    records = {r["file"]: r for r in read_records(ROOT / "results")}
    for r in records.values():
        assert r["script"] == r["command"].split()[1] and r["epochs"] == r["args"]["n_epochs"]
        n = r["test_images"]
        if n:
            # Of CIFAR-10 in a lossless pack there are the first 1,017.
            known = dict(digits=[500], mnist=[10_000], cifar10=[10_000, 1017], camvid=[233], caltech101=[1695])
            assert n in known[r["dataset"]]
        if n and r["score"] == "Acc@1":
            assert r["standard_error"] == pytest.approx((r["last"] * (100 - r["last"]) / n) ** 0.5)
        if r.get("teacher_weights", {}).get("sha256") == "unknown":  # runs from before it was recorded
            recipe = {98.94: "dfad-mnist", 99.08: "dafl-mnist", 98.18: "dafl-mnist"}.get(r["teacher_accuracy"])
            assert r["teacher_weights"]["recipe"] == (recipe or {"digits": "digits"}.get(r["dataset"], "unknown"))
    pieces = records["mnist/DAFL_train-mnist-lenet5-lenet5_half-fp32-then-bf16.json"]["pieces"]
    assert [(p["epochs"], p["precision"]) for p in pieces] == [([1, 50], "fp32"), ([51, 58], "bf16")]


LOGS = [f for f in sorted((ROOT / "results").rglob("*.log.txt")) if not f.name.endswith(".unfinished.log.txt")]


@pytest.mark.parametrize("log", LOGS, ids=lambda f: f.name)
def test_records_and_epochs_say_what_the_logs_beside_them_say(log):
    """Records that their logs were made into, as the run's own was lost, above all."""
    text, stem = log.read_text(), log.name.removesuffix(".log.txt")
    made = json.loads((log.parent / f"{stem}.json").read_text())
    epochs = dict(re.findall(r"^\[Eval\] Epoch=(\d+) \S+?=([\d.]+)", text, re.M))
    with (log.parent / f"{stem}.metrics.csv").open(newline="") as file:
        scores = [float(row["accuracy"]) for row in csv.DictReader(file)]
    assert {str(i): f"{score:.2f}" for i, score in enumerate(scores, 1)} == epochs and len(scores) == made["epochs"]
    assert (made["last"], made["best"]) == (scores[-1], max(scores)) and made["mean"] == pytest.approx(
        sum(scores) / len(scores)
    )
    said = f"last {made['last']:.2f} %, best {made['best']:.2f} % (epoch {made['best_epoch']}), "
    _, found, rest = text.rpartition(said)
    assert found and abs(int(rest.partition(" s:")[0]) - made["seconds"]) < 0.6  # the record's are rounded, too
