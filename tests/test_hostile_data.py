"""Whatever lies in a data folder, reading it ends: in images, or in one line that names the cure."""

import bz2
import gzip
import io
import json
import os
import re
import struct
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import scipy.io
import torch
from PIL import Image

from data import DataError, Source, TensorSplit, folder, get_dataset, get_images, get_segmentation, get_wild

READ = """
import signal, sys
from pathlib import Path
from data import DataError, get_dataset, get_images, get_segmentation, get_wild
for line in sys.argv[1:]:
    signal.alarm(20)  # kills it: what hangs prints nothing
    try:
        eval(line)
        print("read")
    except DataError as error:
        print(error)
"""


def save(path, size=(8, 8), mode="RGB", **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size).save(path, **options)
    return path


def classes(root):
    """Two classes of two images in both splits."""
    for split in ("train", "test"):
        for name in ("ant", "bee"):
            for i in range(2):
                save(root / split / name / f"{i}.png")
    return root


def says(*parts):
    """Expect a DataError of one printable line with all parts in it."""
    words = "".join(f"(?=.*{re.escape(str(part))})" for part in parts)
    return pytest.raises(DataError, match=rf"\A{words}[^\n]*\Z")


def pipe(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    os.mkfifo(path)


def test_pipes_and_devices_are_not_opened(tmp_path, forks):
    """In a process of its own, which would hang."""
    mnist = [f"{s}-{k}-ubyte" for s in ("train", "t10k") for k in ("images-idx3", "labels-idx1")]
    celeba = ["list_attr_celeba.txt", "list_eval_partition.txt", "img_align_celeba"]
    named = {"mnist": mnist, "svhn": ["train_32x32.mat", "test_32x32.mat"], "celeba": celeba}
    named |= {"usps": ["usps.bz2", "usps.t.bz2"], "cifar10": ["cifar10_lossless.zip"]}
    calls = []
    for name, files in named.items():
        for file in files:
            pipe(tmp_path / name / file)
        calls.append(f"get_dataset('{name}', '{tmp_path}', download=False)")
    pipe(classes(tmp_path / "classes") / "train" / "ant" / "!.png")
    (classes(tmp_path / "device") / "train" / "ant" / "a.png").symlink_to("/dev/zero")
    pipe(tmp_path / "wild.zip")
    for i in range(2):
        save(tmp_path / "CamVid" / "train" / f"{i}.png")
        pipe(tmp_path / "CamVid" / "trainannot" / f"{i}.png")
    pipe(tmp_path / "nyuv2" / "splits.mat")
    calls += [f"get_dataset('folder', '{tmp_path / name}')" for name in ("classes", "device")]
    calls += [f"get_images('{tmp_path / 'classes'}', 8, 3)"]
    calls += [f"get_wild('{path}', '.', 8, 3)" for path in (tmp_path / "wild.zip", "/dev/zero")]
    calls += [f"get_segmentation('{name}', '{tmp_path}')" for name in ("camvid", "nyuv2")]
    pipe(classes(tmp_path / "cached") / ".datafree-8x3.pt")
    (tmp_path / "read.py").write_text(READ)
    end = forks.run(tmp_path / "read", [*calls, f"get_dataset('folder', '{tmp_path / 'cached'}')"], seconds=120)
    *lines, cached = end.stdout.splitlines()
    assert len(lines) == len(calls) and (cached, end.stderr) == ("read", ""), end
    assert all("no regular file" in line for line in lines), lines


def test_links(tmp_path):
    place = classes(tmp_path) / "train" / "ant"
    (place / "a.png").symlink_to(place / "0.png")
    (place / "up").symlink_to(tmp_path)
    (tmp_path / "train" / "loop").symlink_to(tmp_path / "train" / "loop")
    assert len(get_dataset("folder", tmp_path).train) == 5
    for target, reason in ((place / "b.png", "Too many levels"), (tmp_path / "nowhere", "No such file")):
        (place / "b.png").symlink_to(target)
        with says(place / "b.png", reason, "replace or delete"):
            get_dataset("folder", tmp_path)
        (place / "b.png").unlink()


def test_a_folder_with_an_image_s_name(tmp_path):
    save(classes(tmp_path) / "train" / "ant" / "more.png" / "0.png")
    assert len(get_dataset("folder", tmp_path).train) == 5


@pytest.mark.parametrize(
    ("content", "name"),
    [
        (b"P6\n0 0\n255\n", "a.ppm"),
        (b"GIF89a" + bytes(7) + b"," + bytes(9) + b"\x02\x02\x4c\x01\0;", "a.gif"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n{ } loop\n", "a.png"),
        (b"P5\n20000 20000\n255\n", "a.pgm"),  # more pixels than Pillow opens
    ],
)
def test_pictures_that_are_none(tmp_path, content, name):
    (classes(tmp_path) / "train" / "ant" / name).write_bytes(content)
    with says(name, "replace or delete"):
        get_dataset("folder", tmp_path, img_size=8)


def test_a_large_picture_makes_no_noise(tmp_path, recwarn):
    save(classes(tmp_path) / "train" / "ant" / "a.png", (9500, 9500), "1")
    assert get_dataset("folder", tmp_path, img_size=8).train.images.shape == (5, 3, 8, 8)
    assert not [w for w in recwarn if "pixels" in str(w.message)]


@pytest.mark.parametrize("name", [b"z\xff\xfe", b"new\nline"])
def test_names_that_are_no_text(tmp_path, name):
    classes(tmp_path)
    for split in ("train", "test"):
        place = os.path.join(os.fsencode(tmp_path / split), name)  # noqa: PTH118 - bytes
        os.mkdir(place)  # noqa: PTH102
        save(Path(os.fsdecode(place)) / "0.png")
    d = get_dataset("folder", tmp_path)
    assert (len(d.train), len(d.fingerprint)) == (5, 16)
    buffer, names = io.BytesIO(), list(d.class_names)
    torch.save(names, buffer)
    buffer.seek(0)
    assert torch.load(buffer, weights_only=True) == names == json.loads(json.dumps(names, ensure_ascii=False))
    assert "\n" not in "".join(names) and "".join(names).encode().decode() == "".join(names)
    (Path(os.fsdecode(place)) / "0.png").write_text("no picture")
    with says("cannot read image") as caught:
        get_dataset("folder", tmp_path)
    str(caught.value).encode()
    (_, broken), *_ = [b for _, b in get_wild(str(tmp_path), ".", 8, 3)[0].scan(8, "cpu")][0] or [(0, "")]
    assert broken.encode() and "\n" not in broken


@pytest.fixture
def unprivileged(tmp_path):
    """A function after which permissions count: the superuser's tests go on as nobody."""
    for place in (tmp_path, *tmp_path.parents):
        if place.owner() == "root" and os.geteuid() == 0 and place.is_relative_to("/tmp/"):
            place.chmod(place.stat().st_mode | 0o055)
    user = os.geteuid()
    yield lambda: user or os.seteuid(65534)
    os.seteuid(user)
    for place in tmp_path.rglob("*"):
        place.chmod(0o755)


@pytest.mark.parametrize("locked", ["train", "train/ant", "train/ant/0.png", "train/ant/deep", ".datafree-8x3.pt"])
def test_locked(tmp_path, unprivileged, locked):
    save(classes(tmp_path) / "train" / "ant" / "deep" / "0.png")
    get_dataset("folder", tmp_path)
    (tmp_path / locked).chmod(0)
    unprivileged()
    if locked.endswith(".pt"):
        assert len(get_dataset("folder", tmp_path).train) == 5
        return
    with says(f"{tmp_path / locked} (Permission denied): change its permissions"):
        get_dataset("folder", tmp_path)
    if locked.endswith("deep"):
        for read in (lambda: get_images(tmp_path, 8, 3), lambda: get_wild(str(tmp_path), ".", 8, 3)):
            with says(tmp_path / locked, "change its permissions"):
                read()


def test_locked_files_are_not_called_damaged(tmp_path, unprivileged):
    write_mnist(tmp_path)
    for name in ("train-images-idx3-ubyte", "w.zip"):
        (tmp_path / name).touch()
        (tmp_path / name).chmod(0)
    unprivileged()
    with says("train-images-idx3-ubyte (Permission denied): change its permissions"):
        get_dataset("mnist", tmp_path, download=False)
    with says("w.zip (Permission denied): change its permissions"):
        get_wild("w.zip", tmp_path, 8, 3)


def test_one_class(tmp_path):
    for split in ("train", "test"):
        save(tmp_path / split / "ant" / "0.png")
    with says("one class, ant", "at least two"):
        get_dataset("folder", tmp_path)


@pytest.mark.parametrize("img_size", [10**8, "32", 8.5, -1])
@pytest.mark.parametrize("name", ["folder", "digits", "none"])
def test_impossible_sizes(tmp_path, name, img_size):
    with says("img_size"):
        get_dataset(name, classes(tmp_path), img_size=img_size, **({"num_classes": 5} if name == "none" else {}))


@pytest.mark.parametrize("num_classes", [-3, 1, 10**12, "ten"])
def test_impossible_numbers_of_classes(num_classes):
    with says(f"num_classes is {num_classes}"):
        get_dataset("none", num_classes=num_classes, img_size=32)


def test_impossible_sizes_of_other_images(tmp_path):
    save(tmp_path / "0.png")
    for read in (get_images, lambda *about: get_wild(str(tmp_path), *about)):
        with says("smaller img_size"):
            read(tmp_path, 10**8, 3)


@pytest.mark.parametrize("root", ["~no-such-user/x", "a" * 5000])
def test_impossible_paths(root):
    for read in (
        lambda: get_dataset("folder", root), lambda: get_dataset("mnist", root, download=False),
        lambda: get_images(root, 8, 3), lambda: get_wild(root, ".", 8, 3), lambda: get_segmentation("camvid", root),
    ):  # fmt: skip
        with says(root[:10]):
            read()


@pytest.mark.parametrize(
    "change",
    [
        lambda cache: [1, 2],
        lambda cache: cache | {"test": torch.zeros(3)},
        lambda cache: cache | {"test": cache["test"].float()},
        lambda cache: cache | {"train": "x"},
        lambda cache: {k: v for k, v in cache.items() if k != "train"},
        lambda cache: cache | {"statistics": "ab"},
        lambda cache: cache | {"statistics": ((0.5,), (0.5,))},
        lambda cache: cache | {"statistics": ([float("nan")] * 3, [0.5] * 3)},
    ],
)
def test_a_cache_of_wrong_types_is_built_again(tmp_path, change):
    first = get_dataset("folder", classes(tmp_path))
    path = tmp_path / ".datafree-8x3.pt"
    torch.save(change(torch.load(path)), path)
    again = get_dataset("folder", tmp_path)
    assert (again.fingerprint, again.mean, again.std) == (first.fingerprint, first.mean, first.std)
    assert again.test.images.dtype == torch.uint8


# --- packed files ----------------------------------------------------------------------------


def images(*sizes, values=None):
    sizes = sizes or (5, 28, 28)
    return struct.pack(f">{1 + len(sizes)}I", 2048 + len(sizes), *sizes) + (
        bytes(np.prod(sizes, dtype=object)) if values is None else values
    )


def write_mnist(root, packed=False, **files):
    for part in ("train", "t10k"):
        for kind, content in (("images-idx3", images()), ("labels-idx1", images(5))):
            content = files.get(f"{part}_{kind[:6]}", content)
            path = root / f"{part}-{kind}-ubyte{'.gz' * packed}"
            path.write_bytes(gzip.compress(content) if packed else content)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (images() + b"x", "more than the 3,920 values"),
        (images()[:-1], "fewer than the 3,920 values"),
        (images(2**31, 2**31, 4, values=b""), "its header says"),
        (images(2**20, 64, 128, values=b""), "its header says"),
        (images(5, 0, 28), "5 x 0 x 28"),
        (images(0, 28, 28), "0 x 28 x 28"),
        (images(5), "no IDX file"),
        (b"\0\0\x08\x03\0\0", ""),
    ],
)
def test_mnist_headers(tmp_path, packed, content, reason):
    write_mnist(tmp_path, packed, train_images=content)
    with says("train-images-idx3-ubyte", reason, "delete it"):
        get_dataset("mnist", tmp_path, download=False)


def test_files_that_unpack_to_too_much(tmp_path, monkeypatch):
    """Each would be 64 GiB, or take hours to be summed up."""
    monkeypatch.setattr("data.sources.TEXT_LIMIT", 2**20)
    write_mnist(tmp_path, packed=True)
    zeros = gzip.compress(bytes(2**24))
    with (tmp_path / "train-images-idx3-ubyte.gz").open("wb") as file:
        file.writelines([gzip.compress(images()), *[zeros] * 4096])
    with says("more than the 3,920 values"):
        get_dataset("mnist", tmp_path, download=False)
    text = bz2.compress(b"1:0 " * 2**22)
    for name in ("usps.bz2", "usps.t.bz2"):
        (tmp_path / name).write_bytes(text * 4096)
    with says("usps.bz2", "unpacks to too much"):
        get_dataset("usps", tmp_path, download=False)
    place = tmp_path / "cifar-10-batches-py"
    place.mkdir()
    for path in (place / "data_batch_1", tmp_path / "train_32x32.mat"):
        with path.open("wb") as file:
            file.truncate(2**40)
    (tmp_path / "test_32x32.mat").touch()
    for name in ("cifar10", "svhn"):
        with says("1,099,511,627,776 bytes"):
            get_dataset(name, tmp_path, download=False)


def test_usps_labels(tmp_path):
    for name in ("usps.bz2", "usps.t.bz2"):
        (tmp_path / name).write_bytes(bz2.compress(b"77 " + b"1:0 " * 256))
    with says("labels to train does not fit"):
        get_dataset("usps", tmp_path, download=False)


@pytest.mark.parametrize(("size", "reason"), [((1280, 1600), "a sheet is 1280x1600"), (None, "too large")])
def test_sheets(tmp_path, size, reason):
    buffer = io.BytesIO(bytes(2**25) if size is None else b"")
    if size:
        Image.new("1", size).save(buffer, "png")
    with zipfile.ZipFile(tmp_path / "cifar10_lossless.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for split in ("train", "test"):
            archive.writestr(f"{split}/00.webp", buffer.getvalue())
            archive.writestr(f"{split}_labels.bin", bytes(9))
    with says("cifar10_lossless.zip", reason):
        get_dataset("cifar10", tmp_path, download=False)


def test_wild_zips(tmp_path, monkeypatch):
    monkeypatch.setattr("data.wild.PICTURE_LIMIT", 2**20)
    path, picture = tmp_path / "w.zip", save(tmp_path / "0.png").read_bytes()
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.png", picture)
        archive.writestr("b.tif", b"II*\0" + struct.pack("<I", 2**21) + bytes(2**21))
        archive.writestr("é.png", picture)
    split, _ = get_wild(str(path), ".", 8, 3)
    ((_, broken),) = list(split.scan(8, "cpu"))
    assert [row for row, _ in broken] == [1] and "bytes unpacked" in broken[0][1]
    whole = path.read_bytes()
    entry = whole.rindex(b"PK\1\2")
    version = whole[: entry + 6] + b"\x63" + whole[entry + 7 :]
    for content in (whole.replace("é".encode(), b"\xff\xfe"), version, whole[:-30], b"hello"):
        path.write_bytes(content)
        with says("w.zip is damaged or no zip file", "name a folder, a zip or a data set"):
            get_wild(str(path), ".", 8, 3)


# --- lists of files, packages ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("attributes", "parts", "reason"),
    [
        ("1\nBald\n1.jpg 1\n2.jpg -1\n", "1.jpg 0\n2.jpg 0\n", "no images to test"),
        ("1\nBald\n1.jpg 1\n2.jpg -1\n", "1.jpg 0\n2.jpg x\n", "damaged"),
        ("1\nBald\n/dev/zero 1\n2.jpg -1\n", "/dev/zero 0\n2.jpg 2\n", "img_align_celeba/zero"),
        ("1\nBald\n", "", "damaged"),
    ],
)
def test_celeba_lists(tmp_path, attributes, parts, reason):
    (tmp_path / "img_align_celeba").mkdir()
    (tmp_path / "list_attr_celeba.txt").write_text(attributes)
    (tmp_path / "list_eval_partition.txt").write_text(parts)
    with says(reason):
        get_dataset("celeba", tmp_path, download=False)


@pytest.mark.parametrize("indices", [["a", "b"], np.zeros((0, 1)), {"a": 1}, [np.nan], np.zeros((1, 2**20))])
def test_nyuv2_lists(tmp_path, indices):
    scipy.io.savemat(tmp_path / "splits.mat", {"testNdxs": indices})
    with says("splits.mat", "fetch it again"):
        get_segmentation("nyuv2", tmp_path, train=False)


def test_a_strip_is_no_frame(tmp_path):
    save(tmp_path / "CamVid" / "test" / "0.png", (40000, 1))
    save(tmp_path / "CamVid" / "testannot" / "0.png", (40000, 1), "L")
    with says("40000x1"):
        get_segmentation("camvid", tmp_path, train=False)


@pytest.mark.parametrize(
    ("code", "said", "cure"),
    [
        ("import nothing_of_that_name", "nothing_of_that_name", "--force-reinstall scikit-learn"),
        ("raise ValueError('numpy.dtype size changed')", "numpy.dtype size", "--force-reinstall scikit-learn"),
        (None, "needs scikit-learn", "pip install scikit-learn"),
    ],
)
def test_scikit_learn_is_missing_or_broken(tmp_path, monkeypatch, code, said, cure):
    for name in [name for name in sys.modules if name.split(".")[0] == "sklearn"]:
        monkeypatch.delitem(sys.modules, name)
    if code:
        (tmp_path / "sklearn.py").write_text(code)
        monkeypatch.syspath_prepend(tmp_path)
    else:
        monkeypatch.setattr(sys, "path", [])
    with says(said, cure):
        get_dataset("digits")


def test_an_own_data_set_without_images(monkeypatch):
    empty = TensorSplit(torch.zeros(0, 3, 8, 8, dtype=torch.uint8), torch.zeros(0, dtype=torch.int64))
    monkeypatch.setitem(get_dataset.__globals__["SOURCES"], "own", Source(lambda *_: folder.Raw(("a", "b"), empty)))
    with says("own has no images to test"):
        get_dataset("own", train=False)
