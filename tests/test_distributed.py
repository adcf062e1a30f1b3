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

from datafree import checkpoint, distributed
from datafree.losses import channel_statistics

HERE = Path(__file__).resolve().parent
FEW = ("teacher_train", "DAFL_train", "DFAD_camvid_deeplab", "DFND_train", "dfq", "cmi", "fast_meta", "imagenet")


def torchrun(n, *command, flags=()):
    """The command line that starts n processes."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", n, *flags]
    return [str(part) for part in (*launch, *command)]


def run(command, **options):
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, cwd=HERE, **options)


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    """The folder where one, two and three processes have run the cases."""
    out = tmp_path_factory.mktemp("ranks")
    ranks.prepare(out)
    for command in (
        [sys.executable, HERE / "ranks.py", out],
        torchrun(2, HERE / "ranks.py", out),
        torchrun(3, HERE / "ranks.py", out, *FEW),
    ):
        end = run(command)
        assert end.returncode == 0, end.stderr
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


def test_reference_numbers_hold_on_two_ranks():
    cases = ["test_DAFL.py::test_joint_step[True]", "test_DFAD.py::test_iterations[True]"]
    end = run(
        torchrun(
            2, "--no-python", sys.executable, "-m", "pytest", "-p", "on_ranks", "-q", "-p", "no:cacheprovider", *cases
        )
    )
    assert end.returncode == 0 and end.stdout.count("[100%]") == 2, end.stdout


def dafl(out, *flags):
    text = "--dataset digits --iterations 3 --batch_size 12 --precision fp32 --device cpu"
    return [HERE.parent / "DAFL_train.py", *text.split(), "--out", out, *flags]


def weights(out):
    return checkpoint.read(next(out.glob("*/last.pt")))["run"]["states"]


def test_a_killed_rank_restarts_the_job(tmp_path):
    end = run(torchrun(2, *dafl(tmp_path / "whole", "--n_epochs", 3)))
    assert end.returncode == 0, end.stderr
    command = torchrun(2, *dafl(tmp_path / "killed", "--n_epochs", 3), flags=["--max-restarts", 3])
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as job:
        while not list((tmp_path / "killed").glob("*/last.pt")):
            assert job.poll() is None
            time.sleep(0.01)
        children = Path(f"/proc/{job.pid}/task/{job.pid}/children").read_text().split()
        os.kill(int(children[-1]), signal.SIGKILL)
        text = job.communicate()[0]
    assert job.returncode == 0 and "resumed after epoch" in text, text
    one, two = tensors(weights(tmp_path / "whole")), tensors(weights(tmp_path / "killed"))
    same = [torch.equal(v, two[k]) if isinstance(v, torch.Tensor) else v == two[k] for k, v in one.items()]
    assert len(same) > 20 and all(same)


@pytest.mark.parametrize("first, second", [(1, 2), (2, 1)])
def test_another_number_of_ranks_goes_on(first, second, tmp_path, checkpoints):
    text = "--method cmi --dataset digits --teacher resnet8 --student resnet8 --batch_size 8 --synthesis_batch_size 8 "
    text += "--ep_steps 1 --kd_steps 1 --warmup 0 --g_steps 1 --bank_size 40 --n_neg 8 --nz 4 --ngf 2 --device cpu"
    command = [HERE.parent / "datafree_kd.py", *text.split(), "--out", tmp_path, "--checkpoints", checkpoints]
    images = []
    for n, epochs in ((first, 1), (second, 2)):
        command[-1:] = [checkpoints, "--n_epochs", epochs, "--resume"]
        end = run([sys.executable, *command] if n == 1 else torchrun(n, *command))
        assert end.returncode == 0, end.stderr
        images.append(next(tmp_path.glob("*/pool.u8")).read_bytes())
        del command[-3:]
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


def test_a_run_follows_rank_0_to_another_machine(tmp_path):
    """Two machines with run folders of their own; the second start counts them the other way round."""
    for first in (0, 1):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        there = ["--nnodes", 2, "--nproc_per_node", 1, "--master_addr", "127.0.0.1", "--master_port", port]
        machines = []
        for machine in (0, 1):
            launch = [sys.executable, "-m", "torch.distributed.run", *there, "--node_rank", machine ^ first]
            command = [*launch, *dafl(tmp_path / str(machine), "--n_epochs", 2, "--resume")]
            machines.append(subprocess.Popen(map(str, command), stdout=subprocess.PIPE, stderr=subprocess.STDOUT))
        said = [machine.communicate()[0].decode() for machine in machines]
        assert not any(machine.returncode for machine in machines), said
    assert "is finished: last" in said[1]
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
for turn in range(120):
    torch.manual_seed(turn)
    shape = shapes[turn % 6] if turn < 60 else shapes[turn % 4]
    every = (torch.randn(distributed.SIZE, *shape, dtype=torch.float64) * 100).to((
        torch.float64, torch.float32, torch.bfloat16, torch.int64, torch.int32)[turn % 5])
    mine = every[distributed.RANK]
    mine = mine.to(memory_format=torch.channels_last) if mine.ndim == 4 else mine
    if turn % 7 == distributed.RANK:
        time.sleep(random.random() / 100)
    for distributed._board in (board, None):
        assert torch.equal(distributed._gather(mine), every), (turn, shape)
        summed = distributed.total(mine.clone())
        assert torch.allclose(summed.double(), every.double().sum(0), rtol=2e-2, atol=1), (turn, shape)
        assert summed.dtype == every.dtype
assert board.turn > 200
"""


@pytest.mark.skipif(platform.machine() != "x86_64" or sys.platform != "linux", reason="memory is shared there only")
def test_shared_memory_says_what_messages_say(tmp_path):
    """Also where a rank is late, and where a tensor is too large for it."""
    script = tmp_path / "script.py"
    script.write_text(BOTH_WAYS.format(root=str(HERE.parent)))
    end = run(torchrun(3, script), timeout=100)
    assert not end.returncode, end.stderr


def test_an_error_of_one_rank_ends_all_in_its_line(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(ALONE.format(root=str(HERE.parent)))
    end = run(torchrun(2, script), timeout=100)
    lines = [line for line in end.stderr.splitlines() if line.startswith("script.py: ")]
    assert end.returncode and lines == ["script.py: this machine has no data: copy it"], end.stderr
    assert "exitcode  : 2" in end.stderr


def test_mistakes_are_one_line():
    script = HERE.parent / "DAFL_train.py"
    for flags, text in (
        (["--dataset", "digits", "--batch_size", 127], "--batch_size 127 cannot be divided among 2 processes"),
        (["--dataset", "nothing"], "invalid choice: 'nothing'"),
    ):
        end = run(torchrun(2, script, *flags))
        assert end.returncode and end.stderr.count(text) == 1, end.stderr
