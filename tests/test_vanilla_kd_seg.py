"""Distillation of segmentation networks on the original images, noise, and other people's."""

import math
import zipfile
from argparse import Namespace

import numpy as np
import pytest
import test_segmentation
import torch
from test_segmentation import TINY, columns, run, small, write

import vanilla_kd_seg
from data import get_segmentation, get_wild
from datafree import checkpoint
from datafree.augment import Transform
from models import get_segmenter

camvid, quick = test_segmentation.camvid, test_segmentation.quick
QUICK = ("--crop", "48", "--lr", "0.01")
NAME = "vanilla_kd_seg-camvid-deeplabv3_resnet50-deeplabv3_mobilenet"
SHORT = "-lr_0.01-batch_size2-n_epochs{}-crop48"


@pytest.fixture
def root(camvid, quick, monkeypatch):
    """Miniature CamVid, a teacher with random weights, and a folder of other images.

    The large network is the small one here, which keeps the tests short.
    """
    monkeypatch.setattr(
        "datafree.session.get_segmenter", lambda _, classes: get_segmenter("deeplabv3_mobilenet", classes)
    )
    torch.manual_seed(0)
    checkpoint.save(
        get_segmenter("deeplabv3_mobilenet", 11).state_dict(), camvid / "checkpoints" / "camvid-deeplabv3_resnet50.pt"
    )
    for i in range(4):  # the left half is dark
        picture = np.full((40, 60, 3), 50 * i + 50)
        picture[:, :30] = 0
        write(camvid / "other" / "deep" / f"{i}.png", picture)
    return camvid


def rows_of(result):
    return {cell["method"]: round(cell["value"], 6) for cell in result["published"]}


def test_original_ends_with_record_and_pictures(root, contents):
    flags = (*QUICK, "--save_img", "1")
    result = run(vanilla_kd_seg, root, *flags, "--n_epochs", "3")
    assert (result["name"], result["method"]) == (NAME + "-original" + SHORT.format(3), "KD (original)")
    assert rows_of(result) == {"KD-ORI": 53.5} and "iou_sky" in result["last_scores"]
    rows = columns(root, result["name"])
    assert len(rows) == 3 and float(rows[-1]["loss"]) < float(rows[0]["loss"])
    assert result["last"] == float(rows[-1]["mIoU"])
    samples = root / "runs" / result["name"] / "samples"
    assert [p.name for p in samples.iterdir()] == ["test0000.png"]
    before = contents(root)
    assert run(vanilla_kd_seg, root, *flags, "--n_epochs", "3", "--resume")["last"] == result["last"]
    assert contents(root) == before
    assert run(vanilla_kd_seg, root, *flags, "--n_epochs", "3", "--evaluate_only")["mIoU"] == result["best"]


@pytest.mark.parametrize("kind", ["noise", "other", "other.zip"])
def test_other_transfer_sets(kind, root):
    if kind == "other.zip":
        with zipfile.ZipFile(root / kind, "w") as archive:
            for path in (root / "other" / "deep").iterdir():
                archive.write(path, path.name)
    if kind != "noise":  # then no training image is looked at
        (root / "CamVid" / "train").rename(root / "CamVid" / "absent")
    result = run(vanilla_kd_seg, root, *QUICK, "--transfer_set", kind)  # below --data_root
    assert (result["name"], result["method"]) == (f"{NAME}-{kind}" + SHORT.format(2), f"KD ({kind})")
    assert all(math.isfinite(float(row["loss"])) for row in columns(root, result["name"]))
    assert rows_of(result) == ({"RANDOM": 1.8} if kind == "noise" else {})
    assert result.get("transfer_images") == (None if kind == "noise" else 4)


def test_namesakes_have_folders_of_their_own(root):
    names = {
        vanilla_kd_seg.parse_args(["--transfer_set", name]).run_name
        for name in ("related", "a/related", "b/related", root / "a" / "related", "unrelated")
    }
    assert len(names) == 5 and all("related" in name for name in names)


def test_what_the_networks_see(root):
    data = small(get_segmentation("camvid", root))
    transform = Transform.of(data)

    def batches(transfer_set, images=None):
        args = vanilla_kd_seg.parse_args(["--transfer_set", transfer_set, "--crop", "48", "--batch_size", "2"])
        runtime = Namespace(device=torch.device("cpu"))
        session = Namespace(args=args, data=data, transform=transform, runtime=runtime)
        seen = list(vanilla_kd_seg.transfer_batches(session, images))
        assert len(seen) == 2 and all(x.shape == (2, 3, 48, 48) for x in seen)
        return torch.cat(seen)

    torch.manual_seed(0)
    data.train.images = [torch.full_like(x, 255) for x in data.train.images]
    assert (batches("original") == 1).all()
    x = batches("noise")
    assert x.mean().abs() < 0.05 and (x.std() - 1).abs() < 0.05
    split, _ = get_wild(str(root / "other"), root, 48, 3)
    sides = torch.cat([batches(root / "other", images)[:, 0, 0, [0, -1]] for images in (split, split.decode())])
    dark = sides == -1
    assert (dark.sum(1) == 1).all() and dark.any(0).all()  # mirrored or not
    assert torch.allclose(sides[:4][~dark[:4]].sort().values, torch.tensor([50, 100, 150, 200]) / 127.5 - 1)


@pytest.mark.parametrize("kind", ["original", "noise", "other"])
def test_resume_is_bit_identical(kind, root, monkeypatch):
    flags = (*QUICK, "--transfer_set", kind, "--save_img", "0")
    run(vanilla_kd_seg, root, *flags)
    train_epoch, calls = vanilla_kd_seg.train_epoch, []

    def interrupted(*args):
        calls.append(1)
        loss = train_epoch(*args)  # the epoch's work is done when it is lost
        if len(calls) > 1:
            raise KeyboardInterrupt
        return loss

    with monkeypatch.context() as patch:
        patch.setattr(vanilla_kd_seg, "train_epoch", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(vanilla_kd_seg, root, *flags, "--tag", "again")
    run(vanilla_kd_seg, root, *flags, "--tag", "again", "--resume")
    whole, resumed = (
        checkpoint.read(root / "runs" / f"{NAME}-{kind}{SHORT.format(2)}{tag}" / "last.pt") for tag in ("", "-again")
    )
    assert whole["epoch"] == resumed["epoch"] == 1
    assert all(torch.equal(v, resumed["state_dict"][k]) for k, v in whole["state_dict"].items())
    assert torch.equal(whole["run"]["rng"]["cpu"], resumed["run"]["rng"]["cpu"])


def test_what_ends_in_one_line(root, refused):
    where = (*TINY, "--data_root", root, "--out", root / "runs", "--checkpoints", root / "checkpoints")
    quick = (*QUICK, *where)
    checkpoint.save(get_segmenter("deeplabv3_mobilenet", 13).state_dict(), root / "wrong.pt")
    write(root / "broken" / "0.png", np.zeros((40, 40)))
    (root / "broken" / "1.png").write_bytes(b"nothing")
    (root / "empty").mkdir()
    for flags, words in (
        (
            (*quick, "--teacher", "deeplabv3_mobilenet"),
            "teacher_train_seg.py --dataset camvid --model deeplabv3_mobilenet",
        ),
        ((*quick, "--teacher_ckpt", root / "wrong.pt"), "13 classes, the data set 11"),
        ((*quick, "--teacher_ckpt", root / "no.pt"), "no.pt does not exist"),
        ((*quick, "--transfer_set", root / "none"), "does not exist: name a folder"),
        ((*quick, "--transfer_set", root / "wrong.png"), "does not exist: name a folder"),
        ((*quick, "--transfer_set", root / "empty"), "no images"),
        ((*quick, "--transfer_set", root / "broken"), "1.png"),
        ((*quick, "--transfer_set", root / "other", "--batch_size", "5"), "into 4 images"),
        ((*quick, "--batch_size", "6"), "into 5 images"),
        ((*quick, "--evaluate_only"), "does not exist"),
        (("--dataset", "nyuv2", "--data_root", root / "none", "--teacher_ckpt", root / "wrong.pt"), "no nyuv2"),
        (("--crop", "300"), "at most 256"),
    ):
        assert words in refused(vanilla_kd_seg, *flags)
    assert not (root / "runs").exists()
