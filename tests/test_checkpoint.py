"""Checkpoints are whole or untouched, load without running code, and say what is wrong."""

import errno
import os
import pickle
import platform
from pathlib import Path

import pytest
import torch

from datafree import checkpoint
from datafree.errors import UsageError
from models import get_model


def test_save_is_atomic(tmp_path, monkeypatch):
    path = tmp_path / "last.pt"
    checkpoint.save({"epoch": 1}, path)

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UsageError, match="No space left.*untouched"):
        checkpoint.save({"epoch": 2}, path)
    assert checkpoint.read(path) == {"epoch": 1}
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="the system has no /dev/full")
def test_a_really_full_disk(tmp_path):
    (tmp_path / f"last.pt.{platform.node()}-{os.getpid()}.tmp").symlink_to("/dev/full")
    with pytest.raises(UsageError, match="No space left"):
        checkpoint.save({"epoch": 1}, tmp_path / "last.pt")


class Evil:
    def __reduce__(self):
        return (os.system, ("touch executed",))


def damaged_files(folder):
    """Files that are no checkpoints, and the words that must be said of them."""
    good = folder / "good.pt"
    checkpoint.save(get_model("lenet5").state_dict(), good)
    content = good.read_bytes()
    for name, data, words in (
        ("half.pt", content[: len(content) // 2], "is damaged"),
        ("empty.pt", b"", "is damaged"),
        ("picture.pt", b"\x89PNG\r\n\x1a\n", "is damaged"),
        ("text.pt", b"<html>404 not found</html>", "is damaged"),
        ("evil.pt", pickle.dumps({"state_dict": Evil()}), "code"),
    ):
        (folder / name).write_bytes(data)
        yield folder / name, words
    torch.save({"state_dict": Evil()}, folder / "evil_zip.pt")
    yield folder / "evil_zip.pt", "code"
    torch.save(get_model("lenet5"), folder / "module.pt")
    yield folder / "module.pt", "code"
    yield folder / "absent.pt", "does not exist"


def test_damaged_files_are_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for path, words in damaged_files(tmp_path):
        with pytest.raises(UsageError, match=words) as error:
            checkpoint.read(path)
        assert path.name in str(error.value)
    assert not Path("executed").exists()


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: state,
        lambda state: {"state_dict": state, "epoch": 3},
        lambda state: {"model": state},
        lambda state: {"model_state": state},
        lambda state: {"model_state_dict": state, "optimizer_state_dict": {}, "epoch": 3},
        lambda state: {"net": state, "acc": 90.0},
        lambda state: {"state_dict": {f"module.{k}": v for k, v in state.items()}},
    ],
)
def test_published_wrappings_load(tmp_path, wrap):
    torch.manual_seed(1)
    source, target = get_model("lenet5"), get_model("lenet5")
    path = tmp_path / "teacher.pt"
    torch.save(wrap(source.state_dict()), path)
    checkpoint.load_weights(target, checkpoint.read(path), path, "lenet5")
    assert all(torch.equal(a, b) for a, b in zip(source.parameters(), target.parameters(), strict=True))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"epoch": 3, "weights": {}}, "no state dict under epoch, weights: save"),
        ([1, 2], "no state dict"),
        ({"state_dict": {}}, "no state dict"),
        (
            {"state_dict": get_model("lenet5_half").state_dict(), "card": {"model": "lenet5_half"}},
            "a lenet5_half, not lenet5",
        ),
        (get_model("resnet8", channels=1).state_dict(), "another architecture, not lenet5"),
        (get_model("lenet5", num_classes=7).state_dict(), "7 classes, the data set 10"),
    ],
)
def test_other_content_is_refused(content, words):
    with pytest.raises(UsageError, match=words):
        checkpoint.load_weights(get_model("lenet5"), content, "t.pt", "lenet5")


@pytest.mark.parametrize(
    "name",
    [
        "resnet20",
        "resnet18_imagenet",
        "vgg8",
        "mobilenetv2",
        "shufflenetv2",
        "wrn16_1",
        "alexnet_half",
        "hintonnet_half",
    ],
)
def test_class_count_is_told_from_architecture_for_every_family(name):
    with pytest.raises(UsageError, match="5 classes, the data set 10"):
        checkpoint.load_weights(get_model(name), get_model(name, num_classes=5).state_dict(), "t.pt", name)


def test_rng_state_is_restored():
    state = checkpoint.rng_state(torch.device("cpu"))
    first = torch.rand(3)
    checkpoint.restore_rng(state, torch.device("cpu"))
    assert torch.equal(torch.rand(3), first)
