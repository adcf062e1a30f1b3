"""Networks that are nobody's but the user's: from a file, torchvision or timm, or a saved program, in every script."""

import copy
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from reference_fill import fill
from torch import nn

import DAFL_train
import datafree_kd
import DFAD_cifar
import DFND_train
import teacher_train
import vanilla_kd
import ZSKT_train
from datafree import checkpoint
from datafree.fold import fold_batch_norm
from datafree.hooks import features_of, settle_features
from datafree.runtime import Runtime
from datafree.session import Session
from models import NetworkError, get_model
from models.outside import logits_of, word_of

ROOT = Path(__file__).parent.parent
NETS = """
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

import beside

@dataclass
class Answer:
    logits: torch.Tensor
    hidden: torch.Tensor

class Net(nn.Module):
    def __init__(self, klassen, answer):
        super().__init__()
        self.Stamm = nn.Conv2d(1, beside.WIDTH, 3, stride=2, bias=False)
        self.norm_1 = nn.BatchNorm2d(8)
        self.noch = nn.Conv2d(8, 8, 3, stride=2)
        self.norm_2 = nn.BatchNorm2d(8)
        self.kopf = nn.Linear(8, klassen)
        self.never_runs = nn.Linear(8, 3)
        self.nor_this = nn.BatchNorm2d(4)
        self.answer = answer

    def forward(self, bilder):
        h = F.relu(self.norm_1(self.Stamm(bilder)))
        h = F.relu(self.norm_2(self.noch(h))).mean((2, 3))
        return self.answer(self.kopf(h), h)

def plain(num_classes=10):
    return Net(num_classes, lambda logits, h: logits)

def dictionary(num_classes=10):
    return Net(num_classes, lambda logits, h: {"hidden": h, "logits": logits})

def pair(num_classes=10):
    return Net(num_classes, lambda logits, h: (h, logits))

def answer(num_classes=10):
    return Net(num_classes, Answer)

def grouped(num_classes, channels):
    return nn.Sequential(
        nn.Conv2d(channels, 8, 5, 4), nn.GroupNorm(2, 8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(8, num_classes),
    )

def bare():
    return nn.Sequential(nn.Conv2d(1, 10, 32), nn.Flatten())

def seven():
    return plain(7)

def fixed():
    return nn.Sequential(nn.Flatten(), nn.Linear(28 * 28, 10))

def probabilities():
    return nn.Sequential(nn.Flatten(), nn.Linear(32 * 32, 10), nn.Softmax(1))

def two():
    return Net(10, lambda logits, h: {"a": logits, "b": h})

def raises():
    raise KeyError("no such\\nlayer as 'x'")

def needs(depth):
    return plain()

def scripted():
    return torch.jit.trace(plain().eval(), torch.zeros(2, 1, 32, 32))

def lazy():
    return nn.Sequential(nn.Flatten(), nn.LazyLinear(10))

def weightless():
    return nn.Sequential(nn.AvgPool2d(3), nn.Flatten())

def blind():
    network = plain()
    network.forward = torch.no_grad()(network.forward)
    return network

def text():
    return "a network"

class Whole(nn.Sequential):
    def train(self, mode=True):
        super().train(mode)

def own_train():
    return Whole(nn.Flatten(), nn.Linear(32 * 32, 10))

class Shifted(nn.Sequential):
    def forward(self, x):
        x -= 0.5
        return super().forward(x)

def in_place():
    return Shifted(nn.Flatten(), nn.Linear(32 * 32, 10))
"""
TINY = "--n_epochs 1 --batch_size 16 --nz 8 --sample_every 0 --precision fp32".split()
DAFL = [*TINY, "--iterations", "2"]
KD = [*TINY, *"--ep_steps 2 --kd_steps 1 --synthesis_batch_size 16 --g_steps 2 --ngf 8 --warmup 0".split()]


@pytest.fixture(scope="session")
def nets(tmp_path_factory):
    """A folder with a file of networks, and weights of each: `plain.pt` is those of `plain`."""
    folder = tmp_path_factory.mktemp("nets")
    (folder / "beside.py").write_text("WIDTH = 8\n")
    (folder / "nets.py").write_text(NETS)
    torch.manual_seed(0)
    for name in ("plain", "grouped", "bare"):
        torch.save(get_model(f"{folder / 'nets.py'}:{name}", 10, 1).state_dict(), folder / f"{name}.pt")
    return folder


@pytest.fixture(scope="session")
def programs(nets):
    """`plain` as saved programs."""
    network, x = get_model(f"{nets / 'nets.py'}:plain", 10).eval(), torch.randn(2, 1, 32, 32)
    network.load_state_dict(torch.load(nets / "plain.pt"))
    several = ({0: torch.export.Dim("n")},)
    torch.export.save(torch.export.export(network, (x,), dynamic_shapes=several), nets / "any.pt2")
    torch.export.save(torch.export.export(network, (x,)), nets / "two.pt2")
    torch.export.save(torch.export.export(network.train(), (x,), dynamic_shapes=several), nets / "training.pt2")
    with pytest.warns((DeprecationWarning, FutureWarning)):
        torch.jit.trace(network.eval(), x).save(nets / "script.pt")
    return nets


def run(script, folder, *flags):
    return script.main(script.parse_args([*map(str, flags), "--dataset", "digits", "--out", str(folder)]))


@pytest.fixture
def stops(refused, tmp_path):
    """Run a script, shortly, and check that it ends in one line before there is a run; return that line."""

    def run(script, *flags):
        short = {DAFL_train: DAFL, datafree_kd: KD}.get(script, ["--n_epochs", "1"])
        error = refused(script, *short, *map(str, flags), "--out", tmp_path / "none")
        assert not (tmp_path / "none").exists()
        return error

    return run


def named(nets, name, weights="plain"):
    return "--teacher", f"{nets / 'nets.py'}:{name}", "--teacher_ckpt", nets / f"{weights}.pt"


@pytest.mark.parametrize("name", ["plain", "dictionary", "pair", "answer"])
def test_a_file_of_ones_own_in_dafl_and_fast_meta(name, nets, tmp_path):
    """Whatever it returns its logits in; layers of any name are found, and those that never run do not matter."""
    student = "--student", f"{nets / 'nets.py'}:{name}"
    made = run(DAFL_train, tmp_path, *named(nets, name), *student, *DAFL, "--a", "0.1")
    assert made["args"]["teacher"] == f"{nets / 'nets.py'}:{name}" and f"-nets_{name}_" in made["name"]
    assert list(checkpoint.read(tmp_path / made["name"] / "best.pt")["state_dict"])[0] == "Stamm.weight"
    made = run(datafree_kd, tmp_path, *named(nets, name), *student, *KD, "--method", "fast_meta")
    assert run(datafree_kd, tmp_path, *named(nets, name), *student, *KD, "--method", "fast_meta", "--resume") == made
    assert "loss_bn" in (tmp_path / made["name"] / "metrics.csv").read_text()


@pytest.mark.parametrize(("name", "dafl"), [("grouped", ()), ("bare", ("--a", "0"))])
def test_networks_without_batch_norm(name, dafl, nets, tmp_path, stops):
    pair = (*named(nets, name, name), "--student", f"{nets / 'nets.py'}:{name}")
    run(DAFL_train, tmp_path, *pair, *DAFL, "--a", "0.1", *dafl)
    made = run(datafree_kd, tmp_path, *pair, *KD, "--method", "fast")
    assert "no BatchNorm: the term bn is left out" in (tmp_path / made["name"] / "log.txt").read_text()
    error = stops(datafree_kd, *pair, "--method", "fast", "--bn", "1")
    assert "has no BatchNorm layers" in error and "dafl" in error
    if name != "grouped":
        error = stops(DAFL_train, *pair, "--a", "0.1")
        assert "give --feature_layer NAME" in error


def test_scripts_that_read_images_too(nets, tmp_path):
    pair = (*named(nets, "dictionary"), "--student", f"{nets / 'nets.py'}:pair")
    short = "--n_epochs", "1", "--batch_size", "32"
    run(vanilla_kd, tmp_path, *pair, *short)
    run(DFND_train, tmp_path, *pair, *short, "--wild", "digits", "--num_select", "64")
    run(ZSKT_train, tmp_path, *pair, *short, "--epoch_itrs", "1", "--nz", "4", "--at", "0")
    run(DFAD_cifar, tmp_path, *pair, *short, "--epoch_itrs", "1", "--nz", "4")


def test_a_teacher_that_is_trained_is_found_by_its_file(nets, tmp_path, monkeypatch):
    monkeypatch.chdir(nets)
    folder = "--checkpoints", tmp_path / "teachers"
    made = run(teacher_train, tmp_path, "--model", "nets.py:pair", "--n_epochs", "1", *folder)
    best = tmp_path / made["name"] / "best.pt"
    run(teacher_train, tmp_path, "--model", "nets.py:pair", "--evaluate_only", "--ckpt", best)
    made = run(DAFL_train, tmp_path, "--teacher", "nets.py:pair", *folder, *DAFL)
    assert made["teacher_weights"]["file"] == f"digits-{word_of('nets.py:pair')}-digits.pt"
    assert made["teacher_weights"]["run"].startswith("teacher_train-digits-nets_pair_")


class Exported(nn.Module):
    """Makes a tensor itself, and asks for a type: an export says of both where and what they were."""

    def __init__(self):
        super().__init__()
        self.body = nn.Conv2d(1, 10, 3)

    def forward(self, x):
        x = self.body(x).float().mean((2, 3))
        return x + torch.arange(10, device=x.device)


def test_a_saved_program_runs_in_another_precision_and_on_another_device(tmp_path):
    network, x, several = Exported().eval(), torch.randn(2, 1, 32, 32), ({0: torch.export.Dim("n")},)
    torch.export.save(torch.export.export(network, (x,), dynamic_shapes=several), tmp_path / "a.pt2")
    program = get_model(str(tmp_path / "a.pt2"), 10, 1)
    torch.testing.assert_close(program(x), network(x))
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(program(x), network(x), rtol=0, atol=0.05)
    assert program.to("meta")(x.to("meta")).device.type == "meta"
    nn.Sequential(program).to_empty(device="cpu")  # as a part of another network, and back
    assert program(x).device.type == "cpu"


def test_a_teacher_is_folded_whoever_asks_first():
    """Under bfloat16's autocast, too, whose rounding is larger than what a folded copy may differ by."""
    torch.manual_seed(0)
    layers = [layer for _ in range(12) for layer in (nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())]
    teacher = nn.Sequential(nn.Conv2d(3, 8, 3), *layers, nn.Flatten(), nn.Linear(8 * 14 * 14, 10)).eval()
    for layer in layers[1::3]:
        nn.init.uniform_(layer.weight, 0.5, 2)
        nn.init.uniform_(layer.running_var, 0.1, 1)
    data, runtime = SimpleNamespace(channels=3, img_size=16), Runtime(torch.device("cpu"), "bf16")
    session = SimpleNamespace(data=data, runtime=runtime, teacher=teacher, args=SimpleNamespace(teacher="a.py:net"))
    with runtime.autocast(), torch.no_grad():
        folded = Session.folded_teacher.func(session)
    assert not any(isinstance(layer, nn.BatchNorm2d) for layer in folded.modules())


@pytest.mark.parametrize("file", ["any.pt2", "script.pt"])
def test_saved_programs(file, programs, tmp_path, stops):
    teacher = "--teacher", str(programs / file)
    kept = get_model(f"{programs / 'nets.py'}:plain", 10).eval()
    kept.load_state_dict(torch.load(programs / "plain.pt"))
    x = torch.randn(5, 1, 32, 32)
    torch.testing.assert_close(get_model(teacher[1], 10, 1)(x), kept(x))
    made = run(DAFL_train, tmp_path, *teacher, *DAFL)
    same = run(DAFL_train, tmp_path, *named(programs, "plain"), *DAFL)
    assert made["teacher_accuracy"] == same["teacher_accuracy"] and made["teacher_weights"]["file"] == file
    assert made["last"] == pytest.approx(same["last"], abs=1)
    run(datafree_kd, tmp_path, *teacher, *KD, "--method", "dfad")
    for script, flags, words in (
        (DAFL_train, ("--a", "0.1"), "the features, which L_a reads, are not found"),
        (datafree_kd, ("--method", "dafl"), "the features, which L_a reads, are not found"),
        (datafree_kd, ("--method", "cmi"), "give --cr 0, or take --method zskt or dfad or dafl"),
        (datafree_kd, ("--method", "fast", "--bn", "1"), "give --bn 0, or take --method zskt or dfad or dafl"),
        (ZSKT_train, ("--at", "1"), "give --at 0"),
        (DAFL_train, ("--teacher_ckpt", programs / "plain.pt"), "has weights of its own: leave --teacher_ckpt out"),
        (DAFL_train, ("--student", teacher[1]), "saved program, which cannot be trained"),
    ):
        assert words in stops(script, *teacher, *flags)


def test_torchvision(tmp_path, stops):
    name = "torchvision:squeezenet1_1"
    torch.save(get_model(name, 10).state_dict(), tmp_path / "t.pt")
    flags = "--teacher", name, "--teacher_ckpt", tmp_path / "t.pt", "--student", name, "--channels", "3"
    made = run(DAFL_train, tmp_path, *flags, *DAFL, "--a", "0.1")
    assert made["name"].startswith("DAFL_train-digits-torchvision_squeezenet1_1-torchvision_squeezenet1_1-")
    run(datafree_kd, tmp_path, *flags, *KD, "--method", "dafl")
    assert "did you mean resnet18" in stops(DAFL_train, "--teacher", "torchvision:resnet17")


def test_older_files_of_torchvision_say_their_version(tmp_path):
    """MNASNet reads its files by it."""
    network = get_model("torchvision:mnasnet0_5", 10)
    torch.save({"model_state_dict": network.state_dict()}, tmp_path / "t.pt")
    checkpoint.load_weights(network, checkpoint.read(tmp_path / "t.pt"), "t.pt", "mnasnet0_5")


def test_timm(tmp_path, stops):
    pytest.importorskip("timm")
    name = "timm:test_vit"
    torch.save(get_model(name, 10).state_dict(), tmp_path / "t.pt")
    flags = "--teacher", name, "--teacher_ckpt", tmp_path / "t.pt", "--channels", "3"
    assert DAFL_train.parse_args(["--teacher", name, "--student", "resnet8"]).img_size == 160  # timm's own
    flags += "--student", "resnet8", "--img_size", "32"
    made = run(DAFL_train, tmp_path, *flags, *DAFL, "--a", "0.1")
    card = checkpoint.read(tmp_path / made["name"] / "best.pt")["metadata"]
    assert card["mean"] == card["std"] == [0.5] * 3
    made = run(datafree_kd, tmp_path, *flags, *KD, "--method", "fast", "--mean", "0.4", "0.4", "0.4")
    assert checkpoint.read(tmp_path / made["name"] / "best.pt")["metadata"]["mean"] == [0.4] * 3
    assert "no classifier" in stops(DAFL_train, "--teacher", "timm:no_such_network")
    assert "leave out what follows the dot" in stops(DAFL_train, "--teacher", "timm:resnet18.no_such_tag")


def test_timm_that_is_not_there(monkeypatch, stops):
    monkeypatch.setitem(sys.modules, "timm", None)
    assert "pip install timm" in stops(DAFL_train, "--teacher", "timm:resnet18")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("nowhere", "has no function nowhere: give FILE.py:FUNCTION, one of Answer, Net, plain, dictionary"),
        ("raises", "KeyError: \"no such\\nlayer as 'x'\""),
        ("needs", "missing 1 required positional argument: 'depth'"),
        ("text", "returns a str: let it return a torch.nn.Module"),
        ("scripted", "returns a TopLevelTracedModule: let it return a torch.nn.Module, or save a program"),
        ("lazy", "has no weights yet: let its function run it once"),
        ("weightless", "has no weights yet"),
        ("own_train", "has a train() of its own that returns something else: end it with return self"),
        ("seven", "(kopf.weight is [10, 8], not [7, 8])"),
        ("", "names no function"),
    ],
)
def test_functions_that_make_no_network(name, words, nets, tmp_path, stops):
    error = stops(DAFL_train, *named(nets, name))
    assert words in error


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("seven", "makes values of shape [2, 7] of two images, not [2, 10], as digits has classes"),
        ("fixed", "cannot take images of 1x32x32 (RuntimeError: mat1 and mat2 shapes cannot be multiplied"),
        ("probabilities", "makes probabilities: let it return the logits"),
        ("in_place", "changes its images in place: write x = x - mean for x -= mean"),
        ("two", "returns a dict of a, b, in which the logits (N, 10) are not found: return them alone"),
    ],
)
@pytest.mark.parametrize("role", ["teacher", "student"])
def test_networks_that_do_not_fit_the_data(name, words, role, nets, tmp_path, stops):
    path = f"{nets / 'nets.py'}:{name}"
    torch.save(get_model(path, 10, 1).state_dict(), tmp_path / "t.pt")
    flags = named(nets, "plain") if role == "student" else ("--teacher_ckpt", tmp_path / "t.pt")
    error = stops(DAFL_train, f"--{role}", path, *flags)
    assert f"--{role} {path} {words}" in error


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"def net(:\n", "SyntaxError"),
        (b"import no_such_module\n", "ModuleNotFoundError: No module named 'no_such_module'"),
        (b"import sys\nsys.exit('usage')\n", "SystemExit: usage"),
        (b"from models import ResNet18\n", "models is these scripts' own: put the network into one file"),
        (b"\x00\xff", "makes no network"),
        (None, "does not exist or is no file"),
    ],
)
def test_files_that_do_not_run(content, words, nets, tmp_path, stops):
    if content:
        (tmp_path / "net.py").write_bytes(content)
    path = f"{tmp_path / 'net.py'}:net"
    assert words in stops(DAFL_train, "--teacher", path, "--teacher_ckpt", nets / "plain.pt")


@pytest.mark.parametrize(
    ("file", "words"),
    [
        ("two.pt2", "export it for any number of images"),
        ("training.pt2", "save it from model.eval()"),
        ("plain.pt", "is damaged or no saved program: if it holds weights alone, give them as --teacher_ckpt"),
        ("text.pt2", "is damaged or no saved program"),
        ("absent.pt2", "does not exist"),
    ],
)
def test_programs_that_do_not_fit(file, words, programs, tmp_path, stops):
    (programs / "text.pt2").write_text("no program")
    assert words in stops(DAFL_train, "--teacher", programs / file)


def test_programs_of_another_size_or_as_weights(programs, stops):
    error = stops(DAFL_train, "--teacher", programs / "any.pt2", "--img_size", "16", "--student", "resnet8")
    assert "cannot take images of 1x16x16 (AssertionError: Guard failed" in error and "give --img_size" in error
    for file in ("script.pt", "any.pt2"):
        assert "give it as --teacher" in stops(DAFL_train, "--teacher_ckpt", programs / file)


def test_names_of_runs(tmp_path):
    """Other content, another function, another file: another folder; the same network from elsewhere: the same one."""

    def name(path):
        return DAFL_train.parse_args(["--teacher", f"{path}:net"]).run_name

    paths = [tmp_path / folder / "net.py" for folder in "abc"]
    for path, content in zip(paths, ("net = 1", "net = 2", "net = 1"), strict=True):
        path.parent.mkdir()
        path.write_text(content)
    first, second, third = map(name, paths)
    assert first == third != second and first.startswith("DAFL_train-digits-net_net_")
    assert DAFL_train.parse_args(["--teacher", f"{paths[0]}:other"]).run_name not in (first, second)
    paths[0].write_text("net = 3")
    assert name(paths[0]) not in (first, second)


def test_state_dict_round_trip(nets, tmp_path):
    """The parameters' names are the network's own, and load with and without what wrappers put in front of them."""
    network = get_model(f"{nets / 'nets.py'}:dictionary", 10)
    state = network.state_dict()
    assert list(state) == list(torch.load(nets / "plain.pt"))
    for i, content in enumerate(
        (
            state,
            {"model": {f"module.{k}": v for k, v in state.items()}},
            {"state_dict": {f"_orig_mod.{k}": v for k, v in state.items()}},
            {f"module._orig_mod.{k}": v for k, v in state.items()},
        )
    ):
        torch.save(content, tmp_path / f"{i}.pt")
        other = get_model(f"{nets / 'nets.py'}:dictionary", 10)
        checkpoint.load_weights(other, checkpoint.read(tmp_path / f"{i}.pt"), "t.pt", "it")
        assert all(map(torch.equal, other.state_dict().values(), state.values()))
    inner = nn.ModuleDict({"module": nn.Linear(2, 2)})  # a name of its own that looks like a wrapper's
    checkpoint.load_weights(inner, inner.state_dict(), "t.pt", "it")


def test_safetensors(nets, tmp_path, monkeypatch, stops):
    safetensors = pytest.importorskip("safetensors.torch")
    state, path = torch.load(nets / "plain.pt"), tmp_path / "t.safetensors"
    safetensors.save_file(state, path)
    assert all(torch.equal(v, state[k]) for k, v in checkpoint.read(path).items())
    flags = "--teacher", f"{nets / 'nets.py'}:plain", "--teacher_ckpt", path
    run(DAFL_train, tmp_path, *flags, *DAFL)
    path.write_bytes(b"no tensors")
    assert "is damaged or no checkpoint" in stops(DAFL_train, *flags)
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    assert "pip install safetensors" in stops(DAFL_train, *flags)


@pytest.mark.parametrize(
    ("output", "found"),
    [
        (lambda a, b: a, True),
        (lambda a, b: {"out": a, "aux": b}, True),
        (lambda a, b: {"logits": a, "out": b}, True),
        (lambda a, b: {"x": a}, True),
        (lambda a, b: [b, a], True),
        (lambda a, b: {"x": a, "y": b}, False),
        (lambda a, b: (b,), False),
        (lambda a, b: None, False),
        (lambda a, b: "logits", False),
    ],
)
def test_logits_of_an_output(output, found):
    logits = torch.randn(2, 10)
    if found:
        assert logits_of(output(logits, torch.randn(2, 3)), 10) is logits
    else:
        with pytest.raises(NetworkError, match="return them alone"):
            logits_of(output(logits, torch.randn(2, 3)), 10)


def test_features_are_what_the_network_sees():
    """What enters the last layer of a registry's network, exactly; nothing is hooked where they are not wanted."""
    network, x = fill(get_model("wrn16_1")), torch.randn(2, 3, 32, 32, dtype=torch.float64)
    settle_features(network, x)
    with torch.no_grad(), features_of(network) as features:
        network(x)
    h = network.block3(network.block2(network.block1(network.conv1(x))))
    assert torch.equal(features[0], network.bn1(h).relu().mean((2, 3))) or torch.equal(
        features[0], nn.functional.adaptive_avg_pool2d(network.bn1(h).relu(), 1).flatten(1)
    )
    assert features[1] is network.fc
    with features_of(network, False) as features:
        assert not network.fc._forward_pre_hooks
        network(x)
    assert features == []


def test_a_generator_needs_a_teacher_that_passes_gradients(nets, tmp_path, stops):
    teacher = named(nets, "blind")
    assert "passes no gradient on to the images" in stops(DAFL_train, *teacher)
    run(vanilla_kd, tmp_path, *teacher, "--n_epochs", "1")


def test_the_layer_of_the_features_is_named(nets, tmp_path, stops):
    teacher = named(nets, "pair")
    error = stops(DAFL_train, *teacher, "--a", "0.1", "--feature_layer", "nowhere")
    assert "there is no such layer, but" in error and "kopf" in error
    assert "are not found" in stops(DAFL_train, *teacher, "--a", "0.1", "--feature_layer", "never_runs")
    for script, weight in ((DAFL_train, "--a"), (datafree_kd, "--act")):
        assert "whose weight" in stops(script, *teacher, "--feature_layer", "kopf"), weight
    named_one, found = (
        run(DAFL_train, tmp_path, *teacher, *DAFL, "--a", "0.1", *more) for more in (("--feature_layer", "noch"), ())
    )
    assert named_one["name"] != found["name"]


def test_folding_keeps_what_a_network_says(nets):
    x = torch.randn(3, 1, 32, 32)
    for name in ("plain", "dictionary", "pair"):
        network = get_model(f"{nets / 'nets.py'}:{name}", 10).eval()
        network(torch.randn(8, 1, 32, 32))
        network.norm_1.running_mean.add_(0.3)
        folded = fold_batch_norm(network, x)
        assert folded is not network and not any(m is network.norm_1 for m in folded.modules())
        torch.testing.assert_close(folded(x), network(x))
    shared = nn.Sequential(conv := nn.Conv2d(1, 1, 1), nn.BatchNorm2d(1), conv, nn.BatchNorm2d(1)).eval()
    shared[1].running_var.fill_(9.0)
    assert fold_batch_norm(shared, x) is shared  # one convolution cannot absorb two
    assert copy.deepcopy(network)(x).shape == (3, 10)


def test_the_example_is_he_et_als_network():
    network = get_model(f"{ROOT / 'examples' / 'resnet20_option_a.py'}:resnet20", 10, 3).eval()
    state = network.state_dict()
    assert sum(p.numel() for p in network.parameters()) == 269_722
    assert {"conv1.weight", "layer2.0.conv1.weight", "layer3.2.bn2.running_var", "linear.bias"} <= state.keys()
    assert not any("shortcut" in name for name in state)
    x = torch.randn(2, 3, 32, 32)
    folded = fold_batch_norm(network, x)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in folded.modules())
    torch.testing.assert_close(folded(x), network(x))
    block = network.layer2[0]  # nothing but zeros in its new channels, where its convolutions say nothing
    nn.init.zeros_(block.bn2.weight)
    x = torch.rand(1, 16, 8, 8)
    y = block(x)
    assert torch.equal(y[:, 8:24], x[:, :, ::2, ::2]) and not y[:, :8].any() and not y[:, 24:].any()
