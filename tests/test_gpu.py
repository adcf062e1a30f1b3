"""On a GPU: each script takes the steps that it takes on a CPU."""

import pytest
import torch
from test_run import CASES, command, datafree, run
from torch import nn
from torch.overrides import TorchFunctionMode

from datafree import checkpoint

SMALL = "--nz 8 --ngf 8"
GPU_CASES = CASES | {
    "fast": datafree("fast", SMALL),
    "nayer": datafree("nayer", f"{SMALL} --g_loops 1 --gwp_loops 1"),
    "zskt": datafree("zskt", f"{SMALL} --kd_steps 2"),
}
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


class HostRandom(TorchFunctionMode):
    """Random numbers of a GPU's tensors are the CPU's."""

    makes = (torch.rand, torch.randn, torch.randint, torch.randperm)
    fills = (nn.init.normal_, nn.init.uniform_, nn.init.kaiming_uniform_)

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function in self.makes and torch.device(kwargs.get("device") or "cpu").type == "cuda":
            return function(*args, **kwargs | {"device": "cpu"}).to(kwargs["device"])
        if function in self.fills and kwargs["tensor"].is_cuda:
            with torch.no_grad():
                return kwargs["tensor"].copy_(function(**kwargs | {"tensor": kwargs["tensor"].cpu()}))
        return function(*args, **kwargs)


def assert_close(a, b, path=""):
    """Numbers in nested dictionaries and lists, to 1e-6 of the largest of their tensor."""
    if isinstance(a, dict):
        assert a.keys() == b.keys(), path
        for k in a:
            assert_close(a[k], b[k], f"{path}/{k}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), path
        for i, pair in enumerate(zip(a, b, strict=True)):
            assert_close(*pair, f"{path}/{i}")
    elif isinstance(a, torch.Tensor):
        a, b = a.double(), b.double()
        assert a.shape == b.shape and (a - b).abs().max() <= 1e-6 * max(1e-3, a.abs().max()), path
    else:
        assert a == (pytest.approx(b, rel=1e-6) if isinstance(b, float) else b), path


@pytest.mark.parametrize("name", GPU_CASES)
def test_it_takes_the_steps_of_a_cpu(name, tmp_path, checkpoints, in_double):
    case, found = GPU_CASES[name], []
    for device in ("cpu", "cuda"):
        with HostRandom():
            out = tmp_path / str(len(found))
            flags = "--device", device, "--precision", "fp32", "--n_epochs", "2"
            run(case.script, *command(case, out, checkpoints, *flags))
        (last,) = out.glob("*/last.pt")
        states = checkpoint.read(last)["run"]["states"]
        # Seconds differ, and only a CPU remembers the teacher's answers.
        found.append({k: v for k, v in states.items() if k not in ("timer", "answers")})
    assert_close(*found)
