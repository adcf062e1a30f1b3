"""Segmentation splits: the test split alone, whole images in batches, and where they live."""

import numpy as np
import pytest
import scipy.io
import torch
from PIL import Image

from data import SEGMENTATIONS, DataError, get_segmentation


def write(root, frame, annotation, height=90, width=120, seed=0):
    pixels = np.random.RandomState(seed).randint(0, 256, (height, width, 3)).astype(np.uint8)
    for path, values in ((frame, pixels), (annotation, pixels[..., 0] % 12)):
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(values).save(root / path)


@pytest.fixture
def camvid(tmp_path):
    """Three frames for training, and six for testing, of which the fourth has another shape."""
    for part, n in (("train", 3), ("test", 6)):
        for i in range(n):
            names = f"CamVid/{part}/{i}.png", f"CamVid/{part}annot/{i}.png"
            write(tmp_path, *names, width=100 if (part, i) == ("test", 3) else 120, seed=i + n)
    return tmp_path


def test_camvid_alone(camvid):
    both = get_segmentation("camvid", camvid)
    alone = get_segmentation("camvid", camvid, train=False)
    for part in ("train", "trainannot"):
        (camvid / "CamVid" / part).rename(camvid / f"old_{part}")
    again = get_segmentation("camvid", camvid, train=False)
    assert alone.train is again.train is None and len(again.test) == 6
    assert again.fingerprint == alone.fingerprint != both.fingerprint
    assert all(map(torch.equal, both.test.images, again.test.images))
    assert again.to("meta").train is None
    with pytest.raises(DataError, match="trainannot"):
        get_segmentation("camvid", camvid)


def test_nyuv2_alone(tmp_path):
    scipy.io.savemat(tmp_path / "splits.mat", {"testNdxs": np.array([[2], [5]])})
    for i in (2, 5):
        label = f"nyuv2-meta-data/test_labels_13/new_nyu_class13_{i:04}.png"
        write(tmp_path, f"480_640/IMAGE/{i - 1}.png", label, seed=i)
    alone = get_segmentation("nyuv2", tmp_path, train=False)
    assert (alone.train, len(alone.test), alone.num_classes) == (None, 2, 13)
    with pytest.raises(DataError, match="splits.mat"):
        get_segmentation("nyuv2", tmp_path)


def test_whole_images_in_batches(camvid):
    split = get_segmentation("camvid", camvid).test
    batches = list(split.whole("cpu", 2))
    assert [len(images) for images, _ in batches] == [2, 1, 1, 2]
    assert [len(images) for images, _ in split.whole("cpu")] == [1] * 6
    for part, wanted in enumerate((split.images, split.labels)):
        found = [row for batch in batches for row in batch[part]]
        assert all(map(torch.equal, found, wanted)), "in the order of the files"
    assert batches[0][0].dtype == torch.uint8 and batches[0][1].dtype == torch.int64
    assert batches[0][0].shape == (2, 3, 256, 341) and batches[0][1].shape == (2, 256, 341)


def test_splits_live_on_the_device_where_they_fit(camvid):
    data = get_segmentation("camvid", camvid)
    moved = data.to("meta")
    assert all(t.is_meta for split in (moved.train, moved.test) for t in (*split.images, *split.labels))
    assert moved.test.labels[0].dtype == torch.uint8 and not data.test.images[0].is_meta
    bytes_of_test = sum(t.numel() for t in (*data.test.images, *data.test.labels))
    assert data.test.to("meta", limit=bytes_of_test).images[0].is_meta
    assert data.test.to("meta", limit=bytes_of_test - 1) is data.test
    assert next(data.test.whole("meta"))[0].is_meta


def test_names_in_the_papers():
    assert {name: source.paper for name, source in SEGMENTATIONS.items()} == {"camvid": "CamVid", "nyuv2": "NYUv2"}
