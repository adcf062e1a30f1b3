"""Segmentation data in their real layouts, in miniature, and what is wrong with broken ones."""

import csv

import numpy as np
import pytest
import scipy.io
import torch
from PIL import Image
from reference_fill import load_reference, noise

import DFAD_camvid_deeplab
import DFAD_cifar
import DFAD_nyu_deeplab
import teacher_train_seg
from data import DataError, get_segmentation
from datafree import checkpoint
from datafree.session import Session
from datafree.teachers import PRETRAINED
from models import get_segmenter

RNG = np.random.RandomState(0)


def write(path, values):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(values.astype(np.uint8)).save(path)


@pytest.fixture
def camvid(tmp_path):
    for part, n in (("train", 5), ("test", 2)):
        for i in range(n):
            write(tmp_path / "CamVid" / part / f"frame{i}.png", RNG.randint(0, 256, (90, 120, 3)))
            labels = np.repeat(np.arange(12), 10)[None].repeat(90, 0)
            write(tmp_path / "CamVid" / f"{part}annot" / f"frame{i}.png", labels)
    return tmp_path


@pytest.fixture
def nyuv2(tmp_path):
    place = tmp_path / "nyuv2"
    parts = {"train": [1, 3, 4], "test": [2]}
    place.mkdir()
    scipy.io.savemat(place / "splits.mat", {f"{k}Ndxs": np.array(v)[:, None] for k, v in parts.items()})
    for part, numbers in parts.items():
        for i in numbers:
            write(place / "480_640" / "IMAGE" / f"{i - 1}.png", np.full((48, 64, 3), i))
            write(
                place / "nyuv2-meta-data" / f"{part}_labels_13" / f"new_nyu_class13_{i:04}.png",
                np.repeat(np.arange(16) % 14, 4)[None].repeat(48, 0),
            )
    return tmp_path


def test_camvid(camvid):
    data = get_segmentation("camvid", camvid)
    assert data.num_classes == 11 and data.class_names[0] == "sky"
    assert (len(data.train), len(data.test)) == (5, 2)
    image, label = next(data.test.whole("cpu"))
    assert image.shape == (1, 3, 256, 341) and label.shape == (1, 256, 341)
    assert sorted(label.unique().tolist()) == [*range(11), 255]
    assert torch.equal(label[0, 0], label[0, 255])
    assert label[0, 0, 0] == 0 and label[0, 0, -1] == 255
    picture = data.paint(label)
    assert picture.shape == (1, 3, 256, 341)
    assert (picture[0, :, 0, 0] * 255).round().tolist() == [128, 128, 128]
    assert not picture[0, :, 0, -1].any()


def test_statistics_of_ones_own(camvid):
    data = get_segmentation("camvid", camvid, mean=[0.1, 0.2, 0.3])
    assert data.mean == (0.1, 0.2, 0.3) and data.std == (0.5, 0.5, 0.5)
    with pytest.raises(DataError, match="3 value"):
        get_segmentation("camvid", camvid, std=[0.5])


def test_given_statistics_stand_before_those_of_a_checkpoint(camvid, quick):
    card = {"mean": [0.5] * 3, "std": [0.4] * 3, "mIoU": 50.0}
    state = get_segmenter("deeplabv3_mobilenet", 11).state_dict()
    checkpoint.save({"state_dict": state, "card": card}, camvid / "best.pt")
    flags = ["--model", "deeplabv3_mobilenet", "--evaluate_only", "--ckpt", camvid / "best.pt", "--data_root", camvid]
    args = teacher_train_seg.parse_args([*flags, "--mean", "0.1", "0.1", "0.1"])
    transform = Session(args, train=True, taught=False, segmentation=True).transform
    assert (*transform.mean, *transform.std) == (0.1,) * 3 + (0.4,) * 3


def test_crops_keep_image_and_label_together(camvid):
    data = get_segmentation("camvid", camvid)
    # Each pixel's image says what its label is.
    data.train.images = [label[None].expand(3, -1, -1) for label in data.train.labels]
    torch.manual_seed(0)
    batches = list(data.train.crops(2, 128, "cpu"))
    assert len(batches) == 2
    mirrored = set()
    for images, labels in batches:
        assert images.shape == (2, 3, 128, 128) and labels.shape == (2, 128, 128)
        assert labels.dtype == torch.int64 and torch.equal(images[:, 0].long(), labels)
        mirrored |= {bool(row[0] > row[-1]) for row in labels[:, 0]}
    assert mirrored == {True, False}


def test_nyuv2(nyuv2):
    data = get_segmentation("nyuv2", nyuv2)
    assert data.num_classes == len(data.colours) == 13
    assert (len(data.train), len(data.test)) == (3, 1)
    assert [int(i[0, 0, 0]) for i in data.train.images] == [1, 3, 4]
    assert int(data.test.images[0][0, 0, 0]) == 2
    assert data.test.labels[0].shape == (256, 341)
    assert sorted(data.test.labels[0].unique().tolist()) == [*range(13), 255]


def broken(name, root, *words):
    with pytest.raises(DataError) as error:
        get_segmentation(name, root)
    text = str(error.value)
    assert all(w in text for w in words) and "\n" not in text, text


def test_what_is_wrong_with_camvid(camvid):
    place = camvid / "CamVid"
    write(place / "testannot" / "frame1.png", np.full((90, 120), 12))
    broken("camvid", camvid, "frame1.png", "label 12")
    write(place / "testannot" / "frame1.png", np.zeros((90, 100)))
    broken("camvid", camvid, "120x90", "100x90")
    write(place / "testannot" / "frame1.png", np.zeros((90, 120, 3)))
    broken("camvid", camvid, "no 8-bit grey")
    (place / "testannot" / "frame1.png").unlink()
    broken("camvid", camvid, "testannot/frame1.png", "missing")
    (place / "train" / "frame0.png").write_bytes(b"nothing")
    broken("camvid", camvid, "cannot read", "train/frame0.png")
    for path in (place / "train").iterdir():
        path.unlink()
    broken("camvid", camvid, "no images in")
    broken("camvid", camvid / "none", "no camvid", "unpack")
    broken("cityscapes", camvid, "camvid nyuv2")


def test_what_is_wrong_with_nyuv2(nyuv2):
    path = nyuv2 / "nyuv2" / "splits.mat"
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    broken("nyuv2", nyuv2, "splits.mat", "fetch it again")
    scipy.io.savemat(path, {"other": 1})
    broken("nyuv2", nyuv2, "splits.mat")
    path.unlink()
    broken("nyuv2", nyuv2, "no nyuv2", "splits.mat")


TINY = ("--batch_size", "2", "--n_epochs", "2")


def run(script, root, *flags):
    where = ("--data_root", root, "--out", root / "runs", "--checkpoints", root / "checkpoints")
    return script.main(script.parse_args([*TINY, *where, *flags]))


def small(data):
    """Miniature data at a quarter of the size, which the networks take seconds for."""
    for split in filter(None, (data.train, data.test)):
        split.images = [i[:, ::4, ::4].contiguous() for i in split.images]
        split.labels = [i[::4, ::4].contiguous() for i in split.labels]
    return data


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr("datafree.inputs.get_segmentation", lambda *a, **k: small(get_segmentation(*a, **k)))


def columns(root, name):
    with (root / "runs" / name / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


NETWORK = ("--model", "deeplabv3_mobilenet", "--crop", "48")
DFAD = ("--teacher", "deeplabv3_mobilenet", "--epoch_itrs", "1", "--img_size", "32", "--nz", "8")


def test_teacher_end_to_end(camvid, quick, capsys, contents):
    """The small network keeps it short; a finished run is not touched again."""
    flags = (*NETWORK, "--backbone_weights", "none", "--save_img", "1")
    result = run(teacher_train_seg, camvid, *flags)
    assert "backbone from scratch" in capsys.readouterr().out
    rows = columns(camvid, result["name"])
    assert len(rows) == 2 and 0 <= float(rows[-1]["mIoU"]) <= 100 and "iou_bicyclist" in rows[0]
    assert (result["published"], result["score"], result["test_images"]) == ([], "mIoU", 2)
    assert result["last"] == float(rows[-1]["mIoU"]) and result["backbone"] == "backbone from scratch"
    assert result["last_scores"]["pixel_accuracy"] == float(rows[-1]["pixel_accuracy"])
    assert [p.name for p in (camvid / "runs" / result["name"] / "samples").iterdir()] == ["test0000.png"]
    card = checkpoint.read(camvid / "checkpoints" / "camvid-deeplabv3_mobilenet.pt")["metadata"]
    assert (card["run"], card["mIoU"], card["epoch"]) == (result["name"], result["best"], result["best_epoch"])
    before = contents(camvid)
    again = run(teacher_train_seg, camvid, *flags, "--resume")
    assert again["seconds"] == result["seconds"] and contents(camvid) == before
    assert run(teacher_train_seg, camvid, *flags, "--evaluate_only")["mIoU"] == result["best"]


def test_camvid_end_to_end(camvid, quick, monkeypatch):
    """Teacher, student, pictures, --evaluate_only; the generator maximises a logarithm."""
    real, spaces = DFAD_cifar.generator_step, []
    monkeypatch.setattr(DFAD_cifar, "generator_step", lambda *a: spaces.append(a[6]) or real(*a))
    run(teacher_train_seg, camvid, *NETWORK, "--backbone_weights", "none", "--save_img", "0")
    flags = (*DFAD, "--save_img", "--sample_every", "1")
    result = run(DFAD_camvid_deeplab, camvid, *flags)
    folder = camvid / "runs" / result["name"]
    rows = columns(camvid, result["name"])
    assert len(rows) == 2 and spaces and all(spaces)
    assert set(result["last_scores"]) >= {"pixel_accuracy", "iou_sky"}
    pictures = sorted(p.name for p in (folder / "samples").iterdir())
    assert pictures == ["epoch0001.png", "epoch0002.png", "test0000.png", "test0001.png"]
    with Image.open(folder / "samples" / "test0000.png") as image:
        width, height = image.size
    assert (width, height) == (4 * 86, 64)  # image, truth, teacher, student
    again = run(DFAD_camvid_deeplab, camvid, *flags, "--evaluate_only")
    assert again["mIoU"] == result["best"]
    state = torch.load(folder / "last.pt", weights_only=True)["state_dict"]
    # Stopped after the first epoch and resumed, the same weights come out.
    run(DFAD_camvid_deeplab, camvid, *flags, "--n_epochs", "1", "--tag", "again")
    run(DFAD_camvid_deeplab, camvid, *flags, "--tag", "again", "--resume")
    (other,) = (camvid / "runs").glob("*-again")
    resumed = torch.load(other / "last.pt", weights_only=True)["state_dict"]
    assert all(torch.equal(state[k], resumed[k]) for k in state)


def test_nyuv2_end_to_end(nyuv2, quick):
    assert run(teacher_train_seg, nyuv2, *NETWORK, "--dataset", "nyuv2")["dataset"] == "nyuv2"
    result = run(DFAD_nyu_deeplab, nyuv2, *DFAD)
    assert "iou_window" in columns(nyuv2, result["name"])[0]


def test_what_ends_in_one_line(camvid, nyuv2, quick, refused):
    where = (*TINY, "--data_root", camvid, "--out", camvid / "runs", "--checkpoints", camvid)
    checkpoint.save(get_segmenter("deeplabv3_mobilenet", 13).state_dict(), camvid / "wrong.pt")
    taught = ("--teacher", "deeplabv3_mobilenet", *where)
    for script, flags, words in (
        (DFAD_camvid_deeplab, where, "teacher_train_seg.py --dataset camvid --model deeplabv3_res"),
        (DFAD_camvid_deeplab, (*taught, "--teacher_ckpt", camvid / "wrong.pt"), "13 classes"),
        (DFAD_camvid_deeplab, (*where, "--img_size", "40", "--teacher_ckpt", camvid / "no.pt"), "no.pt"),
        (teacher_train_seg, (*where, "--batch_size", "6"), "5 training images"),
        (teacher_train_seg, (*where, "--backbone_weights", camvid / "no.pt"), "does not exist"),
        (teacher_train_seg, (*where, "--backbone_weights", camvid / "wrong.pt"), "of the backbone"),
        (teacher_train_seg, (*where, "--crop", "300"), "at most 256"),
        (DFAD_nyu_deeplab, ("--data_root", camvid / "none", "--teacher_ckpt", camvid / "wrong.pt"), "no nyuv2"),
    ):
        assert words in refused(script, *flags)
    assert not (camvid / "runs").exists()


def test_focal_loss():
    values = load_reference("losses")["values"]["dfad_focal/A"]
    inputs = values["inputs"]["logits"]
    logits = (noise(inputs["shape"], inputs["seed"]) * inputs["scale"]).requires_grad_()
    labels = torch.from_numpy(np.random.RandomState(25).randint(0, 11, (2, 4, 4)))
    labels[:, 0, :2] = 255
    loss = teacher_train_seg.focal_loss(logits, labels)
    loss.backward()
    assert loss.item() == pytest.approx(values["value"], rel=1e-9)
    assert logits.grad.norm().item() == pytest.approx(values["gradient_l2"], rel=1e-9)


def test_backbone_weights_are_loaded_or_said_to_be_missing(camvid, monkeypatch, tmp_path):
    args = teacher_train_seg.parse_args([])
    model = get_segmenter("deeplabv3_resnet50", 11)
    own = {k: v.clone() for k, v in model.backbone.state_dict().items()}

    def offline(*_, **__):
        raise OSError("no network")

    weights = PRETRAINED["resnet50_imagenet"]
    monkeypatch.setattr(type(weights), "get_state_dict", offline)
    assert "could not be had" in teacher_train_seg.load_backbone(model, args)
    assert args.backbone_weights == "none"
    # Torchvision's file lacks the counts of batches, and has a classifier.
    changed = {k: v + 1 for k, v in own.items() if v.dim()} | {"fc.weight": torch.zeros(1000, 2048)}
    torch.save(changed, tmp_path / "resnet50.pth")
    args.backbone_weights = str(tmp_path / "resnet50.pth")
    assert "resnet50.pth" in teacher_train_seg.load_backbone(model, args)
    assert all(torch.equal(v, own[k] + 1) for k, v in model.backbone.state_dict().items() if v.dim())
