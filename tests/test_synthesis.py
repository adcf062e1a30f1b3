"""The rounds of datafree_kd.py agree with the published code, and its faults are not repeated."""

from argparse import Namespace
from contextlib import nullcontext

import pytest
import torch
from reference_fill import fill, load_reference, noise

import datafree_kd
from datafree import synthesis
from datafree.augment import Transform
from datafree.fold import fold_batch_norm
from datafree.hooks import BatchNormHooks
from datafree.losses import contrastive_loss, decision_adversarial_loss, js_loss, l1_loss, total_variation
from datafree.pool import ImagePool
from datafree.runtime import cosine_at, make_optimizer
from models import get_generator, get_model, set_folded

CIFAR = Transform((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010))
DYNAMICS = load_reference("dynamics")["values"]
LOSSES = load_reference("losses")["values"]
RUNTIME = Namespace(device=torch.device("cpu"), autocast=nullcontext)
TARGETS = torch.arange(8)


def close(value, expected, rel=1e-7):
    value = value.item() if isinstance(value, torch.Tensor) else value
    assert value == pytest.approx(expected, rel=rel, abs=1e-9)


def check(tensors, expected, rel=1e-7):
    flat = torch.cat([t.detach().flatten().double() for t in tensors])
    close(flat.norm(), expected["l2"], rel)
    assert flat.sum().item() == pytest.approx(expected["sum"], rel=rel, abs=1e-6)


def networks(reference):
    """Teacher, student and generator of the reference's procedures, filled by its rule."""
    settings = reference["settings"]
    teacher = fill(get_model("wrn16_2")).requires_grad_(False)
    student = fill(get_model("wrn16_1")).requires_grad_(False)
    if change := settings.get("student_adjustment"):
        key, index = change["key"], change["index"]
        student.get_parameter(key).data[index] += change["added_after_fill"]
    generator = fill(get_generator("fast", 32, 32, 3, ngf=8)).train()
    return teacher, student, generator


def make(family, reference, tmp_path, **settings):
    pool = ImagePool((3, 32, 32), "cpu", tmp_path / "pool.u8")
    return family(
        *networks(reference), CIFAR, (3, 32, 32), 10, RUNTIME, pool, synthesis_batch_size=8, **settings
    )


class Recorded:
    """Keeps what `weigh` is given at every step."""

    def __init__(self, synthesizer):
        self.steps, self.totals = [], []
        weigh = synthesizer.weigh

        def recording(losses):
            total = weigh(losses)
            self.steps.append({k: v.item() for k, v in losses.items()})
            self.totals.append(total.item())
            return total

        synthesizer.weigh = recording


@pytest.mark.parametrize("case", [k for k in DYNAMICS if k.startswith("fast_meta/")])
@pytest.mark.parametrize("folded", [True, False])
def test_fast_meta(case, folded, tmp_path):
    reference = DYNAMICS[case]
    s = reference["settings"]
    fast = make(
        synthesis.Fast,
        reference,
        tmp_path,
        g_steps=s["iterations"],
        meta=True,
        reset_l0=0,
        reset_bn=0,
        as_published=False,
        **{k: s[k] for k in ("lr_g", "lr_z", "bn", "oh", "adv", "bn_mmt", "is_maml")},
    )
    set_folded(fast.generator, folded)
    for call in reference["calls"]:
        recorded = Recorded(fast)
        added = []
        fast.pool.add = added.append
        z = noise((8, 32), call["latent_seed"])
        fast.invert(z, TARGETS, True, lambda loss: None)
        for step, total, expected in zip(
            recorded.steps, recorded.totals, call["inner_iterations"], strict=True
        ):
            for name, value in step.items():
                close(value, expected[name])
            close(total, expected["loss"])
        check([z], call["z_after"])
        check(added, call["best_inputs"])
        close(fast.best_loss, call["best_cost"])
        check(fast.generator.parameters(), call["generator_parameters_after"])
        # Whoever updates the inner copy's statistics must not touch the common generator's.
        assert all(
            not m.num_batches_tracked for m in fast.generator.modules() if hasattr(m, "num_batches_tracked")
        )
        for name, values in call["generator_per_parameter_after"].items():
            # A bias before a BatchNorm has only rounding for a gradient, which Adam blows up.
            check([fast.generator.get_parameter(name)], values, rel=1e-6)
        if s["bn_mmt"]:
            close(
                torch.cat([t for pair in fast.hooks.buffers for t in pair]).norm(),
                call["bn_momentum_buffers"]["total_l2"],
            )


@pytest.mark.parametrize("method", ["dafl", "dfad"])
@pytest.mark.parametrize("as_published", [True, False])
def test_generative(method, as_published, tmp_path):
    reference = DYNAMICS[f"generative/{method}"]
    s = reference["settings"]
    family = make(
        synthesis.Generative,
        reference,
        tmp_path,
        g_steps=1,
        lr_g=s["lr_g"],
        criterion="l1" if method == "dfad" else "kl",
        as_published=as_published,
        **{k: s[k] for k in ("adv", "bn", "oh", "act", "balance")},
    )
    expected = reference["published" if as_published else "real_student"]
    family.latents = lambda: noise((8, 32), 1)
    losses = family.synthesize(True, lambda loss: None)
    for name, value in losses.items():
        close(value, expected["losses"][name])
    check(family.generator.parameters(), expected["generator_parameters_after"])
    for name, values in expected["generator_per_parameter_after"].items():
        if as_published and method == "dfad":  # no gradient but rounding
            continue
        check([family.generator.get_parameter(name)], values, rel=1e-6)
    family.generator.latents = lambda n, device: noise((n, 32), 2)
    (sample,) = family.sample(1, 8)
    check([sample], expected["sample_after_step_latent_seed_2"])


def test_cmi(tmp_path):
    reference = DYNAMICS["cmi/partial_agreement"]
    s = reference["settings"]
    cmi = make(
        synthesis.CMI,
        reference,
        tmp_path,
        g_steps=s["iterations"],
        head_dim=16,
        bank_size=s["bank_size"],
        n_neg=s["n_neg"],
        **{k: s[k] for k in ("lr_g", "bn", "oh", "adv", "cr", "cr_T")},
    )
    cmi.bank = cmi.bank.double()
    named = torch.nn.ModuleDict({"head": cmi.head})
    fill(named)
    cmi.strong_view = lambda images: CIFAR.normalize(images.flip(-1))
    for call in reference["calls"]:
        assert len(cmi.bank) == call["bank_entries_before"]
        recorded, added = Recorded(cmi), []
        cmi.pool.add = added.append
        z = noise((8, 32), call["latent_seed"])
        cmi.invert(z, TARGETS, True, lambda loss: None)
        for step, total, expected in zip(recorded.steps, recorded.totals, call["iterations"], strict=True):
            for name, value in step.items():
                close(value, expected[name])
            close(total, expected["loss"])
        check([z], call["z_after"])
        check(added, call["best_inputs"])
        check(cmi.generator.parameters(), call["generator_parameters_after"])
        check(cmi.head.parameters(), call["head_parameters_after"])
        check([cmi.bank], call["bank_filled_part"])


def test_student_step():
    reference = DYNAMICS["student_step/kl_T20"]
    teacher = fill(get_model("wrn16_2")).requires_grad_(False)
    student = fill(get_model("wrn16_1")).train()
    optimizer = make_optimizer("sgd", student.parameters(), 0.1, 1e-4)
    args = Namespace(criterion="kl", T=20, kd_steps=1)
    for seed, expected in enumerate(reference["losses"]):
        loss = datafree_kd.distill(
            [noise((4, 3, 32, 32), seed)], teacher, student, optimizer, args, RUNTIME, lambda loss: None
        )
        close(loss, expected)
    check(student.parameters(), reference["student_parameters_after"])
    for name, values in reference["student_per_parameter_after"].items():
        check([student.get_parameter(name)], values)


def array(entry, **kwargs):
    return (noise(entry["shape"], entry["seed"]) * entry.get("scale", 1)).requires_grad_()


@pytest.mark.parametrize("case", [k for k in LOSSES if k.startswith("fast_logit_losses/")])
def test_logit_losses(case):
    values = LOSSES[case]
    for name, loss in (
        ("jsdiv_T1", lambda s, t: js_loss(s, t, 1)),
        ("jsdiv_T3", js_loss),
        ("decision_adversarial", decision_adversarial_loss),
    ):
        s, t = (array(values["inputs"][f"{k}_logits"]) for k in ("student", "teacher"))
        expected = values[name]
        value = loss(s, t)
        close(value, expected["value"])
        value.backward()
        close(
            s.grad.norm(),
            expected.get("gradient_l2_wrt_student", expected.get("gradient_l2_wrt_first_argument")),
        )


@pytest.mark.parametrize("case", [k for k in LOSSES if k.startswith("dfad_adversarial/")])
def test_l1(case):
    values = LOSSES[case]
    s, t = (array(values["inputs"][f"{k}_logits"]) for k in ("student", "teacher"))
    close(l1_loss(s, t.detach()), values["student_l1"]["value"])
    loss = -l1_loss(s, t)
    loss.backward()
    if "generator_classification" in values:
        expected = values["generator_classification"]
        close(loss, expected["value"])
        close(s.grad.norm(), expected["gradient_l2_wrt_student"])
        close(t.grad.norm(), expected["gradient_l2_wrt_teacher"])


@pytest.mark.parametrize("case", [k for k in LOSSES if k.startswith("image_prior/")])
def test_image_priors(case):
    values = LOSSES[case]
    x = array(values["inputs"]["images"])
    value = total_variation(x)
    value.backward()
    close(value, values["total_variation_l1_as_in_fast_and_cmi"])
    close(x.grad.norm(), values["total_variation_gradient_l2"])
    close(x.norm(), values["l2_of_whole_batch"])


@pytest.mark.parametrize("case", [k for k in LOSSES if k.startswith("bn_statistics/")])
def test_batch_norm_statistics(case):
    values = LOSSES[case]
    net = fill(
        torch.nn.Sequential(
            torch.nn.Conv2d(3, 8, 3, padding=1),
            torch.nn.BatchNorm2d(8),
            torch.nn.ReLU(),
            torch.nn.Conv2d(8, 8, 3, padding=1),
            torch.nn.BatchNorm2d(8),
        )
    )
    hooks = BatchNormHooks(net, values["inputs"]["momentum_rate"])
    for i, key in ((1, "batch_1_no_buffer"), (2, "batch_2_with_buffer"), (3, "batch_3_with_buffer")):
        x = array(values["inputs"][f"batch_{i}"])
        with hooks:
            net(x)
        loss = hooks.loss()
        loss.backward()
        close(loss, values[key]["total"])
        close(x.grad.norm(), values[key]["gradient_l2_wrt_input"])
        hooks.update()
        after = values.get(("", "buffer_after_first_update", "buffer_after_second_update", "")[i])
        if after:
            for j, kind in enumerate(("mean", "var")):
                for pair, norm, total in zip(
                    hooks.buffers, after[f"{kind}_l2"], after[f"{kind}_sum"], strict=True
                ):
                    check([pair[j]], {"l2": norm, "sum": total})
    net(array(values["inputs"]["batch_1"]))  # outside the block nothing is recorded
    assert hooks.inputs[0] is not None and not net[1]._forward_pre_hooks


@pytest.mark.parametrize("bank", ["with_bank", "empty_bank"])
def test_contrastive(bank):
    values = LOSSES["cmi_contrastive/A"]
    expected, inputs = values[bank], values["inputs"]
    head = torch.nn.Sequential(torch.nn.Linear(6, 6), torch.nn.ReLU(), torch.nn.Linear(6, 3))
    fill(torch.nn.ModuleDict({"head": head}))
    views = [array(inputs[f"{k}_features"]) for k in ("local", "global")]
    rows = array(inputs["bank"])[: 5 if bank == "with_bank" else 0].detach()
    local, others = (
        torch.nn.functional.normalize(head(torch.cat([view, half])), dim=1)
        for view, half in zip(views, rows.chunk(2, 1), strict=True)
    )
    loss = contrastive_loss(local, others, 0.2, 4)
    loss.backward()
    close(loss, expected["loss"])
    close(views[0].grad.norm(), expected["gradient_l2"]["local_features"])
    assert views[1].grad is None or not views[1].grad.any()
    head_gradient = torch.cat([p.grad.flatten() for p in head.parameters()]).norm()
    close(head_gradient, expected["gradient_l2"]["head"])


def test_student_learning_rate():
    for epoch, lr in LOSSES["fast_student_lr"]["values"].items():
        assert cosine_at(int(epoch) - 20, 0.2, 200, 2e-4) == pytest.approx(lr)


def test_pool_bytes(tmp_path):
    reference = LOSSES["image_pool_quantisation"]
    pool = ImagePool((1, 1, 1), "cpu", tmp_path / "p")
    pool.add(torch.tensor(reference["values"], dtype=torch.float64).view(-1, 1, 1, 1))
    assert pool.images().flatten().tolist() == reference["stored_bytes"]


def numbered(n, start=0):
    return torch.arange(start, start + n, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, 2, 2)


@pytest.mark.parametrize("limit", [None, 0, 5])
def test_pool_batches_are_passes_over_all_images(limit, tmp_path):
    pool = ImagePool((3, 2, 2), "cpu", tmp_path / "p", limit)
    pool.add(numbered(7))
    assert [len(b) for b in pool.batches(16, 3)] == [7, 7, 7]  # fewer than a batch: all of them
    pool.add(numbered(5, 7))
    assert torch.equal(pool.images(), numbered(12))
    passes = torch.cat([b[:, 0, 0, 0] for b in pool.batches(4, 6)]).view(2, 12)
    assert all(sorted(p.tolist()) == list(range(12)) for p in passes)
    assert not torch.equal(*passes)
    assert [len(b) for b in pool.batches(5, 3)] == [5, 5, 5]


def test_pool_is_restored_and_forgets_what_came_after_the_checkpoint(tmp_path):
    pool = ImagePool((3, 2, 2), "cpu", tmp_path / "p")
    pool.add(numbered(4))
    state = pool.state_dict()
    pool.add(numbered(4, 4))
    pool.state_dict()
    for limit in (None, 3):
        again = ImagePool((3, 2, 2), "cpu", tmp_path / "p", limit)
        again.load_state_dict(state)
        assert torch.equal(again.images(), numbered(4))
        again.add(numbered(2, 100))
        assert again.state_dict() == {"images": 6}
        third = ImagePool((3, 2, 2), "cpu", tmp_path / "p")
        third.load_state_dict({"images": 6})
        assert torch.equal(third.images(), torch.cat([numbered(4), numbered(2, 100)]))


def test_a_run_starts_with_an_empty_pool(tmp_path):
    """The published pool reads whatever lies in its folder."""
    old = ImagePool((3, 2, 2), "cpu", tmp_path / "p")
    old.add(numbered(4))
    old.state_dict()
    new = ImagePool((3, 2, 2), "cpu", tmp_path / "p")
    assert len(new) == 0
    new.add(numbered(1, 9))
    assert new.state_dict() == {"images": 1}
    assert (tmp_path / "p").stat().st_size == 12


def test_best_is_a_copy():
    """The published DeepInversion remembers the variable itself, hence the last state."""
    from datafree.synthesis.base import Best

    best, x = Best(), torch.zeros(2)
    for step, loss in enumerate((3.0, 1.0, 1.0, 2.0)):
        x.fill_(step)
        best.offer(torch.tensor(loss), x)
    assert best.tensors[0].tolist() == [1, 1] and best.loss == 1


@pytest.mark.parametrize(
    ("name", "left"), [("resnet34", 0), ("wrn16_2", 6), ("mobilenetv2", 0), ("vgg11", 8), ("lenet5", 0)]
)
def test_folded_batch_norm(name, left):
    """Exact in value and gradient; what cannot be traced or folded stays as it is."""
    model = fill(get_model(name)).requires_grad_(False)
    folded = fold_batch_norm(model)
    norms = [m for m in folded.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    used = {n.target for n in folded.graph.nodes} if hasattr(folded, "graph") else None
    if used is not None:
        norms = [k for k, m in folded.named_modules() if isinstance(m, torch.nn.BatchNorm2d) and k in used]
    assert len(norms) == left
    channels = 1 if name == "lenet5" else 3
    results = []
    for network in (model, folded):
        x = noise((2, channels, 32, 32), 0).requires_grad_()
        logits = network(x)
        logits.square().sum().backward()
        results.append((logits.detach(), x.grad))
    for a, b in zip(*results, strict=True):
        assert (a - b).norm() <= 1e-12 * a.norm()
    assert not any(p.requires_grad for p in folded.parameters())
