"""Several processes compute what one does, and end together."""

import os
import platform
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import ranks
import torch

import teacher_train
from datafree import checkpoint, distributed, runtime
from datafree.errors import UsageError
from datafree.losses import channel_statistics

HERE = Path(__file__).resolve().parent
FEW = ("teacher_train", "DAFL_train", "DFAD_camvid_deeplab", "DFND_train", "dfq", "cmi", "fast_meta", "imagenet")


@pytest.fixture(scope="session")
def torchrun(forks):
    """Begin a script, or with -m a module, in n processes; returns the job that forks.wait waits for."""

    def start(n, *command, flags=("--standalone",)):
        return forks.start(HERE / "torchrun", ["--nproc_per_node", n, *flags, *command], seconds=300)

    return start


@pytest.fixture(scope="session")
def in_processes(forks, torchrun):
    """Run a command in n processes, one without torchrun, to a good end; returns it."""

    def run(n, script, *argv):
        alone = n == 1 and script != "-m"
        end = forks.run(Path(script).with_suffix(""), argv, 300) if alone else forks.wait(torchrun(n, script, *argv))
        assert end.code == 0, end.stdout + end.stderr
        return end

    return run


@pytest.fixture(scope="module")
def out(tmp_path_factory, in_processes):
    """The folder where one, two and three processes have run the cases."""
    out = tmp_path_factory.mktemp("ranks")
    ranks.prepare(out)
    for n, cases in ((1, ()), (2, ()), (3, FEW)):
        in_processes(n, HERE / "ranks.py", out, *cases)
    return out


def tensors(state, path=""):
    """Path -> tensor or other value, of nested states."""
    if isinstance(state, dict | list | tuple):
        items = state.items() if isinstance(state, dict) else enumerate(state)
        return {k: v for key, value in items for k, v in tensors(value, f"{path}/{key}").items()}
    return {path: state}


def kind(path):
    return path.rpartition("/")[2] if "/state/" in path else path.split("/")[1]


@pytest.mark.parametrize("n, name", [(2, name) for name in ranks.CASES] + [(3, name) for name in FEW])
def test_ranks_end_with_the_weights_of_one_process(n, name, out):
    files = [next((out / str(size) / name).glob("*/last.pt")) for size in (1, n)]
    one, several = (tensors(checkpoint.read(path)["run"]["states"]) for path in files)
    assert one.keys() == several.keys()
    tested = [k for k, v in one.items() if isinstance(v, torch.Tensor) and v.is_floating_point() and v.dim()]
    largest = {}  # by the kind of state: weights, momenta ...
    for key in tested:
        largest[kind(key)] = max(largest.get(kind(key), 0), one[key].norm())
    for key in tested:
        # What is nothing but rounding, as the gradient of a bias before a BatchNorm, has no relative error.
        limit = 1e-9 * one[key].norm() + 1e-12 * largest[kind(key)]
        assert (one[key] - several[key]).norm() <= limit, key
    assert len(tested) > 10
    # One process remembers what the teacher said, several ask again.
    assert all(one[k] == several[k] for k in one.keys() - set(tested) if "timer" not in k and "answers" not in k)
    rows = [checkpoint.read(path)["run"]["rows"][-1] for path in files]
    for key in rows[0].keys() - {"seconds", "synthesis_seconds"}:
        assert rows[1][key] == pytest.approx(rows[0][key], rel=1e-9, abs=1e-12)


def test_statistics_of_shares_are_those_of_the_whole(monkeypatch):
    x = torch.randn(8, 3, 4, 4, dtype=torch.float64) + torch.arange(8).view(-1, 1, 1, 1)  # shares of other means
    shares = [channel_statistics(x[rank::2]) for rank in range(2)]
    own, other = (torch.cat([mean, mean, var, var]) for mean, var in shares)  # of two layers
    monkeypatch.setattr(distributed, "SIZE", 2)
    monkeypatch.setattr(distributed, "whole", lambda own: torch.cat([own, other[None]]))
    mean, var = channel_statistics(x)
    assert torch.allclose(distributed.pool_statistics(own), torch.cat([mean, mean, var, var]), rtol=1e-12)


def test_the_pool_has_the_images_in_the_order_of_one_process(out):
    one, two = (next((out / n / "fast_meta").glob("*/pool.u8")).read_bytes() for n in "12")
    assert len(one) == 12 * 3 * 16 * 16 and one == two


def test_reference_numbers_hold_on_two_ranks(in_processes):
    cases = [f"{HERE}/test_DAFL.py::test_joint_step[True]", f"{HERE}/test_DFAD.py::test_iterations[True]"]
    end = in_processes(2, "-m", "pytest", "-p", "on_ranks", "-q", "-p", "no:cacheprovider", *cases)
    assert end.stdout.count("[100%]") == 2, end.stdout


def dafl(out, *flags):
    text = "--dataset digits --iterations 3 --batch_size 12 --precision fp32 --device cpu"
    return [HERE.parent / "DAFL_train.py", *text.split(), "--out", out, *flags]


def weights(out):
    return checkpoint.read(next(out.glob("*/last.pt")))["run"]["states"]


def test_a_killed_rank_restarts_the_job(tmp_path, forks, torchrun, in_processes):
    in_processes(2, *dafl(tmp_path / "whole", "--n_epochs", 5))
    job = torchrun(2, *dafl(tmp_path / "killed", "--n_epochs", 5), flags=["--standalone", "--max-restarts", 3])
    while not list((tmp_path / "killed").glob("*/last.pt")):
        assert not (job / "end.json").exists(), forks.wait(job)
        time.sleep(0.01)
    process = (job / "pid").read_text()
    children = Path(f"/proc/{process}/task/{process}/children").read_text().split()
    assert len(children) == 2
    os.kill(int(children[-1]), signal.SIGKILL)
    end = forks.wait(job)
    assert end.code == 0 and "resumed after epoch" in end.stdout, end
    one, two = tensors(weights(tmp_path / "whole")), tensors(weights(tmp_path / "killed"))
    same = [torch.equal(v, two[k]) if isinstance(v, torch.Tensor) else v == two[k] for k, v in one.items()]
    assert len(same) > 20 and all(same)


CMI = "datafree_kd.py --method cmi --warmup 0 --bank_size 40 --n_neg 8"
REPTILE = "datafree_kd_imagenet.py --phase1_rounds 0 --z_rounds 4"


@pytest.mark.parametrize("script, first, second", [(CMI, 1, 2), (CMI, 2, 1), (REPTILE, 1, 2)])
def test_another_number_of_ranks_goes_on(script, first, second, tmp_path, checkpoints, in_processes):
    text = f"{script} --dataset digits --teacher resnet8 --student resnet8 --batch_size 8 --synthesis_batch_size 8 "
    text += "--ep_steps 1 --kd_steps 1 --g_steps 1 --nz 4 --ngf 2 --device cpu"
    command = [HERE.parent / text.split()[0], *text.split()[1:], "--out", tmp_path, "--checkpoints", checkpoints]
    images = []
    for n, epochs in ((first, 1), (second, 2)):
        end = in_processes(n, *command, "--n_epochs", epochs, "--resume")
        images.append(next(tmp_path.glob("*/pool.u8")).read_bytes())
    assert "resumed after epoch 1" in end.stdout
    assert len(images[1]) == 2 * len(images[0]) and images[1].startswith(images[0])


ALONE = """
import sys
sys.path.insert(0, {root!r})
import torch
from datafree import distributed
from datafree.cli import cli
from datafree.errors import UsageError

def main(args):
    distributed.meet()
    if distributed.RANK == 1:
        raise UsageError("this machine has no data: copy it")
    distributed.mean(torch.zeros(()))  # the other one waits for it

cli(main, lambda: None)
"""


def test_a_run_follows_rank_0_to_another_machine(tmp_path, forks, torchrun):
    """Two machines with run folders of their own; the second start counts them the other way round."""
    for first in (0, 1):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        there = ["--nnodes", 2, "--master_addr", "127.0.0.1", "--master_port", port]
        jobs = [
            torchrun(
                1,
                *dafl(tmp_path / str(machine), "--n_epochs", 2, "--resume"),
                flags=[*there, "--node_rank", machine ^ first],
            )
            for machine in (0, 1)
        ]
        ends = [forks.wait(job) for job in jobs]
        assert not any(end.code for end in ends), ends
    assert "is finished: last" in ends[1].stdout
    contents = [{p.relative_to(tmp_path / n): p.read_bytes() for p in (tmp_path / n).rglob("*.pt")} for n in "01"]
    assert contents[0] == contents[1] and len(contents[0]) == 2


BOTH_WAYS = """
import sys
sys.path.insert(0, {root!r})
import random
import time

import torch
from datafree import distributed

distributed.meet()
board = distributed._board
shapes = (), (1,), (3, 5), (7, 2, 4, 4), (board.ROOM // 8,), (board.ROOM // 8 + 1,)
for turn in range(60):
    torch.manual_seed(turn)
    shape = shapes[turn % 6] if turn < 30 else shapes[turn % 4]
    every = (torch.randn(distributed.SIZE, *shape, dtype=torch.float64) * 100).to((
        torch.float64, torch.float32, torch.bfloat16, torch.int64, torch.int32)[turn % 5])
    mine = every[distributed.RANK]
    mine = mine.to(memory_format=torch.channels_last) if mine.ndim == 4 else mine
    if turn % 7 == distributed.RANK:
        time.sleep(random.random() / 100)
    for distributed._board in (board, None):
        assert torch.equal(distributed._gather(mine), every), (turn, shape)
        summed = distributed.total(mine.clone())
        near = dict(rtol=2e-2, atol=1) if every.dtype == torch.bfloat16 else dict(rtol=1e-6, atol=1e-4)
        assert torch.allclose(summed.double(), every.double().sum(0), **near), (turn, shape)
        assert summed.dtype == every.dtype
assert board.turn > 100
"""


@pytest.mark.skipif(platform.machine() != "x86_64" or sys.platform != "linux", reason="memory is shared there only")
def test_shared_memory_says_what_messages_say(tmp_path, in_processes):
    """Also where a rank is late, and where a tensor is too large for it."""
    script = tmp_path / "script.py"
    script.write_text(BOTH_WAYS.format(root=str(HERE.parent)))
    in_processes(3, script)


def test_an_error_of_one_rank_ends_all_in_its_line(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(ALONE.format(root=str(HERE.parent)))
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", script]
    end = subprocess.run(launch, capture_output=True, text=True, timeout=100)
    lines = [line for line in end.stderr.splitlines() if line.startswith("script.py: ")]
    assert end.returncode and lines == ["script.py: this machine has no data: copy it"], end.stderr
    assert "exitcode  : 2" in end.stderr


BEFORE_THEY_MEET = """
import sys, time
sys.path.insert(0, {root!r})
from datafree import cli, distributed

class Slow:
    write, flush = lambda self, text: (time.sleep(0.7), sys.__stderr__.write(text)), sys.__stderr__.flush

def parse_args():
    time.sleep(1 if distributed.RANK == {late} else 0)
    sys.stderr = Slow()
    raise cli.UsageError("impossible: choose another")

cli.cli(print, parse_args)
"""


@pytest.mark.parametrize("late", [0, 1])
def test_a_mistake_is_said_before_a_process_ends(late, tmp_path, forks, torchrun):
    """The first process to end is what torchrun ends the others for, rank 0 and its messages too."""
    script = tmp_path / "script.py"
    script.write_text(BEFORE_THEY_MEET.format(root=str(HERE.parent), late=late))
    end = forks.wait(torchrun(2, script))
    assert end.code and end.stderr.count("script.py: impossible: choose another") == 1, end.stderr


FROZEN = """
import sys
sys.path.insert(0, {root!r})
import torch
from torch import nn
from datafree import distributed
from datafree.errors import UsageError
from datafree.fold import fold_batch_norm
from models import get_model

class Active(nn.BatchNorm2d):
    def forward(self, x):
        return super().forward(x).relu()

distributed.meet()
torch.manual_seed(0)
x, teacher = torch.rand(4, 3, 32, 32), get_model("resnet8").eval().requires_grad_(False)
own = nn.Sequential(nn.Conv2d(3, 4, 1), Active(4)).eval()
alone = teacher(x), own(x)
for network in (teacher, own):
    distributed.join(network)
with distributed.apart():
    folded = fold_batch_norm(teacher, x)
share = distributed.share(x)
assert folded is not teacher and torch.allclose(folded(share), alone[0], atol=1e-4)
assert torch.equal(own(share), alone[1])
try:
    distributed.synchronize(own.train())
except UsageError as error:
    assert str(error).startswith("Active would see"), error
else:
    raise AssertionError
"""


def test_a_frozen_teacher_stays_as_it_is_and_folds(tmp_path, in_processes):
    """Of a student BatchNorms that do something else besides are refused: in step they would lose it."""
    script = tmp_path / "script.py"
    script.write_text(FROZEN.format(root=str(HERE.parent)))
    in_processes(2, script)


@pytest.mark.parametrize("gpus, wanted", [(True, "cpu:gloo,cuda:nccl"), (False, "gloo")])
def test_tensors_of_the_cpu_have_a_backend_beside_gpus(gpus, wanted, monkeypatch):
    asked = []
    monkeypatch.setattr(distributed, "SIZE", 2)
    monkeypatch.setattr(distributed, "_shared_store", lambda timeout: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus)
    monkeypatch.setattr(distributed.dist, "init_process_group", lambda backend, **_: asked.append(backend) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        distributed.meet()
    assert asked == [wanted]


def test_a_gpu_is_not_named_for_several_processes(monkeypatch):
    monkeypatch.setattr(runtime, "SIZE", 2)
    with pytest.raises(UsageError, match="each process takes one of its own: leave it out"):
        runtime.setup(teacher_train.parse_args(["--gpu", "1"]))


def test_a_time_limit_is_no_failure_that_starts_the_job_again(tmp_path, forks, torchrun):
    again = ["--standalone", "--max-restarts", 3]
    end = forks.wait(torchrun(2, *dafl(tmp_path, "--n_epochs", 3, "--time_limit", "0.0001"), flags=again))
    assert end.code == 0 and end.stderr.count("time limit: stopped") == 1, end
    assert checkpoint.read(next(tmp_path.glob("*/last.pt")))["epoch"] == 0


def test_mistakes_are_one_line(forks, torchrun):
    script = HERE.parent / "DAFL_train.py"
    for flags, text in (
        (["--dataset", "digits", "--batch_size", 127], "--batch_size 127 cannot be divided among 2 processes"),
        (["--dataset", "nothing"], "invalid choice: 'nothing'"),
    ):
        end = forks.wait(torchrun(2, script, *flags))
        assert end.code and end.stderr.count(text) == 1, end.stderr
