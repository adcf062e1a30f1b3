"""A method, a network and a data set from outside: one `register` each, and every script knows them."""

import numpy as np
import pytest
import torch
from torch import nn

import DAFL_train
import data
import datafree_kd
import DFAD_cifar
import DFND_train
import teacher_train
import vanilla_kd
import ZSKT_train
from datafree import synthesis
from datafree.synthesis.base import METHODS, STUDENT, Method, Synthesizer
from models import MODELS
from models.registry import register as register_model


class Coloured(Synthesizer):
    """A toy method: noise images of one random level each, nudged towards random classes."""

    settings = ("synthesis_batch_size", "g_steps", "oh")
    terms = ("oh",)

    def invert(self, z, targets, adversarial, tick):
        """One round of images from z."""
        x = torch.rand(self.synthesis_batch_size, *self.shape, device=self.runtime.device)
        tick(x.mean())
        self.pool.add(x)
        return {"loss_oh": x.mean()}

    def round(self, adversarial, tick):
        return self.invert(None, self.targets(), adversarial, tick)

    def state_dict(self):
        return {}

    def load_state_dict(self, state):
        pass


class Tiny(nn.Module):
    def __init__(self, num_classes=10, channels=1):
        super().__init__()
        self.fc = nn.Linear(channels * 64, num_classes)

    def forward(self, x):
        return self.fc(nn.functional.adaptive_avg_pool2d(x, 8).flatten(1))


def load_toy(root, splits, download, attribute):
    """Two classes: dark and bright squares."""
    images = (
        np.zeros((64, 1, 16, 16), np.uint8) + np.where(np.arange(64) % 2, 200, 40).astype(np.uint8)[:, None, None, None]
    )
    split = data.TensorSplit(torch.from_numpy(images), torch.arange(64) % 2)
    return data.Raw(("dark", "bright"), split, split if "train" in splits else None)


@pytest.fixture
def toys():
    data.register("toy", data.Source(load_toy, 16, 1, (0.5,), (0.5,)))
    register_model("tiny", Tiny)
    settings = dict(synthesis_batch_size=16, g_steps=1, oh=1.0)
    synthesis.register("coloured", Method(Coloured, STUDENT | settings))
    yield
    del data.SOURCES["toy"], MODELS["tiny"], METHODS["coloured"]


def test_toys_in_every_script(toys, tmp_path):
    """A data set without presets of its own takes those of a folder; a method is a choice of --method."""
    common = ["--dataset", "toy", "--out", tmp_path, "--checkpoints", tmp_path, "--n_epochs", "2", "--batch_size", "16"]
    pair = ["--teacher", "tiny", "--student", "tiny"]

    def run(script, *flags):
        return script.main(script.parse_args([*common, *flags]))

    assert run(teacher_train, "--model", "tiny", "--lr", "0.1")["best"] == 100
    assert run(vanilla_kd, *pair, "--transfer_set", "original")["last"] > 40
    for script, *flags in (
        (DAFL_train, "--iterations", "2", "--nz", "4"),
        (DFAD_cifar, "--epoch_itrs", "1", "--nz", "4"),
        (ZSKT_train, "--epoch_itrs", "1", "--nz", "4", "--at", "0"),
        (DFND_train, "--wild", "digits", "--num_select", "64"),
    ):
        assert run(script, *pair, *flags)["teacher_accuracy"] == 100
    result = run(datafree_kd, *pair, "--method", "coloured", "--ep_steps", "4", "--kd_steps", "2")
    assert result["method"] == "coloured" and result["generated_images"] == 2 * 2 * 16
