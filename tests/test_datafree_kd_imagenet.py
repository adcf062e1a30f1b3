"""datafree_kd_imagenet.py: a run on the digits, Reptile by hand, and what ends in one line."""

import csv
import math
from argparse import Namespace
from contextlib import nullcontext

import pytest
import torch
from reference_fill import fill, noise

import datafree_kd_imagenet
from datafree import checkpoint
from datafree.augment import Transform
from datafree.pool import ImagePool, read_raw
from datafree.synthesis import FastLatents
from models import get_generator, get_model

TEACHER = "digits-resnet8-digits.pt"
# fmt: off
TINY = ("--dataset", "digits", "--teacher", "resnet8", "--student", "resnet8", "--batch_size", "16",
        "--synthesis_batch_size", "16", "--n_epochs", "2", "--ep_steps", "5", "--kd_steps", "2", "--g_steps", "2",
        "--nz", "8", "--ngf", "8", "--lr", "0.01", "--phase1_rounds", "3", "--z_rounds", "2")
# fmt: on


def start(out, checkpoints, *flags):
    args = datafree_kd_imagenet.parse_args([*TINY, *flags, "--out", out, "--checkpoints", checkpoints])
    return datafree_kd_imagenet.main(args)


def test_a_run_on_the_digits(tmp_path, checkpoints):
    result = start(tmp_path, checkpoints)
    folder = tmp_path / result["name"]
    with (folder / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    names = ["loss_bn", "loss_oh", "loss_adv", "loss_kd"]
    assert [k for k in rows[0] if k.startswith("loss_")] == names
    assert all(math.isfinite(float(row[k])) for row in rows for k in names)
    # The first phase, then two whole rounds in each of two epochs.
    assert result["generated_images"] == 16 * (3 + 2 * 2)
    images = read_raw(folder / "pool.u8", (1, 32, 32))
    assert len(images) == 16 * 7 and images.min() < images.max()
    assert 0 < result["synthesis_seconds"] < result["seconds"]
    state = checkpoint.read(folder / "last.pt")["run"]["states"]["synthesizer"]
    assert state["rounds"] == 7 and state["z"].shape == (16, 8, 2, 2)
    assert all(s["step"] == 7 for s in state["meta_optimizer"]["state"].values())
    assert state["z_optimizer"]["state"][0]["step"] == 1  # drawn anew in the seventh round


def test_without_any_images(tmp_path, checkpoints):
    result = start(
        tmp_path, checkpoints, "--dataset", "none", "--teacher_ckpt", checkpoints / TEACHER, "--is_maml", "1"
    )
    assert result["score"] == "agreement" and 0 <= result["last"] <= 100 and result["test_images"] == 0


def test_first_phase_has_no_adversary(tmp_path, checkpoints, monkeypatch):
    calls, synthesize = [], FastLatents.synthesize

    def noted(self, adversarial, tick):
        assert not self.student.training
        calls.append(adversarial)
        return synthesize(self, adversarial, tick)

    monkeypatch.setattr(FastLatents, "synthesize", noted)
    start(tmp_path, checkpoints, "--bn", "0", "--adv", "0")
    assert calls == [False] * 3 + [True] * 4
    (result,) = tmp_path.glob("*/result.json")
    result.unlink()
    start(tmp_path, checkpoints, "--bn", "0", "--adv", "0", "--resume")
    assert len(calls) == 7  # the first phase is not made again


def test_first_phase_goes_on_where_it_stopped(tmp_path, checkpoints, monkeypatch):
    monkeypatch.setattr(datafree_kd_imagenet, "SAVE_ROUNDS", 2)
    flags = ("--phase1_rounds", "5", "--n_epochs", "1")
    whole = tmp_path / start(tmp_path, checkpoints, *flags)["name"]
    calls, synthesize = [], FastLatents.synthesize

    def stopped(self, adversarial, tick):
        calls.append(adversarial)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return synthesize(self, adversarial, tick)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(FastLatents, "synthesize", stopped)
        start(tmp_path, checkpoints, *flags, "--tag", "stopped")
    folder = tmp_path / start(tmp_path, checkpoints, *flags, "--tag", "stopped", "--resume")["name"]
    assert "before the end of what precedes" in (folder / "log.txt").read_text()
    assert (whole / "pool.u8").read_bytes() == (folder / "pool.u8").read_bytes()
    a, b = (checkpoint.read(path / "best.pt")["state_dict"] for path in (whole, folder))
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_published_settings():
    # fmt: off
    shared = dict(synthesis_batch_size=100, batch_size=100, g_steps=50, lr_g=2e-4, lr_z=0.01, meta_lr_g=1e-4,
                  meta_lr_z=5e-3, z_rounds=50, bn=0.1, oh=0.1, T=5, n_epochs=400, ep_steps=1000, kd_steps=100, lr=0.1,
                  weight_decay=1e-4, reptile_factor=1, is_maml=0, bn_mmt=0.9, phase1_rounds=1400,
                  teacher="resnet50_imagenet", dataset="imagenet")
    # fmt: on
    for student, adv in (("resnet18_imagenet", 1.0), ("resnet50_imagenet", 0.1), ("mobilenetv2", 0.1)):
        found = vars(datafree_kd_imagenet.parse_args(["--student", student]))
        assert {k: found[k] for k in shared} == shared and found["adv"] == adv


def adam_step(p, gradient, state, lr, betas=(0.5, 0.999)):
    """One step of Adam by its formula; `state` is [m, v, t]."""
    state[0] = betas[0] * state[0] + (1 - betas[0]) * gradient
    state[1] = betas[1] * state[1] + (1 - betas[1]) * gradient**2
    state[2] += 1
    m, v = (s / (1 - b ** state[2]) for s, b in zip(state, betas, strict=False))
    return p - lr * m / (v.sqrt() + 1e-8)


@pytest.mark.parametrize("factor", [1.0, 67.0])
def test_reptile_by_hand(factor, tmp_path):
    """Two rounds of two inner steps against the formulas, in float64; then z is drawn anew."""
    runtime = Namespace(device=torch.device("cpu"), autocast=nullcontext)
    teacher = fill(get_model("wrn16_1")).requires_grad_(False)
    student = fill(get_model("resnet8")).requires_grad_(False)
    generator = fill(get_generator("deep", 4, 32, 3, ngf=4)).train()
    transform = Transform((0.5,) * 3, (0.25,) * 3)  # no augmentation
    # fmt: off
    settings = dict(synthesis_batch_size=4, g_steps=2, lr_g=1e-3, lr_z=0.02, meta_lr_g=3e-3, meta_lr_z=7e-3,
                    z_rounds=2, reptile_factor=factor, is_maml=0, bn_mmt=0.0, bn=0.1, oh=0.5, adv=0.0)
    # fmt: on
    pool = ImagePool((3, 32, 32), "cpu", tmp_path / "pool.u8")
    family = FastLatents(teacher, student, generator, transform, (3, 32, 32), 10, runtime, pool, **settings)
    drawn = iter([noise((4, 4, 2, 2), 1), noise((4, 4, 2, 2), 2)])
    family.latents = lambda: next(drawn)
    family.targets = lambda: torch.arange(4)
    added = []
    pool.add = added.append

    # The same by hand; `probe` lends its computation.
    probe = fill(get_generator("deep", 4, 32, 3, ngf=4)).train()
    names = [k for k, p in probe.named_parameters() if p.requires_grad]
    common = {k: probe.get_parameter(k).detach().clone() for k in names}
    common["z"] = noise((4, 4, 2, 2), 1)
    meta_rates = {k: 7e-3 if k == "z" else 3e-3 for k in common}
    rates = {k: 0.02 if k == "z" else 1e-3 for k in common}
    meta_states = {k: [0, 0, 0] for k in common}
    for _ in range(2):
        inner = {k: v.clone().requires_grad_() for k, v in common.items()}
        inner_states, seen = {k: [0, 0, 0] for k in common}, []
        for _ in range(2):
            weights = {k: inner[k] for k in names}
            images = torch.func.functional_call(probe, weights, (inner["z"],))
            losses = family.inversion_losses(transform.normalize(images), torch.arange(4), False)
            loss = 0.1 * losses["loss_bn"] + 0.5 * losses["loss_oh"]
            seen.append((loss.item(), images.detach()))
            gradients = dict(zip(inner, torch.autograd.grad(loss, inner.values()), strict=True))
            inner = {
                k: adam_step(v, gradients[k], inner_states[k], rates[k]).detach().requires_grad_()
                for k, v in inner.items()
            }
        for k, v in common.items():
            gradient = factor * (v - inner[k].detach())
            assert gradient.abs().max() > 0
            common[k] = adam_step(v, gradient, meta_states[k], meta_rates[k])
        before = family.z.clone() if family.rounds else noise((4, 4, 2, 2), 1)
        family.synthesize(False, lambda loss: None)
        assert torch.allclose(added[-1], min(seen, key=lambda pair: pair[0])[1], rtol=1e-9)
        assert torch.allclose(family.z, common["z"], rtol=1e-9)
        assert (family.z - before).abs().max() > 1e-3  # in the published code it is 0
        for k in names:
            assert torch.allclose(generator.get_parameter(k), common[k], rtol=1e-7, atol=1e-9), k
    family.synthesize(False, lambda loss: None)
    assert (family.z - noise((4, 4, 2, 2), 2)).abs().max() < 0.02
    assert family.z_optimizer.state[family.z]["step"] == 1


def test_what_ends_in_one_line(tmp_path, checkpoints, refused):
    where = ("--out", tmp_path / "runs", "--checkpoints", checkpoints)
    bare = tmp_path / "bare.pt"
    checkpoint.save(get_model("resnet8", channels=1).state_dict(), bare)
    digits = ("--dataset", "digits", "--teacher", "resnet8", "--student", "resnet8", *where)
    for flags, words in (
        (("--bn", "0", "--oh", "0"), "in the first phase"),
        (("--bn", "0", "--oh", "0", "--adv", "0", "--phase1_rounds", "0"), "both 0"),
        (("--g_steps", "0"), "0 is impossible"),
        (("--phase1_rounds", "-1"), "-1 is impossible"),
        (("--kd_steps", "50", "--ep_steps", "40"), "does not fit"),
        (("--student", "resnet999"), "invalid choice"),
        ((*digits, "--teacher_ckpt", bare, "--img_size", "40"), "multiple of 16"),
        ((*digits, "--teacher", "lenet5"), "lenet5 has no BatchNorm layers"),
        ((*digits, "--checkpoints", tmp_path / "none"), "--dataset digits --model resnet8 --recipe digits`"),
        (where, "--dataset imagenet --model resnet50_imagenet --pretrained`"),
    ):
        assert words in refused(datafree_kd_imagenet, *flags), flags
    assert not (tmp_path / "runs").exists()
