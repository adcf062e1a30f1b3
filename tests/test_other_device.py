"""The scripts on a device that is not the CPU: nothing mixed, and no wait in the inner loops."""

import json
import shlex

import pytest
from test_run import CASES, command
from torch.utils import backend_registration

SCRIPTS = sorted({case.script.__name__ for case in CASES.values()})

pytestmark = pytest.mark.skipif(
    not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"),
    reason="this PyTorch cannot have a device that is written in Python",
)


def waits(forks, script, *runs):
    """Run a script with each of these flags; returns where it waits in its epochs."""
    end = forks.run("tests/other_device", [script, *map(shlex.join, runs)], seconds=600)
    assert end.code == 0 and "on fakegpu" in end.stdout, end.stderr[-2000:]
    return json.loads(end.stdout.splitlines()[-1])


FAULTY = """
import torch
import other_device

def train_epoch():
    x = torch.ones(3, device=other_device.DEVICE)
    x.sum().item(), x.cpu(), x[x > 0], x.nonzero()
    try:
        x + torch.ones(3)
    except RuntimeError as error:
        print(error)

with other_device.Everything():
    train_epoch()
print(sum(other_device.waits.values()))
"""


def test_such_a_device_notices_faults(tmp_path, forks):
    (tmp_path / "faulty.py").write_text(FAULTY)
    assert forks.run(tmp_path / "faulty", []).stdout == "aten.add.Tensor mixes tensors of fakegpu and of the CPU\n4\n"


def test_a_pool_that_does_not_fit(tmp_path, checkpoints, forks):
    argv = command(CASES["fast_meta"], tmp_path, checkpoints, "--n_epochs", "2", "--pool_size", "8")
    waits(forks, "datafree_kd", argv)  # such a pool makes the host wait once a pass
    assert (tmp_path / CASES["fast_meta"].folder("--n_epochs", "2") / "result.json").exists()


@pytest.mark.parametrize("script", SCRIPTS)
def test_two_epochs_and_a_resumed_one(script, tmp_path, checkpoints, forks):
    cases = [case for case in CASES.values() if case.script.__name__ == script]
    epochs = (["--n_epochs", "2"], ["--n_epochs", "3", "--resume"])
    runs = [command(case, tmp_path, checkpoints, *flags) for case in cases for flags in epochs]
    assert waits(forks, script, *runs) == {}
    assert all((tmp_path / case.folder("--n_epochs", "3") / "result.json").exists() for case in cases)
