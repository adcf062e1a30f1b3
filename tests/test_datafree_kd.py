"""datafree_kd.py: recipes, every method on the digits, and what ends in one line."""

import contextlib
import csv
import shutil
import subprocess
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from reference_fill import load_reference

import datafree_kd
from datafree import checkpoint, metrics, synthesis
from datafree.augment import Transform
from datafree.errors import UsageError
from datafree.pool import ImagePool, read_raw
from datafree.run import Run
from datafree.runtime import Runtime
from datafree.synthesis import METHODS, Generative, Method
from models import get_generator, get_model

pytestmark = pytest.mark.usefixtures("few_digits")
ROOT = Path(__file__).parent.parent
# fmt: off
TINY = ("--batch_size", "32", "--synthesis_batch_size", "32", "--ngf", "16", "--nz", "16", "--warmup", "0",
        "--lr", "0.01", "--sample_every", "0", "--teacher", "resnet8", "--student", "lenet5_half")
# fmt: on
SETTINGS = {
    "zskt": ("--n_epochs", "6", "--ep_steps", "20"),
    "dfad": ("--n_epochs", "6", "--ep_steps", "20"),
    "dafl": ("--n_epochs", "6", "--ep_steps", "20"),
    "dfq": ("--n_epochs", "6", "--ep_steps", "20"),
    "deepinv": ("--n_epochs", "6", "--ep_steps", "10", "--g_steps", "5"),
    "cmi": ("--n_epochs", "6", "--ep_steps", "10", "--g_steps", "4", "--bank_size", "100"),
    "fast": ("--n_epochs", "8", "--ep_steps", "10", "--g_steps", "3"),
    "fast_meta": ("--n_epochs", "8", "--ep_steps", "10", "--g_steps", "3"),
    "nayer": ("--n_epochs", "8", "--ep_steps", "10", "--g_steps", "3"),
}


def flags_of(method):
    tiny = list(TINY)
    if method == "deepinv":
        tiny = tiny[:4] + tiny[8:]  # it has no generator
    return ["--method", method, *tiny, *SETTINGS[method]]


def start(out, checkpoints, *flags):
    return datafree_kd.main(datafree_kd.parse_args([*flags, "--out", out, "--checkpoints", checkpoints]))


def record(out, result):
    with (out / result["name"] / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("method", METHODS)
def test_every_method_learns_on_digits(method, tmp_path, checkpoints):
    result = start(tmp_path, checkpoints, *flags_of(method))
    rows = record(tmp_path, result)
    if method in ("zskt", "dfad", "dfq"):  # two players: neither loss falls by itself
        assert float(rows[-1]["loss_adv"]) < 0
    else:
        assert float(rows[-1]["loss_kd"]) < float(rows[0]["loss_kd"])
    assert result["synthesis_seconds"] < result["seconds"]
    weights = [w for w in METHODS[method].family.terms if METHODS[method].recipe[w]]
    assert [k.removeprefix("loss_") for k in rows[0] if k.startswith("loss_")] == [*weights, "kd"]


@pytest.mark.parametrize("is_maml", [0, 1])
def test_meta_learning_moves_the_common_generator(is_maml, tmp_path, checkpoints):
    start(tmp_path, checkpoints, *flags_of("fast_meta"), "--n_epochs", "1", "--is_maml", str(is_maml))
    (last,) = tmp_path.glob("*/last.pt")
    state = checkpoint.read(last)["run"]["states"]["synthesizer"]["meta_optimizer"]
    assert state["state"][0]["step"] == 1
    # Reptile's difference, about lr_g, is taken 67 times; Adam keeps half of it.
    assert state["state"][0]["exp_avg"].abs().max() > (0 if is_maml else 0.05)


def test_published_recipes():
    def settings(*argv):
        args = datafree_kd.parse_args(["--dataset", "cifar10", *argv])
        return vars(args)

    shared = dict(batch_size=256, lr=0.2, kd_steps=400, ep_steps=400, n_epochs=220, warmup=20, T=20, bn=10)
    shared |= dict(bn_mmt=0.9, reset_l0=1, nz=256, is_maml=1, weight_decay=1e-4)
    for teacher, student, adv, oh in (
        ("resnet34", "resnet18", 1.33, 0.5),
        ("vgg11", "resnet18", 1.0, 0.5),
        ("wrn40_2", "wrn16_1", 1.1, 0.4),
        ("wrn40_2", "wrn40_1", 1.1, 0.4),
    ):
        for g_steps, lr_z, lr_g in ((2, 0.015, 5e-3), (5, 0.01, 3e-3), (10, 0.01, 2e-3)):
            found = settings(
                "--method", "fast_meta", "--teacher", teacher, "--student", student, "--g_steps", str(g_steps)
            )
            expected = shared | dict(adv=adv, oh=oh, lr_z=lr_z, lr_g=lr_g)
            assert {k: found[k] for k in expected} == expected
    bare = settings("--method", "fast_meta", "--teacher", "wrn40_2", "--student", "wrn16_1")
    assert bare["g_steps"] == 10 and bare["lr_g"] == 2e-3
    columns = ("kd_steps", "g_steps", "lr_g", "adv", "bn", "oh", "T", "lr", "n_epochs", "warmup")
    for method, row, more in (
        ("dafl", (5, 1, 1e-3, 0, 0, 1), dict(act=0.001, balance=20, nz=512, T=20)),
        ("dfad", (5, 1, 1e-3, 1, 0, 0), dict(act=0, balance=0, nz=256, T=1, criterion="l1")),
        ("zskt", (5, 1, 1e-3, 1, 0, 0), dict(act=0, balance=0, nz=256, T=20, criterion="kl")),
        ("dfq", (10, 1, 1e-3, 1, 1, 1), dict(act=0, balance=20, nz=256, T=20)),
        ("deepinv", (400, 1000, 0.1, 1, 10, 1), dict(T=20)),
        (
            "cmi",
            (400, 200, 1e-3, 0.5, 1, 1),
            dict(T=20, nz=256, cr=0.8, cr_T=0.2, bank_size=40960, n_neg=4096, head_dim=256),
        ),
    ):
        expected = (
            dict(zip(columns, row, strict=False))
            | more
            | dict(lr=0.1, n_epochs=200, warmup=0, ep_steps=400, batch_size=256)
        )
        found = settings("--method", method)
        assert {k: found[k] for k in expected} == expected


class Spy:
    """A synthesizer that only notes what it is asked for."""

    terms = ()

    def __init__(self):
        self.calls, self.resets = [], []

    def synthesize(self, adversarial, tick):
        self.calls.append(adversarial)
        return {}

    def reset(self):
        self.resets.append(len(self.calls))

    def sample(self, n, batch_size):
        return iter(())


@pytest.mark.parametrize(
    ("flags", "first", "reset"), [((), 20, 140), (("--as_published",), 19, 139), (("--epochs", "22"), 2, 14)]
)
def test_when_the_adversary_starts_and_the_generator_is_redrawn(flags, first, reset, monkeypatch):
    args = datafree_kd.parse_args(["--dataset", "cifar10", *flags])
    spy, session = Spy(), Namespace(args=args, student=torch.nn.Linear(1, 1), run=Namespace(tick=None))
    optimizer = torch.optim.SGD(session.student.parameters(), 1.0)
    distilled, rates = [], []
    monkeypatch.setattr(datafree_kd, "distill", lambda *a: distilled.append(len(spy.calls)) or 0.0)
    for epoch in range(args.n_epochs):
        datafree_kd.train_epoch(epoch, session, spy, optimizer, contextlib.nullcontext())
        rates.append(optimizer.param_groups[0]["lr"])
    for epoch, lr in load_reference("losses")["values"]["fast_student_lr"]["values"].items():
        assert args.n_epochs != 220 or rates[int(epoch)] == pytest.approx(lr)
    assert spy.calls.index(True) == first and all(spy.calls[first:])
    assert spy.resets == [reset]
    assert distilled[0] == args.warmup + 1 and len(distilled) == args.n_epochs - args.warmup


def test_reset_draws_scales_around_one_and_as_published_around_zero(tmp_path):
    for as_published, mean in ((False, 1.0), (True, 0.0)):
        generator = get_generator("fast", 8, 32, 3)
        settings = dict.fromkeys(synthesis.Fast.settings, 1) | dict(reset_bn=0, as_published=as_published)
        cpu, plain = Runtime(torch.device("cpu"), "fp32"), Transform((0,), (1,))
        fast = synthesis.Fast(get_model("resnet8"), None, generator, plain, (3, 32, 32), 10, cpu, None, **settings)
        before = {k: v.clone() for k, v in generator.state_dict().items()}
        fast.reset()
        changed = {k for k, v in generator.state_dict().items() if not torch.equal(v, before[k])}
        assert changed == {"l1.0.weight", "l1.0.bias", "conv_blocks.0.weight"}
        assert generator.conv_blocks[0].weight.mean().item() == pytest.approx(mean, abs=0.02)
        assert generator.l1[0].weight.std().item() == pytest.approx(0.02, rel=0.1)


def test_temperature_is_used_and_as_published_it_is_not():
    for method, T in (("zskt", 1), ("dfq", 1), ("dfad", 1), ("fast_meta", 7), ("cmi", 7)):
        flags = ["--dataset", "cifar10", "--method", method, "--T", "7"]
        assert datafree_kd.parse_args(flags).T == 7
        assert datafree_kd.parse_args([*flags, "--as_published"]).T == T


def test_weight_zero_leaves_the_term_out(tmp_path, checkpoints):
    """The published DeepInversion crashes at adv 0, the published CMI at cr 0."""
    for method, weight in (("deepinv", "adv"), ("cmi", "cr"), ("cmi", "bn"), ("fast_meta", "oh")):
        result = start(tmp_path, checkpoints, *flags_of(method), "--n_epochs", "1", f"--{weight}", "0", "--tag", weight)
        assert f"loss_{weight}" not in record(tmp_path, result)[0]


def test_priors_of_deepinversion_are_read(tmp_path, checkpoints):
    result = start(tmp_path, checkpoints, *flags_of("deepinv"), "--n_epochs", "1", "--tv", "0.1", "--l2", "0.01")
    row = record(tmp_path, result)[0]
    assert float(row["loss_tv"]) > 0 and float(row["loss_l2"]) > 0


def test_memory_bank_forgets_its_oldest(tmp_path, checkpoints):
    """The published bank yields NaN in the round in which it is exactly full."""
    result = start(tmp_path, checkpoints, *flags_of("cmi"), "--bank_size", "64", "--n_epochs", "4")
    rows = record(tmp_path, result)
    assert all(np.isfinite(float(r["loss_cr"])) for r in rows)
    folder = tmp_path / result["name"]
    state = checkpoint.read(folder / "last.pt")["run"]["states"]["synthesizer"]["bank"]
    # What a round keeps is not in the checkpoint, but beside it: two banks of 64 rows, of 2 x 336 numbers.
    assert state == {"rows": 4 * 32} and (folder / "bank.f32").stat().st_size == 2 * 64 * 2 * 336 * 4
    assert (folder / "last.pt").stat().st_size < 8e6


def test_teacher_without_batch_norm(tmp_path, checkpoints, refused, capsys):
    flags = ("--teacher", "lenet5", "--out", tmp_path, "--checkpoints", checkpoints)
    assert "no BatchNorm" in refused(datafree_kd, *flags, "--bn", "1")
    assert "no BatchNorm" in refused(datafree_kd, *flags, "--method", "cmi")
    assert "no BatchNorm" in refused(datafree_kd, *flags, "--oh", "0", "--adv", "0")
    small = ("--n_epochs", "1", "--ep_steps", "2", "--g_steps", "1", "--ngf", "8", "--batch_size", "8")
    start(tmp_path, checkpoints, "--teacher", "lenet5", *small)
    assert "the term bn is left out" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["png", "npz"])
def test_exported_images_start_cmi(kind, tmp_path, checkpoints):
    first = start(tmp_path, checkpoints, *flags_of("fast_meta"), "--n_epochs", "2", "--export_images", kind)
    folder = tmp_path / first["name"]
    images = read_raw(folder / "pool.u8", (1, 32, 32))
    assert len(images) == 64 == first["generated_images"]
    if kind == "png":
        files = sorted((folder / "images").iterdir())
        assert len(files) == 64
        assert np.array_equal(np.asarray(Image.open(files[5])), images[5, 0].numpy())
        source = folder / "images"
    else:
        source = folder / "images" / "images.npz"
        with np.load(source) as archive:
            assert np.array_equal(archive["images"][..., 0], images[:, 0].numpy())
    for path in (source, folder):
        start(tmp_path, checkpoints, *flags_of("cmi"), "--n_epochs", "1", "--cmi_init", str(path), "--tag", "init")
        (run,) = tmp_path.glob("*-init")
        begun = read_raw(run / "pool.u8", (1, 32, 32))
        assert len(begun) == 96 and torch.equal(begun[:64], images)
        assert checkpoint.read(run / "last.pt")["run"]["states"]["synthesizer"]["bank"] == {"rows": 96}
        shutil.rmtree(run)
    with pytest.raises(UsageError, match=r"of shape \(1, 32, 32\), not \(1, 16, 16\)"):
        datafree_kd.read_inverted(str(folder), (1, 16, 16))


def test_full_disk_while_exporting_loses_nothing(tmp_path, checkpoints, refused, monkeypatch):
    class Full:
        def save(self, file, kind):
            file.write(b"half an image")
            raise OSError(28, "No space left on device")

    where = ["--save_dir", tmp_path / "pngs", "--out", tmp_path, "--checkpoints", checkpoints]
    flags = [*flags_of("fast_meta"), "--n_epochs", "1", "--export_images", "png", *where]
    with monkeypatch.context() as patch:
        patch.setattr("datafree.pool.to_pil_image", lambda image: Full())
        assert "No space left" in refused(datafree_kd, *flags)
    assert not list((tmp_path / "pngs").iterdir())
    (result,) = tmp_path.glob("*/result.json")
    datafree_kd.main(datafree_kd.parse_args([*flags, "--resume"]))  # exports, trains nothing
    assert len(list((tmp_path / "pngs").iterdir())) == 32
    assert "000000.png: give an empty --save_dir" in refused(datafree_kd, *flags, "--seed", "5")  # before it begins
    (tmp_path / "pngs" / "000032.png").touch()  # of a larger run
    assert "000032.png" in refused(datafree_kd, *flags, "--resume")
    assert len((result.parent / "metrics.csv").read_text().splitlines()) == 2


def test_full_disk_while_the_pool_is_saved(tmp_path, checkpoints, refused, monkeypatch):
    flags = [*flags_of("fast_meta"), "--n_epochs", "4", "--out", str(tmp_path), "--checkpoints", str(checkpoints)]
    flush, calls = ImagePool.flush, []

    def full(self):
        calls.append(1)
        if len(calls) > 2:
            with self.path.open("ab") as file:
                file.write(b"half an image")
            raise OSError(28, "No space left on device", str(self.path))
        flush(self)

    with monkeypatch.context() as patch:
        patch.setattr(ImagePool, "flush", full)
        assert "No space left" in refused(datafree_kd, *flags)
    result = datafree_kd.main(datafree_kd.parse_args([*flags, "--resume"]))
    assert len(read_raw(tmp_path / result["name"] / "pool.u8", (1, 32, 32))) == 128


def test_shortened_pool_file_is_refused(tmp_path, checkpoints, refused):
    flags = [*flags_of("fast_meta"), "--n_epochs", "2", "--out", str(tmp_path), "--checkpoints", str(checkpoints)]
    folder = tmp_path / datafree_kd.main(datafree_kd.parse_args(flags))["name"]
    (folder / "result.json").unlink()
    (folder / "pool.u8").write_bytes((folder / "pool.u8").read_bytes()[:-1024])
    assert "images that the checkpoint counts" in refused(datafree_kd, *flags, "--resume")


@pytest.mark.parametrize("method", ["zskt", "deepinv", "cmi", "fast_meta", "nayer"])
def test_without_any_images(method, tmp_path, checkpoints, monkeypatch):
    """The score is the agreement with the teacher on images that the student never learns from."""
    score, scores, shares = metrics.agreement_beyond_chance, [], []

    def looked_at(student, teacher, num_classes, batches, runtime):
        batches = list(batches)
        shares.append(metrics.agreement(student, teacher, batches, runtime))
        scores.append(score(student, teacher, num_classes, batches, runtime))
        return scores[-1]

    monkeypatch.setattr(metrics, "agreement_beyond_chance", looked_at)
    flags = ("--dataset", "none", "--teacher_ckpt", checkpoints / "digits-resnet8-digits.pt", "--n_epochs", "2")
    result = start(tmp_path, checkpoints, *flags_of(method), *flags)
    assert result["score"] == "agreement" and result["best"] == max(scores) and result["test_images"] == 0
    assert all(0 <= score <= share <= 100 for score, share in zip(scores, shares, strict=True)) and max(shares) > 0
    if method != "zskt":
        batches = 4 if method == "nayer" else 2
        assert result["generated_images"] == batches * 32  # those that score it are not among them


@pytest.mark.parametrize("more", [(), ("--as_published",)])
def test_a_warm_up_without_a_term_makes_nothing(more, tmp_path, checkpoints, monkeypatch):
    """And the progress bar, which counts updates, ends with the run."""
    bars, progress = [], Run.progress
    monkeypatch.setattr(Run, "progress", lambda run, *a: bars.append(run) or progress(run, *a))
    result = start(tmp_path, checkpoints, *flags_of("zskt"), "--n_epochs", "2", "--warmup", "1", *more)
    first, second = record(tmp_path, result)
    assert float(first["loss_kd"]) == 0 < float(second["loss_kd"])
    if not more:
        assert float(first["loss_adv"]) == 0 > float(second["loss_adv"])
    assert bars[0].done == bars[0].iterations


def test_a_method_of_ones_own_is_a_choice(tmp_path, checkpoints):
    class Brighter(Generative):
        """Images that tend to white."""

        terms = (*Generative.terms, "bright")
        settings = (*Generative.settings, "bright")

        def step(self, z, adversarial):
            return super().step(z, adversarial) | {"loss_bright": -self.generator(z).mean()}

    recipe = METHODS["dafl"].recipe | dict(bright=1.0)
    try:
        synthesis.register("brighter", Method(Brighter, recipe), {"bright": "weight of the brightness"})
        flags = [f for f in flags_of("zskt") if f != "zskt"]
        flags.insert(1, "brighter")
        result = start(tmp_path, checkpoints, *flags, "--n_epochs", "1", "--bright", "2")
    finally:
        del METHODS["brighter"], synthesis.FLAGS["bright"]
    assert result["name"].count("-brighter-") == 1 and result["args"]["bright"] == 2
    assert float(record(tmp_path, result)[0]["loss_bright"]) < 0


def test_runs_are_named_after_what_they_were_told():
    def name(*flags):
        return datafree_kd.parse_args(["--dataset", "cifar10", *flags]).run_name

    assert name() == name("--g_steps", "10") == "datafree_kd-cifar10-wrn40_2-wrn16_1-fast_meta10"
    assert name("--g_steps", "5").endswith("-fast_meta5") and name("--method", "cmi").endswith("-cmi")
    assert name("--method", "deepinv", "--g_steps", "2000").endswith("-deepinv-g_steps2000")


def test_what_ends_in_one_line(tmp_path, checkpoints, refused):
    blocked = tmp_path / "file"
    blocked.write_text("in the way")
    empty = tmp_path / "empty"
    empty.mkdir()
    other = tmp_path / "classes.pt"
    checkpoint.save({"state_dict": get_model("lenet5_half", 7).state_dict()}, other)
    where = ("--out", tmp_path, "--checkpoints", checkpoints)
    cmi = ("--method", "cmi", "--teacher", "resnet8")
    np.savez(tmp_path / "wrong.npz", images=np.zeros((4, 28, 28, 1), np.uint8))
    for flags, words in (
        (("--g_steps", "0"), "0 is impossible"),
        (("--method", "dafl", "--cr", "1"), "--cr is not a setting of dafl"),
        (("--method", "deepinv", "--nz", "4"), "--nz is not a setting of deepinv"),
        (("--method", "dafl", "--oh", "0", "--act", "0", "--balance", "0"), "are all 0"),
        (("--is_maml", "2"), "invalid choice"),
        (("--epochs", "3", "--warmup", "3"), "leaves none of 3 epochs"),
        (("--kd_steps", "50", "--ep_steps", "40"), "does not fit"),
        (("--method", "dafl", "--export_images", "png"), "keeps no images"),
        (("--cmi_init", empty), "is for --method cmi"),
        ((*cmi, "--cmi_init", empty), "no images below"),
        ((*cmi, "--dataset", "none", "--bn", "0", "--oh", "0", "--adv", "0"), "made without --cr"),
        (("--method", "cmi", "--teacher", "lenet5", "--bn", "0", "--feature_layers", "blocks"), "has no stages"),
        ((*cmi, "--cmi_init", tmp_path / "none.npz"), "none.npz"),
        ((*cmi, "--cmi_init", tmp_path / "wrong.npz"), "not uint8 of (1, 32, 32)"),
        (("--save_dir", blocked / "images"), "--save_dir"),
        (("--evaluate_only", "--ckpt", other), "7 classes"),
    ):
        assert words in refused(datafree_kd, *where, *flags), flags
    assert not list(tmp_path.glob("datafree_kd-*"))


@pytest.mark.parametrize("script", sorted(p.name for p in (ROOT / "scripts").glob("*_cifar.sh")))
def test_scripts_of_the_tables_explain_themselves(script):
    path = ROOT / "scripts" / script
    end = subprocess.run(["bash", path, "--help"], capture_output=True, text=True)
    assert end.returncode == 0 and "wrn40_2-wrn16_1" in end.stdout and not end.stderr
    end = subprocess.run(["bash", path, "cifar11"], capture_output=True, text=True)
    assert end.returncode == 2 and end.stderr.count("\n") == 1 and "cifar11" in end.stderr
