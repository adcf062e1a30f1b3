"""MMRazor's DAFL, DFAD and ZSKT agree with steps of the published code."""

import copy
import csv
import functools
from contextlib import nullcontext

import pytest
import torch
from reference_fill import fill, load_reference, noise
from test_models import fill_as

import DAFL_train
import DFAD_cifar
import ZSKT_train
from datafree.losses import activation_loss, attention_loss, information_entropy_loss, kd_loss, l1_loss, one_hot_loss
from datafree.runtime import lr_at, make_optimizer
from models import get_generator, get_model

REFERENCE = load_reference("mmrazor")
VALUES, LOSSES = REFERENCE["values"], REFERENCE["losses"]
S, T, F, S_MAP, T_MAP = "student_logits", "teacher_logits", "teacher_features", "student_map", "teacher_map"
# Entry: inputs, and the loss of them. The published code divides KL by the classes as well where it says "mean".
ENTRIES = {
    "kl_tau6_batchmean_weight1 (DAFL student)": (S, T, lambda s, t: kd_loss(s, t.detach(), 6.0)),
    "kl_tau1_mean_weight2 (ZSKT student)": (S, T, lambda s, t: 2 * kd_loss(s, t.detach()) / 10),
    "kl_tau1_mean_weight-2_teacher_not_detached (ZSKT generator)": (S, T, lambda s, t: -2 * kd_loss(s, t) / 10),
    "l1_weight1 (DFAD student)": (S, T, l1_loss),
    "l1_weight-1 (DFAD generator)": (S, T, lambda s, t: -l1_loss(s, t)),
    "one_hot_weight0.05": (T, lambda t: 0.05 * one_hot_loss(t)),
    "information_entropy_weight5": (T, lambda t: 5 * information_entropy_loss(t)),
    "activation_abs_weight0.01": (F, lambda f: 0.01 * activation_loss(f)),
    "attention_weight250": (S_MAP, T_MAP, lambda s, t: 250 * attention_loss(s, t)),
}


def close(actual, expected, rel=1e-7):
    assert float(torch.as_tensor(actual).detach()) == pytest.approx(expected, rel=rel, abs=1e-9)


@pytest.mark.parametrize("entry", ENTRIES)
def test_loss(entry):
    *inputs, loss = ENTRIES[entry]
    expected = LOSSES["values"][entry]
    given = [LOSSES["inputs"][name] for name in inputs]
    tensors = [(noise(i["shape"], i["seed"]) * i["scale"]).requires_grad_() for i in given]
    value = loss(*tensors)
    close(value, expected["value"])
    gradients = torch.autograd.grad(value, tensors, allow_unused=True)
    for gradient, norm in zip(gradients, expected["gradient_l2"], strict=True):
        close(0 if gradient is None else gradient.norm(), norm)


@functools.cache
def filled(name):
    """A classifier with the reference's weights, to be copied where it is changed."""
    return fill(get_model(name)).requires_grad_(False)


def networks(case):
    """Generator, teacher and student of a case, in the modes that the procedures name, and its optimisers."""
    settings = case["settings"]
    published = REFERENCE["architectures"][settings["generator"]]["state_dict"]
    name = {"DAFLGenerator_latent1000": "dafl", "DAFLGenerator_latent256_eps1e-5": "generator_a"}.get(
        settings["generator"].removeprefix("mmrazor/"), "zskt"
    )
    generator = fill_as(get_generator(name, settings["latent_size"]), published).train()
    teacher, student = filled("resnet34"), copy.deepcopy(filled("resnet18")).requires_grad_().train()
    rates = case["iterations"][0]["learning_rates"]
    optimizers = {}
    for network, role in ((generator, "generator"), (student, "student")):
        kind = settings[f"{role}_optimiser"].split(",")[0].lower()
        decay = 5e-4 if kind == "sgd" else None
        optimizers[role] = make_optimizer(kind, network.parameters(), rates[role], decay)
    return generator, teacher, student, optimizers["generator"], optimizers["student"], published


def test_schedules():
    """Both sides' optimisers, and their rates at the iterations that the reference names."""

    def dafl(step, args):
        return DAFL_train.rates_at(step, args)

    def dfad(step, args):
        return [lr * DFAD_cifar.lr_fall(step // args.epoch_itrs, args) for lr in (args.lr_G, args.lr_S)]

    def zskt(step, args):
        return [lr_at(step // args.epoch_itrs, lr, args.n_epochs, args.milestones) for lr in (args.lr_G, args.lr_S)]

    mmrazor = ["--dataset", "cifar10", "--variant", "mmrazor"]
    for method, rates, args in (
        ("dafl", dafl, DAFL_train.parse_args([*mmrazor, "--as_published"])),
        ("dfad", dfad, DFAD_cifar.parse_args(mmrazor)),
        ("zskt", zskt, ZSKT_train.parse_args(mmrazor[:2])),
    ):
        expected = REFERENCE["schedules"][method]
        for step in map(int, expected["student"]["lr_at_iteration"]):
            for role, rate in zip(("generator", "student"), rates(step, args), strict=True):
                close(rate, expected[role]["lr_at_iteration"][str(step)])
        assert expected["student"]["weight_decay"] == args.weight_decay
        for role, flag in (("generator", "optimizer_G"), ("student", "optimizer_S")):
            if flag in args:
                assert expected[role]["optimiser"].lower() == getattr(args, flag)
    args = DAFL_train.parse_args(mmrazor)
    rates = [dafl(step, args)[1] for step in range(30_000)]
    assert [i for i in range(1, 30_000) if rates[i] < rates[i - 1]] == [12_000, 24_000]


def check_networks(expected, generator, student, forwards=1):
    """Parameters and running statistics; `forwards`: how often the student saw each batch there, for once here."""
    for network, role in ((generator, "generator"), (student, "student")):
        check(network.parameters(), expected[f"{role}_parameters_after"])
        statistics, state = expected[f"{role}_running_statistics_after"], network.state_dict()
        for kind in ("mean", "var"):
            tensors = [v for k, v in state.items() if k.endswith(f"running_{kind}")]
            check(tensors, {k: statistics[f"running_{kind}_{k}"] for k in ("sum", "l2")})
        passes = sum(v.item() for k, v in state.items() if k.endswith("num_batches_tracked"))
        assert passes * (forwards if network is student else 1) == statistics["num_batches_tracked_total"]


def check(tensors, expected, rel=1e-7):
    flat = torch.cat([t.detach().flatten() for t in tensors])
    close(flat.norm(), expected["l2"], rel)
    assert flat.sum().item() == pytest.approx(expected["sum"], rel=rel, abs=1e-5)


def check_gradient(student, norm):
    """What a generator step left in the student, None for nothing."""
    left = [p.grad.flatten() for p in student.parameters() if p.grad is not None]
    if norm is None:
        assert not left
    else:
        close(torch.cat(left).norm(), norm)
    assert all(p.requires_grad for p in student.parameters())


def check_parameters(case, generator, student, published):
    """The parameters at the end, one by one."""
    names = dict(zip((name for name, _ in published), generator.state_dict(), strict=True))
    for name, values in case["generator_per_parameter_after"].items():
        # A bias before a BatchNorm has only rounding for a gradient, which Adam blows up.
        check([generator.get_parameter(names[name])], values, rel=1e-6)
    for name, values in case["student_per_parameter_after"].items():
        check([student.get_parameter(name)], values)


@pytest.mark.parametrize("forwards", [1, 2])
def test_dafl(forwards):
    """Procedure R1."""
    case = VALUES["mmrazor_dafl/constant_rates" + ",one_student_forward" * (forwards == 1)]
    assert case["settings"]["student_forwards_per_iteration"] == forwards
    generator, teacher, student, optimizer_G, optimizer_S, published = networks(case)
    args = DAFL_train.parse_args(["--dataset", "cifar10", "--variant", "mmrazor"])
    if forwards == 2:
        DAFL_train.move_statistics_twice(student)
    for expected in case["iterations"]:
        z = noise((8, 1000), expected["latent_seed"])
        losses = DAFL_train.distill_step(z, generator, teacher, student, optimizer_G, optimizer_S, args, nullcontext)
        theirs = expected["generator_losses"]
        close(losses["loss_G"], theirs["loss"])
        for name, weight, published_name in (
            ("oh", args.oh, "loss_oh"),
            ("ie", args.ie, "loss_ie"),
            ("a", args.a, "loss_ac"),
        ):
            close(weight * losses[f"loss_{name}"], theirs[published_name])
        close(losses["loss_kd"], expected["student_losses"]["loss_kl"])
        check_networks(expected, generator, student, forwards)
    check_parameters(case, generator, student, published)


@pytest.mark.parametrize("keep", [True, False])
def test_dfad(keep):
    """Procedure R2."""
    case = VALUES["mmrazor_dfad/" + ("published" if keep else "student_gradient_cleared")]
    *trio, optimizer_G, optimizer_S, published = networks(case)
    generator, _, student = trio
    for expected in case["iterations"]:
        for step in expected["steps"]:
            z = noise((4, 256), step["latent_seed"])
            if step["step"] == "student":
                loss = DFAD_cifar.student_step(z, *trio, optimizer_S, nullcontext)
            else:
                loss = DFAD_cifar.generator_step(z, *trio, optimizer_G, nullcontext, keep_student_gradient=keep)
                check_gradient(student, step["student_gradient_left_l2"] if keep else None)
            close(loss, step["loss"])
        check_networks(expected, generator, student)
    check_parameters(case, generator, student, published)


@pytest.mark.parametrize("keep", [True, False])
def test_zskt(keep):
    """Procedure R3."""
    case = VALUES["mmrazor_zskt/" + ("published" if keep else "student_gradient_cleared")]
    *trio, optimizer_G, optimizer_S, published = networks(case)
    generator, _, student = trio
    args = ZSKT_train.parse_args(["--dataset", "cifar10"] + ["--keep_student_gradient"] * keep)
    for expected in case["iterations"]:
        for step in expected["steps"]:
            z = noise((4, 256), step["latent_seed"])
            if step["step"] == "generator":
                loss = ZSKT_train.generator_step(z, *trio, optimizer_G, args, nullcontext)
                close(loss, step["loss"])
                check_gradient(student, step["student_gradient_left_l2"] if keep else None)
            else:
                losses = ZSKT_train.student_step(z, *trio, optimizer_S, args, nullcontext)
                close(losses["loss_S"], step["loss"])
                close(losses["loss_kl"], step["loss_kl"])
                for i in range(1, 5):
                    close(losses[f"loss_at{i}"], step[f"loss_s{i}"])
        check_networks(expected, generator, student)
    check_parameters(case, generator, student, published)


@pytest.mark.parametrize("step", ["DFAD", "ZSKT"])
def test_a_kept_gradient_is_a_copy(step):
    """A compiled network's lies where its next backward pass writes."""
    *trio, optimizer_G, _, _ = networks(VALUES["mmrazor_zskt/published"])
    given, z = [], noise((4, 256), 0)
    for p in trio[2].parameters():
        p.register_post_accumulate_grad_hook(lambda p: given.append(p.grad))
    if step == "DFAD":
        DFAD_cifar.generator_step(z, *trio, optimizer_G, nullcontext, keep_student_gradient=True)
    else:
        args = ZSKT_train.parse_args(["--dataset", "cifar10", "--keep_student_gradient"])
        ZSKT_train.generator_step(z, *trio, optimizer_G, args, nullcontext)
    kept = {p.grad.data_ptr() for p in trio[2].parameters()}
    assert given and kept.isdisjoint(g.data_ptr() for g in given)


def test_attention_end_to_end(checkpoints, tmp_path, refused):
    """A run with it; networks without stages, or with other ones, are refused before the first epoch."""
    where = ("--dataset", "digits", "--at", "250", "--checkpoints", str(checkpoints), "--out", str(tmp_path))
    few = ("--n_epochs", "1", "--epoch_itrs", "1", "--k", "2", "--batch_size", "4", "--nz", "4")
    pair = ("--teacher", "resnet8", "--student")
    result = ZSKT_train.main(ZSKT_train.parse_args([*where, *few, *pair, "resnet20"]))
    assert result["generated_images"] == 12
    (row,) = csv.DictReader((tmp_path / result["name"] / "metrics.csv").open())
    parts = [float(row[k]) for k in ("loss_kl", "loss_at1", "loss_at2", "loss_at3")]
    assert min(parts) > 0 and sum(parts) == pytest.approx(float(row["loss_S"]), rel=1e-5)
    assert "no pixels" in refused(ZSKT_train, *where)
    assert "[32, 16, 8, 4]" in refused(ZSKT_train, *where, *pair, "resnet18")
