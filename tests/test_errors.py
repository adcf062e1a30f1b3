"""Every mistake of a user's ends in one line, exit code 2 and nothing lost."""

import ast
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import bench
import bench_rates
import bench_scan
import compare
import compress
import DAFL_train
import datafree_kd
import datafree_kd_imagenet
import DFAD_caltech101
import DFAD_camvid_deeplab
import DFAD_cifar
import DFAD_mnist
import DFAD_nyu_deeplab
import DFND_train
import quickstart
import teacher_train
import teacher_train_seg
import vanilla_kd
import vanilla_kd_seg
import ZSKT_train
from datafree import checkpoint, runtime
from datafree.synthesis import METHODS, FastLatents
from models import get_model

ROOT = Path(__file__).parent.parent
SCRIPTS = [DAFL_train, teacher_train, vanilla_kd, datafree_kd]
DFAD = [
    DFAD_mnist,
    DFAD_cifar,
    DFAD_caltech101,
    DFAD_camvid_deeplab,
    DFAD_nyu_deeplab,
    teacher_train_seg,
    vanilla_kd_seg,
]
PARSERS = [
    *SCRIPTS,
    *DFAD,
    datafree_kd_imagenet,
    DFND_train,
    ZSKT_train,
    quickstart,
    bench,
    bench_rates,
    bench_scan,
    compare,
    compress,
]


class Evil:
    def __reduce__(self):
        return (os.system, ("touch executed",))


@pytest.mark.parametrize("script", [DAFL_train, vanilla_kd, datafree_kd, DFAD_mnist, DFND_train])
@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "does not exist: give --teacher_ckpt"),
        ("truncated", "damaged"),
        ("code", "holds code"),
        ("architecture", "a resnet8, not lenet5"),
        ("classes", "7 classes, the data set 10"),
    ],
)
def test_teacher_file(script, content, words, tmp_path, refused, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "teacher.pt"
    if content == "truncated":
        checkpoint.save(get_model("lenet5").state_dict(), path)
        path.write_bytes(path.read_bytes()[:5000])
    elif content == "code":
        path.write_bytes(pickle.dumps(Evil()))
    elif content == "architecture":
        checkpoint.save(
            {"state_dict": get_model("resnet8", channels=1).state_dict(), "card": {"model": "resnet8"}}, path
        )
    elif content == "classes":
        checkpoint.save(get_model("lenet5", 7).state_dict(), path)
    wild = ("--wild", "digits") if script is DFND_train else ()
    error = refused(script, "--dataset", "digits", "--teacher_ckpt", path, *wild)
    assert words in error and "teacher.pt" in error
    assert not Path("executed").exists() and not Path("runs").exists()


@pytest.mark.parametrize("script", SCRIPTS)
def test_unknown_names_and_impossible_values(script, refused):
    model = "--model" if script is teacher_train else "--teacher"
    for flags, words in (
        ((model, "resnet999"), "invalid choice: 'resnet999'"),
        (("--dataset", "imagenot"), "invalid choice: 'imagenot'"),
        (("--batch_size", "0"), "0 is impossible: it must be at least"),
        (("--batch_size", "many"), "invalid int value"),
        (("--n_epochs", "0"), "impossible"),
        (("--seed", "-1"), "impossible"),
        (("--precision", "fp8"), "invalid choice"),
        (("--bn_mmt" if script is datafree_kd else "--milestones", "1.5"), "at most 1"),
        (("--no_such_flag",), "unrecognized arguments"),
        (("--dataset", "mnist", "--img_size", "40"), "takes images of 32 pixels, not 40"),
    ):
        assert words in refused(script, *flags)


def test_impossible_combinations(refused, checkpoints):
    for script, flags, words in (
        (DAFL_train, ("--oh", "0", "--ie", "0", "--a", "0"), "all 0"),
        (DAFL_train, ("--batch_size", "1"), "impossible"),
        (DAFL_train, ("--lr_G", "nan"), "impossible"),
        (DAFL_train, ("--lr_S", "inf"), "impossible"),
        (DAFL_train, ("--lr_S", "0"), "must be at least 1e-12"),
        (DAFL_train, ("--teacher", "hintonnet"), "lenet5_half takes images of 32 pixels, not 28"),
        (vanilla_kd, ("--transfer_set", "noise", "--beta", "1"), "labels"),
        (vanilla_kd, ("--alpha", "0"), "nothing would be learnt"),
        (vanilla_kd, ("--transfer_set", "no/such", "--checkpoints", checkpoints), "does not exist: name a folder"),
        (vanilla_kd, ("--transfer_set", "noise", "--scratch"), "labels"),
    ):
        assert words in refused(script, *flags)


def test_teacher_of_another_image_size(tmp_path, refused):
    checkpoint.save(
        {"state_dict": get_model("resnet8", channels=1).state_dict(), "card": {"model": "resnet8", "img_size": 16}},
        tmp_path / "t.pt",
    )
    networks = ("--teacher", "resnet8", "--student", "resnet8")
    assert "give --img_size 16" in refused(DAFL_train, *networks, "--teacher_ckpt", tmp_path / "t.pt")


def test_image_size_that_the_generator_cannot_make(tmp_path, refused):
    checkpoint.save(get_model("resnet8", channels=1).state_dict(), tmp_path / "t.pt")
    networks = ("--teacher", "resnet8", "--student", "resnet8")
    assert "multiple of 4" in refused(DAFL_train, *networks, "--img_size", "30", "--teacher_ckpt", tmp_path / "t.pt")


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize(
    "dataset", ["mnist", "fashion-mnist", "cifar10", "cifar100", "svhn", "celeba", "imagenet", "folder"]
)
def test_data_absent_and_no_network(script, dataset, tmp_path, refused, monkeypatch):
    def offline(*_, **__):
        raise OSError(101, "Network is unreachable")

    monkeypatch.setattr("socket.socket.connect", offline)
    monkeypatch.setattr("socket.getaddrinfo", offline)
    flags = ["--img_size", "32"] if dataset in ("folder", "svhn") else []
    if script is not teacher_train:
        checkpoint.save(get_model("lenet5").state_dict(), tmp_path / "t.pt")
        flags += ["--teacher_ckpt", tmp_path / "t.pt"]
    error = refused(
        script,
        "--dataset",
        dataset,
        "--data_root",
        tmp_path / "none",
        *flags,
        "--out",
        tmp_path / "runs",
        "--checkpoints",
        tmp_path,
    )
    assert str(tmp_path / "none") in error
    assert not (tmp_path / "runs").exists()


def test_empty_and_broken_images(tmp_path, refused):
    folder = tmp_path / "data"
    flags = (
        "--dataset",
        "folder",
        "--data_root",
        folder,
        "--model",
        "resnet8",
        "--img_size",
        "16",
        "--out",
        tmp_path / "runs",
        "--checkpoints",
        tmp_path,
    )
    for split in ("train", "test"):
        for name in "ab":
            (folder / split / name).mkdir(parents=True)
    assert str(folder) in refused(teacher_train, *flags)
    for split in ("train", "test"):
        for name in "ab":
            (folder / split / name / "0.png").write_bytes(b"\x89PNG\r\n\x1a\n, and then nothing")
    assert "0.png" in refused(teacher_train, *flags)


@pytest.mark.parametrize("script", SCRIPTS)
def test_precision_and_device_that_are_not_there(script, refused, monkeypatch, checkpoints):
    flags = () if script is teacher_train else ("--checkpoints", checkpoints)
    monkeypatch.setattr(runtime, "has_bf16", lambda device: False)
    assert "--precision fp32" in refused(script, "--precision", "bf16", "--device", "cpu", *flags)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert "--device cpu" in refused(script, "--device", "cuda", *flags)
    assert "GPU 3" in refused(script, "--gpu", "3", *flags)


@pytest.mark.parametrize("script", SCRIPTS)
def test_output_folder_that_cannot_be_written(script, tmp_path, refused, checkpoints):
    blocked = tmp_path / "file"
    blocked.write_text("in the way")
    assert "--out" in refused(script, "--out", blocked / "runs", "--checkpoints", checkpoints)
    assert blocked.read_text() == "in the way"


@pytest.mark.parametrize("script", SCRIPTS)
def test_nothing_to_evaluate(script, tmp_path, refused, checkpoints):
    error = refused(script, "--evaluate_only", "--out", tmp_path, "--checkpoints", checkpoints)
    assert "does not exist" in error and "best.pt" in error


def test_a_real_command_line_ends_without_traceback(tmp_path):
    command = [sys.executable, ROOT / "DAFL_train.py", "--teacher_ckpt", tmp_path / "none.pt", "--out", tmp_path]
    end = subprocess.run(command, capture_output=True, text=True)
    assert end.returncode == 2 and end.stdout == ""
    assert end.stderr.count("\n") == 1 and end.stderr.startswith("DAFL_train.py: teacher ")


def names_read(path):
    """What a file reads as args.NAME or ....args.NAME, those of the scripts that it is a door to included."""
    tree = ast.parse(path.read_text())
    read = {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and getattr(node.value, "id", getattr(node.value, "attr", None)) == "args"
    }
    imported = [a.name for node in ast.walk(tree) if isinstance(node, ast.Import) for a in node.names]
    imported += [node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    return read.union(*(names_read(p) for name in imported if (p := ROOT / f"{name}.py").exists()))


@pytest.mark.parametrize("script", PARSERS)
def test_help_shows_and_every_flag_is_read(script, capsys):
    with pytest.raises(SystemExit) as stop:
        script.parse_args(["--help"])
    text = capsys.readouterr().out
    assert stop.value.code == 0 and "{presets}" not in text and len(text) > 300
    read = names_read(Path(script.__file__)).union(*map(names_read, (ROOT / "datafree").glob("*.py")))
    if script in (datafree_kd, datafree_kd_imagenet):  # these hand a family its settings by name
        read |= {name for method in METHODS.values() for name in method.family.settings} | {*FastLatents.settings}
    flags = vars(script.parse_args(["--wild", "mnist"] if script is DFND_train else []))
    assert flags.keys() - read <= {"script", "command"}  # what the record of a run says
