"""teacher_train.py --pretrained: torchvision's ImageNet weights become a teacher; no network."""

import pytest
import torch
from PIL import Image

import datafree_kd_imagenet
import teacher_train
from datafree import checkpoint
from datafree.teachers import PRETRAINED
from models import get_model

FLAGS = ("--dataset", "imagenet", "--model", "resnet18_imagenet", "--pretrained")


@pytest.fixture
def where(tmp_path):
    """Flags that name a miniature ImageNet of three classes and where to write."""
    for split in ("train", "val"):
        for name, colour in (("n01", "red"), ("n02", "green"), ("n03", "blue")):
            folder = tmp_path / "imagenet" / split / name
            folder.mkdir(parents=True)
            Image.new("RGB", (40, 32), colour).save(folder / "0.png")
    out = ("--out", tmp_path / "runs", "--checkpoints", tmp_path / "checkpoints")
    return ["--data_root", tmp_path, *out, "--img_size", "32"]


def offer(monkeypatch, answer):
    """Let torchvision's loader return what answer() does."""
    monkeypatch.setattr(type(PRETRAINED["resnet18_imagenet"]), "get_state_dict", lambda self, progress: answer())


def test_weights_are_tested_and_copied(where, tmp_path, monkeypatch, contents):
    (tmp_path / "imagenet" / "train").rename(tmp_path / "absent")  # only test images are read
    state = get_model("resnet18_imagenet", 3).state_dict()
    offer(monkeypatch, lambda: state)
    result = teacher_train.main(teacher_train.parse_args([*FLAGS, *where]))
    content = checkpoint.read(tmp_path / "checkpoints" / "imagenet-resnet18_imagenet-torchvision.pt")
    assert all(torch.equal(v, state[k]) for k, v in content["state_dict"].items())
    card = content["metadata"]
    assert card["model"] == "resnet18_imagenet" and card["class_names"] == ["n01", "n02", "n03"]
    assert card["mean"] == [0.485, 0.456, 0.406] and card["accuracy"] == result["last"]
    assert (card["recipe"], card["run"]) == ("torchvision", result["name"]) and result["args"]["pretrained"] is True
    before = contents(tmp_path)
    again = teacher_train.main(teacher_train.parse_args([*FLAGS, *where, "--resume"]))
    assert again["seconds"] == result["seconds"] and contents(tmp_path) == before


def test_what_ends_in_one_line(where, tmp_path, refused, monkeypatch):
    def offline():
        raise OSError("no network")

    offer(monkeypatch, offline)
    error = refused(teacher_train, *FLAGS, *where)
    assert "run once with a network" in error
    assert "https://download.pytorch.org/models/resnet18" in error
    offer(monkeypatch, get_model("resnet18_imagenet", 1000).state_dict)
    assert "1000 classes, the data set 3" in refused(teacher_train, *FLAGS, *where)
    for flags, words in (
        (("--dataset", "imagenet", "--model", "resnet18"), "--model resnet18_imagenet, "),
        (("--dataset", "digits", "--model", "resnet18_imagenet"), "--dataset imagenet"),
        ((*FLAGS, "--recipe", "dafl"), "its own recipe"),
        ((*FLAGS, "--lr", "0.1"), "leave --lr out"),
        ((*FLAGS, "--n_epochs", "9"), "leave --n_epochs out"),
    ):
        assert words in refused(teacher_train, *flags, "--pretrained"), flags
    error = refused(datafree_kd_imagenet, *where)
    assert "--dataset imagenet --model resnet50_imagenet --pretrained`" in error
    error = refused(datafree_kd_imagenet, *where, "--teacher", "wrn40_2")
    assert "--model wrn40_2 --recipe imagenet`" in error
    assert not (tmp_path / "runs").exists() and not (tmp_path / "checkpoints").exists()
