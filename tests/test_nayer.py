"""NAYER agrees with steps of the published code, and what stands for a label is what was asked for."""

import zlib

import numpy as np
import pytest
import torch
from reference_fill import fill_value, load_reference, noise
from test_synthesis import CIFAR, RUNTIME, Recorded, check, close, networks

import datafree_kd
from datafree.errors import UsageError
from datafree.pool import ImagePool
from datafree.synthesis import METHODS
from datafree.synthesis.nayer import Nayer, embeddings
from models import get_generator, get_model
from models.generator import NoisyLayers

REFERENCE = load_reference("nayer")
ARCHITECTURES, VALUES = REFERENCE["architectures"], REFERENCE["values"]
SETTINGS = ("lr_g", "g_steps", "g_loops", "gwp_loops", "g_life", "warmup", "bn", "oh", "adv", "bn_mmt")


def tensors(noisy, generator):
    """What the two hold, by the published names."""
    found = {f"n1.{k}": v for k, v in noisy.n1.state_dict().items()}
    for i, (weight, bias) in enumerate(zip(noisy.weight.detach(), noisy.bias.detach(), strict=True)):
        found |= {f"le1.{i}.weight": weight, f"le1.{i}.bias": bias}
    return found | generator.state_dict()


def fill(noisy, generator, prefix=""):
    noisy.double(), generator.double()
    for name, value in tensors(noisy, generator).items():
        value.copy_(fill_value(prefix + name, value.shape))


def embedding(seed, classes=10):
    return noise((classes, 512), seed)


def build(arguments, batch):
    a = arguments
    noisy = NoisyLayers(a["le_size"], a["le_emb_size"], a.get("nl", 10), -(-batch // a.get("nl", 10)))
    return noisy, get_generator("fast", a["le_emb_size"], a["img_size"], a["nc"], ngf=a["ngf"])


@pytest.mark.parametrize("name", [k for k in ARCHITECTURES if "Deep" not in k])
def test_generator(name):
    entry = ARCHITECTURES[name]
    with torch.device("cpu" if entry["values_in_this_file"] else "meta"):
        noisy, generator = build(entry["constructor_args"], entry["constructor_args"]["sbz"])
    found = {k: list(v.shape) for k, v in tensors(noisy, generator).items()}
    assert found == dict(entry["state_dict"]) and len(noisy.weight) == entry["noisy_layers"]
    learnt = [*noisy.parameters(), *generator.parameters()]
    assert sum(p.numel() for p in learnt) == entry["num_parameters"]
    for output in entry.get("outputs", {}).values():
        fill(noisy.train(), generator.train())
        targets = output["targets"]
        targets = torch.arange(10).repeat(40) if isinstance(targets, str) else torch.tensor(targets)
        with torch.no_grad():
            images = generator(noisy(embedding(output["label_embedding"]["seed"])[targets]))
        expected = output["output_train"]
        assert list(images.shape) == expected["shape"]
        check([images], expected)
        for i, values in zip(expected["listed_samples"], expected["first10_per_sample"], strict=True):
            assert images[i].flatten()[:10].tolist() == pytest.approx(values, rel=1e-7)
        running = output["running_statistics_after_one_train_forward"]
        state = tensors(noisy, generator)
        for kind in ("running_mean", "running_var"):
            flat = torch.cat([v for k, v in state.items() if k.endswith(kind)])
            close(flat.sum(), running[f"{kind}_sum"])
            close(flat.norm(), running[f"{kind}_l2"])


def make(reference, tmp_path, as_published):
    """The family with the reference's networks and draws."""
    s = reference["settings"]
    teacher, student, _ = networks(reference)
    generator = get_generator("fast", s["generator"]["le_emb_size"], 32, 3, ngf=s["generator"]["ngf"]).double().train()
    settings = {k: s[k] for k in SETTINGS} | dict(label_embedding="orthogonal", as_published=as_published)
    pool = ImagePool((3, 32, 32), "cpu", tmp_path / "pool.u8")
    nayer = Nayer(teacher, student, generator, CIFAR, (3, 32, 32), 10, RUNTIME, pool,
                  synthesis_batch_size=s["synthesis_batch"], **settings)  # fmt: skip
    nayer.embedding = embedding(s["label_embedding_seed"])
    nayer.noisy.double()
    count = {"lives": 0, "draws": 0}
    targets = nayer.targets

    def begin_anew():
        fill(nayer.noisy, nayer.generator, f"life{count['lives']}." if count["lives"] else "")
        count["lives"] += 1

    def redraw():
        with torch.no_grad():
            for i, weight in enumerate(nayer.noisy.weight):
                weight.copy_(noise(weight.shape, s["noise_seed"] + 100 * count["draws"] + i))
            nayer.noisy.bias.zero_()
        count["draws"] += 1

    def with_tail():
        found, tails = targets(), s.get("tails")
        if tails:
            found[-len(tails[0]) :] = torch.tensor(tails[count["draws"] - 1])
        return found

    nayer.begin_anew, nayer.noisy.redraw, nayer.targets = begin_anew, redraw, with_tail
    return nayer, count


@pytest.mark.parametrize("case", VALUES)
def test_rounds(case, tmp_path):
    reference = VALUES[case]
    s = reference["settings"]
    nayer, count = make(reference, tmp_path, as_published=not s["student_kept_in_eval_mode"])
    recorded, added, seen = Recorded(nayer), [], []
    add, invert = nayer.pool.add, nayer.invert

    def adding(images):
        add(images)
        added.append(images)

    def inverting(targets, adversarial, tick):
        losses = invert(targets, adversarial, tick)
        rows = [t.detach().clone() for t in tensors(nayer.noisy, nayer.generator).values()]
        seen.append((targets, nayer.best_loss, dict(zip(tensors(nayer.noisy, nayer.generator), rows, strict=True)),
                     nayer.hooks.buffers,
                     {k: v.clone() for k, v in nayer.student.state_dict().items()}))  # fmt: skip
        return losses

    nayer.pool.add, nayer.invert = adding, inverting
    for call in reference["calls"]:
        lives, ticks = count["lives"], []
        for kept in (recorded.steps, recorded.totals, added, seen):
            kept.clear()
        nayer.student.eval()
        nayer.synthesize(call["adversarial_term_on"], ticks.append)
        assert (count["lives"] > lives) == call["recreated"]
        assert len(ticks) == len(call["loops"]) * s["g_steps"] == nayer.updates(call["adversarial_term_on"])
        steps = zip(recorded.steps, recorded.totals, strict=True)
        for loop, images, (targets, best, state, buffers, student) in zip(call["loops"], added, seen, strict=True):
            assert targets.tolist() == loop["targets"]
            for expected in loop["steps"]:
                losses, total = next(steps)
                for name, value in losses.items():
                    close(value, expected[name])
                close(total, expected["loss"])
            close(best, loop["best_cost"])
            check([images], loop["images_to_pool"])
            raw = (images.clamp(0, 1) * 255).to(torch.uint8).numpy()
            assert zlib.crc32(raw.tobytes()) == loop["images_to_pool"]["bytes_crc32"]
            learnt = {k: v for k, v in state.items() if "running" not in k and "num_batches" not in k}
            check(learnt.values(), loop["generator_parameters_after"]["all"])
            noisy = [v for k, v in learnt.items() if k.startswith("le1.")]
            check(noisy, loop["generator_parameters_after"]["noisy_layers"])
            for network, key in ((state, "generator"), (student, "student")):
                expected = loop[f"{key}_running_statistics_after"]
                for kind in ("running_mean", "running_var"):
                    flat = torch.cat([v for k, v in network.items() if k.endswith(kind)])
                    close(flat.norm(), expected[f"{kind}_l2"])
                counted = sum(int(v) for k, v in network.items() if k.endswith("num_batches_tracked"))
                assert counted == expected["num_batches_tracked_total"]
            if s["bn_mmt"]:
                expected = loop["bn_momentum_buffers"]["total_l2"]
                close(buffers.norm(), expected)
    for name, values in reference["generator_per_parameter_after_last_call"].items():
        check([tensors(nayer.noisy, nayer.generator)[name]], values, rel=1e-6)  # as in test_fast_meta
    assert len(nayer.pool) == reference["images_in_pool"]


@pytest.mark.parametrize("case", REFERENCE["generator_recreation"]["cases"])
def test_when_a_generator_begins_anew(case, tmp_path):
    for as_published in (False, True):
        nayer, _ = make(VALUES["nayer/student_kept_in_eval_mode,bn_mmt=0.9"], tmp_path, as_published)
        nayer.g_life, nayer.warmup, found = case["g_life"], case["warmup"], []
        nayer.begin_anew = lambda found=found, nayer=nayer: found.append(nayer.rounds - 1)
        nayer.invert = lambda *_: {}
        for _ in range(case["of_calls"]):
            nayer.round(True, None)
        every = list(range(0, case["of_calls"], case["g_life"]))
        assert found == (case["calls_counted_from_0"] if as_published else every)


def test_a_generator_that_begins_anew_is_as_new(tmp_path):
    nayer, _ = make(VALUES["nayer/student_kept_in_eval_mode,bn_mmt=0.9"], tmp_path, False)
    fresh = get_generator("fast", 32, 32, 3, ngf=8).double()
    nayer.begin_anew()  # the reference's, which fills it with larger weights
    torch.manual_seed(0)
    Nayer.begin_anew(nayer)
    for (name, value), new in zip(nayer.generator.state_dict().items(), fresh.state_dict().values(), strict=True):
        assert value.shape == new.shape
        assert value.std().item() == pytest.approx(new.std().item(), rel=0.2) if value.numel() > 99 else True, name


def test_embeddings(tmp_path):
    teacher = get_model("resnet8", 10, 3).eval()
    rows = embeddings("orthogonal", teacher, 10, (3, 32, 32))
    torch.testing.assert_close(rows @ rows.t() / 512, torch.eye(10), atol=1e-5, rtol=0)
    assert embeddings("orthogonal", teacher, 600, (3, 32, 32)).shape == (600, 600)
    assert torch.equal(embeddings("teacher", teacher, 10, (3, 32, 32)), teacher.fc.weight)
    lenet5 = get_model("lenet5")  # whose features, as DAFL has them, enter another layer
    assert torch.equal(embeddings("teacher", lenet5, 10, (1, 32, 32)), lenet5.fc2.weight)
    file = tmp_path / "text.npy"
    np.save(file, np.arange(20, dtype=np.float16).reshape(10, 2))
    assert embeddings(str(file), teacher, 10, (3, 32, 32)).tolist()[1] == [2.0, 3.0]
    for array, text in (
        (np.zeros((9, 2)), "it must be a .npy file of 10 rows"),
        (np.zeros(10), "its array is float64 of shape"),
        (np.full((10, 2), np.nan), "not finite"),
        (np.array([["a", "b"]] * 10), "its array is <U1"),
        (np.array([[None, 1]] * 10), "it must be a .npy file"),
    ):
        np.save(file, array)
        with pytest.raises(UsageError, match=text):
            embeddings(str(file), teacher, 10, (3, 32, 32))
    np.savez(tmp_path / "several.npz", np.zeros((10, 2)))
    whole = (tmp_path / "several.npz").read_bytes()
    for content, text in ((whole, "it holds several arrays"), (whole[:60], "it must be a .npy file")):
        file.write_bytes(content)
        with pytest.raises(UsageError, match=text):
            embeddings(str(file), teacher, 10, (3, 32, 32))
    with pytest.raises(UsageError, match="is not found: take orthogonal"):
        embeddings("teacher", teacher, 11, (3, 32, 32))


@pytest.mark.parametrize("dataset, g_steps", [("cifar10", 30), ("cifar100", 40)])
def test_published_settings(dataset, g_steps):
    args = datafree_kd.parse_args(["--method", "nayer", "--dataset", dataset])
    found = {k: getattr(args, k) for k in METHODS["nayer"].recipe}
    assert found == dict(
        n_epochs=320, warmup=20, ep_steps=400, kd_steps=400, batch_size=512, synthesis_batch_size=400, lr=0.2, T=20.0,
        weight_decay=1e-4, criterion="kl", g_steps=g_steps, lr_g=4e-3, g_loops=2, gwp_loops=10, g_life=10, adv=1.33,
        bn=10.0, oh=0.5, bn_mmt=0.9, generator="fast", nz=1000, ngf=64, label_embedding="orthogonal",
    )  # fmt: skip
    rounds = datafree_kd.counts(args, lambda adversarial: Nayer.batches(vars(args), adversarial))
    assert rounds == [10] * 20 + [2] * 300


def test_published_settings_of_tiny_imagenet():
    args = vars(datafree_kd.parse_args(["--method", "nayer", "--dataset", "tiny-imagenet"]))
    assert {k: args[k] for k in ("g_steps", "g_loops", "gwp_loops", "synthesis_batch_size", "batch_size", "lr",
                                 "kd_steps", "ep_steps", "warmup", "teacher", "student", "adv")} == dict(
        g_steps=60, g_loops=4, gwp_loops=20, synthesis_batch_size=200, batch_size=256, lr=0.1, kd_steps=1000,
        ep_steps=1000, warmup=20, teacher="resnet34", student="resnet18", adv=1.33,
    )  # fmt: skip


def test_mistakes(refused):
    flags = "--method", "nayer", "--label_embedding"
    assert "it takes orthogonal, teacher, or a .npy file" in refused(datafree_kd, *flags, "clip")
    text = refused(datafree_kd, "--method", "fast", "--label_embedding", "teacher")
    assert "--label_embedding is not a setting of fast" in text
