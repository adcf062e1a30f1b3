"""A run's folder: its record, its resumption bit for bit, and what stops it."""

import csv
import json
import os
import shutil
import signal
import time
from typing import NamedTuple

import pytest
import torch
from PIL import Image

import DAFL_train
import datafree_kd
import datafree_kd_imagenet
import DFAD_cifar
import DFAD_mnist
import DFND_train
import teacher_train
import vanilla_kd
import ZSKT_train
from datafree import checkpoint
from datafree.cli import cli
from datafree.errors import TimeLimit
from datafree.session import Session

pytestmark = pytest.mark.usefixtures("few_digits")


class Case(NamedTuple):
    """A short run of a script: its flags, and the module of its loop."""

    script: object
    flags: tuple
    module: object = None

    @property
    def loop(self):
        return self.module or self.script

    def folder(self, *more):
        return self.script.parse_args([*self.flags, *more]).run_name


def case(script, flags, module=None):
    return Case(script, tuple(flags.split()), module)


def datafree(method, flags=""):
    common = (
        "--batch_size 16 --synthesis_batch_size 16 --ep_steps 4 --n_epochs 4 --warmup 1 --lr 0.01 --sample_every 2 "
        "--teacher resnet8 --student resnet8 --g_steps 2"
    )
    return case(datafree_kd, f"{common} --method {method} {flags}")


SMALL_GENERATOR = "--nz 8 --ngf 8"
DAFL = case(DAFL_train, "--batch_size 16 --iterations 4 --n_epochs 4 --nz 4 --milestones 0.5 --sample_every 2")
CASES = {
    "DAFL_train": DAFL,
    "teacher_train": case(teacher_train, "--batch_size 128 --n_epochs 4 --recipe dafl"),
    "vanilla_kd": case(vanilla_kd, "--batch_size 128 --n_epochs 4 --transfer_set noise"),
    "fast_meta": datafree("fast_meta", SMALL_GENERATOR),
    "cmi": datafree("cmi", f"{SMALL_GENERATOR} --bank_size 40 --n_neg 8"),
    "deepinv": datafree("deepinv"),
    "dfq": datafree("dfq", f"{SMALL_GENERATOR} --kd_steps 2"),
    "datafree_kd_imagenet": case(
        datafree_kd_imagenet,
        "--batch_size 8 --synthesis_batch_size 8 --dataset digits --ep_steps 2 --kd_steps 2 --n_epochs 4 --lr 0.01 "
        "--sample_every 2 --teacher resnet8 --student resnet8 --g_steps 2 --phase1_rounds 2 --z_rounds 4 "
        + SMALL_GENERATOR,
    ),
    "DFAD_mnist": case(
        DFAD_mnist,
        "--batch_size 16 --dataset digits --n_epochs 4 --epoch_itrs 2 --nz 4 --sample_every 2 --scheduler",
        DFAD_cifar,
    ),
    "ZSKT_train": case(ZSKT_train, "--batch_size 4 --n_epochs 4 --epoch_itrs 1 --nz 4 --sample_every 2"),
    "DFND_train": case(DFND_train, "--batch_size 64 --wild digits --num_select 256 --n_epochs 4"),
}


def command(case, out, checkpoints, *flags):
    folder = out / "checkpoints" if case.script is teacher_train else checkpoints
    return [*case.flags, "--out", str(out), "--checkpoints", str(folder), *flags]


def run(script, *argv):
    return script.main(script.parse_args(list(argv)))


def equal(a, b):
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(equal, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def states(out, case, *flags):
    content = checkpoint.read(out / case.folder(*flags) / "last.pt")
    states = {k: v for k, v in content["run"]["states"].items() if k != "timer"}
    return content["state_dict"], states, content["run"]["rng"], content["epoch"]


def rows(out, case):
    with (out / case.folder() / "metrics.csv").open(newline="") as file:
        return [{k: v for k, v in r.items() if "seconds" not in k} for r in csv.DictReader(file)]


@pytest.fixture(scope="module", params=CASES)
def whole(request, tmp_path_factory, checkpoints):
    """A case, and the folder of a run of it that nobody stopped."""
    out, case = tmp_path_factory.mktemp("whole"), CASES[request.param]
    run(case.script, *command(case, out, checkpoints))
    return case, out


def test_resume_after_every_epoch_is_bit_identical(whole, tmp_path, checkpoints, monkeypatch, capsys):
    """Stopped in the first epoch, by a time limit behind it, in the third and in the fourth; resumed each time."""
    case, out = whole
    train_epoch, argv = case.loop.train_epoch, command(case, tmp_path, checkpoints)
    for done, flags in ((0, ()), (9, ("--resume", "--time_limit", "0.0001")), (1, ("--resume",)), (1, ("--resume",))):
        left = iter(range(done))

        def interrupted(*args, left=left):
            result = train_epoch(*args)  # the epoch's work is done when it is lost
            if next(left, None) is None:
                raise KeyboardInterrupt
            return result

        with monkeypatch.context() as patch:
            patch.setattr(case.loop, "train_epoch", interrupted)
            with pytest.raises(SystemExit) as end:
                cli(case.script.main, lambda flags=flags: case.script.parse_args([*argv, *flags]))
        code, word = (75, "time limit") if len(flags) > 1 else (130, "--resume")
        assert end.value.code == code and word in capsys.readouterr().err
        assert not (tmp_path / case.folder() / "result.json").exists()
    result = run(case.script, *argv, "--resume")
    assert [p["epochs"] for p in result["pieces"]] == [[1, 1], [2, 2], [3, 3], [4, 4]]
    assert equal(states(tmp_path, case), states(out, case))
    assert rows(tmp_path, case) == rows(out, case)
    assert equal(
        checkpoint.read(tmp_path / case.folder() / "best.pt"), checkpoint.read(out / case.folder() / "best.pt")
    )


def test_resume_after_a_kill_in_mid_epoch_is_bit_identical(tmp_path, checkpoints, forks):
    def argv(out):
        return command(DAFL, out, checkpoints, "--iterations", "12")

    assert forks.run("DAFL_train", argv(tmp_path / "whole")).code == 0
    job = forks.start("DAFL_train", argv(tmp_path / "killed"))
    last = tmp_path / "killed" / DAFL.folder("--iterations", "12") / "last.pt"
    while not last.exists():
        assert not (job / "end.json").exists(), forks.wait(job)
        time.sleep(0.01)
    time.sleep(0.1)
    os.kill(int((job / "pid").read_text()), signal.SIGKILL)
    assert forks.wait(job).code == -signal.SIGKILL
    assert states(tmp_path / "killed", DAFL, "--iterations", "12")[3] < 3
    assert forks.run("DAFL_train", [*argv(tmp_path / "killed"), "--resume"]).code == 0
    assert equal(
        states(tmp_path / "killed", DAFL, "--iterations", "12"), states(tmp_path / "whole", DAFL, "--iterations", "12")
    )


def test_folder_holds_what_it_should(whole):
    case, out = whole
    folder = out / case.folder()
    names = {p.name for p in folder.iterdir()}
    assert {
        "args.json",
        "metrics.csv",
        "log.txt",
        "last.pt",
        "best.pt",
        "accuracy.png",
        "result.json",
        "samples",
    } <= names
    assert not [n for n in names if n.endswith(".tmp")]
    record = rows(out, case)
    assert [r["epoch"] for r in record] == ["1", "2", "3", "4"]
    result = json.loads((folder / "result.json").read_text())
    accuracies = [float(r["accuracy"]) for r in record]
    assert result["last"] == accuracies[-1] and result["best"] == max(accuracies)
    assert accuracies[result["best_epoch"] - 1] == max(accuracies)
    for key in (
        "seed",
        "command",
        "commit",
        "versions",
        "hardware",
        "seconds",
        "fingerprint",
        "precision",
        "dataset",
        "published",
    ):
        assert key in result
    assert result["command"].startswith(f"python {case.script.__name__}.py --batch_size ")
    assert Image.open(folder / "accuracy.png").size[0] > 400
    assert (folder / "log.txt").read_text().count("[Eval] Epoch=") == 4


def test_best_weights_score_what_the_record_says(whole, checkpoints, capsys):
    case, out = whole
    argv = command(case, out, checkpoints)
    result = json.loads((out / case.folder() / "result.json").read_text())
    assert run(case.script, *argv, "--evaluate_only")["accuracy"] == result["best"]
    last = str(out / case.folder() / "last.pt")
    assert run(case.script, *argv, "--evaluate_only", "--ckpt", last)["accuracy"] == result["last"]
    assert f"Acc@1={result['last']:.2f}" in capsys.readouterr().out


def test_teacher_for_distillation_is_the_best_epoch(whole, checkpoints):
    case, out = whole
    if case.script is teacher_train:
        made, best = out / "checkpoints" / "digits-lenet5-dafl.pt", out / case.folder() / "best.pt"
        assert equal(checkpoint.read(made)["state_dict"], checkpoint.read(best)["state_dict"])


def test_generated_images_are_written(whole):
    case, out = whole
    samples = sorted((out / case.folder() / "samples").iterdir())
    if case.script in (teacher_train, vanilla_kd, DFND_train):
        assert [p.name for p in samples] == ["wild_best.png", "wild_worst.png"] * (case.script is DFND_train)
    else:
        assert [p.name for p in samples] == ["epoch0002.png", "epoch0004.png"]
        image = Image.open(samples[0])
        dark, bright = image.convert("L").getextrema()
        columns = 8 if case.loop in (DAFL_train, DFAD_cifar, ZSKT_train) or "dfq" in case.flags else 5
        assert image.size[0] == columns * 34 + 2 and bright - dark > 50


def test_seed_decides_the_run(whole, tmp_path, checkpoints):
    """That the same one gives the same run the resumed ones say."""
    case, out = whole
    run(case.script, *command(case, tmp_path, checkpoints, "--seed", "1"))
    assert not equal(states(tmp_path, case, "--seed", "1")[0], states(out, case)[0])


def test_an_earlier_run_is_set_aside(tmp_path, checkpoints):
    ends = []
    for _ in range(3):
        run(DAFL_train, *command(DAFL, tmp_path, checkpoints, "--n_epochs", "2"))
        ends.append(states(tmp_path, DAFL, "--n_epochs", "2")[0])
    assert equal(ends[0], ends[1]) and equal(ends[0], ends[2])
    name = DAFL.folder("--n_epochs", "2")
    assert {p.name for p in tmp_path.iterdir()} - {".locks"} == {name, f"{name}.1", f"{name}.2"}


def test_other_flags_are_another_run(whole):
    """What makes the result makes the folder; where and how loud a run is does not."""
    case, _ = whole
    same = {case.folder(), case.folder("--out", "elsewhere"), case.folder("--time_limit", "3"), case.folder("--resume")}
    others = {case.folder(*flags) for flags in (("--seed", "1"), ("--n_epochs", "5"), ("--precision", "fp32"))}
    assert len(same) == 1 and len(others) == 3 and not same & others


def test_resume_with_other_flags_than_the_run_in_the_folder_is_refused(whole, tmp_path, checkpoints, refused):
    case, out = whole
    argv = command(case, tmp_path, checkpoints)
    moved = tmp_path / case.folder("--seed", "5")
    shutil.copytree(out / case.folder(), moved)
    (moved / "result.json").unlink()
    before = (moved / "last.pt").read_bytes()
    assert "--seed was 0" in refused(case.script, *argv, "--resume", "--seed", "5")
    assert (moved / "last.pt").read_bytes() == before


def test_resuming_a_finished_run_leaves_every_byte(whole, checkpoints, contents):
    case, out = whole
    before = contents(out)
    result = run(case.script, *command(case, out, checkpoints), "--resume")
    assert contents(out) == before
    assert result == json.loads((out / case.folder() / "result.json").read_text())


def test_more_epochs_go_on_with_the_shorter_run(tmp_path, checkpoints, capsys):
    argv = command(DAFL, tmp_path, checkpoints)
    run(DAFL_train, *argv, "--n_epochs", "2")
    result = run(DAFL_train, *argv, "--n_epochs", "3", "--resume")
    assert "its schedule stretches" in capsys.readouterr().out
    assert [p["epochs"] for p in result["pieces"]] == [[1, 2], [3, 3]] and result["epochs"] == 3
    assert {p.name for p in tmp_path.glob("[!.]*")} == {DAFL.folder("--n_epochs", "3")}
    assert (
        json.loads(next((tmp_path / DAFL.folder("--n_epochs", "3")).glob("result-*.json")).read_text())["epochs"] == 2
    )


def test_more_epochs_after_its_folder_was_renamed(tmp_path, checkpoints, refused):
    """As it asks for where two shorter runs could go on."""
    argv = command(DAFL, tmp_path, checkpoints)
    for n in "12":
        run(DAFL_train, *argv, "--n_epochs", n)
    assert "Rename its folder" in refused(DAFL_train, *argv, "--n_epochs", "3", "--resume")
    folder = (tmp_path / DAFL.folder("--n_epochs", "2")).rename(tmp_path / DAFL.folder("--n_epochs", "3"))
    result = run(DAFL_train, *argv, "--n_epochs", "3", "--resume")
    assert [p["epochs"] for p in result["pieces"]] == [[1, 2], [3, 3]]
    (before,) = folder.glob("result-*.json")
    assert json.loads(before.read_text())["epochs"] == 2


def test_more_epochs_where_the_longer_run_had_no_checkpoint_yet(tmp_path, checkpoints):
    argv = command(DAFL, tmp_path, checkpoints)
    run(DAFL_train, *argv, "--n_epochs", "1")
    log = tmp_path / DAFL.folder("--n_epochs", "2") / "log.txt"
    log.parent.mkdir()
    log.write_text("stopped\n")
    result = run(DAFL_train, *argv, "--n_epochs", "2", "--resume")
    assert [p["epochs"] for p in result["pieces"]] == [[1, 1], [2, 2]]
    assert (log.parent.with_name(f"{log.parent.name}.1") / "log.txt").read_text() == "stopped\n"


def test_a_shorter_run_of_other_flags_keeps_its_name(tmp_path, checkpoints):
    """Such as another warm-up, which follows the number of epochs and is not in the name."""
    argv = command(DAFL, tmp_path, checkpoints)
    run(DAFL_train, *argv, "--n_epochs", "1")
    flags = tmp_path / DAFL.folder("--n_epochs", "1") / "args.json"
    flags.write_text(json.dumps(json.loads(flags.read_text()) | {"warmup": 3}))
    result = run(DAFL_train, *argv, "--n_epochs", "2", "--resume")
    assert [p["epochs"] for p in result["pieces"]] == [[1, 2]] and flags.with_name("result.json").exists()


def test_a_warm_up_that_makes_nothing_has_no_pictures(tmp_path, checkpoints):
    case = datafree("fast", f"{SMALL_GENERATOR} --bn 0 --oh 0 --sample_every 1")
    run(datafree_kd, *command(case, tmp_path, checkpoints, "--n_epochs", "2"))
    assert [p.name for p in (tmp_path / case.folder("--n_epochs", "2") / "samples").iterdir()] == ["epoch0002.png"]


def test_pieces_say_what_really_happened(tmp_path, checkpoints, monkeypatch):
    """A run whose first epoch was computed elsewhere is labelled by both machines."""
    argv = command(DAFL, tmp_path, checkpoints)
    monkeypatch.setattr("datafree.run.device_name", lambda device: "one machine")
    with pytest.raises(TimeLimit):
        run(DAFL_train, *argv, "--time_limit", "0.0001")
    monkeypatch.setattr("datafree.run.device_name", lambda device: "another")
    result = run(DAFL_train, *argv, "--resume")
    assert result["hardware"] == "one machine then another"
    assert [p["epochs"] for p in result["pieces"]] == [[1, 1], [2, 4]]


def test_a_log_that_is_no_terminal_says_a_line_a_minute(tmp_path, checkpoints, monkeypatch, capsys):
    monkeypatch.setattr("datafree.run.SAY_EVERY", 0)
    run(DAFL_train, *command(DAFL, tmp_path, checkpoints, "--n_epochs", "1"))
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("epoch 1: ")]
    assert len(lines) == 4 and "images/s" in lines[0] and "left, loss" in lines[0]


def test_a_generator_that_has_died_is_told_once(tmp_path, checkpoints, monkeypatch, capsys):
    """One without a gradient: its loss stays what it is."""
    monkeypatch.setattr(DAFL_train, "one_hot_loss", lambda logits: 0 * logits.sum() + 2)
    run(DAFL_train, *command(DAFL, tmp_path, checkpoints))
    said = "loss_oh to the last bit as in the epoch before: what they train has died"
    assert capsys.readouterr().out.count(said) == 1


def test_resume_of_a_damaged_checkpoint_is_refused(tmp_path, checkpoints, refused):
    argv = command(DAFL, tmp_path, checkpoints, "--n_epochs", "2")
    run(DAFL_train, *argv)
    last = tmp_path / DAFL.folder("--n_epochs", "2") / "last.pt"
    (last.parent / "result.json").unlink()
    last.write_bytes(last.read_bytes()[:1000])
    assert "is damaged or no checkpoint" in refused(DAFL_train, *argv, "--resume")


@pytest.mark.parametrize("what", ["loss", "weights"])
def test_nan_stops_the_run_and_keeps_the_last_good_checkpoint(whole, what, tmp_path, checkpoints, refused, monkeypatch):
    case, out = whole
    train_epoch, calls = case.loop.train_epoch, []

    def broken(*args):
        calls.append(1)
        result = train_epoch(*args)
        if len(calls) < 3:
            return result
        if what == "weights":
            student = next(a for a in args if isinstance(a, Session)).student
            next(student.parameters()).data.view(-1)[0] = float("inf")
            return result
        if isinstance(result, dict):
            return {**result, "loss_kd": torch.tensor(float("nan"))}
        return torch.tensor(float("inf"))

    monkeypatch.setattr(case.loop, "train_epoch", broken)
    error = refused(case.script, *command(case, tmp_path, checkpoints))
    assert "NaN or infinite in epoch 3" in error and "last.pt" in error
    state, _, _, epoch = states(tmp_path, case)
    assert epoch == 1 and all(t.isfinite().all() for t in state.values())
    assert len(rows(tmp_path, case)) == 2


def test_full_disk_keeps_what_is_saved(tmp_path, checkpoints, refused, monkeypatch):
    calls = []
    fsync = os.fsync

    def full(file):
        calls.append(1)
        if len(calls) > 6:  # in the second epoch
            raise OSError(28, "No space left on device")
        fsync(file)

    monkeypatch.setattr(os, "fsync", full)
    argv = command(DAFL, tmp_path, checkpoints)
    assert "No space left" in refused(DAFL_train, *argv)
    monkeypatch.setattr(os, "fsync", fsync)
    assert states(tmp_path, DAFL)[3] in (0, 1)
    run(DAFL_train, *argv, "--resume")
    assert len(rows(tmp_path, DAFL)) == 4


def test_losses_fall_on_digits(tmp_path, checkpoints):
    run(
        DAFL_train,
        "--batch_size",
        "64",
        "--iterations",
        "15",
        "--n_epochs",
        "4",
        "--out",
        str(tmp_path),
        "--checkpoints",
        str(checkpoints),
        "--tag",
        "falls",
        "--nz",
        "16",
    )
    with (tmp_path / next(tmp_path.glob("*-falls")).name / "metrics.csv").open() as file:
        record = list(csv.DictReader(file))
    assert float(record[-1]["loss_G"]) < float(record[0]["loss_G"])
    assert float(record[-1]["accuracy"]) > 25  # of ten classes


def test_own_images_and_teacher_end_to_end(tmp_path, refused):
    """A folder of images and a bare state dict, through all three scripts and MMRazor's variant."""
    torch.manual_seed(0)
    for split in ("train", "test"):
        for name, colour in (("dark", 60), ("bright", 200)):
            folder = tmp_path / "data" / split / name
            folder.mkdir(parents=True)
            for i in range(8):
                noise = torch.randint(-50, 50, (16, 16, 3)) + colour
                Image.fromarray(noise.to(torch.uint8).numpy()).save(folder / f"{i}.png")
    common = [
        "--dataset",
        "folder",
        "--data_root",
        str(tmp_path / "data"),
        "--out",
        str(tmp_path),
        "--n_epochs",
        "1",
        "--batch_size",
        "8",
        "--checkpoints",
        str(tmp_path),
    ]
    trained = run(teacher_train, *common, "--model", "resnet8")
    assert trained["dataset"] == "folder" and (tmp_path / "folder-resnet8-fast.pt").exists()
    card = checkpoint.read(tmp_path / "folder-resnet8-fast.pt")["metadata"]
    assert card["num_classes"] == 2 and card["img_size"] == 16 and len(card["mean"]) == 3
    bare = tmp_path / "bare.pt"
    torch.save(checkpoint.read(tmp_path / "folder-resnet8-fast.pt")["state_dict"], bare)
    networks = [
        "--teacher",
        "resnet8",
        "--student",
        "wrn16_1",
        "--teacher_ckpt",
        str(bare),
        "--mean",
        "0.5",
        "0.5",
        "0.5",
        "--std",
        "0.2",
        "0.2",
        "0.2",
    ]
    for script, *flags in (
        (DAFL_train, "--iterations", "2", "--nz", "8", "--sample_every", "1"),
        (DAFL_train, "--iterations", "2", "--nz", "8", "--variant", "mmrazor"),
        (vanilla_kd,),
        (vanilla_kd, "--transfer_set", str(tmp_path / "data" / "train")),
        (vanilla_kd, "--scratch", "--img_size", "16"),
        (datafree_kd, "--ep_steps", "2", "--g_steps", "1", "--ngf", "8"),
        (DFAD_cifar, "--epoch_itrs", "1", "--nz", "8"),
    ):
        result = run(script, *common, *networks, *flags)
        best = checkpoint.read(tmp_path / result["name"] / "best.pt")
        assert best["metadata"]["model"] == "wrn16_1" and best["metadata"]["mean"] == [0.5] * 3
    assert list(tmp_path.glob("DAFL_train-folder_data_*-resnet8-wrn16_1-*/samples/epoch0001.png"))
    assert "3 value" in refused(DAFL_train, *common, *networks, "--mean", "0.5")
