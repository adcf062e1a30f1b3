"""The losses agree with numbers computed with the published code."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from datafree.losses import activation_loss, information_entropy_loss, kd_loss, one_hot_loss
from datafree.metrics import Confusion

VALUES = json.loads((Path(__file__).parent / "reference/losses.json").read_text())["values"]


def array(entry):
    n = np.random.RandomState(entry["seed"]).standard_normal(entry["shape"])
    return torch.tensor(n * entry.get("scale", 1.0), requires_grad=True)


def close(value, expected):
    assert value.item() == pytest.approx(expected, rel=1e-9, abs=1e-11)


@pytest.mark.parametrize("case", [k for k in VALUES if k.startswith("dafl/")])
def test_dafl(case):
    values = VALUES[case]
    t_logits, t_features, s_logits = (
        array(values["inputs"][k]) for k in ("teacher_logits", "teacher_features", "student_logits")
    )
    oh, ie, a = (one_hot_loss(t_logits), information_entropy_loss(t_logits), activation_loss(t_features))
    close(oh, values["one_hot"])
    close(ie, values["information_entropy_log10"])
    close(information_entropy_loss(t_logits, np.e), values["information_entropy_natural_log_for_comparison"])
    close(a, values["activation"])
    kd = kd_loss(s_logits, t_logits.detach())
    close(kd, values["kd_loss"])
    for weights, expected in values["total"].items():
        w = {k: float(v) for k, v in (part.split("=") for part in weights.split(","))}
        total = w["oh"] * oh + w["ie"] * ie + w["a"] * a
        close(total, expected)
        close(total + kd, values["total_plus_kd"][weights])
    (kd_gradient,) = torch.autograd.grad(kd, s_logits)
    close(kd_gradient.norm(), values["kd_gradient_l2_wrt_student"])
    total = oh + 5 * ie + 0.1 * a
    expected = values["gradient_of_total_oh1_ie5_a0.1"]
    for name, gradient in zip(expected, torch.autograd.grad(total, (t_logits, t_features)), strict=True):
        close(gradient.abs().sum(), expected[name]["sum_abs"])
        close(gradient.norm(), expected[name]["l2"])


@pytest.mark.parametrize("case", [k for k in VALUES if k.startswith("fast_logit_losses/")])
def test_kd_at_temperatures(case):
    values = VALUES[case]
    s_logits, t_logits = (array(values["inputs"][f"{k}_logits"]) for k in ("student", "teacher"))
    close(one_hot_loss(t_logits), values["one_hot_of_teacher_logits"])
    close(information_entropy_loss(t_logits, np.e), values["class_balance_of_teacher_logits"])
    for T in (1, 4, 20):
        loss = kd_loss(s_logits, t_logits.detach(), T)
        close(loss, values[f"kldiv_T{T}"]["value"])
        (gradient,) = torch.autograd.grad(loss, s_logits)
        close(gradient.norm(), values[f"kldiv_T{T}"]["gradient_l2_wrt_student"])


def test_class_that_never_occurs_costs_nothing_and_no_nan():
    logits = torch.tensor([[200.0, -200.0], [200.0, -200.0]], requires_grad=True)
    loss = information_entropy_loss(logits)
    loss.backward()
    assert abs(loss.item()) < 1e-30 and logits.grad.isfinite().all()


def test_half_precision_is_widened():
    s, t = torch.randn(8, 10), torch.randn(8, 10)
    loss = kd_loss(s.bfloat16(), t.bfloat16())
    assert loss.dtype == torch.float32
    assert loss == kd_loss(s.bfloat16().float(), t.bfloat16().float())


@pytest.mark.parametrize("case", [k for k in VALUES if k.startswith("dfad_segmentation_metrics/")])
def test_segmentation_scores(case):
    values = VALUES[case]
    inputs = values["inputs"]
    confusion = Confusion(inputs["num_classes"])
    labels, predictions = (torch.tensor(inputs[k]) for k in ("labels", "predictions"))
    for i in range(len(labels)):
        confusion.add(predictions[i], labels[i])
    assert confusion.matrix.tolist() == values["confusion_rows_true_cols_predicted"]
    scores = confusion.scores()
    for name in ("pixel_accuracy", "mean_accuracy", "mean_iou", "frequency_weighted_iou"):
        assert scores[name] == pytest.approx(values[name], rel=1e-10)
    expected = [float(v) for v in values["per_class_iou"].values()]
    assert scores["class_iou"] == pytest.approx(expected, rel=1e-10, nan_ok=True)
