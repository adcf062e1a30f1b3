"""CIFAR-10 as a zip of lossless sheets and as JPEGs, and image sets in the wild below the data's root."""

import io
import zipfile

import numpy as np
import pytest
import test_data
import torch
from PIL import Image
from test_data import expect_error, noise

from data import DataError, get_dataset, get_wild, sources
from data.sources import CIFAR10_CLASSES

no_network, cifar = test_data.no_network, test_data.cifar
N = {"train": 1050, "test": 57}  # two sheets of 1,000 and 50, and one


def sheet_of(images):
    """Images (n, 32, 32, 3) as a picture of 40 a row, the rest black."""
    tiles = np.zeros((-(-len(images) // 40) * 40, 32, 32, 3), np.uint8)
    tiles[: len(images)] = images
    return Image.fromarray(tiles.reshape(-1, 40, 32, 32, 3).swapaxes(1, 2).reshape(-1, 1280, 3))


def write_pack(path, leave_out=(), **replaced):
    """A miniature pack; returns its images and labels by split."""
    path.parent.mkdir(parents=True, exist_ok=True)
    images = {split: noise(n, 32, 32, 3, seed=n) for split, n in N.items()}
    labels = {split: np.arange(n + 9).astype(np.uint8) % 10 for split, n in N.items()}
    with zipfile.ZipFile(path, "w") as archive:
        for split in N:
            for i, start in enumerate(range(0, N[split], 1000)):
                buffer = io.BytesIO()
                sheet_of(images[split][start : start + 1000]).save(buffer, "webp", lossless=True)
                content = {f"{split}{i}": buffer.getvalue()} | replaced
                if f"{split}/{i:02}.webp" not in leave_out:
                    archive.writestr(f"{split}/{i:02}.webp", content[f"{split}{i}"])
            content = {f"{split}_labels": labels[split].tobytes()} | replaced
            archive.writestr(f"{split}_labels.bin", content[f"{split}_labels"])
    return images, labels


@pytest.mark.parametrize("place", ["", "cifar10", "cifar10_lossless"])
def test_cifar10_sheets(tmp_path, place, monkeypatch):
    images, labels = write_pack(tmp_path / place / "cifar10_lossless.zip")
    d = get_dataset("cifar10", tmp_path, download=False)
    for split, n in N.items():
        found = getattr(d, split)
        assert torch.equal(found.images, torch.from_numpy(images[split]).permute(0, 3, 1, 2))
        assert found.labels.tolist() == labels[split][:n].tolist()
    assert (d.class_names, d.mean, d.padding) == (CIFAR10_CLASSES, (0.4914, 0.4822, 0.4465), 4)

    names = []
    read = zipfile.ZipFile.read
    monkeypatch.setattr(zipfile.ZipFile, "read", lambda z, name: names.append(name) or read(z, name))
    alone = get_dataset("cifar10", tmp_path, train=False)
    assert sorted(names) == ["test/00.webp", "test_labels.bin"]
    assert alone.train is None and torch.equal(alone.test.images, d.test.images)


@pytest.mark.parametrize(
    ("damage", "part"),
    [
        ({"leave_out": ("train/00.webp",)}, "sheets of train are missing"),
        ({"leave_out": ("test/00.webp",)}, "sheets of test are missing"),
        ({"train1": b"no picture"}, "damaged"),
        ({"test_labels": bytes(56)}, "labels to test does not fit"),
        ({"train_labels": bytes([10]) * 1050}, "labels to train does not fit"),
    ],
)
def test_cifar10_sheets_damaged(tmp_path, damage, part):
    write_pack(tmp_path / "cifar10_lossless.zip", **damage)
    expect_error(part, "cifar10_lossless.zip", "put a good copy there", name="cifar10", root=tmp_path)


def test_cifar10_sheets_cut_off(tmp_path):
    path = tmp_path / "cifar10_lossless.zip"
    write_pack(path)
    path.write_bytes(path.read_bytes()[:-1000])
    expect_error("damaged", path.name, name="cifar10", root=tmp_path, train=False)


def write_folders(root, ending):
    for split in ("train", "test"):
        for name in CIFAR10_CLASSES:
            (root / split / name).mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (32, 32)).save(root / split / name / f"0.{ending}")


def test_cifar10_original_before_sheets_before_folders(cifar):
    write_folders(cifar / "cifar10", "png")
    write_pack(cifar / "cifar10_lossless" / "cifar10_lossless.zip")
    assert len(get_dataset("cifar10", cifar).train) == 50
    (cifar / "cifar-10-batches-py").rename(cifar / "elsewhere")
    assert len(get_dataset("cifar10", cifar).train) == N["train"]
    (cifar / "cifar10_lossless").rename(cifar / "elsewhere2")
    assert len(get_dataset("cifar10", cifar).train) == 10


def test_jpeg_copies_are_noticed_once(tmp_path, capsys):
    sources._notice.cache_clear()
    write_folders(tmp_path / "a", "png")
    get_dataset("cifar10", tmp_path / "a")
    assert capsys.readouterr().err == ""
    write_folders(tmp_path / "b", "jpg")
    for train in (False, True, True):
        get_dataset("cifar10", tmp_path / "b", train=train)
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "JPEG" in said and "10 to 13 points" in said


def test_wild_below_the_root(tmp_path, monkeypatch):
    place = tmp_path / "root" / "imagenet" / "train"
    for name in ("a/0.webp", "b/c/1.WEBP", "b/2.png"):
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (20, 30), (0, 0, 9)).save(place / name)
    monkeypatch.chdir(tmp_path)
    split, fingerprint = get_wild("imagenet/train", tmp_path / "root", 16, 3)
    assert len(split) == 3 and split.decode().images.shape == (3, 3, 16, 16)
    assert get_wild(str(place), "elsewhere", 16, 3)[1] == fingerprint
    (tmp_path / "imagenet" / "train").mkdir(parents=True)  # as given, before below the root
    Image.new("RGB", (8, 8)).save(tmp_path / "imagenet" / "train" / "0.png")
    assert len(get_wild("imagenet/train", "root", 16, 3)[0]) == 1
    with zipfile.ZipFile(tmp_path / "root" / "w.zip", "w") as archive:
        archive.write(place / "b" / "2.png", "2.png")
    assert len(get_wild("w.zip", "root", 16, 3)[0]) == 1
    with pytest.raises(DataError, match="absent or root/absent does not exist: name a folder") as caught:
        get_wild("absent", "root", 16, 3)
    assert "\n" not in str(caught.value)
