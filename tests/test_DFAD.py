"""DFAD's game agrees with two iterations of the published code, and its settings hold."""

from argparse import Namespace
from contextlib import nullcontext

import pytest
import torch
from reference_fill import fill, load_reference, noise

import DFAD_caltech101
import DFAD_cifar
import DFAD_mnist
import DFAD_nyu_deeplab
from datafree.runtime import make_optimizer
from models import get_generator, get_model, set_folded

REFERENCE = load_reference("dynamics")["values"]["dfad_original/mnist"]
LOSSES = load_reference("losses")["values"]


def check(tensors, expected, rel=1e-7):
    flat = torch.cat([t.detach().flatten() for t in tensors])
    assert flat.norm().item() == pytest.approx(expected["l2"], rel=rel, abs=1e-9)
    assert flat.sum().item() == pytest.approx(expected["sum"], rel=rel, abs=1e-6)


@pytest.mark.parametrize("folded", [True, False])
def test_iterations(folded):
    teacher = fill(get_model("lenet5")).requires_grad_(False)
    student = fill(get_model("lenet5_half")).train()
    generator = fill(get_generator("generator_a", 100, 32, 1)).train()
    set_folded(generator, folded)
    optimizer_S = make_optimizer("sgd", student.parameters(), 0.01, 1e-4)
    optimizer_G = make_optimizer("adam", generator.parameters(), 1e-3)
    for seed, expected in enumerate(REFERENCE["losses_in_order"], 1):
        z = noise((8, 100, 1, 1), seed)
        networks = generator, teacher, student
        if "loss_S" in expected:
            loss = DFAD_cifar.student_step(z, *networks, optimizer_S, nullcontext)
        else:
            loss = DFAD_cifar.generator_step(z, *networks, optimizer_G, nullcontext)
        assert loss.item() == pytest.approx(*expected.values(), rel=1e-7)
    check(student.parameters(), REFERENCE["student_parameters_after"])
    check(generator.parameters(), REFERENCE["generator_parameters_after"])
    for name, values in REFERENCE["generator_per_parameter_after"].items():
        # A bias before a BatchNorm has only rounding for a gradient, which Adam blows up.
        check([generator.get_parameter(name)], values, rel=1e-6)
    statistics = REFERENCE["generator_running_statistics_after"]
    for kind in ("mean", "var"):
        check(
            [v for k, v in generator.state_dict().items() if k.endswith(f"running_{kind}")],
            {k: statistics[f"running_{kind}_{k}"] for k in ("sum", "l2")},
        )
    assert all(p.requires_grad for p in student.parameters())


@pytest.mark.parametrize("case", [k for k in LOSSES if k.startswith("dfad_adversarial/")])
def test_generator_for_segmentation_maximises_the_logarithm(case):
    values = LOSSES[case]
    inputs = values["inputs"]
    s, t = (
        noise(inputs[f"{k}_logits"]["shape"], inputs[f"{k}_logits"]["seed"]) * inputs[f"{k}_logits"]["scale"]
        for k in ("student", "teacher")
    )

    class Answer(torch.nn.Module):
        def __init__(self, logits):
            super().__init__()
            self.logits = torch.nn.Parameter(logits)

        def forward(self, x):
            return self.logits

    generator = torch.nn.Linear(1, 1)
    loss = DFAD_cifar.generator_step(
        torch.zeros(1, 1),
        generator,
        Answer(t),
        Answer(s),
        make_optimizer("adam", generator.parameters(), 1e-3),
        nullcontext,
        log_space=True,
    )
    expected = values["generator_segmentation_log"]["value"]
    assert loss.item() == pytest.approx(expected, rel=1e-9)


def test_published_presets():
    keys = ("teacher", "student", "batch_size", "n_epochs", "epoch_itrs", "k", "lr_S", "lr_G", "weight_decay", "nz")
    for script, flags, row in (
        (DFAD_mnist, (), ("lenet5", "lenet5_half", 512, 40, 50, 5, 0.01, 1e-3, 1e-4, 100)),
        (DFAD_cifar, (), ("resnet34", "resnet18", 256, 500, 50, 5, 0.1, 1e-3, 5e-4, 256)),
        (DFAD_cifar, ("--dataset", "cifar100"), ("resnet34", "resnet18", 256, 500, 50, 5, 0.1, 1e-3, 5e-4, 256)),
        (DFAD_caltech101, (), ("resnet34_imagenet", "resnet18_imagenet", 64, 300, 50, 5, 0.05, 1e-3, 5e-4, 256)),
    ):
        args = script.parse_args(flags)
        assert tuple(getattr(args, k) for k in keys) == row and not args.scheduler
    args = DFAD_cifar.parse_args(["--variant", "mmrazor"])
    assert (args.batch_size, args.n_epochs, args.epoch_itrs, args.optimizer_G, args.lr_G, args.scheduler) == (
        256,
        100,
        250,
        "adamw",
        1e-3,
        True,
    )


def test_scheduler():
    def falls(*flags):
        args = DFAD_cifar.parse_args(flags)
        factors = [DFAD_cifar.lr_fall(e, args) for e in range(args.n_epochs)]
        return [e for e in range(1, args.n_epochs) if factors[e] < factors[e - 1]]

    assert falls() == []
    assert falls("--scheduler") == [100, 200]
    nyuv2 = DFAD_nyu_deeplab.parse_args(["--scheduler"])
    assert [DFAD_cifar.lr_fall(epoch, nyuv2) for epoch in (99, 100, 200)] == pytest.approx([1, 0.3, 0.09])
    assert falls("--variant", "mmrazor") == [20, 40]  # iterations 5000 and 10,000
    assert falls("--scheduler", "--n_epochs", "50") == [10, 20]
    assert falls("--scheduler", "--step_size", "20", "--n_epochs", "50") == [20, 40]


def test_both_learning_rates_fall(monkeypatch):
    args = DFAD_cifar.parse_args(["--scheduler", "--n_epochs", "10", "--epoch_itrs", "1"])
    net = torch.nn.Linear(1, 1)
    generator = get_generator("generator_a", 2, 8, 1)
    optimizers = [make_optimizer("sgd", net.parameters(), 1.0) for _ in range(2)]
    for step in ("student_step", "generator_step"):
        monkeypatch.setattr(DFAD_cifar, step, lambda *a, **k: torch.zeros(()))
    runtime = Namespace(device=torch.device("cpu"), autocast=nullcontext)
    s = Namespace(args=args, runtime=runtime, student=net, folded_teacher=net, run=Namespace(tick=lambda loss: None))
    for epoch, fall in ((0, 1), (1, 1), (2, 0.1), (4, 0.01), (9, 0.01)):
        DFAD_cifar.train_epoch(epoch, s, generator, *optimizers)
        assert [o.param_groups[0]["lr"] for o in optimizers] == pytest.approx([0.1 * fall, 1e-3 * fall])
