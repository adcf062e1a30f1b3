"""Data-free scripts read test images alone, or none; what is not known of them is asked for in one line."""

import hashlib

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from sklearn.metrics import cohen_kappa_score
from torch import nn

import DAFL_train
import datafree_kd
import DFAD_cifar
import DFND_train
import ZSKT_train
from datafree import checkpoint, metrics
from datafree.runtime import Runtime
from models import get_model

SCRIPTS = {
    DAFL_train: ("--iterations", "2", "--nz", "8"),
    DFAD_cifar: ("--epoch_itrs", "1", "--nz", "8"),
    ZSKT_train: ("--epoch_itrs", "1", "--nz", "8"),
    DFND_train: ("--wild", "digits", "--num_select", "64"),
    datafree_kd: ("--ep_steps", "2", "--kd_steps", "1", "--g_steps", "1", "--ngf", "8", "--synthesis_batch_size", "32"),
}
SHORT = ("--teacher", "resnet8", "--student", "resnet8", "--n_epochs", "1", "--batch_size", "16", "--img_size", "16")


@pytest.fixture
def teacher(tmp_path):
    """Weights with a card that says what they were trained for, without statistics."""
    torch.manual_seed(0)
    card = {"model": "resnet8", "dataset": "folder", "num_classes": 2, "img_size": 16, "channels": 3}
    checkpoint.save({"state_dict": get_model("resnet8", 2, 3).state_dict(), "card": card}, tmp_path / "t.pt")
    return tmp_path / "t.pt"


def run(script, teacher, *flags):
    flags = [*SHORT, *SCRIPTS[script], "--teacher_ckpt", teacher, "--out", teacher.parent / "runs", *flags]
    return script.main(script.parse_args(flags))


STATISTICS = ("--mean", "0.5", "0.5", "0.5", "--std", "0.2", "0.2", "0.2")


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_folder_that_has_only_test_images(script, teacher, tmp_path, refused):
    for name, colour in (("dark", 60), ("bright", 200)):
        folder = tmp_path / "data" / "test" / name
        folder.mkdir(parents=True)
        for i in range(4):
            Image.new("RGB", (16, 16), (colour, colour, colour)).save(folder / f"{i}.png")
    data = ("--dataset", "folder", "--data_root", tmp_path / "data")
    wild = ("--wild_root", tmp_path) if script is DFND_train else ()
    flags = [*SHORT, *SCRIPTS[script], *data, *wild, "--teacher_ckpt", teacher, "--out", tmp_path / "none"]
    assert "give --mean and --std" in refused(script, *flags)
    assert not (tmp_path / "none").exists()
    result = run(script, teacher, *data, *wild, *STATISTICS)
    assert result["score"] == "Acc@1" and result["test_images"] == 8 and result["standard_error"] is not None
    weights = hashlib.sha256(teacher.read_bytes()).hexdigest()
    assert result["teacher_weights"]["sha256"] == weights


@pytest.mark.parametrize("script", SCRIPTS)
def test_no_test_images_at_all(script, teacher, tmp_path, capsys, refused):
    """The teacher's card says classes and channels; --num_classes and --channels say them without one."""
    result = run(script, teacher, "--dataset", "none", *STATISTICS)
    assert "which is no accuracy" in capsys.readouterr().out
    assert result["score"] == "agreement" and 0 <= result["best"] <= 100
    assert result["test_images"] == 0 and result["teacher_accuracy"] is None
    checkpoint.save(get_model("resnet8", 2, 1).state_dict(), tmp_path / "bare.pt")
    bare = ["--teacher_ckpt", tmp_path / "bare.pt", "--dataset", "none", "--out", tmp_path / "runs"]
    assert "--num_classes" in refused(script, *SHORT, *SCRIPTS[script], *bare, *STATISTICS)
    flags = [*SHORT, *SCRIPTS[script], *bare, "--num_classes", "2", "--channels", "1", "--mean", "0.5", "--std", "0.2"]
    assert script.main(script.parse_args(flags))["score"] == "agreement"


def test_a_teacher_of_other_classes_is_refused(tmp_path, refused):
    """CIFAR-10 and SVHN have ten classes each."""
    names = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
    card = {"model": "lenet5", "dataset": "cifar10", "class_names": names}
    checkpoint.save({"state_dict": get_model("lenet5").state_dict(), "card": card}, tmp_path / "t.pt")
    error = refused(DAFL_train, "--teacher_ckpt", tmp_path / "t.pt", "--out", tmp_path)
    assert "airplane, automobile, bird ... of cifar10, not 0, 1, 2 ... of digits" in error


def test_a_run_goes_on_with_the_same_teacher_only(teacher, tmp_path, refused):
    """Another file in the teacher's place is noticed, whatever it is called."""
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    content = checkpoint.read(teacher)
    flags = [
        "--dataset",
        "digits",
        "--teacher",
        "lenet5",
        "--student",
        "lenet5_half",
        "--n_epochs",
        "2",
        "--batch_size",
        "16",
    ]
    flags += [*SCRIPTS[DAFL_train], "--checkpoints", folder, "--out", tmp_path / "runs"]
    for seed in (0, 1):
        torch.manual_seed(seed)
        content = {"state_dict": get_model("lenet5").state_dict()}
        checkpoint.save(content, folder / "digits-lenet5-digits.pt")
        if seed == 0:
            result = DAFL_train.main(DAFL_train.parse_args(flags))
            (tmp_path / "runs" / result["name"] / "result.json").unlink()
    assert "weights (SHA-256) was" in refused(DAFL_train, *flags, "--resume")


def test_a_default_that_is_given_is_no_other_flag(checkpoints, tmp_path):
    flags = [
        *"--teacher resnet8 --student resnet8 --ep_steps 2 --kd_steps 1 --g_steps 1 --ngf 8 --batch_size 16".split()
    ]
    flags += ["--synthesis_batch_size", "16", "--n_epochs", "2", "--checkpoints", checkpoints, "--out", tmp_path]
    result = datafree_kd.main(datafree_kd.parse_args(flags))
    (tmp_path / result["name"] / "result.json").unlink()
    again = datafree_kd.main(datafree_kd.parse_args([*flags, "--bn", "10", "--resume"]))
    assert again["name"] == result["name"] and again["last"] == result["last"]


class Column(nn.Module):
    """Puts a row of x (N, 2) into the class that its column names."""

    def __init__(self, column: int):
        super().__init__()
        self.column = column

    def forward(self, x):
        return F.one_hot(x[:, self.column], 5).float()


def test_the_score_is_cohens_kappa():
    """Agreement beyond chance: none where a generator that has died shows one image."""
    x = torch.randint(4, (100, 2), generator=torch.Generator().manual_seed(0))
    x[:60, 1] = x[:60, 0]

    def score(x):
        runtime = Runtime(torch.device("cpu"), "fp32")
        return metrics.agreement_beyond_chance(Column(1), Column(0), 5, x.split(30), runtime)

    assert score(x) == pytest.approx(100 * cohen_kappa_score(x[:, 0], x[:, 1])) and 40 < score(x) < 75
    assert score(x[:60]) == pytest.approx(100)
    assert score(torch.ones_like(x)) == 0
    assert score(torch.tensor([[0, 1], [1, 0]])) == 0  # kappa is -1
