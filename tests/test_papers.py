"""Each published cell has a command that says what its row says, and reproduce.py runs, lists and checks it."""

import argparse
import csv
import hashlib
import json
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

import bench_rates
import datafree_kd
import papers
import reproduce
from datafree.cli import cli
from datafree.errors import UsageError
from datafree.synthesis import METHODS as METHODS_OF_KD
from datafree.teachers import teacher_file

ROOT = Path(__file__).parent.parent
CELLS = {cell.name: cell for cell in papers.cells()}
RUNNABLE = [cell for cell in CELLS.values() if cell.script]
# fmt: off
RECIPES = {  # table's source and data set -> how its networks were trained on the data
    ("DAFL", "MNIST"): dict(recipe="dafl-mnist", optimizer="adam", lr=1e-3, batch_size=256, n_epochs=10),
    ("DFAD", "MNIST"): dict(recipe="dfad-mnist", optimizer="sgd", lr=0.01, weight_decay=1e-4, batch_size=256),
    ("DAFL", "CIFAR"): dict(recipe="dafl", optimizer="sgd", lr=0.1, weight_decay=5e-4, batch_size=128,
                            milestones=[0.4, 0.6], gamma=0.1, n_epochs=200),
    ("DFAD", "CIFAR"): dict(recipe="dfad", weight_decay=5e-4, batch_size=128, milestones=[0.4, 0.8], gamma=0.1),
    ("Fast-Datafree", "CIFAR"): dict(recipe="fast", weight_decay=1e-4, batch_size=256, milestones=[0.6, 0.75, 0.9],
                                     gamma=0.2, n_epochs=200),
    ("NAYER", "CIFAR"): dict(recipe="nayer", weight_decay=5e-4, batch_size=256, schedule="cosine", n_epochs=200),
    ("DFAD", "Caltech101"): dict(recipe="dfad-caltech101", batch_size=128, n_epochs=150),
    ("DAFL", "CelebA"): dict(recipe="celeba"),
    ("Fast-Datafree", "ImageNet"): dict(recipe="imagenet", n_epochs=90),
    ("DFAD", "CamVid"): dict(lr=0.1, weight_decay=5e-4, batch_size=16, n_epochs=200),
    ("DFAD", "NYUv2"): dict(lr=0.05, weight_decay=5e-4, batch_size=16, n_epochs=200),
}
METHODS = {  # method, or source and method -> script and what its parsed flags have
    "KD original data": ("vanilla_kd", dict(transfer_set="original", alpha=1, beta=0)),
    "KD-ORI": ("vanilla_kd", dict(transfer_set="original")),
    "KD": ("vanilla_kd", dict(transfer_set="original", alpha=1, beta=0.1, T=1)),
    "Random noise (normal distribution)": ("vanilla_kd", dict(transfer_set="noise")),
    "RANDOM": ("vanilla_kd", dict(transfer_set="noise")),
    "KD alternative data (USPS)": ("vanilla_kd", dict(transfer_set="usps")),
    "KD alternative data (similar)": ("vanilla_kd", {}),
    "KD-REL": ("vanilla_kd", {}),
    "KD-UNR": ("vanilla_kd", {}),
    "Places365+KD": ("vanilla_kd", dict(transfer_set="places365")),
    "Random wild images": ("DFND_train", dict(selection="random", num_select=600_000)),
    "DFND": ("DFND_train", dict(selection="lowest", num_select=600_000)),
    "DeepInversion": ("datafree_kd", dict(method="deepinv", g_steps=2000)),
    "DAFL": ("DAFL_train", dict(variant="dafl")),
    "DFAD": ("DFAD", {}),
    ("MMRazor DAFL", "DAFL"): ("DAFL_train", dict(variant="mmrazor", T=6, batch_size=2048, iterations=150)),
    ("MMRazor DFAD", "DFAD"): ("DFAD", dict(variant="mmrazor", batch_size=256, n_epochs=100, epoch_itrs=250)),
    ("MMRazor ZSKT", "ZSKT"): ("ZSKT_train", dict(batch_size=128)),
    ("Fast-Datafree", "DAFL"): ("datafree_kd", dict(method="dafl", act=0.001, balance=20, kd_steps=5, n_epochs=200)),
    "ZSKT": ("datafree_kd", dict(method="zskt", adv=1, kd_steps=5, n_epochs=200)),
    "DFQ": ("datafree_kd", dict(method="dfq", adv=1, bn=1, balance=20, kd_steps=10, n_epochs=200)),
    "DeepInv-2k": ("datafree_kd", dict(method="deepinv", g_steps=2000, bn=10, oh=1)),
    "CMI-500": ("datafree_kd", dict(method="cmi", g_steps=500, cr=0.8, n_epochs=200)),
    "Fast-2": ("datafree_kd", dict(method="fast_meta", g_steps=2, n_epochs=220, lr_z=0.015, lr_g=5e-3)),
    "Fast-5": ("datafree_kd", dict(method="fast_meta", g_steps=5, n_epochs=220, lr_z=0.01, lr_g=3e-3)),
    "Fast-10": ("datafree_kd", dict(method="fast_meta", g_steps=10, n_epochs=220, lr_z=0.01, lr_g=2e-3)),
    **{f"NAYER-{n}": ("datafree_kd", dict(method="nayer", g_steps=40, n_epochs=n + 20, batch_size=512, lr_g=4e-3,
                                          g_loops=2, warmup=20)) for n in (100, 200, 300)},
    "Fast-50": ("datafree_kd_imagenet", dict(g_steps=50)),
}
DFAD = {"MNIST": "DFAD_mnist", "CIFAR-10": "DFAD_cifar", "CIFAR-100": "DFAD_cifar", "Caltech101": "DFAD_caltech101",
        "CamVid": "DFAD_camvid_deeplab", "NYUv2": "DFAD_nyu_deeplab"}
FAST = {"ResNet-34": (1.33, 0.5), "VGG-11": (1.0, 0.5), "WRN40-2": (1.1, 0.4)}  # teacher -> adv, oh of Fast-N
WITHOUT = {"Meta data", "PU-compression", "Generative DFD", "SpaceshipNet", "MAD", "Fast (FM-100)",
           "Fast (FM-200)", "Fast (FM-300)", "(row describes another algorithm, WSLD)"}
NAMES = {"LeNet-5": "lenet5", "LeNet-5-HALF": "lenet5_half", "HintonNet (2x1200 MLP)": "hintonnet",
         "2x800 MLP": "hintonnet_half", "VGG-11": "vgg11", "DeepLabv3-ResNet-50 (ImageNet)": "deeplabv3_resnet50",
         "DeepLabv3-MobileNetv2": "deeplabv3_mobilenet"}
# fmt: on


def has(args, wanted):
    assert {k: args[k] for k in wanted} == wanted


def recipe_of(row):
    source = {"DFND": "DAFL"}.get(row["source"], "Fast-Datafree" if "MMRazor" in row["source"] else row["source"])
    return RECIPES[source, row["dataset"].split("-")[0]]


def test_every_row_is_a_cell_and_those_without_a_command_say_why():
    with (ROOT / "results" / "paper_tables.csv").open(newline="") as file:
        assert [c.row for c in CELLS.values()] == list(csv.DictReader(file))
    assert len(CELLS) == 220
    for cell in CELLS.values():
        method, seg = cell.row["method"], cell.row["dataset"] in ("CamVid", "NYUv2")
        assert (cell.script is None) == (method in WITHOUT or seg and method == "DAFL"), cell.name
        assert bool(cell.reason) == (cell.script is None) == (cell.command is None)
    assert (CELLS["mmrazor-03"].value, CELLS["mmrazor-04"].value, CELLS["mmrazor-01"].value) == (93.27, 93.05, 92.8)
    assert CELLS["dfad-24"].value is None and CELLS["dfad-41"].value == 53.5


@pytest.mark.parametrize("cell", RUNNABLE, ids=lambda cell: cell.name)
def test_a_command_says_what_its_row_says(cell):
    row, args, seg = cell.row, cell.args, cell.row["dataset"] in ("CamVid", "NYUv2")
    method, large = row["method"], row["dataset"] in ("Caltech101", "ImageNet")
    assert args["dataset"].replace("-", "") == row["dataset"].lower().replace("-", "")
    names = {}
    for role in ("teacher", "student"):
        name = NAMES.get(row[role], row[role].lower().replace("-", "_").split(" (")[0])
        names[role] = name.replace("resnet_", "resnet") + "_imagenet" * (large and name.startswith("resnet"))
    if method in ("Teacher", "Student scratch", "Student", "Scratch"):
        assert cell.script == f"teacher_train{'_seg' * seg}.py" and not cell.training
        has(args, recipe_of(row) | dict(model=names["teacher" if method == "Teacher" else "student"]))
        return
    imagenet = row["dataset"] == "ImageNet"
    script, wanted = METHODS.get((row["source"], method)) or METHODS[method]
    script = DFAD[row["dataset"]] if script == "DFAD" else script + "_seg" * seg
    assert cell.script == f"{script}.py"
    has(args, wanted | names | dict(teacher_recipe="torchvision" if imagenet else recipe_of(row).get("recipe")))
    training = vars(papers.parse(cell.training[0], cell.training[1:]))
    # torchvision's weights are tested once.
    has(
        training,
        recipe_of(row)
        | (dict(n_epochs=1, recipe="torchvision") if imagenet else {})
        | dict(dataset=args["dataset"], model=names["teacher"]),
    )
    if script.startswith("DFAD"):
        assert args["scheduler"] == (row["dataset"] != "MNIST")
    if method in ("Fast-2", "Fast-5", "Fast-10"):
        adv, oh = FAST[row["teacher"]]
        has(args, dict(adv=adv, oh=oh, bn=10, bn_mmt=0.9, T=20, warmup=20, batch_size=256, lr=0.2, is_maml=1))
    if method in ("KD-REL", "KD-UNR", "KD alternative data (similar)"):
        assert args["transfer_set"] not in ("original", "noise", args["dataset"])


def test_runs_and_teachers_have_places_of_their_own():
    folders, files = {}, {}
    for cell in RUNNABLE:
        folders.setdefault(cell.args["run_name"], set()).add(cell.command)
        for script, *flags in filter(None, (cell.training, (cell.script, *cell.flags) if not cell.training else ())):
            args = papers.parse(script, flags)
            file = teacher_file("", args.dataset, args.model, getattr(args, "recipe", None))
            files.setdefault(file.name, set()).add(shlex.join([script, *flags]))
    assert {name for name, commands in folders.items() if len(commands) > 1} == set()
    assert not {f for f, commands in files.items() if len(commands) > 1}


def published(script, *flags):
    return {c["cell"]: c["differs"] for c in papers.published(papers.parse(script, flags))}


def test_what_is_published_for_a_run(tmp_path):
    pair = ("--dataset", "cifar10", "--teacher", "wrn40_2", "--student", "wrn16_1")
    fast = ("datafree_kd.py", *pair, "--method")
    assert published(*fast, "fast", "--g_steps", "10") == {}
    assert published(*fast, "fast_meta", "--g_steps", "10") == {"fast-53": ""}
    assert published(*fast, "fast_meta", "--g_steps", "7") == {}
    assert published(*fast, "fast_meta", "--g_steps", "5", "--seed", "3", "--out", "x") == {"fast-48": ""}
    assert published(*fast, "fast_meta", "--n_epochs", "3", "--warmup", "1") == {
        "fast-53": "--n_epochs 3 (220), --warmup 1 (20)"
    }
    assert published(*fast, "deepinv", "--g_steps", "2000") == {"fast-18": ""}
    assert published(*fast, "deepinv", "--g_steps", "1000") == {"fast-18": "--g_steps 1000 (2000)"}
    (tmp_path / "clip.npy").touch()
    nayer = ("--dataset", "cifar100", "--teacher", "wrn40_2", "--student", "wrn16_2", "--method", "nayer")
    differs = "--n_epochs 40 (120), --warmup 2 (20), --label_embedding orthogonal (CLIP's text features)"
    found = published("datafree_kd.py", *nayer, "--teacher_recipe", "nayer", "--n_epochs", "40")
    file = published("datafree_kd.py", *nayer, "--teacher_recipe", "nayer", "--n_epochs", "120", "--warmup", "20",
                     "--label_embedding", tmp_path / "clip.npy")  # fmt: skip
    assert file["nayer-01"] == ""
    assert found["nayer-01"] == differs  # text features are the published embeddings, without which it runs, too
    (cell,) = papers.published(papers.parse("DAFL_train.py", ["--dataset", "mnist"]))
    assert (cell["cell"], cell["source"], cell["table"], cell["value"]) == ("dafl-13", "DAFL", "Table 1", 98.2)
    assert published("DAFL_train.py", "--dataset", "mnist", "--precision", "bf16") == {"dafl-13": "bf16 (fp32)"}
    assert published("DAFL_train.py", "--dataset", "mnist", "--teacher_recipe", "dfad-mnist") == {"dfad-21": ""}
    assert published("DAFL_train.py", "--dataset", "digits") == {}


def record(name, **changes):
    """What a run of a cell leaves: flags, or facts, with other values where `changes` says."""
    cell = CELLS[name]
    args = cell.args | {k: v for k, v in changes.items() if k in cell.args}
    facts = dict(
        name=f"{name} {changes}", script=cell.script, score="Acc@1", last=97.0, best=98.0, best_epoch=1, epochs=200,
        mean=90.0, variance=4.0, method=cell.row["method"], dataset=args["dataset"], seconds=120.0,
        teacher_accuracy=99.0, standard_error=0.1, hardware="a machine", commit="0", seed=args["seed"],
        precision="fp32", command=cell.command, pieces=None,
    )  # fmt: skip
    return facts | {k: v for k, v in changes.items() if k in facts or k not in args} | {"args": args}


def test_records_are_runs_of_cells():
    cell = CELLS["dafl-13"]
    same, short = record("dafl-13", seed=1), record("dafl-13", n_epochs=50)
    mixed = record("dafl-13", precision="auto") | {"precision": "fp32 then bf16"}
    other = record("dafl-13", teacher_weights={"file": "x.pt", "recipe": "dfad-mnist"}, teacher_ckpt="x.pt")
    own = record("dafl-13", teacher_weights={"file": "x.pt", "recipe": "dafl-mnist"}, teacher_ckpt="x.pt")
    found = papers.runs_of(cell, [short, mixed, other, same, own])
    assert found == {"": [same, own], "--n_epochs 50 (200)": [short], "fp32 then bf16 (fp32)": [mixed]}
    assert list(found)[0] == ""
    assert papers.runs_of(CELLS["dfad-21"], [other]) == {"": [other]}


def test_verdicts():
    cell = CELLS["dafl-13"]  # 98.20
    full, low = record("dafl-13", best=97.3), record("dafl-13", best=97.0, seed=1)
    short = record("dafl-13", best=99.0, n_epochs=50)
    assert papers.verdict(cell, []) == "not yet"
    assert papers.verdict(cell, [full]) == papers.verdict(cell, [full, short]) == "reproduced"
    assert papers.verdict(cell, [full, low]) == papers.verdict(cell, [low]) == papers.verdict(cell, [short]) == "partly"
    assert papers.verdict(cell, [low], margin=1.5) == "reproduced"


# reproduce.py


@pytest.fixture(autouse=True)
def nothing_shipped(monkeypatch, tmp_path):
    monkeypatch.setattr(reproduce, "SHIPPED", tmp_path / "shipped")


def run(*argv):
    return reproduce.main(reproduce.parse_args([str(a) for a in argv]))


def code(*argv):
    with pytest.raises(SystemExit) as stop:
        cli(reproduce.main, lambda: reproduce.parse_args([str(a) for a in argv]))
    return stop.value.code


def test_list_and_missing(capsys, tmp_path):
    run("--list")
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" ")[0] for line in lines if line.split(" ")[0] in CELLS] == list(CELLS)
    (tmp_path / "a.json").write_text(json.dumps(record("dafl-13")))
    run("--missing", "--results", tmp_path, "--out", tmp_path / "none")
    missing = {line.split(" ")[0] for line in capsys.readouterr().out.splitlines()} & {*CELLS}
    assert missing == {c.name for c in RUNNABLE} - {"dafl-13"}
    (tmp_path / "out").mkdir()
    shutil.copy(tmp_path / "a.json", tmp_path / "out" / "result.json")
    run("dafl-13", "--list", "--results", tmp_path, "--out", tmp_path / "out")
    assert "  1 runs  " in capsys.readouterr().out  # a copy is no further run


def test_commands_teacher_first_and_flags_for_all(tmp_path, monkeypatch):
    monkeypatch.setattr(reproduce.subprocess, "run", None)
    weights, where = tmp_path / "weights", ("--data_root", "elsewhere", "--gpu", "1", "--out", "o")
    flags = ("dafl-13", "--dry-run", "--n_epochs=5", *where, "--checkpoints", weights)
    other = run("dafl-13", "--dry-run", "--data", "sets", "--output_dir", "o")[-1]
    assert (other[other.index("--data_root") + 1], other[other.index("--out") + 1]) == ("sets", "o")
    teacher, student = run(*flags)
    assert teacher[:5] == ["teacher_train.py", "--dataset", "mnist", "--model", "lenet5"]
    assert student[0] == "DAFL_train.py" and "--n_epochs=5" in student and "--n_epochs=5" not in teacher
    for command in (teacher, student):
        args = papers.parse(command[0], command[1:])
        assert (args.data_root, args.gpu, args.out, args.resume) == ("elsewhere", 1, "o", True)
        assert args.checkpoints == str(weights)
    weights.mkdir()
    (weights / "mnist-lenet5-dafl-mnist.pt").touch()
    assert run(*flags) == [student]
    seeds = run(*flags, "--seeds", 3)
    names = [papers.parse(command[0], command[1:]).run_name for command in seeds]
    assert len({*names}) == 3 and [papers.parse(c[0], c[1:]).seed for c in seeds] == [0, 1, 2]
    for more, wanted in ((("--seeds", 2), ["weights", "seed1"]), (("--seed", 2), ["seed2"])):
        teachers = run("dafl-01", "--dry-run", "--checkpoints", weights, *more)
        assert [Path(papers.parse(c[0], c[1:]).checkpoints).name for c in teachers] == wanted


@pytest.mark.parametrize("cell", {c.script: c for c in RUNNABLE}.values(), ids=lambda cell: cell.script)
def test_every_script_is_told_where_the_data_are(cell):
    for command in run(cell.name, "--dry-run", "--data_root", "elsewhere"):
        assert papers.parse(command[0], command[1:]).data_root == "elsewhere"


def test_without_images_the_teacher_is_named(tmp_path, monkeypatch):
    where = ("--dry-run", "--dataset", "none", "--checkpoints", tmp_path)
    file = tmp_path / "cifar10-wrn40_2-fast.pt"
    training, command = run("fast-53", *where)
    assert training[0] == "teacher_train.py"
    file.touch()
    assert run("fast-53", *where) == [command]
    args = papers.parse(command[0], command[1:])
    assert (args.dataset, args.teacher_ckpt) == ("none", str(file)) and papers.published(args) == []
    monkeypatch.setattr(reproduce, "SHIPPED", tmp_path)
    (command,) = run("fast-53", "--dry-run", "--dataset=none", "--checkpoints", tmp_path / "other")
    assert papers.parse(command[0], command[1:]).teacher_ckpt == str(file)


def test_cells_by_their_columns():
    one = ["dataset=cifar10", "method=Fast-5,Fast-10", "teacher=WRN40-2", "student=wrn16_1", "paper=fast"]
    assert [c.name for c in papers.select(one)] == ["fast-48", "fast-53"]
    assert [command[0] for command in run("--select", *one, "--dry-run", "--n_epochs", "30")] == [
        "teacher_train.py", "datafree_kd.py", "datafree_kd.py"
    ]  # fmt: skip


def started(script, words, folder):
    """What a shell script starts in its environment: a Python script and flags."""
    shutil.copytree(ROOT / "scripts", folder / "scripts", dirs_exist_ok=True)
    (folder / "scripts" / "setup.sh").write_text("setup() { PY=echo; }\n")
    command = ["bash", folder / "scripts" / script, *words]
    return shlex.split(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


@pytest.mark.parametrize(
    ("script", "words", "cells"),
    [
        ("fast_cifar.sh", "cifar10 wrn40_2-wrn16_1 10 --n_epochs 1", ["fast-53"]),
        ("fast_cifar.sh", "vgg11-resnet18 2", ["fast-42", "fast-97"]),
        ("cmi_cifar.sh", "cifar10 wrn40_2-wrn16_1", ["fast-23"]),
        ("deepinv_cifar.sh", "cifar10 wrn40_2-wrn16_1", ["fast-18"]),
        ("dafl_cifar.sh", "cifar10 wrn40_2-wrn16_1", ["fast-28"]),
        ("zskt_cifar.sh", "cifar10 wrn40_2-wrn16_1", ["fast-33"]),
        ("dfq_cifar.sh", "cifar10 wrn40_2-wrn16_1", ["fast-38"]),
        ("nayer_cifar.sh", "cifar100 wrn40_2-wrn16_2 100", ["nayer-01"]),
        ("dfad_cifar.sh", "", ["dfad-26", "dfad-27"]),
        ("dfad_mnist.sh", "--seeds 3", ["dfad-25"]),
        ("reproduce.sh", "dafl-13 --seeds 3", ["dafl-13"]),
    ],
)
def test_shell_scripts_name_cells(script, words, cells, tmp_path):
    name, *argv = started(script, words.split(), tmp_path)
    assert name == "reproduce.py"
    args = reproduce.parse_args(argv)
    assert [c.name for c in reproduce.chosen(args)] == cells
    assert args.flags == (["--n_epochs", "1"] if "--n_epochs" in words else [])
    assert args.seeds == (3 if "--seeds" in words else 1)


def test_each_command_of_the_readme_is_known_to_its_parser(tmp_path):
    blocks = re.findall(r"^```bash\n(.*?)^```", (ROOT / "README.md").read_text(), re.S | re.M)
    commands = [shlex.split(line, comments=True) for line in "".join(blocks).replace("\\\n", " ").splitlines()]
    assert {"bash", "python"} <= {command[0] for command in commands}
    for program, script, *argv in commands:
        if program == "bash":
            script, *argv = started(Path(script).name, argv, tmp_path)
        if script == "reproduce.py":
            assert reproduce.chosen(reproduce.parse_args(argv))
        elif script.endswith(".py"):
            papers.parse(script, argv)


def steps_of(args):
    """A run's student steps and updates of synthesis."""
    if args["script"] == "datafree_kd.py":
        settings, rounds = argparse.Namespace(**args), datafree_kd.counts
        family = METHODS_OF_KD[args["method"]].family
        made = sum(rounds(settings, lambda adversarial: family.batches(args, adversarial))) * args["g_steps"]
        return (args["n_epochs"] - args["warmup"]) * args["ep_steps"] // args["kd_steps"] * args["kd_steps"], made
    if args["script"] == "DAFL_train.py":
        return (args["n_epochs"] * args["iterations"],) * 2
    if args["script"] == "vanilla_kd.py":
        return args["n_epochs"] * -(-{"mnist": 60_000, "cifar10": 50_000}[args["dataset"]] // args["batch_size"]), 0
    if args["script"] == "DFND_train.py":
        return args["n_epochs"] * -(-args["num_select"] // args["batch_size"]), 0
    return args["n_epochs"] * args["epoch_itrs"] * args["k"], args["n_epochs"] * args["epoch_itrs"]


@pytest.mark.parametrize("cell", papers.benchmark(), ids=lambda cell: cell.name)
def test_rows_of_the_benchmark_keep_to_its_steps(cell):
    students, updates = {"mnist": (2400, 600), "cifar10": (800, 200)}[cell.dataset]
    student_steps, made = steps_of(cell.args)
    assert 0.2 * students < student_steps <= students and made <= updates and cell.args["batch_size"] == 256
    assert cell.args.get("synthesis_batch_size", 256) == 256
    file = teacher_file(ROOT / "pretrained", cell.dataset, cell.teacher, cell.args["teacher_recipe"])
    text = (ROOT / "benchmarks" / "README.md").read_text()
    assert file.name in text and hashlib.sha256(file.read_bytes()).hexdigest() in text
    assert papers.find(cell.name) is cell and not cell.training


def test_runs_of_the_benchmark_have_all_its_flags():
    cell, other = papers.find("dfd10-mnist-fast_meta"), papers.find("dfd10-mnist-fast_meta-reptile")
    run = dict(script=cell.script, dataset="mnist", args=cell.args, precision="fp32", file="dfd10/a.json")
    assert papers.verdict(cell, [run]) == "measured" and papers.verdict(other, [run]) == "not yet"
    longer = run | dict(args=cell.args | dict(n_epochs=41))
    assert papers.verdict(cell, [longer]) == "not yet"
    assert not any(papers.runs_of(c, [run]) for c in papers.cells() if c.script)


RATED = [cell for cell in papers.benchmark(searched=False) if cell.row["method"] not in ("noise", "real", "wild")]


@pytest.mark.parametrize("cell", RATED, ids=lambda cell: cell.name)
def test_a_search_changes_nothing_but_rate_and_length(cell):
    found = vars(papers.parse(cell.script, bench_rates.without_data(cell, 0.1)))
    rate, other = ("lr" if "lr" in found else "lr_S"), {"dataset", "num_classes", "command", "run_name", "teacher_ckpt"}
    changed = {k for k, v in found.items() if vars(papers.parse(cell.script, cell.flags)).get(k) != v} - other
    assert changed - {"warmup"} == {rate, "n_epochs", "seed", "teacher_recipe", "any_teacher"}
    assert found["n_epochs"] == cell.args["n_epochs"] // 4 and found["seed"] == 100 and found["dataset"] == "none"
    assert found[rate] == pytest.approx(cell.args[rate] / 10) and Path(found["teacher_ckpt"]).is_file()


def test_a_search_goes_on(monkeypatch, tmp_path, capsys):
    """Each rate is tried once; a run that becomes infinite agrees never."""
    monkeypatch.setattr(papers, "RATES", tmp_path / "rates.csv")
    rates = []

    def main(args):
        rates.append(args.lr)
        if args.lr > 0.005:
            raise UsageError("student became NaN or infinite in epoch 1")
        if len(rates) == 3:
            raise KeyboardInterrupt
        return {"last": 50.0}

    monkeypatch.setattr(datafree_kd, "main", main)
    args = bench_rates.parse_args(["--method", "fast"])
    with pytest.raises(KeyboardInterrupt):
        bench_rates.main(args)
    bench_rates.main(args)
    assert [round(rate, 6) for rate in rates] == [0.03, 0.01, 0.003, 0.003, 0.001]
    text = (tmp_path / "rates.csv").read_text().splitlines()
    assert (
        text[:3] == ["track,method,rate,agreement", "mnist,fast,0.03,0.00", "mnist,fast,0.01,0.00"] and len(text) == 5
    )
    with pytest.raises(UsageError, match="no real to search for"):
        bench_rates.main(bench_rates.parse_args(["--method", "real"]))


def test_what_another_search_is_at_is_left_to_it(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(papers, "RATES", tmp_path / "rates.csv")

    def main(args):
        if args.lr > 0.02:
            raise UsageError("runs/rates/x is being written by process 1 on a: wait for it")
        (tmp_path / "rates.csv").write_text("track,method,rate,agreement\nmnist,fast,0.003,7.00\n")
        return {"last": 50.0}

    monkeypatch.setattr(datafree_kd, "main", main)
    bench_rates.main(bench_rates.parse_args(["--method", "fast"]))
    assert "fast: another search is at rate 0.03" in capsys.readouterr().out
    assert {line["rate"]: line["agreement"] for line in papers.known_rates()} == {"0.003": "7.00", "0.001": "50.00"}


@pytest.mark.parametrize("line", ["<<<<<<< HEAD", "mnist,fast,0.01", "mnist,fast,0.01,"])
def test_a_damaged_line_of_the_rates_is_told(line, monkeypatch, tmp_path):
    monkeypatch.setattr(papers, "RATES", tmp_path / "rates.csv")
    assert papers.known_rates() == []
    (tmp_path / "rates.csv").write_text(f"track,method,rate,agreement\n{line}\n")
    with pytest.raises(UsageError, match=f"{line}.*: mend or delete it"):
        papers.benchmark.__wrapped__()


def test_a_run_of_the_benchmark_is_none_of_a_published_cell(tmp_path):
    """Wherever its record lies."""
    cell = papers.find("dfd10-mnist-DAFL_train")
    made = dict(args=cell.args, script=cell.script, dataset="mnist", precision="fp32", file="run/result.json")
    assert papers.of_benchmark(made) and not papers.runs_of(papers.find("dafl-13"), [made])
    made["args"] = made["args"] | {"n_epochs": 41}
    assert not papers.of_benchmark(made) and papers.runs_of(papers.find("dafl-13"), [made])


def test_a_better_rate_makes_a_row_of_its_own(monkeypatch, tmp_path):
    lines = ["track,method,rate,agreement"]
    lines += [f"mnist,fast,{rate},{score}" for rate, score in (("0.03", 1), ("0.01", 70), ("0.003", 71), ("0.001", 2))]
    lines += [f"mnist,zskt,{rate},{score}" for rate, score in (("0.03", 1), ("0.01", 70), ("0.003", 70), ("0.001", 2))]
    lines += [f"mnist,dfad,{rate},{score}" for rate, score in (("0.03", 1), ("0.01", 70), ("0.003", 71))]
    (tmp_path / "rates.csv").write_text("\n".join(lines))
    monkeypatch.setattr(papers, "RATES", tmp_path / "rates.csv")
    own, cells = papers.benchmark(searched=False), papers.benchmark.__wrapped__()
    found = [cell for cell in cells if cell not in own]
    assert [cell.name for cell in found] == ["dfd10-mnist-fast-searched"]
    assert found[0].row["method"] == "fast-searched" and found[0].args["lr"] == 0.003
    before = cells[cells.index(found[0]) - 1]
    assert before.name == "dfd10-mnist-fast" and found[0].flags == (*before.flags, "--lr", "0.003")


def test_check(tmp_path, capsys):
    def checked(*argv):
        return code(*argv, "--check", "--results", tmp_path, "--out", tmp_path / "none")

    (tmp_path / "a.json").write_text(json.dumps(record("dafl-13", best=97.5)))
    (tmp_path / "b.json").write_text(json.dumps(record("dfad-25", best=90.0)))
    assert run("dafl-13", "--check", "--results", tmp_path, "--out", tmp_path / "none") == []
    assert "dafl-13: reproduced, published 98.20\n  best 97.50" in capsys.readouterr().out
    assert checked("dafl-13", "--margin", "0.5") == 1
    assert checked("dfad-25") == checked("dafl-13", "dfad-25") == checked("dafl-14") == 1
    assert "dfad-25: partly" in capsys.readouterr().out
    assert checked("no-such") == checked("dafl-13", "--n_epochs", "5") == 2
    (tmp_path / "a.json").write_text("{")
    assert checked("dafl-13") == 2


def test_exit_codes_of_runs(monkeypatch, tmp_path):
    ended, calls = type("Ended", (), {"returncode": 0}), []
    monkeypatch.setattr(reproduce.subprocess, "run", lambda command: calls.append(command) or ended)
    flags = ("dafl-13", "--checkpoints", tmp_path, "--out", tmp_path)
    assert len(run(*flags, "--time_limit", "1000")) == len(calls) == 2
    assert all(float(command[-1]) < 1000 and command[-2] == "--time_limit" for command in calls)
    # What is not there is not resumed: a shorter run, such as another cell's, would be stretched.
    assert not any("--resume" in command for command in calls)
    student = tmp_path / papers.find("dafl-13").args["run_name"]
    student.mkdir()
    (student / "last.pt").touch()
    run(*flags)
    assert "--resume" in calls[-1]
    for ended.returncode in (75, 2):
        calls.clear()
        assert code(*flags) == ended.returncode and len(calls) == 1
    calls.clear()
    assert code(*flags, "--time_limit", "1e-9") == 75 and not calls


def test_mistakes(refused):
    assert "did you mean dafl-1" in refused(reproduce, "dafl-133")
    assert "has no command: another paper's method" in refused(reproduce, "dafl-11")
    assert "no command for nayer-08" in refused(reproduce, "--select", "method=MAD")
    assert "name a cell" in refused(reproduce)
    assert "for running a cell: --n_epochs 3" in refused(reproduce, "--list", "--n_epochs", "3")
    assert "no cell has method=none" in refused(reproduce, "--select", "method=none")
    assert "it takes paper=" in refused(reproduce, "--select", "models=none")
    assert "is of mnist, not digits" in refused(reproduce, "dafl-13", "--dry-run", "--dataset", "digits")
    assert "unrecognized arguments: --wrong" in refused(reproduce, "dafl-13", "--dry-run", "--wrong", "1")
    assert "exclude each other" in refused(reproduce, "dafl-13", "--seeds", "2", "--seed=1")
