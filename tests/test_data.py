"""data/: every source in its on-disk layout (miniature), folders, the cache, batches, errors."""

import ast
import bz2
import gzip
import os
import pickle
import socket
import struct
import urllib.error
from pathlib import Path

import numpy as np
import pytest
import scipy.io
import torch
from PIL import Image
from torchvision import datasets as tv
from torchvision.datasets import utils as tv_utils

from data import (
    DATASETS,
    SOURCES,
    DataError,
    FileSplit,
    Source,
    TensorSplit,
    get_dataset,
    load_folder,
    register,
    sources,
    split_caltech101,
    splits,
)
from data.sources import CIFAR10_CLASSES, split_class

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    """Downloads fail at once, as on a machine without a network."""

    def unreachable(*args, **kwargs):
        raise urllib.error.URLError("no network in tests")

    monkeypatch.setattr(tv_utils, "_urlretrieve", unreachable)
    monkeypatch.setattr(tv_utils, "_get_redirect_url", unreachable)


def noise(*shape, seed=0):
    return np.random.RandomState(seed).randint(0, 256, shape).astype(np.uint8)


def expect_error(*parts, **kwargs):
    """get_dataset must raise a DataError of one line with all parts in it."""
    with pytest.raises(DataError) as caught:
        get_dataset(**kwargs)
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert str(part) in message, message
    return message


# --- folders ---------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    """Two classes of 16x16 PNGs: 6 + 6 for training, 2 + 2 for testing."""
    for split, n in (("train", 6), ("test", 2)):
        for c, name in enumerate(("ant", "bee")):
            place = tmp_path / split / name
            place.mkdir(parents=True)
            for i in range(n):
                pixels = noise(16, 16, 3, seed=100 * len(split) + 10 * c + i)
                Image.fromarray(pixels).save(place / f"{i}.png")
    return tmp_path


def test_folder_in_memory(folder):
    d = get_dataset("folder", folder)
    assert isinstance(d.train, TensorSplit)
    assert (len(d.train), len(d.test), d.num_classes) == (12, 4, 2)
    assert d.class_names == ("ant", "bee")
    assert (d.img_size, d.channels, d.padding, d.flip) == (16, 3, 2, True)
    assert d.train.images.dtype == torch.uint8 and d.train.labels.dtype == torch.int64
    assert d.train.labels.tolist() == [0] * 6 + [1] * 6
    first = np.asarray(Image.open(folder / "train" / "ant" / "0.png"))
    assert np.array_equal(d.train.images[0].permute(1, 2, 0).numpy(), first)
    scaled = d.train.images.double() / 255
    assert d.mean == pytest.approx(scaled.mean((0, 2, 3)).tolist(), abs=1e-9)
    assert d.std == pytest.approx(scaled.std((0, 2, 3), correction=0).tolist(), abs=1e-9)


def test_folder_overrides(folder):
    half, some = (0.5, 0.5, 0.5), (0.25, 0.2, 0.3)
    d = get_dataset("folder", folder, img_size=24, mean=half, std=some)
    assert d.train.images.shape == (12, 3, 24, 24)
    assert (d.mean, d.std, d.padding) == (half, some, 3)
    grey = get_dataset("folder", folder, channels=1)
    assert grey.train.images.shape == (12, 1, 16, 16) and len(grey.mean) == len(grey.std) == 1
    luma = np.asarray(Image.open(folder / "test" / "bee" / "1.png").convert("L"))
    assert np.array_equal(grey.test.images[-1, 0].numpy(), luma)


def test_folder_streamed_equals_in_memory(folder):
    kwargs = {"img_size": 20, "channels": 1}
    memory = get_dataset("folder", folder, **kwargs)
    streamed = get_dataset("folder", folder, **kwargs, in_memory_limit=0)
    assert isinstance(streamed.train, FileSplit)
    assert (streamed.mean, streamed.std) == (memory.mean, memory.std)
    for shuffle in (False, True):
        states, passes = [], []
        for d in (memory, streamed):
            torch.manual_seed(3)
            batches = d.train.batches(5, shuffle=shuffle, device="cpu")
            assert len(batches) == 3
            passes.append(list(batches))
            states.append(torch.get_rng_state())
        assert len(passes[0]) == len(passes[1]) == 3
        for (x, y), (u, v) in zip(*passes, strict=True):
            assert torch.equal(x, u) and torch.equal(y, v)
            assert u.dtype == torch.uint8 and v.dtype == torch.int64
        assert torch.equal(*states)


def test_folder_odd_images(tmp_path):
    """Every kind of image becomes what a viewer shows."""
    place = tmp_path / "train" / "x"
    (place / "deeper" / "still").mkdir(parents=True)
    (tmp_path / "test" / "x").mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(tmp_path / "test" / "x" / "0.PNG")

    def solid(mode, colour):
        return Image.new(mode, (8, 8), colour)

    def grey16(value):
        return Image.fromarray(np.full((8, 8), value, np.uint16))

    palette = solid("RGB", (200, 10, 60)).convert("P", palette=Image.Palette.ADAPTIVE)
    wide = np.zeros((8, 24, 3), np.uint8)
    wide[:, 8:16] = (1, 2, 3)
    cases = {
        "a_rgba.png": (solid("RGBA", (10, 20, 30, 255)), (10, 20, 30)),
        "b_clear.png": (solid("RGBA", (10, 20, 30, 0)), (255, 255, 255)),
        "c_palette.gif": (palette, (200, 10, 60)),
        "d_grey.JPG": (solid("L", 77), (77, 77, 77)),
        "e_grey16.png": (grey16(65535), (255, 255, 255)),
        "f_grey16.tiff": (grey16(128 * 257), (128, 128, 128)),
        "g_grey16.png": (grey16(300), (1, 1, 1)),
        "h_bits.bmp": (solid("1", 1), (255, 255, 255)),
        "i_cmyk.tif": (solid("CMYK", (255, 0, 0, 0)), (0, 255, 255)),
        "j_wide.png": (Image.fromarray(wide), (1, 2, 3)),
        "k_grey_alpha.png": (solid("LA", (50, 255)), (50, 50, 50)),
        "l.ppm": (solid("RGB", (4, 5, 6)), (4, 5, 6)),
        "m.pgm": (solid("L", 9), (9, 9, 9)),
        "n.webp": (solid("RGB", (128, 128, 128)), (128, 128, 128)),
    }
    for name, (image, _) in cases.items():
        image.save(place / name)
    solid("RGB", (7, 7, 7)).save(place / "deeper" / "still" / "z.jpeg")
    (place / "notes.txt").write_text("not an image")
    (place / "._a.png").write_text("a hidden file")
    for split in ("train", "test"):
        (tmp_path / split / "y").mkdir()
        Image.new("RGB", (8, 8)).save(tmp_path / split / "y" / "0.png")
    d = get_dataset("folder", tmp_path, img_size=8)
    wanted = [colour for _, colour in cases.values()]
    by_name = dict(zip(sorted([*cases, "deeper"]), d.train.images[:-1], strict=True))
    assert by_name.pop("deeper").flatten(1).float().mean(1).tolist() == [7, 7, 7]
    for name, colour in zip(cases, wanted, strict=True):
        image = by_name[name].flatten(1).int()
        assert (image - torch.tensor(colour)[:, None]).abs().max() <= 1, name


def test_folder_unreadable_images(folder, capfd):
    bad = folder / "train" / "ant" / "3.png"
    bad.write_bytes(bad.read_bytes()[:300])
    expect_error(bad, "replace or delete", name="folder", root=folder)
    (folder / "test" / "bee" / "0.png").write_bytes(b"")
    (folder / "train" / "bee" / "2.png").write_text("hello")
    expect_error(bad, "and 1 more", name="folder", root=folder)
    # Streamed, with the statistics given, it only shows when the batch is read.
    some = (0.5, 0.5, 0.5)
    d = get_dataset("folder", folder, mean=some, std=some, in_memory_limit=0)
    with pytest.raises(DataError, match="cannot read image") as caught:
        list(d.train.batches(4))
    assert "\n" not in str(caught.value)
    assert "Traceback" not in capfd.readouterr().err


def test_folder_wrong_layouts(folder, tmp_path):
    expect_error(
        "no class folders", tmp_path / "nowhere", "test/<class>",
        name="folder", root=tmp_path / "nowhere",
    )  # fmt: skip
    (folder / "train" / "cow").mkdir()
    expect_error("cow", "both splits", name="folder", root=folder)
    (folder / "test" / "cow").mkdir()
    expect_error("no images", folder / "train" / "cow", name="folder", root=folder)
    for split in ("train", "test"):
        (folder / split / "cow").rmdir()
    Image.new("RGB", (5, 9)).save(folder / "train" / "ant" / "!.png")
    expect_error("5x9", "img_size", name="folder", root=folder)
    assert get_dataset("folder", folder, img_size=4).img_size == 4
    (folder / "test").rename(folder / "val")
    expect_error(folder / "test", name="folder", root=folder)


def test_constant_images_have_a_usable_std(tmp_path):
    for split in ("train", "test"):
        for name in "xy":
            (tmp_path / split / name).mkdir(parents=True)
            Image.new("RGB", (4, 4), (255, 0, 0)).save(tmp_path / split / name / "0.png")
    d = get_dataset("folder", tmp_path)
    assert d.mean == (1, 0, 0) and min(d.std) > 0


# --- the cache -------------------------------------------------------------------------------


@pytest.fixture
def decoded(monkeypatch):
    """Counts calls that read pixels from files."""
    calls = []
    original = FileSplit.__getitem__

    def counting(self, rows):
        calls.append(len(rows))
        return original(self, rows)

    monkeypatch.setattr(FileSplit, "__getitem__", counting)
    return calls


def test_cache_is_used_and_invalidated(folder, decoded):
    cache = folder / ".datafree-16x3.pt"
    first = get_dataset("folder", folder)
    assert sum(decoded) == 16 and cache.is_file()
    decoded.clear()
    again = get_dataset("folder", folder)
    assert not decoded and torch.equal(first.train.images, again.train.images)
    assert (first.mean, first.fingerprint) == (again.mean, again.fingerprint)

    changed = folder / "train" / "ant" / "0.png"  # same name and size, other time
    stat = changed.stat()
    os.utime(changed, ns=(stat.st_atime_ns, stat.st_mtime_ns + 10**9))
    get_dataset("folder", folder)
    assert sum(decoded) == 16
    decoded.clear()

    # The same files as another data set, which has published statistics.
    register("mine", Source(lambda root, *more: load_folder(folder, *more), mean=(0.5,) * 3, std=(0.2,) * 3))
    assert (get_dataset("mine", folder).mean, get_dataset("mine", folder).std) == ((0.5,) * 3, (0.2,) * 3)
    del SOURCES["mine"]

    (folder / "test" / "bee" / "1.png").unlink()
    assert len(get_dataset("folder", folder).test) == 3
    assert sum(decoded) == 15
    decoded.clear()

    cache.write_bytes(cache.read_bytes()[:1000])  # cut off, then not even ours
    get_dataset("folder", folder)
    cache.write_text("nonsense")
    get_dataset("folder", folder)
    assert sum(decoded) == 30
    assert [p.name for p in folder.glob(".datafree*")] == [cache.name]


def test_cache_of_a_streamed_folder_holds_statistics(folder, decoded):
    first = get_dataset("folder", folder, in_memory_limit=0)
    assert sum(decoded) == 12 and (folder / ".datafree-16x3.pt").stat().st_size < 4000
    decoded.clear()
    assert get_dataset("folder", folder, in_memory_limit=0).mean == first.mean
    assert not decoded
    assert isinstance(get_dataset("folder", folder).train, TensorSplit)
    assert sum(decoded) == 16


def test_no_cache_where_it_cannot_be_written(folder, decoded):
    (folder / ".datafree-16x3.pt").mkdir()  # permissions would not stop root
    for _ in range(2):
        assert len(get_dataset("folder", folder).train) == 12
    assert sum(decoded) == 32
    assert len(list(folder.glob(".datafree*"))) == 1


# --- batches ---------------------------------------------------------------------------------


def test_batches(folder):
    split = get_dataset("folder", folder).train
    assert [len(y) for _, y in split.batches(5)] == [5, 5, 2]
    assert [len(y) for _, y in split.batches(5, drop_last=True)] == [5, 5]
    assert len(split.batches(5)) == 3 and len(split.batches(5, drop_last=True)) == 2
    assert torch.equal(torch.cat([x for x, _ in split.batches(5)]), split.images)
    with pytest.raises(DataError, match="smaller batch size"):
        split.batches(13, drop_last=True)
    x, _ = next(iter(split.batches(4)))
    x.zero_()  # batches are copies
    assert split.images[:4].any()


def test_shuffling_repeats_from_the_saved_state():
    split = get_dataset("digits").train
    torch.manual_seed(0)
    batches = split.batches(100, shuffle=True)
    list(batches)
    state = torch.get_rng_state()
    second = [y for _, y in batches]
    third = torch.cat([y for _, y in batches])
    torch.set_rng_state(state)
    assert all(torch.equal(a, b) for a, (_, b) in zip(second, batches, strict=True))
    assert torch.equal(third.sort().values, split.labels.sort().values)
    assert not torch.equal(third, torch.cat(second))


def test_to_device(folder):
    for limit in (0, 2**30):
        d = get_dataset("folder", folder, in_memory_limit=limit).to("meta")
        assert next(iter(d.train.batches(2)))[0].device.type == "meta"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_batches_on_a_gpu(folder):
    for limit in (0, 2**30):
        d = get_dataset("folder", folder, in_memory_limit=limit)
        host = list(d.train.batches(5))
        for moved in (d.to("cuda").train.batches(5), d.train.batches(5, device="cuda")):
            for (x, y), (u, v) in zip(host, moved, strict=True):
                assert u.is_cuda and v.is_cuda
                assert torch.equal(x, u.cpu()) and torch.equal(y, v.cpu())


# --- digits ----------------------------------------------------------------------------------


def test_digits():
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    d = get_dataset("digits")
    assert torch.equal(before[0], torch.get_rng_state())
    assert np.array_equal(before[1], np.random.get_state()[1])
    assert d.train.images.shape == (1297, 1, 32, 32) and d.test.images.shape == (500, 1, 32, 32)
    assert torch.bincount(d.test.labels).tolist() == [50] * 10
    assert torch.bincount(d.train.labels).min() >= 124
    mean, std = splits.channel_statistics(d.train)
    # The resizing kernels of different torchvision versions round apart by a few 1e-4.
    assert d.mean == pytest.approx(mean, abs=1e-3) and d.std == pytest.approx(std, abs=1e-3)
    assert (d.num_classes, d.padding, d.flip) == (10, 0, False)
    np.random.seed(5)
    assert get_dataset("digits").fingerprint == d.fingerprint == "0c75dd140fd20d97"
    native = get_dataset("digits", img_size=8)
    assert native.train.images.shape[-2:] == (8, 8) and native.train.images.max() == 255


def test_digits_in_three_channels():
    d = get_dataset("digits", channels=3)
    assert d.train.images.shape == (1297, 3, 32, 32)
    assert torch.equal(d.train.images[:, 0], d.train.images[:, 2])
    assert d.mean == (0.3060,) * 3 and d.std == (0.3242,) * 3


# --- MNIST and Fashion-MNIST -----------------------------------------------------------------


def write_idx(place, zipped=False, n=(20, 10)):
    place.mkdir(parents=True, exist_ok=True)
    written = {}
    for split, count in zip(("train", "t10k"), n, strict=True):
        images, labels = noise(count, 28, 28, seed=count), np.arange(count, dtype=np.uint8) % 10
        files = {
            f"{split}-images-idx3-ubyte": struct.pack(">4I", 2051, count, 28, 28) + images.tobytes(),
            f"{split}-labels-idx1-ubyte": struct.pack(">2I", 2049, count) + labels.tobytes(),
        }
        for name, content in files.items():
            if zipped:
                (place / f"{name}.gz").write_bytes(gzip.compress(content))
            else:
                (place / name).write_bytes(content)
        written[split] = images
    return written


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("mnist", ""), ("mnist", "mnist"), ("mnist", "MNIST/raw"),
        ("fashion-mnist", "fashion-mnist"), ("fashion-mnist", "FashionMNIST/raw"),
    ],
)  # fmt: skip
def test_idx(tmp_path, name, place, zipped):
    images = write_idx(tmp_path / place, zipped)
    native = get_dataset(name, tmp_path, img_size=28)
    assert np.array_equal(native.train.images[:, 0].numpy(), images["train"])
    assert np.array_equal(native.test.images[:, 0].numpy(), images["t10k"])
    assert native.test.labels.tolist() == list(range(10))
    d = get_dataset(name, tmp_path)
    assert d.train.images.shape == (20, 1, 32, 32) and d.img_size == 32
    assert d.fingerprint == native.fingerprint  # of the data, not of how it is fed
    assert d.mean == ((0.1307,) if name == "mnist" else (0.2860,))
    assert len(d.class_names) == 10


def test_idx_resizes_like_pillow(tmp_path):
    images = write_idx(tmp_path)["train"]
    wanted = Image.fromarray(images[0]).resize((32, 32), Image.Resampling.BILINEAR)
    got = get_dataset("mnist", tmp_path).train.images[0, 0]
    assert np.abs(got.numpy().astype(int) - np.asarray(wanted).astype(int)).max() <= 1


@pytest.mark.parametrize("zipped", [False, True])
def test_idx_damaged(tmp_path, zipped):
    write_idx(tmp_path, zipped)
    path = tmp_path / ("train-images-idx3-ubyte" + ".gz" * zipped)
    whole = path.read_bytes()
    for content in (whole[:-9], whole[:7], b"", b"nonsense" * 9):
        path.write_bytes(content)
        expect_error(path, "put a good copy there", name="mnist", root=tmp_path)
    path.write_bytes(whole)
    labels = tmp_path / ("t10k-labels-idx1-ubyte" + ".gz" * zipped)
    content = struct.pack(">2I", 2049, 9) + bytes(9)
    labels.write_bytes(gzip.compress(content) if zipped else content)
    expect_error(labels.stem, "labels to test does not fit", name="mnist", root=tmp_path)


def test_mnist_is_downloaded_once(tmp_path, monkeypatch):
    def fetched(self):
        assert socket.getdefaulttimeout()
        print("chatter")
        write_idx(Path(self.raw_folder))
        (Path(self.raw_folder) / "train-images-idx3-ubyte.gz").write_bytes(b"archive")

    monkeypatch.setattr(tv.MNIST, "download", fetched)
    root = tmp_path / "new"
    assert len(get_dataset("mnist", root).train) == 20
    left = sorted(p.relative_to(root).as_posix() for p in root.rglob("*") if p.is_file())
    assert left[0] == "MNIST/raw/t10k-images-idx3-ubyte" and len(left) == 4
    assert not list(root.glob(".download*")) and socket.getdefaulttimeout() is None
    monkeypatch.undo()
    assert len(get_dataset("mnist", root, download=False).train) == 20


# --- CIFAR -----------------------------------------------------------------------------------


@pytest.fixture
def cifar(tmp_path, monkeypatch):
    """Miniature original batches of both; their sums cannot be the published ones."""
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda p, m: Path(p).exists())
    for cls, key, names in (
        (tv.CIFAR10, "labels", list(CIFAR10_CLASSES)),
        (tv.CIFAR100, "fine_labels", [f"class{i}" for i in range(100)]),
    ):
        place = tmp_path / cls.base_folder
        place.mkdir()
        for i, (file, _) in enumerate(cls.train_list + cls.test_list):
            content = {"data": noise(10, 3072, seed=i), key: [j % len(names) for j in range(10)]}
            (place / file).write_bytes(pickle.dumps(content))
        (place / cls.meta["filename"]).write_bytes(pickle.dumps({cls.meta["key"]: names}))
    return tmp_path


def test_cifar_batches(cifar):
    d = get_dataset("cifar10", cifar, download=False)
    assert d.train.images.shape == (50, 3, 32, 32) and len(d.test) == 10
    assert np.array_equal(d.train.images[10].flatten().numpy(), noise(10, 3072, seed=1)[0])
    assert (d.padding, d.flip, d.class_names) == (4, True, CIFAR10_CLASSES)
    assert d.mean == (0.4914, 0.4822, 0.4465) and d.std == (0.2023, 0.1994, 0.2010)
    hundred = get_dataset("cifar100", cifar)
    assert (len(hundred.train), len(hundred.test), hundred.num_classes) == (10, 10, 100)
    assert hundred.mean == (0.5071, 0.4867, 0.4408)


def test_cifar_in_grey(cifar):
    d = get_dataset("cifar10", cifar, channels=1)
    pixels = noise(10, 3072, seed=0)[0].reshape(3, 32, 32).transpose(1, 2, 0)
    luma = np.asarray(Image.fromarray(np.ascontiguousarray(pixels)).convert("L"))
    assert np.array_equal(d.train.images[0, 0].numpy(), luma)
    assert d.mean == pytest.approx((0.4809,), abs=1e-4) and len(d.std) == 1


def test_cifar_damaged(cifar, monkeypatch):
    monkeypatch.undo()  # the real sums
    expect_error("cifar-10-batches-py", "damaged", "delete it", name="cifar10", root=cifar)


@pytest.mark.parametrize("place", ["", "cifar10"])
def test_cifar10_as_class_folders(tmp_path, place):
    for split in ("train", "test"):
        for c, name in enumerate(CIFAR10_CLASSES):
            folder = tmp_path / place / split / name
            folder.mkdir(parents=True)
            Image.new("RGB", (32, 32), (c, c, c)).save(folder / "0000.jpg", quality=100)
    d = get_dataset("cifar10", tmp_path)
    assert d.train.labels.tolist() == list(range(10)) and d.class_names == CIFAR10_CLASSES
    assert d.mean == (0.4914, 0.4822, 0.4465) and d.padding == 4
    assert (tmp_path / place / ".datafree-32x3.pt").is_file()
    (tmp_path / place / "train" / "horse").rename(tmp_path / place / "train" / "pony")
    expect_error("no cifar10", "cifar-10-batches-py", name="cifar10", root=tmp_path)


# --- SVHN, CelebA ----------------------------------------------------------------------------


def test_usps(tmp_path):
    pixels = noise(12, 16, 16)
    for name in ("usps.bz2", "usps.t.bz2"):
        lines = [
            f"{i % 10 + 1} " + " ".join(f"{j}:{v / 127.5 - 1:.7f}" for j, v in enumerate(x.flatten(), 1))
            for i, x in enumerate(pixels)
        ]
        (tmp_path / name).write_bytes(bz2.compress("\n".join(lines).encode()))
    d = get_dataset("usps", tmp_path, img_size=16)
    assert (len(d.train), len(d.test), d.channels) == (12, 12, 1)
    assert d.test.labels.tolist() == [*range(10), 0, 1]
    # torchvision cuts off what it computes from the file's rounded numbers.
    assert (d.train.images[:, 0].int() - torch.from_numpy(pixels).int()).abs().max() <= 1
    whole = (tmp_path / "usps.bz2").read_bytes()
    (tmp_path / "usps.bz2").write_bytes(whole[: len(whole) // 2])
    expect_error("damaged", name="usps", root=tmp_path)
    alone = get_dataset("usps", tmp_path, img_size=16, train=False)
    assert alone.train is None and torch.equal(alone.test.images, d.test.images)


def test_svhn(tmp_path, monkeypatch):
    monkeypatch.setattr("torchvision.datasets.svhn.check_integrity", lambda *a: True)
    images = {"train": noise(32, 32, 3, 12), "test": noise(32, 32, 3, 11, seed=1)}
    for split, x in images.items():
        y = (np.arange(x.shape[3]) % 10 + 1)[:, None]  # 10 stands for the digit 0
        scipy.io.savemat(tmp_path / f"{split}_32x32.mat", {"X": x, "y": y})
    d = get_dataset("svhn", tmp_path)
    assert (len(d.train), len(d.test)) == (12, 11)
    assert d.test.labels.tolist() == [1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 1]
    wanted = images["train"][..., 3].transpose(2, 0, 1)
    assert np.array_equal(d.train.images[3].numpy(), wanted)
    assert (d.mean, d.std, d.padding, d.flip) == ((0.5,) * 3, (0.5,) * 3, 0, False)
    (tmp_path / "train_32x32.mat").rename(tmp_path / "train.mat")
    alone = get_dataset("svhn", tmp_path, train=False)
    assert alone.train is None and torch.equal(alone.test.images, d.test.images)
    (tmp_path / "train.mat").rename(tmp_path / "train_32x32.mat")
    (tmp_path / "test_32x32.mat").write_bytes(b"cut off")
    expect_error("damaged", name="svhn", root=tmp_path)


def test_caltech101(tmp_path, forks):
    place = tmp_path / "caltech101" / "101_ObjectCategories"
    for c, (name, n) in enumerate({"BACKGROUND_Google": 4, "ant": 4, "bass": 23}.items()):
        (place / name).mkdir(parents=True)
        for i in reversed(range(n)):  # the file system's order must not matter
            Image.fromarray(noise(20, 30, 3, seed=c)).save(place / name / f"image_{i:04}.jpg")
    d = get_dataset("caltech101", tmp_path)
    assert d.class_names == ("ant", "bass")
    assert (d.img_size, d.flip, d.mean) == (128, True, (0.5,) * 3)
    # max(int(0.2 n), 2) of each class are for testing
    assert d.test.labels.tolist() == [0] * 2 + [1] * 4
    assert d.train.labels.tolist() == [0] * 2 + [1] * 19
    names = [f"image_{i:04}.jpg" for i in range(23)]
    train, test = split_class(names)
    assert split_class(names[::-1]) == (train, test) and sorted(train + test) == names
    assert test == ["image_0002.jpg", "image_0004.jpg", "image_0008.jpg", "image_0018.jpg"]
    for _ in range(2):
        split_caltech101.main(place.parent)
    assert sorted(p.name for p in (place.parent / "test" / "bass").iterdir()) == test
    end = forks.run("data/split_caltech101", [tmp_path / "none"])
    assert end.code and end.stderr.startswith("no class folders in ") and end.stderr.count("\n") == 1
    for path in (place / "ant").iterdir():
        path.unlink()
    expect_error("0 image(s)", "ant", name="caltech101", root=tmp_path)


@pytest.mark.parametrize("place", ["", "imagenet"])
@pytest.mark.parametrize("second", ["val", "test"])
def test_imagenet(tmp_path, place, second):
    root = tmp_path / place
    # A class that only one split has does not count.
    for split, names in (("train", ("n02", "n01", "n03")), (second, ("n01", "n02", "n04"))):
        for name in names:
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(2 if split == "train" else 1):
                Image.fromarray(noise(20, 30, 3, seed=i)).save(folder / f"{i}.png")
    d = get_dataset("imagenet", tmp_path, in_memory_limit=2**19)
    assert isinstance(d.train, FileSplit) and not list(root.rglob(".datafree*"))
    assert d.class_names == ("n01", "n02") and d.num_classes == 2
    assert d.train.labels.tolist() == [0, 0, 1, 1] and d.test.labels.tolist() == [0, 1]
    assert (d.img_size, d.channels, d.padding, d.flip) == (224, 3, 28, True)
    assert d.mean == (0.485, 0.456, 0.406) and d.std == (0.229, 0.224, 0.225)
    x, y = next(iter(d.train.batches(3)))
    assert x.shape == (3, 3, 224, 224) and y.tolist() == [0, 0, 1]
    small = get_dataset("imagenet", tmp_path, img_size=32)
    assert small.train.images.shape == (4, 3, 32, 32) and small.padding == 4
    assert [SOURCES["imagenet"].least_area(size) for size in (None, 224, 32)] == [0.08, 0.08, None]
    (root / "train" / "n01" / "0.png").unlink()
    (root / "train" / "n01" / "1.png").unlink()
    expect_error("no images", root / "train" / "n01", name="imagenet", root=tmp_path)
    (root / second).rename(root / "other")
    expect_error(
        "no imagenet", "train/<class>/ and val/<class>/", tmp_path / "imagenet",
        name="imagenet", root=tmp_path,
    )  # fmt: skip


@pytest.mark.parametrize("place", ["", "tiny-imagenet-200"])
@pytest.mark.parametrize("sorted_out", [False, True])
def test_tiny_imagenet(tmp_path, place, sorted_out):
    """As it is unpacked, or with the validation images sorted into folders of their classes."""
    root, names = tmp_path / place, ("n03", "n01")
    lines = []
    for name in names:
        (root / "train" / name / "images").mkdir(parents=True)
        for i in range(2):
            Image.fromarray(noise(64, 64, 3, seed=i)).save(root / "train" / name / "images" / f"{name}_{i}.JPEG")
    for i, name in enumerate(("n01", "n03", "n01")):
        folder = root / "val" / (f"{name}/images" if sorted_out else "images")
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(noise(64, 64, 3, seed=9 + i)).save(folder / f"val_{i}.JPEG")
        lines.append(f"val_{i}.JPEG\t{name}\t0\t32\t44\t62")
    (root / "val" / "val_annotations.txt").write_text("\n".join(lines) + "\n")
    (root / "wnids.txt").write_text("\n".join(names) + "\n")
    d = get_dataset("tiny-imagenet", tmp_path)
    assert d.class_names == ("n01", "n03") and d.train.labels.tolist() == [0, 0, 1, 1]
    assert d.test.labels.tolist() == ([0, 0, 1] if sorted_out else [0, 1, 0])
    assert (d.img_size, d.padding, d.flip, d.mean) == (64, 4, True, (0.5,) * 3)
    assert d.test.images.shape == (3, 3, 64, 64)
    assert get_dataset("tiny-imagenet", tmp_path, train=False).train is None
    for path in root.rglob("wnids.txt"):
        listed = path.read_text()
        path.write_text("")
        expect_error("has no classes", name="tiny-imagenet", root=tmp_path)
        path.write_text(listed)
    if not sorted_out:
        (root / "val" / "val_annotations.txt").write_text("val_0.JPEG\tn99\n")
        expect_error("val_annotations.txt is damaged", name="tiny-imagenet", root=tmp_path)
        (root / "val" / "val_annotations.txt").write_text(lines[0] + "\nval_7.JPEG\tn01\n")
        expect_error("val_7.JPEG", name="tiny-imagenet", root=tmp_path)


@pytest.fixture
def celeba(tmp_path):
    place = tmp_path / "celeba"
    (place / "img_align_celeba").mkdir(parents=True)
    attributes = {"Bald": {1}, "Smiling": {0, 2, 4, 7, 8}, "Young": {0, 1, 2, 3, 4, 5, 6, 8}}
    rows, parts = ["10", " ".join(attributes)], []
    for i in range(10):
        file = f"{i + 1:06d}.jpg"
        values = ["1" if i in members else "-1" for members in attributes.values()]
        rows.append(f"{file} " + " ".join(v.rjust(2) for v in values))
        parts.append(f"{file} {0 if i < 6 else 1 if i < 7 else 2}")
        Image.fromarray(noise(218, 178, 3, seed=i)).save(place / "img_align_celeba" / file)
    (place / "list_attr_celeba.txt").write_text("\n".join(rows) + "\n")
    (place / "list_eval_partition.txt").write_text("\n".join(parts) + "\n")
    return tmp_path


def test_celeba(celeba):
    d = get_dataset("celeba", celeba, in_memory_limit=2**20)
    assert isinstance(d.train, FileSplit) and not list(celeba.rglob(".datafree*"))
    assert (d.num_classes, d.class_names) == (2, ("not Smiling", "Smiling"))
    assert (d.img_size, d.flip, d.padding, d.mean) == (224, True, 0, (0.5,) * 3)
    assert d.train.labels.tolist() == [1, 0, 1, 0, 1, 0] and d.test.labels.tolist() == [1, 1, 0]
    x, y = next(iter(d.train.batches(4)))
    assert x.shape == (4, 3, 224, 224) and y.tolist() == [1, 0, 1, 0]
    bald = get_dataset("celeba", celeba, attribute="Bald", img_size=16)
    assert bald.train.images.shape == (6, 3, 16, 16) and bald.class_names[1] == "Bald"
    assert bald.train.labels.tolist() == [0, 1, 0, 0, 0, 0]
    expect_error("Hat", "Bald Smiling Young", name="celeba", root=celeba, attribute="Hat")
    (celeba / "celeba" / "img_align_celeba" / "000002.jpg").unlink()
    expect_error("000002.jpg", name="celeba", root=celeba)
    (celeba / "celeba" / "list_eval_partition.txt").write_text("000001.jpg 0\n")
    expect_error("damaged", name="celeba", root=celeba)


# --- arguments, downloads, fingerprints ------------------------------------------------------


@pytest.mark.parametrize("name", sorted(set(DATASETS) - {"digits", "folder", "imagenet", "tiny-imagenet"}))
@pytest.mark.parametrize("download", [True, False])
def test_missing_data(tmp_path, name, download, capfd):
    root = tmp_path / "datasets"
    message = expect_error(f"no {name}", "looked for", root, name=name, root=root, download=download)
    assert ("failed" in message) == download and "Traceback" not in message
    assert not root.exists() and socket.getdefaulttimeout() is None
    assert capfd.readouterr().out == ""


def test_failed_download_leaves_what_was_there(tmp_path, monkeypatch):
    def cut_off(self):
        Path(self.root, "cifar-10-python.tar.gz").write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tv.CIFAR10, "download", cut_off)
    (tmp_path / "mine.txt").write_text("keep")
    expect_error("No space left", name="cifar10", root=tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]
    expect_error("no mnist", name="mnist", root=tmp_path / "mine.txt")  # cannot be a folder


def test_a_download_comes_into_place_whole(tmp_path, monkeypatch):
    """A folder is there with all that it holds, and lists are there when what they list is."""
    old, new = tmp_path / "root", tmp_path / "new"
    for name in ("celeba/images/0.jpg", "celeba/images/1.jpg", "celeba/a_list.txt", "more/x"):
        (new / name).parent.mkdir(parents=True, exist_ok=True)
        (new / name).touch()
    (old / "celeba").mkdir(parents=True)
    moved, replace = [], Path.replace
    monkeypatch.setattr(Path, "replace", lambda self, to: moved.append(self.name) or replace(self, to))
    sources._move(new, old)
    assert moved == ["images", "a_list.txt", "more"] and (old / "celeba" / "images" / "1.jpg").is_file()


def test_fashion_is_not_the_digits_that_lie_beside_it(tmp_path):
    write_idx(tmp_path)
    assert len(get_dataset("mnist", tmp_path, download=False).train) == 20
    expect_error("no fashion-mnist", name="fashion-mnist", root=tmp_path, download=False)


@pytest.mark.parametrize(
    ("kwargs", "part"),
    [
        ({"name": "cifar11"}, "choose one of: digits"),
        ({"name": "digits", "channels": 2}, "1 or 3"),
        ({"name": "digits", "img_size": 0}, "at least 1"),
        ({"name": "digits", "mean": (0.5, 0.5)}, "one per channel"),
        ({"name": "digits", "mean": (127.0,)}, "from 0 to 1"),
        ({"name": "digits", "std": (0.0,)}, "not 0"),
        ({"name": "digits", "attribute": "Bald"}, "celeba"),
    ],
)
def test_wrong_arguments(kwargs, part):
    expect_error(part, **kwargs)


def test_fingerprint_sees_a_pixel_and_a_label(folder):
    kwargs = {"name": "folder", "root": folder}
    before = get_dataset(**kwargs).fingerprint
    streamed = get_dataset(**kwargs, in_memory_limit=0).fingerprint
    assert before != streamed and len(before) == 16
    path = folder / "test" / "bee" / "0.png"
    pixels = np.array(Image.open(path))
    pixels[3, 3, 0] ^= 1
    Image.fromarray(pixels).save(path)
    os.utime(path, ns=(0, 0))
    changed = get_dataset(**kwargs).fingerprint
    assert changed != before
    path.rename(folder / "test" / "ant" / "9.png")
    assert get_dataset(**kwargs).fingerprint not in (before, changed)
    assert get_dataset(**kwargs, in_memory_limit=0).fingerprint != streamed


def test_imports_go_one_way():
    """Root scripts import datafree, which imports models and data; those import nothing of ours."""
    scripts = {path.stem for path in ROOT.glob("*.py")}
    above = {"data": {"models", "datafree"}, "models": {"data", "datafree"}, "datafree": set()}
    for package, others in above.items():
        for path in sorted((ROOT / package).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Import):
                    names = [alias.name for alias in node.names]
                elif isinstance(node, ast.ImportFrom) and node.level == 0:
                    names = [node.module]
                else:
                    continue
                imported = {name.split(".")[0] for name in names}
                assert not imported & (others | scripts), f"{path}:{node.lineno}"
