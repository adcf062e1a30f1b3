"""DFND: its matrix and selection agree with the published code; wild sets of every kind work."""

import json
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import DFND_train
from data import DataError, get_dataset, get_wild
from datafree import checkpoint
from datafree.losses import kd_loss
from datafree.runtime import lr_at

VALUES = json.loads((Path(__file__).parent / "reference" / "losses.json").read_text())["values"]


def normal(spec):
    x = np.random.RandomState(spec["seed"]).standard_normal(spec["shape"])
    return torch.tensor(spec["scale"] * x)


def test_matrix_and_losses_agree():
    case = VALUES["dfnd/A"]
    inputs = case["inputs"]
    noise = DFND_train.NoiseAdaptation(5, inputs["teacher_accuracy"]).double()
    torch.testing.assert_close(noise.log_matrix().exp()[0].tolist(), case["matrix_at_zero_parameters_first_row"])
    noise.logits.data = normal(inputs["noise_parameters"])
    matrix = noise.log_matrix().exp()
    torch.testing.assert_close(matrix, torch.tensor(case["matrix_intended"]).double(), rtol=1e-7, atol=1e-9)
    s_logits = normal(inputs["student_logits"]).requires_grad_()
    t_logits = normal(inputs["teacher_logits"])
    loss = noise(s_logits, t_logits)
    loss.backward()
    loss_kd = kd_loss(s_logits, t_logits, 4)
    got = [
        loss.item(),
        s_logits.grad.norm().item(),
        noise.logits.grad.norm().item(),
        loss_kd.item(),
        (loss + loss_kd).item(),
    ]
    wanted = [
        case["noise_adaptation_loss"],
        case["gradient"]["student_logits_l2"],
        case["gradient"]["noise_parameters_l2"],
        case["kd_loss_T4"],
        case["total_kd_T4_plus_noise"],
    ]
    assert got == pytest.approx(wanted, rel=1e-7)


def test_a_perfect_teacher_has_a_finite_loss():
    noise = DFND_train.NoiseAdaptation(3, 1.0)
    s_logits = torch.randn(4, 3, requires_grad=True)
    t_logits = torch.randn(4, 3)
    loss = noise(s_logits, t_logits)
    loss.backward()
    assert loss.item() == pytest.approx(torch.nn.functional.cross_entropy(s_logits, t_logits.argmax(1)).item())
    assert s_logits.grad.isfinite().all() and noise.logits.grad.isfinite().all()


def test_selection_agrees():
    case = VALUES["dfnd_selection/A"]
    values = DFND_train.value_of(normal(case["inputs"]["teacher_logits"]))
    assert values.tolist() == pytest.approx(case["values"], rel=1e-7)
    args = DFND_train.parse_args(["--wild", "x", "--num_select", str(case["inputs"]["k"])])
    rows = DFND_train.select({"values": values}, args)
    assert rows.tolist() == case["selected_indices_in_published_order"]


@pytest.mark.parametrize("selected", ["600000", "50000"])
def test_schedule_agrees(selected):
    case = VALUES["dfnd_schedule"][selected]
    longest = DFND_train.max_epoch(int(selected))
    assert (longest, longest - 1) == (case["max_epoch"], case["epochs_run"])
    for epoch, lr in case["lr"].items():
        assert lr_at(int(epoch), 0.1, longest, [0.4, 0.8]) == pytest.approx(lr)


def draw(mode, size=(40, 36), seed=0):
    pixels = np.random.RandomState(seed).randint(0, 256, (*size[::-1], 4), np.uint8)
    return Image.fromarray(pixels, "RGBA").convert(mode)


@pytest.fixture(scope="module")
def wild(tmp_path_factory):
    """A folder of everything that lies about: 26 readable images, 3 that are not, 2 other files."""
    root = tmp_path_factory.mktemp("wild")
    (root / "deep" / "er").mkdir(parents=True)
    for i in range(20):
        draw("RGB", seed=i).save(root / "deep" / f"photo{i:02}.JPG", "JPEG")
    draw("L").save(root / "grey.png")
    draw("RGBA").save(root / "deep" / "er" / "transparent.png")
    Image.fromarray(np.arange(32 * 32, dtype=np.uint16).reshape(32, 32) * 64).save(root / "sixteen bits.png")
    draw("CMYK").save(root / "print.jpg")
    draw("P").save(root / "moving.gif", save_all=True, append_images=[draw("P", seed=1)])
    draw("RGB").save(root / "näme.webp")
    whole = (root / "deep" / "photo00.JPG").read_bytes()
    (root / "truncated.jpg").write_bytes(whole[: len(whole) // 2])
    (root / "empty.png").touch()
    (root / "page.png").write_text("<html>404 not found</html>")
    (root / "notes.txt").write_text("no image")
    (root / ".hidden.png").write_bytes(whole)
    return root


def zipped(root, path):
    with zipfile.ZipFile(path, "w") as archive:
        for file in sorted(root.rglob("*")):
            if file.is_file():
                archive.write(file, file.relative_to(root))
    return path


def run(*argv):
    return DFND_train.main(DFND_train.parse_args([str(a) for a in argv]))


SHORT = ("--n_epochs", 2, "--batch_size", 8, "--num_select", 16)


def test_folder_and_zip_are_the_same_images(wild, tmp_path):
    folder, _ = get_wild(str(wild), ".", 32, 3)
    archive, _ = get_wild(str(zipped(wild, tmp_path / "w.zip")), ".", 32, 3)
    copy = shutil.copytree(wild, tmp_path / "copy", copy_function=shutil.copyfile)  # with times of its own
    assert get_wild(str(copy), ".", 32, 3)[1] == get_wild(str(wild), ".", 32, 3)[1]
    assert len(folder) == len(archive) == 29
    for a, b in zip(folder.scan(8, "cpu"), archive.scan(8, "cpu"), strict=True):
        assert torch.equal(a[0], b[0]) and [row for row, _ in a[1]] == [row for row, _ in b[1]]


@pytest.mark.parametrize("selection", ["lowest", "random", "all"])
@pytest.mark.parametrize("kind", ["folder", "zip"])
def test_a_wild_folder_of_everything(kind, selection, wild, tmp_path, checkpoints, capsys):
    source = wild if kind == "folder" else zipped(wild, tmp_path / "wild.zip")
    flags = ("--wild", source, "--checkpoints", checkpoints, "--out", tmp_path, *SHORT, "--selection", selection)
    result = run(*flags)
    assert (result["wild_images"], result["wild_broken"]) == (29, 3)
    assert result["selected"] == (26 if selection == "all" else 16)
    folder = tmp_path / result["name"]
    assert f"-{source.name}_" in folder.name
    assert "left out: 3 files" in (folder / "log.txt").read_text()
    for picture in ("wild_values.png", "samples/wild_best.png", "samples/wild_worst.png"):
        with Image.open(folder / picture) as image:
            assert image.convert("RGB").getextrema() != ((0, 0), (0, 0), (0, 0))
    # A second run takes the scan from the disk, and ends with the same student.
    weights = checkpoint.read(folder / "last.pt")["state_dict"]
    assert len(list((tmp_path / "wild_scans").iterdir())) == 1
    again = run(*flags)
    assert "scanned before" in (folder / "log.txt").read_text()
    assert again["last"] == result["last"]
    for key, value in checkpoint.read(folder / "last.pt")["state_dict"].items():
        assert torch.equal(value, weights[key])


def test_another_teacher_scans_again(wild, tmp_path):
    """Also one whose weights are constants of its program, and the same at another size."""
    images = ("--dataset", "none", "--num_classes", 10, "--channels", 1, "--mean", 0, "--std", 1, "--wild", wild)
    for i in range(2):
        torch.manual_seed(i)
        network = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(4), torch.nn.Flatten(), torch.nn.Linear(16, 10))
        torch.jit.save(torch.jit.freeze(torch.jit.script(network.eval())), tmp_path / f"{i}.pt")
    for i, size in ((0, 32), (1, 32), (1, 28)):
        teacher = ("--teacher", tmp_path / f"{i}.pt", "--img_size", size)
        run(*images, *teacher, "--student", "resnet8", "--out", tmp_path, *SHORT)
    a, b, c = (checkpoint.read(path)["values"] for path in (tmp_path / "wild_scans").iterdir())
    assert not (torch.equal(a, b) or torch.equal(a, c) or torch.equal(b, c))


def test_images_that_do_not_fit_are_streamed(wild, tmp_path, checkpoints):
    common = ("--wild", wild, "--checkpoints", checkpoints, *SHORT)
    kept = run(*common, "--out", tmp_path / "a")
    streamed = run(*common, "--out", tmp_path / "b", "--memory", 1e-6)
    assert kept["last"] == streamed["last"]
    a, b = (checkpoint.read(tmp_path / x / kept["name"] / "last.pt") for x in "ab")
    for key, value in a["state_dict"].items():
        assert torch.equal(value, b["state_dict"][key])


def test_the_surest_images_are_selected(tmp_path, checkpoints):
    """Of digits hidden among noise, the teacher takes the digits."""
    digits = get_dataset("digits", train=True).train.images[:64, 0].numpy()
    noise = np.random.RandomState(0).randint(118, 138, (64, 32, 32), np.uint8)
    root = tmp_path / "wild"
    root.mkdir()
    for i, pixels in enumerate([*digits, *noise]):
        Image.fromarray(pixels).save(root / f"{i:03}.png")
    flags = ("--wild", root, "--num_select", 32, "--batch_size", 16, "--n_epochs", 1)
    result = run(*flags, "--checkpoints", checkpoints, "--out", tmp_path)
    scan = next((tmp_path / "wild_scans").iterdir())
    rows = DFND_train.select(checkpoint.read(scan), DFND_train.parse_args([str(flag) for flag in flags]))
    assert result["selected"] == 32 and (rows < 64).float().mean() > 0.9


def test_the_accuracy_in_the_matrix(wild, tmp_path, checkpoints):
    common = ("--wild", wild, "--out", tmp_path, "--n_epochs", 1, *SHORT[2:])
    content = checkpoint.read(checkpoints / "digits-lenet5-digits.pt")
    known = run(*common, "--checkpoints", checkpoints)
    assert known["accuracy_in_Q"] == pytest.approx(content["metadata"]["accuracy"] / 100)
    assert run(*common, "--checkpoints", checkpoints, "--teacher_acc", 0.9)["accuracy_in_Q"] == 0.9
    bare = tmp_path / "bare.pt"
    checkpoint.save(content["state_dict"], bare)
    estimated = run(*common, "--teacher_ckpt", bare)
    assert 0.1 <= estimated["accuracy_in_Q"] <= 1
    assert "does not say how good" in (tmp_path / estimated["name"] / "log.txt").read_text()


def test_wild_stats_change_what_the_teacher_sees(wild, tmp_path, checkpoints):
    common = ("--wild", wild, "--checkpoints", checkpoints, "--out", tmp_path, *SHORT)
    run(*common)
    run(*common, "--wild_stats", "imagenet")
    a, b = (checkpoint.read(path)["values"] for path in (tmp_path / "wild_scans").iterdir())
    assert not torch.equal(a, b)


def test_without_test_images(wild, tmp_path, checkpoints, refused):
    """The score is the agreement on wild images that did not teach."""
    common = ("--dataset", "none", "--wild", wild, "--out", tmp_path, "--student", "lenet5_half", *SHORT)
    teacher = ("--teacher", "lenet5", "--teacher_ckpt", checkpoints / "digits-lenet5-digits.pt")
    for selection, selected in (("lowest", 16), ("random", 16), ("all", 13)):
        result = run(*common, *teacher, "--selection", selection)
        assert (result["score"], result["selected"]) == ("agreement", selected)
        assert (result["test_images"], result["teacher_accuracy"], result["standard_error"]) == (0, None, None)
        # Of 26 readable images 10 or 13 are left: the score is a multiple of one of them.
        left = 26 - selected
        assert result["last"] * left / 100 == pytest.approx(round(result["last"] * left / 100))
    assert "lower --num_select" in refused(DFND_train, *common, *teacher, "--num_select", 26)


def test_images_that_score_do_not_teach():
    args = DFND_train.parse_args(["--dataset", "none", "--wild", "x", "--selection", "all", "--teacher_ckpt", "y"])
    values = torch.rand(5000)
    values[::7] = torch.nan
    rows = DFND_train.select({"values": values}, args)
    unseen = DFND_train.not_selected({"values": values}, rows)
    gaps = unseen.diff()  # evenly spread, as a set may be sorted by class
    assert len(unseen) == 1000 and gaps.min() >= 4 and gaps.max() <= 6
    assert sorted([*rows.tolist(), *unseen.tolist()]) == (~values.isnan()).nonzero().flatten().tolist()


def test_wild_set_and_selection_are_in_the_name(wild, tmp_path):
    def name(*flags):
        return DFND_train.parse_args([str(flag) for flag in flags]).run_name

    names = {
        name("--wild", "mnist"),
        name("--wild", "mnist", "--selection", "random"),
        name("--wild", wild),
        name("--wild", tmp_path / wild.name),
        name("--wild", "folder", "--wild_root", tmp_path),
        name("--wild", "folder", "--wild_root", wild),
    }
    assert len(names) == 6
    assert "DFND_train-digits-lenet5-lenet5_half-mnist" in names
    assert "DFND_train-digits-lenet5-lenet5_half-mnist-selection_random" in names


def test_wild_sets_that_cannot_be_used(wild, tmp_path, checkpoints, refused):
    common = ("--checkpoints", checkpoints, "--out", tmp_path / "runs")
    empty = tmp_path / "empty"
    empty.mkdir()
    damaged = tmp_path / "damaged.zip"
    damaged.write_bytes(zipped(wild, tmp_path / "w.zip").read_bytes()[:2000])
    for flags, words in (
        ((), "--wild is missing"),
        (("--wild", tmp_path / "nowhere"), "does not exist"),
        (("--wild", "nowhere", "--wild_root", tmp_path), f"nowhere or {tmp_path / 'nowhere'} does not exist"),
        (("--wild", empty), "no images in"),
        (("--wild", damaged), "is damaged or no zip file"),
        (("--wild", wild, "--num_select", 30), "has 29 images, fewer than --num_select 30"),
        (("--wild", wild, "--num_select", 27), "has 26 images that can be read, fewer than"),
        (("--wild", "mnist", "--data_root", empty), "mnist"),
        (("--wild", wild, "--teacher_acc", 1.5), "at most 1"),
    ):
        assert words in refused(DFND_train, *common, *flags)
    folder = tmp_path / "rubbish"
    folder.mkdir()
    for i in range(3):
        (folder / f"{i}.png").write_text("no image")
    error = refused(DFND_train, *common, "--wild", folder, "--selection", "all")
    assert "has 0 images that can be read" in error


def test_a_name_of_a_wild_set_that_vanishes_is_a_data_error(wild, tmp_path):
    split, _ = get_wild(str(wild), ".", 32, 3)
    split = split.take(torch.tensor([0]))
    split.root = tmp_path
    with pytest.raises(DataError, match="cannot read image"):
        split.decode()
