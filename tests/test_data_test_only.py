"""Reading the test split alone, "none", and data sets registered from outside."""

import numpy as np
import pytest
import test_data
import torch
from PIL import Image
from test_data import expect_error, noise, write_idx

import data
from data import (
    DATASETS,
    SOURCES,
    TEST_SETS,
    DataError,
    FileSplit,
    Raw,
    Source,
    TensorSplit,
    get_dataset,
    preset_of,
    split_caltech101,
)
from data.sources import CIFAR10_CLASSES
from models import MODELS

no_network, folder, decoded = test_data.no_network, test_data.folder, test_data.decoded
cifar, celeba = test_data.cifar, test_data.celeba


def remove(*paths):
    for path in paths:
        path.unlink()


def alone_as_beside_train(name, root, **kwargs):
    """The test split as it is read alone, which is the one that is read beside train."""
    both = get_dataset(name, root, **kwargs)
    alone = get_dataset(name, root, train=False, download=False, **kwargs)
    assert alone.train is None and alone.class_names == both.class_names
    assert torch.equal(alone.test.images, both.test.images) and torch.equal(alone.test.labels, both.test.labels)
    assert alone.fingerprint != both.fingerprint and len(alone.fingerprint) == 16
    return alone


# --- the test split alone --------------------------------------------------------------------


def test_folder_alone(folder, decoded):
    both = get_dataset("folder", folder)
    decoded.clear()
    alone = get_dataset("folder", folder, train=False)
    assert sum(decoded) == 4, "only the test images are decoded"
    assert torch.equal(alone.test.images, both.test.images)
    for path in (folder / "train").rglob("*.png"):
        path.write_bytes(b"")  # they may be damaged, of other classes, or gone
    (folder / "train" / "ant").rename(folder / "train" / "cow")
    decoded.clear()
    cached = get_dataset("folder", folder, train=False)
    assert not decoded and torch.equal(cached.test.images, both.test.images)
    assert cached.fingerprint == alone.fingerprint != both.fingerprint
    assert (alone.train, alone.mean, alone.std) == (None, None, None)
    assert (alone.class_names, alone.img_size, alone.padding) == (("ant", "bee"), 16, 2)
    (folder / "train").rename(folder / "elsewhere")
    given = get_dataset("folder", folder, train=False, img_size=8, mean=(0.1,) * 3, std=(0.2,) * 3)
    assert (given.mean, given.std, given.test.images.shape) == ((0.1,) * 3, (0.2,) * 3, (4, 3, 8, 8))
    assert given.to("meta").train is None and given.to("meta").test.images.is_meta
    streamed = get_dataset("folder", folder, train=False, in_memory_limit=0)
    assert isinstance(streamed.test, FileSplit) and streamed.fingerprint not in (alone.fingerprint, both.fingerprint)
    expect_error("no class folders", folder / "train", name="folder", root=folder)
    (folder / "test").rename(folder / "val")
    message = expect_error(f"put the images into {folder / 'test'}", name="folder", root=folder, train=False)
    assert "train" not in message


def test_in_training_nothing_of_the_test_only_cache_is_used(folder, decoded):
    get_dataset("folder", folder, train=False)
    decoded.clear()
    assert get_dataset("folder", folder).mean is not None and sum(decoded) == 16


def test_digits_alone():
    assert alone_as_beside_train("digits", ".").mean == (0.3060,)


@pytest.mark.parametrize("zipped", [False, True])
def test_idx_alone(tmp_path, zipped):
    write_idx(tmp_path, zipped)
    alone = alone_as_beside_train("mnist", tmp_path)
    remove(*tmp_path.glob("train-*"))
    assert get_dataset("mnist", tmp_path, train=False).fingerprint == alone.fingerprint
    remove(*tmp_path.glob("t10k-images*"))
    message = expect_error("t10k-images-idx3-ubyte", name="mnist", root=tmp_path, train=False)
    assert "train" not in message


def test_cifar_alone(cifar):
    for name, kept in (("cifar10", "test_batch"), ("cifar100", "test")):
        alone = alone_as_beside_train(name, cifar)
        place = next(path.parent for path in cifar.rglob(kept) if path.is_file())
        remove(*(path for path in place.iterdir() if path.name not in (kept, "batches.meta", "meta")))
        assert get_dataset(name, cifar, train=False).fingerprint == alone.fingerprint
        expect_error("damaged", place.name, name=name, root=cifar)


def test_cifar10_folders_alone(tmp_path):
    for c, name in enumerate(CIFAR10_CLASSES):
        (tmp_path / "test" / name).mkdir(parents=True)
        Image.new("RGB", (32, 32), (c, c, c)).save(tmp_path / "test" / name / "0.png")
    alone = get_dataset("cifar10", tmp_path, train=False)
    assert alone.test.labels.tolist() == list(range(10)) and alone.mean == (0.4914, 0.4822, 0.4465)


def test_svhn_and_usps_ask_for_their_test_files_alone(tmp_path):
    for name, wanted, unwanted in (("svhn", "test_32x32.mat", "train_32"), ("usps", "usps.t.bz2", "usps.bz2")):
        message = expect_error(f"looked for {wanted} in", name=name, root=tmp_path, train=False, download=False)
        assert unwanted not in message


def test_celeba_alone(celeba):
    alone = alone_as_beside_train("celeba", celeba, img_size=16)
    assert alone.class_names == ("not Smiling", "Smiling"), "the attribute is the one that training takes"
    place = celeba / "celeba"
    remove(*(place / "img_align_celeba" / f"{i:06d}.jpg" for i in range(1, 7)))
    assert get_dataset("celeba", celeba, img_size=16, train=False).fingerprint == alone.fingerprint
    lines = (place / "list_attr_celeba.txt").read_text().splitlines()
    (place / "list_attr_celeba.txt").write_text("\n".join(lines[:2] + lines[9:]))
    assert get_dataset("celeba", celeba, attribute="Bald", img_size=16, train=False).test.labels.tolist() == [0, 0, 0]


@pytest.mark.parametrize("place", ["", "imagenet"])
@pytest.mark.parametrize("second", ["val", "test"])
def test_imagenet_alone(tmp_path, place, second):
    for c, name in enumerate(("n02", "n01")):
        (tmp_path / place / second / name).mkdir(parents=True)
        Image.fromarray(noise(20, 30, 3, seed=c)).save(tmp_path / place / second / name / "0.png")
    alone = get_dataset("imagenet", tmp_path, train=False, img_size=16)
    assert (alone.train, alone.class_names, alone.mean) == (None, ("n01", "n02"), (0.485, 0.456, 0.406))
    assert "train/" not in expect_error("no imagenet", name="imagenet", root=tmp_path / "x", train=False)


@pytest.mark.parametrize("ending", ["jpg", "webp"])
def test_caltech101_alone(tmp_path, ending):
    place = tmp_path / "caltech101"
    for c, (name, n) in enumerate({"BACKGROUND_Google": 4, "accordion": 5, "bass": 23}.items()):
        (place / "101_ObjectCategories" / name).mkdir(parents=True)
        for i in range(n):
            image = Image.fromarray(noise(20, 30, 3, seed=10 * c + i))
            image.save(place / "101_ObjectCategories" / name / f"image_{i:04}.{ending}")
    alone = alone_as_beside_train("caltech101", tmp_path, img_size=16)
    split_caltech101.main(place)
    assert sorted(path.name for path in place.iterdir() if path.is_dir()) == ["101_ObjectCategories", "test", "train"]
    assert len(list((place / "train").rglob(f"*.{ending}"))) == 3 + 19
    (place / "101_ObjectCategories").rename(tmp_path / "elsewhere")
    assert get_dataset("caltech101", tmp_path, img_size=16).num_classes == 2
    (place / "train").rename(tmp_path / "elsewhere2")
    assert get_dataset("caltech101", tmp_path, img_size=16, train=False).fingerprint == alone.fingerprint


# --- no images at all ------------------------------------------------------------------------


def test_none():
    d = get_dataset("none", num_classes=3, img_size=24, channels=1).to("cpu")
    assert (d.train, d.test, d.mean, d.std, d.fingerprint) == (None, None, None, None, "none")
    assert (d.class_names, d.num_classes, d.img_size, d.channels) == (("0", "1", "2"), 3, 24, 1)
    given = get_dataset("none", num_classes=2, img_size=32, mean=(0.5,) * 3, std=(0.25,) * 3, train=False)
    assert (given.channels, given.mean, given.std) == (3, (0.5,) * 3, (0.25,) * 3)
    for known in ({}, {"num_classes": 2}, {"img_size": 32}):
        expect_error("--num_classes", "--img_size", name="none", **known)
    expect_error("num_classes", "digits", name="digits", num_classes=10)
    assert "none" not in DATASETS and TEST_SETS() == (*DATASETS, "none")


# --- rows of the table -----------------------------------------------------------------------


def test_registered_from_outside():
    images = torch.from_numpy(noise(6, 3, 8, 8))
    split = TensorSplit(images, torch.arange(6) % 2)
    try:
        data.register("toy", Source(lambda root, *_: Raw(("a", "b"), split, split), like="cifar10", flip=True))
        assert "toy" in DATASETS and "toy" in TEST_SETS() and "toy" in list(DATASETS)
        d = get_dataset("toy")
        assert (d.img_size, d.channels, d.padding, d.flip, d.class_names) == (8, 3, 0, True, ("a", "b"))
        assert d.mean == pytest.approx((images.double() / 255).mean((0, 2, 3)).tolist(), abs=1e-9)
        assert np.array_equal(get_dataset("toy", img_size=8).train.images, images)
        alone = get_dataset("toy", train=False)
        assert (alone.train, alone.mean, len(alone.test)) == (None, None, 6)
        assert preset_of("toy", {"cifar10": 1, "folder": 2}) == 1
        assert SOURCES["toy"].pair == ("wrn40_2", "wrn16_1") and SOURCES["toy"].paper is None
    finally:
        SOURCES.pop("toy", None)
    assert "toy" not in DATASETS
    with pytest.raises(DataError, match="none of: digits"):
        data.register("other", Source(lambda *_: None, like="toy"))


def test_preset_of():
    presets = {"mnist": "M", "cifar10": "C", "folder": "F", "usps": "U"}
    found = {name: preset_of(name, presets) for name in (*DATASETS, "none", "camvid")}
    wanted = dict.fromkeys(found, "F") | dict.fromkeys(("digits", "mnist", "fashion-mnist"), "M")
    assert found == wanted | dict.fromkeys(("cifar10", "cifar100", "svhn"), "C") | {"usps": "U"}
    with pytest.raises(KeyError):
        preset_of("celeba", {"mnist": "M"})


def test_each_source_names_networks_that_exist():
    for name, source in SOURCES.items():
        assert set(source.pair) <= set(MODELS), name
        assert source.like in SOURCES, name
