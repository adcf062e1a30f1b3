"""compress.py: somebody's network becomes files that run without these scripts, and what is wrong ends in one line."""

import functools
import json
import math
import runpy
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import compress
import teacher_train
from data import get_dataset
from datafree import checkpoint, export, inversion
from datafree.card import describe
from datafree.errors import UsageError
from models import get_model

NETWORKS = """
import torch.nn as nn
import torch.nn.functional as F


class Odd(nn.Module):
    def __init__(self, classes, norm):
        super().__init__()
        self.a, self.norm, self.b = nn.Conv2d(1, 8, 5, 2), norm, nn.Conv2d(8, 16, 5, 2)
        self.head = nn.Linear(400, classes)

    def forward(self, x):
        x = F.relu(self.b(F.relu(self.norm(self.a(x)))))
        return {"scores": self.head(x.view(x.size(0), -1))}  # as in many tutorials: not in channels_last


def plain(num_classes):
    return Odd(num_classes, nn.Identity())


def grouped(num_classes):
    return Odd(num_classes, nn.GroupNorm(2, 8))


def batch(num_classes):
    return Odd(num_classes, nn.BatchNorm2d(8))
"""
ABOUT = "--num_classes 10 --img_size 32 --mean 0.306 --std 0.3242".split()
SHORT = ["--student", "lenet5_half", "--n_epochs", "1", "--steps", "2", "--batch_size", "16", "--precision", "fp32"]


@pytest.fixture(autouse=True)
def few_images(monkeypatch):
    """An eighth of the images to calibrate on, a tenth of those to agree on, all made by a narrow generator."""
    monkeypatch.setattr(compress, "CALIBRATION", 64)
    monkeypatch.setattr(inversion, "UNSEEN", 100)
    monkeypatch.setattr(inversion, "maker_of", functools.partial(inversion.maker_of, ngf=16))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """nets.py, and weights of its networks, quickly trained on the digits, beside it."""
    folder = tmp_path_factory.mktemp("mine")
    (folder / "nets.py").write_text(NETWORKS)
    for name in ("plain", "grouped", "batch"):
        flags = ["--dataset", "digits", "--model", f"{folder / 'nets.py'}:{name}", "--n_epochs", "2", "--out", folder]
        teacher_train.main(teacher_train.parse_args([*flags, "--tag", name, "--checkpoints", folder / name]))
        (weights,) = (folder / name).glob("*.pt")
        torch.save(checkpoint.read(weights)["state_dict"], folder / f"{name}.pt")  # bare, as other people's are
    return folder


def run(folder, name, out, *flags):
    teacher = ["--teacher", f"{folder / 'nets.py'}:{name}", "--teacher_ckpt", folder / f"{name}.pt"]
    return compress.main(compress.parse_args([*teacher, *ABOUT, "--out", out, *flags]))


def logits(file, pixels):
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    return session.run(["logits"], {"pixels": pixels})[0]


@pytest.mark.parametrize(
    ("name", "method", "kind"),
    [("plain", "dafl", "float"), ("grouped", "dfad", "uint8"), ("batch", "fast_meta", "float")],
)
def test_a_network_of_odd_style(name, method, kind, folder, tmp_path):
    chosen = ["--method", "dfad"] if method == "dfad" else []  # the others are what the teacher calls for
    card = run(folder, name, tmp_path, *SHORT, "--int8", "--onnx_input", kind, *chosen)
    assert card["made"]["method"] == method and card["check"]["batch_norms"] == (name == "batch")
    assert min(card["check"]["confidence"].values()) > 0.3 and len(card["check"]["confidence"]) == 10
    content = checkpoint.read(tmp_path / "student.pt")
    student = get_model("lenet5_half", 10, 1).eval()
    student.load_state_dict(content["state_dict"])
    last = checkpoint.read(tmp_path / card["made"]["run"] / "last.pt")["state_dict"]
    plain = load_file(tmp_path / "student.safetensors")
    assert plain.keys() == last.keys() == content["state_dict"].keys()
    assert all(torch.equal(plain[k], v) and torch.equal(content["state_dict"][k], v) for k, v in last.items())
    for n in (1, 7):
        pixels = get_dataset("digits", train=False).test.images[:n]
        given = pixels.numpy() if kind == "uint8" else pixels.float().numpy() / 255
        with torch.no_grad():
            expected = student((pixels / 255 - 0.306) / 0.3242).numpy()
        np.testing.assert_allclose(logits(tmp_path / "student.onnx", given), expected, atol=1e-4)
        error = np.abs(logits(tmp_path / "student.int8.onnx", given) - expected).max()
        assert 0 < error < 0.5 * np.abs(expected).max()  # eight bits, not the same file again
    assert card["bytes"]["student.int8.onnx"] < 0.6 * card["bytes"]["student.onnx"]
    facts = card["networks"]
    assert facts["teacher"]["agreement"] == 100 and facts["student"]["agreement"] == facts["student.onnx"]["agreement"]
    assert facts["student"]["parameters"] == sum(p.numel() for p in student.parameters())
    assert facts["teacher"]["multiply_adds"] == 8 * 25 * 14**2 + 16 * 8 * 25 * 5**2 + 400 * 10
    assert all(value["milliseconds"] > 0 and "accuracy" not in value for value in facts.values())
    assert json.loads((tmp_path / "card.json").read_text())["networks"] == facts
    assert (tmp_path / "README.md").read_text() == describe(card) and card["command"] in describe(card)
    for picture in ("teacher_check.png", "images.png"):
        assert Image.open(tmp_path / picture).size[0] > 100


def test_images_to_calibrate_on_are_not_below_those_to_test_on(folder, tmp_path):
    flags = ["--teacher", f"{folder / 'nets.py'}:batch", "--teacher_ckpt", folder / "batch.pt", *ABOUT]
    flags += ["--test_images", tmp_path / "test", "--data_root", "all", "--int8", "--calibrate_on", "cifar10"]
    args = compress.parse_args([*flags, "--out", tmp_path])
    assert (args.dataset, args.data_root, args.images_root) == ("folder", str(tmp_path / "test"), "all")


def test_a_saved_program_itself_in_int8(folder, tmp_path):
    net = checkpoint.read(folder / "batch.pt")
    compress_me = get_model(f"{folder / 'nets.py'}:batch", 10).eval()
    compress_me.load_state_dict(net)
    shapes = ({0: torch.export.Dim("n", min=1)},)
    torch.export.save(
        torch.export.export(compress_me, (torch.randn(2, 1, 32, 32),), dynamic_shapes=shapes), tmp_path / "t.pt2"
    )
    flags = ["--teacher", tmp_path / "t.pt2", "--dataset", "digits", "--student", "same", "--int8", "--out", tmp_path]
    found = {}
    for images in ("noise", "synthetic"):
        card = compress.main(compress.parse_args([*flags, "--calibrate_on", images, "--resume"]))
        found[images] = card["networks"]["student.int8.onnx"]["accuracy"], (tmp_path / "student.int8.onnx").read_bytes()
        assert card["calibrated_on"] == images and card["networks"]["student.onnx"]["agreement"] == 100
    exact = card["networks"]["teacher"]
    assert exact["standard_error"] == pytest.approx(math.sqrt(exact["accuracy"] * (100 - exact["accuracy"]) / 500))
    assert len({content for _, content in found.values()}) == 2
    assert all(abs(score - exact["accuracy"]) < 10 for score, _ in found.values()), found
    kept = checkpoint.read(tmp_path / "images.pt")
    assert kept["synthetic"].shape == (64, 1, 32, 32) and kept["unseen"].shape == (100, 1, 32, 32)


def test_resumed_with_the_lengths_that_were_measured(folder, tmp_path, monkeypatch, contents):
    """A second command with --resume measures nothing, looks at nothing, and changes no weight."""
    measured = []
    monkeypatch.setattr(
        compress, "run_seconds", lambda script, parsed, steps: measured.append(steps) or 0.5 + 0.1 * steps
    )
    monkeypatch.setattr(compress, "lengths", lambda *given: measured.append(given[0]) or (2, 1))
    flags = [*SHORT[:2], "--batch_size", "16", "--minutes", "0.5", "--precision", "fp32"]
    first = run(folder, "plain", tmp_path, *flags)
    assert measured == [1, 11, 0.5] and (first["made"]["n_epochs"], first["made"]["steps"]) == (2, 1)
    files, before = contents(tmp_path), load_file(tmp_path / "student.safetensors")
    monkeypatch.setattr(compress, "class_images", None)
    again = run(folder, "plain", tmp_path, *flags, "--resume")
    assert again["made"] == first["made"] and len(measured) == 3
    same = [name for name, digest in contents(tmp_path).items() if files.get(name) == digest]
    assert {"plan.json", "teacher_check.json", f"{first['made']['run']}/last.pt"} <= set(same)
    weights = load_file(tmp_path / "student.safetensors")
    assert all(torch.equal(v, weights[k]) for k, v in before.items())
    with pytest.raises(TypeError, match="NoneType"):  # other images: it is looked at anew
        run(folder, "plain", tmp_path, *flags, "--resume", "--seed", "1")


def test_a_recipe_of_several_rounds_is_measured_over_whole_ones(folder, tmp_path, monkeypatch):
    """DFQ makes images every ten steps; on small networks it has no warm-up, as the digits' recipe has none."""
    measured = []
    monkeypatch.setattr(
        compress, "run_seconds", lambda script, parsed, steps: measured.append(parsed(30, steps)) or 1.0
    )
    run(folder, "batch", tmp_path, *SHORT[:2], "--batch_size", "16", "--minutes", "0.001", "--method", "dfq")
    assert [a.ep_steps // a.kd_steps for a in measured] == [1, 2] and {a.warmup for a in measured} == {0}


@pytest.mark.parametrize("first", [1, 10])
@pytest.mark.parametrize("minutes", [0.1, 1, 5, 60, 10000])
def test_lengths_keep_to_the_time_and_the_recipe(minutes, first):
    for rest, step in ((0.0, 0.01), (2.0, 0.02), (25.0, 0.5), (300.0, 9.0)):
        costs = rest + first * step, rest + (first + 10) * step
        n_epochs, steps = compress.lengths(minutes, *costs, (220, 400), first)
        assert 1 <= n_epochs <= 220 and 1 <= steps <= 400
        taken, whole = n_epochs * (rest + steps * step), 220 * (rest + 400 * step)
        assert taken <= max(60 * minutes, 5 * (rest + step)) * 1.01
        assert taken >= 0.6 * min(60 * minutes, whole) or steps == 1


def test_auto_is_the_largest_within_the_limits(monkeypatch):
    monkeypatch.setattr(compress, "MODELS", ("lenet5", "wrn16_1", "resnet8", "wrn40_2", "vgg8", "resnet18"))
    data = type("Data", (), dict(num_classes=10, channels=3, img_size=32))
    sizes = {name: export.parameters(get_model(name, 10, 3)) for name in ("wrn16_1", "resnet18", "wrn40_2")}
    assert sizes["wrn16_1"] < sizes["wrn40_2"] < sizes["resnet18"]

    def chosen(*flags):
        return compress.choose_student(compress.parse_args(["--student", "auto", *flags]), data)

    assert chosen("--max_params", sizes["wrn40_2"]) == "wrn40_2"
    macs = export.multiply_adds(get_model("wrn40_2", 10, 3), torch.zeros(1, 3, 32, 32))
    assert chosen("--max_macs", macs) == "wrn40_2"  # VGG-8 has more parameters and less work
    with pytest.raises(UsageError, match="raise --max_params or --max_macs"):
        chosen("--max_params", "5")


def test_what_a_missing_package_would_write_is_left_out(folder, tmp_path, monkeypatch, capsys, refused):
    monkeypatch.setattr(export, "find_spec", lambda name: None if name in ("onnxscript", "safetensors") else object())
    card = run(folder, "plain", tmp_path, *SHORT, "--int8")
    assert card["bytes"].keys() == {"student.pt"} and card["networks"].keys() == {"teacher", "student"}
    out = capsys.readouterr().out
    assert "student.onnx is left out: onnxscript missing: pip install -r requirements-export.txt" in out
    assert "student.safetensors is left out: safetensors missing" in out
    assert "onnxscript missing" in refused(compress, "--student", "same")


def test_mistakes(folder, tmp_path, refused):
    def error(*flags, name="plain", weights=None, about=ABOUT):
        teacher = ["--teacher", f"{folder / 'nets.py'}:{name}", "--teacher_ckpt", weights or folder / f"{name}.pt"]
        line = refused(compress, *teacher, *about, "--out", tmp_path / "out", *SHORT, *flags)
        assert not list((tmp_path / "out").glob("student*"))
        return line

    for name in "abc":
        (tmp_path / "three" / "test" / name).mkdir(parents=True)
        Image.new("L", (32, 32)).save(tmp_path / "three" / "test" / name / "0.png")
    broken = {k: v.clone() for k, v in checkpoint.read(folder / "plain.pt").items()}
    broken["a.weight"][0] = math.nan
    torch.save(broken, tmp_path / "nan.pt")
    torch.save(get_model(f"{folder / 'nets.py'}:batch", 10).state_dict(), tmp_path / "fresh.pt")
    (tmp_path / "file").touch()
    assert "no class folders in" in error("--test_images", folder)
    assert "10 classes, the data set 3" in error("--test_images", tmp_path / "three")
    assert "finite numbers" in error(weights=tmp_path / "nan.pt")
    assert "takes images of 32 pixels, not 64" in error("--img_size", "64")
    assert "cannot take images of 1x64x64" in error("--img_size", "64", "--student", "resnet8")
    assert "classes" in error("--num_classes", "7")
    assert "it is not trained" in error(name="batch", weights=tmp_path / "fresh.pt")
    assert "choose another --out" in error("--out", tmp_path / "file")
    assert "does not exist: name a folder" in error("--int8", "--calibrate_on", "no/such")
    for flags, words in (
        (("--test_images", tmp_path, "--dataset", "digits"), "exclude each other"),
        (("--minutes", "1", "--n_epochs", "1"), "exclude each other"),
        (("--steps", "1"), "--steps goes with --n_epochs"),
        (("--calibrate_on", "noise"), "--calibrate_on is for --int8"),
        (("--student", "auto"), "go together"),
        (("--max_params", "9"), "go together"),
        (("--student", "resnet999"), "invalid choice"),
    ):
        assert words in refused(compress, *flags)


def test_the_page_on_int8_says_what_its_cards_say():
    folder = Path(__file__).resolve().parent.parent / "results" / "compress"
    assert (folder / "README.md").read_text() == runpy.run_path(str(folder / "table.py"))["table"]()
