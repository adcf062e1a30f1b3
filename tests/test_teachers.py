"""teacher_train.py's recipes, rates and files, and the teacher that vanilla_kd.py distils from."""

import hashlib
import json
import shutil

import pytest
import torch
from PIL import Image
from torch import nn

import DAFL_train
import teacher_train
import vanilla_kd
from data import get_dataset
from datafree import checkpoint, teachers
from datafree.cli import path_word
from datafree.errors import TimeLimit, UsageError
from datafree.session import Session
from models import get_model

SHORT = ("--dataset", "digits", "--n_epochs", "1", "--batch_size", "256")


def run(script, root, *flags):
    return script.main(script.parse_args([*SHORT, "--out", root / "runs", "--checkpoints", root / "c", *flags]))


@pytest.mark.parametrize(
    ("dataset", "model", "recipe"),
    [
        ("digits", "resnet34", "digits"),
        ("celeba", "alexnet", "celeba"),
        ("imagenet", "resnet18_imagenet", "imagenet"),
        ("caltech101", "resnet34_imagenet", "dfad-caltech101"),
        ("mnist", "lenet5", "dafl-mnist"),
        ("usps", "lenet5", "dafl-mnist"),
        ("cifar10", "resnet34", "dafl"),
        ("cifar100", "wrn40_2", "fast"),
        ("folder", "vgg11", "fast"),
    ],
)
def test_default_recipe(dataset, model, recipe):
    assert teacher_train.parse_args(["--dataset", dataset, "--model", model]).recipe == recipe


def test_default_network_is_the_data_sets():
    assert [teacher_train.parse_args(["--dataset", d]).model for d in ("mnist", "svhn")] == ["lenet5", "wrn40_2"]


def test_recipe_of_imagenet():
    args = teacher_train.parse_args(["--dataset", "imagenet", "--model", "resnet18_imagenet"])
    assert (args.optimizer, args.lr, args.weight_decay, args.batch_size) == ("sgd", 0.1, 1e-4, 256)
    assert (args.n_epochs, args.milestones, args.gamma, args.schedule) == (90, [1 / 3, 2 / 3], 0.1, "steps")


def test_rates_of_nayer_are_those_of_a_cosine_to_0():
    args = teacher_train.parse_args(["--dataset", "cifar10", "--model", "resnet34", "--recipe", "nayer"])
    assert (args.optimizer, args.weight_decay, args.batch_size, args.n_epochs) == ("sgd", 5e-4, 256, 200)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], args.lr)
    published = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 200)
    for epoch in range(200):
        rate = teacher_train.lr_of(epoch, args)
        assert rate == pytest.approx(optimizer.param_groups[0]["lr"], abs=1e-9)
        optimizer.step()
        published.step()
    assert [teacher_train.lr_of(e, args) for e in (0, 100, 200)] == pytest.approx([0.1, 0.05, 0])
    args = teacher_train.parse_args(["--dataset", "cifar10", "--recipe", "fast"])
    assert [teacher_train.lr_of(e, args) for e in (119, 120, 199)] == pytest.approx([0.1, 0.02, 0.0008])


def test_schedule_reaches_the_optimiser(tmp_path, monkeypatch):
    rates = []
    monkeypatch.setattr(teacher_train, "set_lr", lambda optimizer, lr: rates.append(lr))
    run(teacher_train, tmp_path, "--recipe", "nayer", "--lr", "0.001", "--n_epochs", "2")
    assert rates == pytest.approx([0.001, 0.0005])


def test_two_recipes_have_two_folders_and_two_files(tmp_path, capsys):
    results = [run(teacher_train, tmp_path, "--recipe", r) for r in ("digits", "dafl-mnist")]
    names = [r["name"] for r in results]
    assert names[0].startswith("teacher_train-digits-lenet5-digits-") and "-dafl-mnist-" in names[1]
    assert {p.name for p in (tmp_path / "runs").glob("[!.]*")} == set(names)
    files = {p.name for p in (tmp_path / "c").iterdir()}
    assert files == {"digits-lenet5-digits.pt", "digits-lenet5-dafl-mnist.pt"}
    for result, recipe in zip(results, ("digits", "dafl-mnist"), strict=True):
        card = checkpoint.read(tmp_path / "c" / f"digits-lenet5-{recipe}.pt")["metadata"]
        assert (card["recipe"], card["run"], card["model"]) == (recipe, result["name"], "lenet5")
        assert (card["accuracy"], card["epoch"]) == (result["best"], 1) and result["recipe"] == recipe
    assert "in place of" not in capsys.readouterr().out


def test_a_longer_run_goes_on_from_a_shorter_one_of_any_name(tmp_path):
    flags = ("--recipe", "dafl", "--lr", "0.01", "--gamma", "0.5", "--weight_decay", "0", "--seed", "1")
    short = run(teacher_train, tmp_path, *flags)
    longer = run(teacher_train, tmp_path, *flags, "--n_epochs", "2", "--resume")
    assert "gamma" not in longer["name"]  # but a hash of all flags
    assert longer["name"] == short["name"].replace("n_epochs1", "n_epochs2")
    assert [p["epochs"] for p in longer["pieces"]] == [[1, 1], [2, 2]]
    assert [p.name for p in (tmp_path / "runs").glob("[!.]*")] == [longer["name"]]


def test_what_a_teacher_replaces_is_said(tmp_path, capsys):
    first = run(teacher_train, tmp_path)
    target = tmp_path / "c" / "digits-lenet5-digits.pt"
    second = run(teacher_train, tmp_path, "--seed", "1")
    line = f"{target}, in place of others ({first['name']}, epoch 1, {first['best']:.2f} %)"
    assert line in capsys.readouterr().out
    assert checkpoint.read(target)["metadata"]["run"] == second["name"] != first["name"]
    for content in (b"damaged", None):
        if content:
            target.write_bytes(content)
        else:
            checkpoint.save(checkpoint.read(target)["state_dict"], target)  # bare
        run(teacher_train, tmp_path)
        assert f"{target}, in place of others (unknown)" in capsys.readouterr().out
        assert checkpoint.read(target)["metadata"]["run"] == first["name"]


@pytest.mark.parametrize("script", [teacher_train, vanilla_kd])
def test_a_finished_run_is_not_touched(script, tmp_path, contents, capsys):
    run(teacher_train, tmp_path)
    result = run(script, tmp_path)
    before = contents(tmp_path)
    assert run(script, tmp_path, "--resume")["seconds"] == result["seconds"]
    assert contents(tmp_path) == before and "nothing is changed" in capsys.readouterr().out


def test_vanilla_kd_learns_from_the_folded_teacher(checkpoints, tmp_path, monkeypatch):
    sessions, seen = [], []

    class Watched(Session):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            sessions.append(self)

    def kd_loss(s_logits, t_logits, T):
        seen.append(t_logits)
        return s_logits.square().mean()

    monkeypatch.setattr(vanilla_kd, "Session", Watched)
    monkeypatch.setattr(vanilla_kd, "kd_loss", kd_loss)
    torch.manual_seed(0)
    x = torch.randn(8, 1, 32, 32)
    monkeypatch.setattr(vanilla_kd.Noise, "__iter__", lambda self: iter([(x, None)] * len(self)))
    networks = ("--teacher", "resnet8", "--student", "lenet5_half")
    flags = ("--transfer_set", "noise", "--checkpoints", checkpoints, "--n_epochs", "1", "--precision", "fp32")
    run(vanilla_kd, tmp_path, *networks, *flags)
    (s,) = sessions
    calls = [0, 0]
    for i, teacher in enumerate((s.teacher, s.folded_teacher)):
        for layer in filter(lambda m: isinstance(m, nn.BatchNorm2d), teacher.modules()):
            layer.register_forward_hook(lambda *_, i=i: calls.__setitem__(i, calls[i] + 1))
        teacher(x)
    assert calls[0] > calls[1] and not s.folded_teacher.training
    with torch.no_grad():
        assert torch.equal(seen[0], s.folded_teacher(x)) and not torch.equal(seen[0], s.teacher(x))
        assert torch.allclose(seen[0], s.teacher(x), rtol=1e-4, atol=1e-4)


def test_names_of_vanilla_kd():
    def name(*flags):
        return vanilla_kd.parse_args(flags).run_name

    start = "vanilla_kd-digits-lenet5-lenet5_half-"
    assert name() == start + "original" and name("--transfer_set", "svhn") == start + "svhn"
    assert name("--scratch") == start + "scratch"
    assert name("--alpha", "0.9", "--beta", "0.1") == start + "original-alpha_0.9-beta_0.1"
    paths = ("a/images", "b/images", "images")
    assert len({name("--transfer_set", path) for path in paths}) == 3
    assert len({name("--transfer_set", "images", "--transfer_root", root) for root in "ab"}) == 2
    assert len({name("--transfer_set", "folder", "--transfer_root", root) for root in "ab"}) == 2
    assert path_word("images") == "images" and path_word("a/images").startswith("images_")


def test_a_run_goes_on_with_the_same_transfer_set_only(tmp_path, checkpoints):
    images = tmp_path / "images"
    images.mkdir()
    for i in range(16):
        Image.new("L", (32, 32), i).save(images / f"{i}.png")
    flags = ("--transfer_set", images, "--batch_size", "8", "--n_epochs", "2", "--checkpoints", checkpoints)
    with pytest.raises(TimeLimit):
        run(vanilla_kd, tmp_path, *map(str, flags), "--time_limit", "0.0001")
    (images / "0.png").unlink()
    with pytest.raises(UsageError, match="the transfer set .fingerprint. was"):
        run(vanilla_kd, tmp_path, *map(str, flags), "--resume")


@pytest.mark.parametrize(("transfer_set", "train"), [("original", True), ("noise", True), ("usps", False)])
def test_only_sets_that_need_training_images_read_them(transfer_set, train, checkpoints, tmp_path, monkeypatch):
    asked = []

    def watched(*args, **kwargs):
        asked.append(kwargs["train"])
        return get_dataset(*args, **kwargs)

    monkeypatch.setattr("datafree.inputs.get_dataset", watched)
    wild = get_dataset("digits").train
    monkeypatch.setattr(vanilla_kd, "get_wild", lambda source, *_: (wild, source))
    result = run(vanilla_kd, tmp_path, "--transfer_set", transfer_set, "--checkpoints", checkpoints)
    assert asked == [train] and result["method"] == f"KD ({transfer_set})"
    assert result.get("transfer_fingerprint") == (None if train else "usps")
    assert result["teacher_weights"]["recipe"] == "digits"


def test_scratch_needs_no_teacher(tmp_path):
    result = run(vanilla_kd, tmp_path, "--scratch")
    assert (result["method"], result["student"]) == ("Student", "lenet5_half") and "teacher_weights" not in result
    assert run(vanilla_kd, tmp_path, "--scratch", "--evaluate_only")["accuracy"] == result["best"]


SHIPPED = sorted(teachers.SHIPPED.glob("*.pt"))


@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: p.stem)
def test_what_ships_is_what_its_record_says(path):
    """pretrained/<data>-<model>-<recipe>.pt, with the result.json of its run beside it; under 10 MB."""
    record, content = json.loads(path.with_suffix(".json").read_text()), checkpoint.read(path)
    known = checkpoint.metadata_of(content, path)
    assert hashlib.sha256(path.read_bytes()).hexdigest() == record["weights_sha256"]
    assert path.stem.split("-", 2)[:2] == [known["dataset"], known["model"]] == [record["dataset"], record["model"]]
    assert known["accuracy"] == record["best"] and record["commit"] and record["standard_error"] > 0
    model = get_model(known["model"], known["num_classes"], known["channels"])
    checkpoint.load_weights(model, content, path, known["model"])
    assert path.stat().st_size < 10e6 and len(SHIPPED) >= 4


def test_a_shipped_teacher_is_found_from_a_fresh_clone(tmp_path):
    args = DAFL_train.parse_args(["--dataset", "mnist", "--checkpoints", str(tmp_path)])
    assert teachers.find_teacher(args).name == "mnist-lenet5-dafl-mnist.pt"


def test_a_teacher_of_another_recipe(tmp_path, capsys):
    """The only one there is, wherever it lies, is taken; of several the recipes are named."""
    flags = ["--dataset", "cifar10", "--teacher", "wrn40_2", "--student", "wrn16_1", "--checkpoints", str(tmp_path)]
    with pytest.raises(UsageError, match="--teacher_recipe fast or nayer"):
        teachers.find_teacher(DAFL_train.parse_args(flags))
    flags = ["--dataset", "digits", "--checkpoints", str(tmp_path)]
    args = DAFL_train.parse_args(flags)
    args.teacher_recipe = "dfad"
    assert teachers.find_teacher(args).parent == teachers.SHIPPED
    shutil.copy(teachers.SHIPPED / "digits-lenet5-digits.pt", tmp_path)
    assert teachers.find_teacher(args).parent == tmp_path and "of another recipe" in capsys.readouterr().out
