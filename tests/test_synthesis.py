"""The rounds of datafree_kd.py agree with the published code, and its faults are not repeated."""

import copy
from argparse import Namespace
from functools import partial

import pytest
import torch
from reference_fill import fill, load_reference, noise
from torch.multiprocessing.reductions import StorageWeakRef

import datafree_kd
from datafree import synthesis
from datafree.augment import Transform
from datafree.errors import UsageError
from datafree.fold import fold_batch_norm
from datafree.hooks import BatchNormHooks
from datafree.losses import contrastive_loss, decision_adversarial_loss, js_loss, l1_loss, total_variation
from datafree.pool import ImagePool
from datafree.runtime import Runtime, cosine_at, make_optimizer
from datafree.session import Session
from datafree.synthesis.cmi import MemoryBank
from models import get_generator, get_model, set_folded

CIFAR = Transform((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010))
DYNAMICS = load_reference("dynamics")["values"]
LOSSES = load_reference("losses")["values"]
RUNTIME = Runtime(torch.device("cpu"), "fp32")
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
    return family(*networks(reference), CIFAR, (3, 32, 32), 10, RUNTIME, pool, synthesis_batch_size=8, **settings)


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
        for step, total, expected in zip(recorded.steps, recorded.totals, call["inner_iterations"], strict=True):
            for name, value in step.items():
                close(value, expected[name])
            close(total, expected["loss"])
        check([z], call["z_after"])
        check(added, call["best_inputs"])
        close(fast.best_loss, call["best_cost"])
        check(fast.generator.parameters(), call["generator_parameters_after"])
        # Whoever updates the inner copy's statistics must not touch the common generator's.
        assert all(not m.num_batches_tracked for m in fast.generator.modules() if hasattr(m, "num_batches_tracked"))
        for name, values in call["generator_per_parameter_after"].items():
            # A bias before a BatchNorm has only rounding for a gradient, which Adam blows up.
            check([fast.generator.get_parameter(name)], values, rel=1e-6)
        if s["bn_mmt"]:
            close(fast.hooks.buffers.norm(), call["bn_momentum_buffers"]["total_l2"])


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
    ((sample, _),) = family.sample(1, 8)
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
        feature_layers="bn",
        bank_size=s["bank_size"],
        n_neg=s["n_neg"],
        **{k: s[k] for k in ("lr_g", "bn", "oh", "adv", "cr", "cr_T")},
    )
    cmi.bank.rows = cmi.bank.rows.double()
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
        check([cmi.bank.rows[: len(cmi.bank)]], call["bank_filled_part"])


def test_student_step():
    reference = DYNAMICS["student_step/kl_T20"]
    teacher = fill(get_model("wrn16_2")).requires_grad_(False)
    student = fill(get_model("wrn16_1")).train()
    optimizer = make_optimizer("sgd", student.parameters(), 0.1, 1e-4)
    session = Namespace(args=Namespace(criterion="kl", T=20, kd_steps=1), runtime=RUNTIME)
    session.answers = lambda x, _: teacher(x)
    session.student, session.run = student, Namespace(tick=lambda loss: None)
    session.step = partial(Session.step, session)
    for seed, expected in enumerate(reference["losses"]):
        close(datafree_kd.distill([(noise((4, 3, 32, 32), seed), None)], session, optimizer), expected)
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
        close(s.grad.norm(), expected.get("gradient_l2_wrt_student", expected.get("gradient_l2_wrt_first_argument")))


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
def test_image_priors(case, tmp_path):
    values = LOSSES[case]
    x = array(values["inputs"]["images"])
    value = total_variation(x)
    value.backward()
    close(value, values["total_variation_l1_as_in_fast_and_cmi"])
    close(x.grad.norm(), values["total_variation_gradient_l2"])
    family = tiny("deepinv", tmp_path, tv=1.0, l2=1.0, bn=0.0, oh=0.0, adv=0.0)
    found = family.losses(x, torch.zeros(1, 3, 32, 32), torch.zeros(1, dtype=torch.int64), False)
    close(found["loss_tv"], values["total_variation_l1_as_in_fast_and_cmi"])
    close(found["loss_l2"], values["l2_of_whole_batch"])


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
        with hooks.record():
            net(x)
        loss = hooks.loss()
        loss.backward()
        close(loss, values[key]["total"])
        close(x.grad.norm(), values[key]["gradient_l2_wrt_input"])
        hooks.update()
        after = values.get(("", "buffer_after_first_update", "buffer_after_second_update", "")[i])
        if after:
            for half, kind in zip(hooks.buffers.chunk(2), ("mean", "var"), strict=True):
                parts = half.split([layer.num_features for layer in hooks.layers])
                for part, norm, total in zip(parts, after[f"{kind}_l2"], after[f"{kind}_sum"], strict=True):
                    check([part], {"l2": norm, "sum": total})
    assert not net[1]._forward_pre_hooks  # outside the block nothing is recorded


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
    assert [len(b) for _, b in pool.batches(16, 3)] == [7, 7, 7]  # fewer than a batch: all of them
    pool.add(numbered(5, 7))
    assert torch.equal(pool.images(), numbered(12))
    batches = [(rows, b[:, 0, 0, 0]) for rows, b in pool.batches(4, 6)]
    assert all(torch.equal(rows, named) for rows, named in batches)
    passes = torch.cat([named for _, named in batches]).view(2, 12)
    assert all(sorted(p.tolist()) == list(range(12)) for p in passes)
    assert not torch.equal(*passes)
    assert [len(b) for _, b in pool.batches(5, 3)] == [5, 5, 5]


def test_pool_is_restored_and_forgets_what_came_after_the_checkpoint(tmp_path):
    pool = ImagePool((3, 2, 2), "cpu", tmp_path / "p")
    pool.add(numbered(4))
    pool.flush()
    state = pool.state_dict()
    pool.add(numbered(4, 4))
    pool.flush()
    for limit in (None, 3):
        again = ImagePool((3, 2, 2), "cpu", tmp_path / "p", limit)
        again.load_state_dict(state)
        assert torch.equal(again.images(), numbered(4))
        again.add(numbered(2, 100))
        again.flush()
        assert again.state_dict() == {"images": 6} and (tmp_path / "p").stat().st_size == 72
        third = ImagePool((3, 2, 2), "cpu", tmp_path / "p")
        third.load_state_dict({"images": 6})
        assert torch.equal(third.images(), torch.cat([numbered(4), numbered(2, 100)]))


def test_a_run_starts_with_an_empty_pool(tmp_path):
    """The published pool reads whatever lies in its folder."""
    old = ImagePool((3, 2, 2), "cpu", tmp_path / "p")
    old.add(numbered(4))
    old.flush()
    new = ImagePool((3, 2, 2), "cpu", tmp_path / "p")
    assert len(new) == 0
    new.add(numbered(1, 9))
    new.flush()
    assert new.state_dict() == {"images": 1}
    assert (tmp_path / "p").stat().st_size == 12


def test_promised_images_take_memory_once(tmp_path, monkeypatch):
    """Filling, saving and resuming a pool allocates no more than a chunk beside its two stores."""
    monkeypatch.setattr("datafree.pool.CHUNK", 24)  # two images
    made, empty = [], torch.empty

    def counted(*size, **options):
        made.append(empty(*size, **options))
        return made[-1]

    with monkeypatch.context() as patch:
        patch.setattr(torch, "empty", counted)
        pool = ImagePool((3, 2, 2), "cpu", tmp_path / "p", limit=5, capacity=12)
        for start in range(0, 12, 3):
            pool.add(numbered(3, start))
            pool.flush()
        assert [len(t) for t in made] == [5, 7]
        again = ImagePool((3, 2, 2), "cpu", tmp_path / "p", limit=5, capacity=12)
        again.load_state_dict(pool.state_dict())
    assert [len(t) for t in made[2:4]] == [5, 7] and all(len(t) <= 2 for t in made[4:])
    assert torch.equal(again.images(), numbered(12))
    again.add(numbered(1, 12))  # more than was promised
    assert torch.equal(again.images(), numbered(13)) and again.near is made[2]
    with pytest.raises(UsageError, match="lower --pool_size"):
        ImagePool((3, 2, 2), "cpu", tmp_path / "p", capacity=10**15)
    (tmp_path / "p").write_bytes(b"half an image")
    with pytest.raises(UsageError, match="has not the 2 images that the checkpoint counts"):
        again.load_state_dict({"images": 2})


@pytest.mark.parametrize(("size", "batch"), [(12, 5), (4, 6)])
def test_memory_bank_survives_a_killed_run(size, batch, tmp_path):
    """Whatever is written behind a checkpoint, its rows come back, and the file stays of two banks' size."""

    def rows(i):
        return torch.arange(i * batch, (i + 1) * batch).float()[:, None].expand(-1, 2)

    def new():
        return MemoryBank(size, 2, torch.device("cpu"), tmp_path / "bank.f32")

    bank, expected = new(), torch.empty(0, 2)
    assert len(bank.draw(3)) == 0
    for i in range(30):
        bank.add(rows(i))
        expected = torch.cat([expected, rows(i)])[-size:]
        assert torch.equal(bank.draw(size), expected)
        torch.manual_seed(i)
        drawn = bank.draw(3)
        torch.manual_seed(i)
        assert torch.equal(drawn, expected[torch.randperm(len(expected))[:3]])
        if i % 4 < 2:
            state, saved = bank.state_dict(), expected
            bank.flush()
        elif i % 4 == 3:  # killed while the next checkpoint is written, two rounds after the last
            bank.flush()
            bank, expected = new(), saved
            bank.load_state_dict(state)
            assert torch.equal(bank.draw(size), saved)
    assert size < bank.saved
    assert (tmp_path / "bank.f32").stat().st_size <= 2 * size * 8
    (tmp_path / "bank.f32").unlink()
    with pytest.raises(UsageError, match="without --resume"):
        new().load_state_dict(state)


def test_best_is_a_copy():
    """The published DeepInversion remembers the variable itself, hence the last state."""
    from datafree.synthesis.base import Best

    best, x = Best(), torch.zeros(2)
    for step, loss in enumerate((3.0, 1.0, 1.0, 2.0)):
        x.fill_(step)
        best.offer(torch.tensor(loss), x)
    assert best.tensors[0].tolist() == [1, 1] and best.loss == 1


FAMILIES = ("zskt", "dafl", "deepinv", "cmi", "fast", "fast_meta", "imagenet", "nayer")


def tiny(method, tmp_path, teacher="resnet8", **changes):
    """A synthesizer of a method, on networks that take a moment; and the networks."""
    torch.manual_seed(0)
    entry = synthesis.METHODS.get(method) or synthesis.Method(synthesis.FastLatents, synthesis.IMAGENET)
    deep = entry.family is synthesis.FastLatents
    settings = dict(entry.recipe) | dict(entry.fixed) | dict(as_published=False, synthesis_batch_size=4, g_steps=2)
    settings |= dict(bank_size=8, n_neg=5, head_dim=4) | changes
    return entry.family(
        get_model(teacher).eval().requires_grad_(False),
        get_model("resnet8").eval().requires_grad_(False),
        get_generator("deep" if deep else "fast", 4, 32, 3, ngf=4),
        Transform((0.5,) * 3, (0.25,) * 3, padding=2, flip=True),
        (3, 32, 32),
        10,
        RUNTIME,
        ImagePool((3, 32, 32), "cpu", tmp_path / "pool.u8"),
        **{k: settings[k] for k in entry.family.settings},
    )


def leaves(state):
    if isinstance(state, dict | list | tuple):
        for value in state.values() if isinstance(state, dict) else state:
            yield from leaves(value)
    else:
        yield state


@pytest.mark.parametrize("weight", [1.0, 0.0])
@pytest.mark.parametrize("method", FAMILIES)
def test_no_activation_outlives_a_round(method, weight, tmp_path):
    family = tiny(method, tmp_path, bn=weight, oh=1.0)
    storages, recorded = [], []
    for network in (family.teacher, family.student):
        for layer in network.modules():
            if isinstance(layer, torch.nn.BatchNorm2d):
                layer.register_forward_pre_hook(
                    lambda layer, x: storages.append(StorageWeakRef(x[0].untyped_storage()))
                )
    family.hooks.layers[0].register_forward_hook(
        lambda layer, x, y: recorded.append(family.hooks.pairs[:1] + family.hooks.means[:1])
    )
    losses = family.synthesize(True, lambda loss: None)
    assert losses and storages and all(s.expired() for s in storages)
    # Without the weights that read them, there are no hooks: what CMI keeps then are its features.
    assert any(recorded) == bool(weight or method == "cmi")
    assert all(isinstance(v, torch.Tensor | int | float | None) for v in leaves(family.state_dict()))


@pytest.mark.parametrize("method", FAMILIES)
def test_a_round_without_a_term_does_nothing(method, tmp_path):
    weights = dict.fromkeys(("bn", "oh", "act", "balance", "cr", "tv", "l2"), 0.0) | dict(adv=1.0)
    family = tiny(method, tmp_path, **weights)
    assert family.synthesize(False, None) == {} and not len(family.pool)
    assert list(family.synthesize(True, lambda loss: None)) == ["loss_adv"]


@pytest.mark.parametrize("method", FAMILIES)
def test_unseen_images_leave_no_trace(method, tmp_path):
    family = tiny(method, tmp_path)
    family.synthesize(True, lambda loss: None)
    before, rng, n = copy.deepcopy(family.state_dict()), torch.get_rng_state(), len(family.pool)
    made = torch.cat(list(family.unseen()))
    assert torch.equal(torch.get_rng_state(), rng) and len(family.pool) == n
    after = family.state_dict()
    pairs = zip(leaves(before), leaves(after), strict=True)
    assert all(torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b for a, b in pairs)
    seen = family.transform(family.pool.images()) if family.pooled else made[:0]
    assert made.shape[1:] == (3, 32, 32) and not any(torch.equal(x, y) for x in made for y in seen)
    assert torch.equal(torch.cat(list(family.unseen())), made)


def test_images_set_apart_by_deepinv_are_the_teachers_alone(tmp_path):
    """So a resumed run, whose student knows more, has the same."""
    family = tiny("deepinv", tmp_path)
    made = torch.cat(list(family.unseen()))
    family.apart, family.student = None, get_model("resnet8").eval()
    assert torch.equal(torch.cat(list(family.unseen())), made)


@pytest.mark.parametrize("method", FAMILIES)
def test_a_resumed_synthesizer_goes_on_alike(method, tmp_path):
    """Also where the killed run made another round, and wrote its files, behind the checkpoint."""
    family = tiny(method, tmp_path)
    for _ in range(3):
        family.synthesize(True, lambda loss: None)
    parts = family, family.pool
    states = copy.deepcopy([part.state_dict() for part in parts])
    for _ in range(2):
        for part in parts:
            part.flush()
        torch.manual_seed(5)
        expected = family.synthesize(True, lambda loss: None)
    again = tiny(method, tmp_path)
    for part, state in zip((again, again.pool), states, strict=True):
        part.load_state_dict(state)
    for _ in range(2):
        torch.manual_seed(5)
        found = again.synthesize(True, lambda loss: None)
    assert found == expected
    assert torch.equal(again.pool.images(), family.pool.images())


def test_deepinversion_mirrors_a_whole_batch(tmp_path):
    family = tiny("deepinv", tmp_path)
    x = torch.arange(2.0)[:, None, None, None] + torch.arange(4.0).expand(2, 3, 4, 4)  # too small to roll
    kinds = [family.jitter(x)[:, 0, 0, 0].tolist() for _ in range(50)]
    assert {tuple(k) for k in kinds} == {(0, 1), (3, 4)}


@pytest.mark.parametrize(("teacher", "width"), [("resnet34", 512), ("resnet8", 16 + 16 + 32), ("wrn16_1", None)])
def test_cmi_looks_at_what_enters_the_stages(teacher, width, tmp_path):
    """As CMI's repository does for its ResNet-34, and as it is then the default here."""
    adjusted = synthesis.METHODS["cmi"].adjust("cifar10", teacher, None)
    assert adjusted == ({"feature_layers": "blocks"} if teacher == "resnet34" else {})
    if width is None:
        with pytest.raises(UsageError, match="no stages"):
            tiny("cmi", tmp_path, teacher, feature_layers="blocks")
        return
    cmi, entered = tiny("cmi", tmp_path, teacher, feature_layers="blocks"), []
    for layer in (m for name, m in cmi.teacher.named_children() if name.startswith("layer")):
        layer.register_forward_pre_hook(lambda layer, x: entered.append(x[0].mean((2, 3))))
    x = torch.rand(2, 3, 32, 32)
    features = cmi.features(x)
    assert torch.allclose(features, torch.cat(entered, 1)) and features.shape == (2, width)
    assert cmi.bank.rows.shape == (8, 2 * width)
    assert "loss_cr" in cmi.synthesize(True, lambda loss: None)


def test_imagenets_first_order_maml(tmp_path):
    """The common generator and latents step along the copies' last gradients; unused weights do not."""
    family = tiny("imagenet", tmp_path, is_maml=1, bn_mmt=0.9)
    family.generator.register_parameter("unused", torch.nn.Parameter(torch.ones(1)))
    seen, take = [], family._take_gradients

    def noted(copies, first):
        assert first and copies[-1].shape == family.z.shape
        seen.append([p.grad for p in copies])
        seen[-1] = [g if g is None else g.clone() for g in seen[-1]]
        take(copies, first)

    family._take_gradients = noted
    family.synthesize(True, lambda loss: None)
    assert len(seen) == 2
    for common, gradient in zip(family.common(), seen[-1], strict=True):
        assert (common.grad is None and gradient is None) or torch.equal(common.grad, gradient)
    assert family.generator.unused.item() == 1 and family.hooks.buffers is not None


def test_a_method_of_ones_own_is_one_call_away():
    class Mine(synthesis.Generative):
        terms = (*synthesis.Generative.terms, "mine")

    entry = synthesis.Method(Mine, synthesis.STUDENT | dict(mine=0.5))
    try:
        synthesis.register("mine", entry, {"mine": "weight of it"})
        assert synthesis.METHODS["mine"] is entry and synthesis.FLAGS["mine"] == "weight of it"
        with pytest.raises(ValueError, match="taken"):
            synthesis.register("mine", entry)
    finally:
        del synthesis.METHODS["mine"], synthesis.FLAGS["mine"]


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
