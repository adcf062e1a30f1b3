"""--compile: the same steps but for rounding, and no harm where it cannot be."""

import shutil

import pytest
import torch
from torch._dynamo.utils import counters

import DAFL_train
import datafree_kd
import DFAD_cifar
from datafree import checkpoint, runtime

COMMON = "--dataset digits --teacher resnet8 --student resnet8 --n_epochs 1 --precision fp32"
CASES = {
    "fast": (datafree_kd, "--method fast --ep_steps 2 --kd_steps 2 --warmup 0 --g_steps 1 --batch_size 16 --nz 8 "
             "--ngf 4 --synthesis_batch_size 16"),
    "nayer": (datafree_kd, "--method nayer --ep_steps 2 --kd_steps 2 --warmup 0 --g_steps 1 --batch_size 16 --nz 8 "
              "--ngf 4 --synthesis_batch_size 16"),
    "dafl": (DAFL_train, "--iterations 2 --batch_size 16 --nz 8"),
    "dfad": (DFAD_cifar, "--epoch_itrs 1 --k 2 --batch_size 16 --nz 8"),
    "dfad_kept": (DFAD_cifar, "--epoch_itrs 2 --k 2 --batch_size 16 --nz 8 --keep_student_gradient"),
    "deepinv": (datafree_kd, "--method deepinv --ep_steps 2 --kd_steps 2 --warmup 0 --g_steps 2 --batch_size 16 "
                "--synthesis_batch_size 16"),
}  # fmt: skip
GPU = torch.cuda.is_available()


# Half a minute each on a CPU: there the one that compiles a generator, a folded teacher and a student.
@pytest.mark.parametrize("case", CASES if GPU else ["dfad"])
@pytest.mark.skipif(not GPU and not shutil.which("g++"), reason="torch.compile needs a C++ compiler on a CPU")
def test_compiled_networks_take_the_same_steps(case, tmp_path, checkpoints, in_double, few_digits):
    script, text = CASES[case]
    found = []
    for flags in ([], ["--compile"]):
        counters.clear()
        where = "--out", tmp_path, "--checkpoints", checkpoints
        result = script.main(script.parse_args([*COMMON.split(), *text.split(), *where, *flags]))
        assert bool(counters["stats"]["unique_graphs"]) == bool(flags)
        found.append((result["name"], checkpoint.read(tmp_path / result["name"] / "last.pt")["state_dict"]))
    (name, plain), (other, compiled) = found
    assert name != other
    for key, value in plain.items():
        assert (compiled[key] - value).double().norm() <= 1e-5 * value.double().norm(), key


def test_where_it_cannot_be_networks_run_as_they_are(monkeypatch, capsys):
    def broken(function):
        raise RuntimeError("no\nworking C++ compiler")

    monkeypatch.setattr(runtime.torch, "compile", broken)
    assert not runtime.can_compile(torch.device("cpu"))
    assert (
        capsys.readouterr().out == "--compile does not work here, networks run as they are: no working C++ compiler\n"
    )
    network = torch.nn.Linear(1, 1)
    assert runtime.Runtime(torch.device("cpu"), "fp32").compile(network)._compiled_call_impl is None
