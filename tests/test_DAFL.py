"""DAFL's joint step agrees with two steps of the published code, and its settings hold."""

from argparse import Namespace
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from reference_fill import fill, load_reference

import DAFL_train
from datafree.runtime import lr_at, make_optimizer
from models import get_generator, get_model, set_folded

REFERENCE = load_reference("dynamics")["values"]["dafl_original/mnist"]


def check(tensors, expected, rel=1e-7):
    flat = torch.cat([t.flatten() for t in tensors])
    assert flat.norm().item() == pytest.approx(expected["l2"], rel=rel, abs=1e-9)
    assert flat.sum().item() == pytest.approx(expected["sum"], rel=rel, abs=1e-6)


@pytest.mark.parametrize("folded", [True, False])
def test_joint_step(folded):
    settings = REFERENCE["settings"]
    teacher = fill(get_model("lenet5").double()).eval().requires_grad_(False)
    student = fill(get_model("lenet5_half").double()).train()
    generator = fill(get_generator("dafl", settings["latent"], 32, 1).double()).train()
    set_folded(generator, folded)
    optimizer_G = make_optimizer("adam", generator.parameters(), settings["lr_generator"])
    optimizer_S = make_optimizer("adam", student.parameters(), settings["lr_student"])
    weights = Namespace(oh=settings["oh"], ie=settings["ie"], a=settings["a"], ie_log="10", T=1.0)
    for expected in REFERENCE["steps"]:
        n = np.random.RandomState(expected["latent_seed"])
        z = torch.tensor(n.standard_normal((settings["batch"], settings["latent"])))
        losses = DAFL_train.distill_step(z, generator, teacher, student, optimizer_G, optimizer_S, weights, nullcontext)
        for ours, theirs in (
            ("loss_oh", "loss_one_hot"),
            ("loss_ie", "loss_information_entropy"),
            ("loss_a", "loss_activation"),
            ("loss_kd", "loss_kd"),
        ):
            assert losses[ours].item() == pytest.approx(expected[theirs], rel=1e-7)
        total = losses["loss_G"] + losses["loss_kd"]
        assert total.item() == pytest.approx(expected["total"], rel=1e-7)
        for module, name in ((generator, "generator"), (student, "student")):
            check(module.parameters(), expected[f"{name}_parameters_after"])
            for key, values in expected.get(f"{name}_per_parameter_after", {}).items():
                # A bias in front of a batch norm has no gradient but rounding, which Adam blows
                # up: the reference allows those sums 1e-6.
                check([module.get_parameter(key)], values, rel=1e-6)
        statistics = expected["generator_running_statistics_after"]
        for kind in ("mean", "var"):
            check(
                [v for k, v in generator.state_dict().items() if k.endswith(f"running_{kind}")],
                {k: statistics[f"running_{kind}_{k}"] for k in ("sum", "l2")},
            )


def test_published_presets():
    def settings(*argv):
        args = DAFL_train.parse_args(argv)
        return (
            args.teacher,
            args.student,
            args.batch_size,
            args.n_epochs,
            args.lr_G,
            args.lr_S,
            args.nz,
            args.oh,
            args.ie,
            args.a,
        )

    assert settings("--dataset", "mnist") == ("lenet5", "lenet5_half", 512, 200, 0.2, 2e-3, 100, 1, 5, 0.1)
    assert settings("--dataset", "cifar10") == ("resnet34", "resnet18", 1024, 2000, 0.02, 0.1, 1000, 0.05, 5, 0.01)
    assert settings("--dataset", "cifar100")[-3:] == (0.5, 20, 0.1)
    assert settings("--dataset", "celeba")[4:] == (2e-3, 2e-4, 100, 2, 5, 0.1)
    assert settings("--dataset", "mnist", "--teacher", "hintonnet", "--student", "hintonnet_half", "--nz", "7")[-4] == 7
    assert (
        DAFL_train.parse_args(["--dataset", "mnist", "--teacher", "hintonnet", "--student", "hintonnet_half"]).img_size
        == 28
    )
    mmrazor = DAFL_train.parse_args(["--dataset", "cifar10", "--variant", "mmrazor"])
    assert (
        mmrazor.T,
        mmrazor.optimizer_S,
        mmrazor.lr_S,
        mmrazor.optimizer_G,
        mmrazor.lr_G,
        mmrazor.warmup,
        mmrazor.n_epochs,
        mmrazor.iterations,
        mmrazor.batch_size,
    ) == (6, "adamw", 0.1, "adamw", 1e-3, 500, 200, 150, 2048)


def test_milestones_scale_with_the_epochs():
    reference = load_reference("losses")["values"]
    for n_epochs in (2000, 20):
        rates = [lr_at(e, 0.1, n_epochs, DAFL_train.CIFAR10["milestones"]) for e in range(n_epochs)]
        falls = [e for e in range(1, n_epochs) if rates[e] < rates[e - 1]]
        assert falls == [n_epochs * 2 // 5, n_epochs * 4 // 5]
    for epoch, lr in reference["dafl_schedule"].items():
        assert lr_at(int(epoch), 0.1, 2000, [0.4, 0.8]) == pytest.approx(lr)


def test_warmup_rises_linearly(monkeypatch):
    seen = []
    monkeypatch.setattr(
        DAFL_train,
        "distill_step",
        lambda *a: (
            seen.append((a[4].param_groups[0]["lr"], a[5].param_groups[0]["lr"])) or {"loss_kd": torch.zeros(())}
        ),
    )
    net = torch.nn.Linear(1, 1)
    args = DAFL_train.parse_args(["--variant", "mmrazor", "--warmup", "4", "--iterations", "3"])
    runtime = Namespace(device=torch.device("cpu"), autocast=nullcontext)
    s = Namespace(args=args, runtime=runtime, student=net, teacher=net, run=Namespace(tick=lambda loss: None))
    generator = get_generator("dafl", 2, 8, 1)
    optimizers = [make_optimizer("adamw", net.parameters(), 1.0) for _ in range(2)]
    for epoch in range(2):
        DAFL_train.train_epoch(epoch, s, generator, *optimizers)
    rise = torch.tensor([1e-4, (1 + 2e-4) / 3, (2 + 1e-4) / 3, 1, 1, 1]).tolist()
    assert [s for _, s in seen] == pytest.approx([0.1 * f for f in rise])
    assert [g for g, _ in seen] == pytest.approx([1e-3 * f for f in rise])
