"""Several processes, on GPUs or machines, that torchrun starts: together they compute what one would.

Every rank draws the same random numbers, those of the whole batch, and takes its `share` of what is drawn: of its rows
the one with the rank's number, and every SIZEth from there. Networks run on shares; what they say is put together again
(`join`), so that every loss is the whole batch's on every rank, and its gradient flows into the rank's own rows. Before
an optimiser's step the gradients are added up (`add_up`): all ranks take the step of the whole batch. Rank 0 alone
speaks and writes; the others' run folders are temporary. One process alone computes as if none of this were here.
"""

import atexit
import os
import platform
import shutil
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from itertools import islice
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed.rendezvous import rendezvous
from torch.optim import Optimizer

from datafree.errors import UsageError
from datafree.losses import channel_statistics
from models.generator import GeneratorA

T = TypeVar("T")
PATIENCE = timedelta(hours=2)  # while one unpacks data; a rank that dies ends the others at once, by torchrun
SOON = timedelta(seconds=10)
GONE = "Connection closed by peer", "Connection reset by peer", "Broken pipe", "remote process exited", "was aborted"
LAUNCHED = dist.is_available() and dist.is_torchelastic_launched()
RANK, SIZE, LOCAL_RANK, LOCAL_SIZE = (
    int(os.environ.get(name, other)) if LAUNCHED else other
    for name, other in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0), ("LOCAL_WORLD_SIZE", 1))
)
RESTARTS, MOST_RESTARTS = (
    int(os.environ.get(f"TORCHELASTIC_{name}", 0)) if LAUNCHED else 0 for name in ("RESTART_COUNT", "MAX_RESTARTS")
)
_store: dist.Store | None = None  # what the processes share; of this start of them
_board: "_Board | None" = None  # where all are on one machine
earlier = 0.0  # seconds that ended starts of this job took
_joined = True  # whether networks give the whole batch's outputs


def meet() -> None:
    """Meet the other processes, once."""
    global _store, _board, earlier
    if SIZE > 1 and not dist.is_initialized():
        _store = _shared_store(PATIENCE)
        # Where it is not said, PyTorch takes NCCL alone on a machine with GPUs: nothing for a CPU's tensors.
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, store=_store, rank=RANK, world_size=SIZE, timeout=PATIENCE)
        atexit.register(_end)
        now = time.time()
        earlier = now - float(_store.underlying_store.compare_set("datafree began", "", repr(now)))
        # Only there can what another process wrote before be relied on to be seen before, without a fence.
        if LOCAL_SIZE == SIZE and (platform.system(), platform.machine()) == ("Linux", "x86_64"):
            file = from_first(_shared_file)
            _board = _Board(file) if file else None


def _shared_store(timeout: timedelta) -> dist.Store:
    # torchrun's outlives a restart: addresses that the ended processes left there are not for these.
    return dist.PrefixStore(f"restart {RESTARTS}", next(rendezvous("env://", timeout=timeout))[0])


def begin(args: Namespace) -> None:
    """Meet the other processes, and adapt a script's flags: restarted, a job goes on; rank 0's run folder counts.

    Raises:
        UsageError: a batch that cannot be divided among the processes.
    """
    meet()
    for flag in ("batch_size", "synthesis_batch_size"):
        if (n := getattr(args, flag, 0)) % SIZE:
            text = f"--{flag} {n} cannot be divided among {SIZE} processes"
            raise UsageError(f"{text}: choose a multiple, or another --nproc_per_node")
    args.resume = args.resume or RESTARTS > 0
    if args.resume and not args.evaluate_only:
        _bring_home(Path(args.out) / args.run_name)
    if RANK and not args.evaluate_only:
        args.out = tempfile.mkdtemp(prefix="datafree-")
        atexit.register(shutil.rmtree, args.out, ignore_errors=True)


def _bring_home(folder: Path) -> None:
    """Copy a run to rank 0's machine if another's has it from later: there rank 0 was before, with its own folder."""
    last = folder / "last.pt"
    saved = gather([last.stat().st_mtime if last.is_file() else 0.0])
    newest = max(range(len(saved)), key=saved.__getitem__)
    if saved[newest] == saved[0]:
        return
    files = [file for file in folder.rglob("*") if file.is_file()] if newest == RANK else ()
    content = [{file.relative_to(folder).as_posix(): file.read_bytes() for file in files}]
    dist.broadcast_object_list(content, src=newest)
    # The checkpoint last, and at once: where it is, all else is.
    for name in sorted(content[0], key=lambda name: name == last.name) if RANK == 0 else ():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        part = folder / f"{name}.{os.getpid()}.tmp"
        part.write_bytes(content[0][name])
        part.replace(folder / name)


def _end() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def speaks() -> bool:
    """Whether this process writes files and speaks to the user."""
    return RANK == 0


def complain(line: str) -> None:
    """Say on stderr what ended the processes: the first one that comes here, for all.

    None goes on, so to its end, before that is said: torchrun ends the others at once when it sees one end.
    """
    store, first = None, RANK == 0
    if SIZE > 1:
        with suppress(RuntimeError):  # the store is gone where rank 0's machine is
            store = _store or _shared_store(SOON)
            first = store.add("complaints", 1) == 1
    if first:
        print(line, file=sys.stderr, flush=True)
    if store is not None:
        with suppress(RuntimeError):
            store.set("said", "") if first else store.wait(["said"], SOON)


def lost(error: BaseException) -> bool:
    """Whether an error says that another process is gone."""
    return dist.is_initialized() and any(words in str(error) for words in GONE)


def from_first(make: Callable[[], T]) -> T:
    """What `make()` returns or raises on rank 0, on all ranks: picklable."""
    if not dist.is_initialized():
        return make()
    answer = [None, None]
    if RANK == 0:
        try:
            answer[0] = make()
        except Exception as error:
            answer[1] = error
    dist.broadcast_object_list(answer)
    if answer[1] is not None:
        raise answer[1]
    return answer[0]


def gather(items: list[T]) -> list[T]:
    """The items, picklable, of all ranks' lists, one list after the other."""
    if SIZE == 1:
        return items
    lists = [None] * SIZE
    dist.all_gather_object(lists, items)
    return [item for found in lists for item in found]


def fetch(path: Path) -> None:
    """Copy a file of rank 0's run folder, if it is there, to the other ranks'."""
    content = from_first(lambda: path.read_bytes() if SIZE > 1 and path.is_file() else None)
    if RANK and content is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


def alone(what: str) -> None:
    """Raises UsageError for what one process does alone, where there are several."""
    if SIZE > 1:
        raise UsageError(f"{what} is for one process: start it by python, not torchrun")


@contextmanager
def first_alone() -> Iterator[None]:
    """A block that rank 0 goes through before the others: it downloads and unpacks what they then find."""
    if dist.is_initialized() and RANK > 0:
        dist.barrier()
    yield
    if dist.is_initialized() and RANK == 0:
        dist.barrier()


def share(x: Tensor, dim: int = 0) -> Tensor:
    """This rank's rows of a whole batch's tensor; a rest that does not go round is left out."""
    if SIZE == 1:
        return x
    return x.index_select(dim, torch.arange(x.shape[dim] // SIZE, device=x.device) * SIZE + RANK)


def part(rows: Tensor) -> Tensor:
    """This rank's rows as `share`'s, but no row is left out: ranks may have one more than others."""
    return rows[RANK::SIZE]


def turns(items: Iterable[T]) -> Iterator[T]:
    """This rank's of some items that the ranks take in turn."""
    return islice(items, RANK, None, SIZE)


def count(x: Tensor) -> int:
    """The rows of the whole batch that x is the share of."""
    return len(x) * SIZE


def _shared_file() -> str | None:
    """A file of zeros in memory that other processes can open, of `_Board.BYTES` bytes; None where there is no room."""
    try:
        descriptor, name = tempfile.mkstemp(prefix="datafree-", dir="/dev/shm")
    except OSError:
        return None
    try:
        os.posix_fallocate(descriptor, 0, _Board.BYTES)
    except OSError:
        Path(name).unlink()
        return None
    finally:
        os.close(descriptor)
    return name


class _Board:
    """Memory of one machine's ranks on which each leaves a small tensor of a CPU for all to read.

    gloo takes half a millisecond and more for a message, most of it to wake threads, and each BatchNorm of a step sends
    two: this takes 20 us. A rank that waits tries again, so Ctrl-C and torchrun can end it.
    """

    ROOM = 2**24 // SIZE & -64  # bytes of a rank's tensor
    BYTES = SIZE * (64 + 2 * ROOM)

    def __init__(self, file: str):
        """All ranks make theirs of the same file at once, which then is nobody else's."""
        memory = torch.from_file(file, shared=True, size=self.BYTES, dtype=torch.uint8)
        dist.barrier()
        if RANK == 0:
            Path(file).unlink()
        turns, pages = memory.split((SIZE * 64, 2 * SIZE * self.ROOM))
        self.turns = turns.view(torch.int64).view(SIZE, 8)[:, 0].numpy()  # a line of the cache each
        self.pages, self.turn = pages.view(2, SIZE, self.ROOM), 0

    def gather(self, x: Tensor) -> Tensor:
        """All ranks' tensors of the same shape and type (SIZE, ...)."""
        self.turn += 1
        # Two pages in turn: who writes on one again knows that all have begun the other, and so have read this.
        page = self.pages[self.turn % 2, :, : x.nbytes]
        page[RANK] = x.detach().reshape(-1).view(torch.uint8)
        self.turns[RANK] = self.turn
        tries = 0
        while self.turns.min() < self.turn:
            tries += 1
            os.sched_yield() if tries < 10_000 else time.sleep(1e-4)
        return page.clone().view(x.dtype).view(SIZE, *x.shape)


def _gather(x: Tensor) -> Tensor:
    """All ranks' tensors of the same shape and type (SIZE, ...)."""
    if _board and not x.is_cuda and x.nbytes <= _board.ROOM:
        return _board.gather(x)
    rows = x.new_empty(SIZE, *x.shape)
    dist.all_gather(list(rows), x.contiguous())
    return rows


def whole(x: Tensor) -> Tensor:
    """The whole batch (N, ...) of the ranks' shares; its gradient flows into the rank's own rows."""
    return x if SIZE == 1 else _Whole.apply(x)


def mean(value: Tensor) -> Tensor:
    """The whole batch's mean of which `value` (0-d) is the share's."""
    return value if SIZE == 1 else whole(value[None]).mean()


def norm(value: Tensor) -> Tensor:
    """The whole batch's Euclidean norm of which `value` (0-d) is the share's."""
    return value if SIZE == 1 else whole(value[None]).norm()


def total(x: Tensor) -> Tensor:
    """The sum of the ranks' tensors, which takes the place of x."""
    if _board and not x.is_cuda and x.nbytes <= _board.ROOM:
        return torch.sum(_board.gather(x), 0, dtype=x.dtype, out=x)
    if SIZE > 1:
        dist.all_reduce(x)
    return x


class _Whole(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return _gather(x).transpose(0, 1).flatten(0, 1)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        return gradient[RANK::SIZE]


def pool_statistics(statistics: Tensor) -> Tensor:
    """The whole batch's means and biased variances, one half each (2 D,), from those of the rank's share."""
    if SIZE == 1:
        return statistics
    means, variances = whole(statistics[None]).chunk(2, dim=1)
    mean = means.mean(0)
    return torch.cat([mean, variances.mean(0) + (means - mean).square().mean(0)])


def join(network: nn.Module) -> None:
    """Let a network give the whole batch's outputs for the rank's share of the images, and in train mode be in step.

    Raises:
        UsageError: see `synchronize`.
    """
    if network.training:
        synchronize(network)
    if SIZE > 1:
        network.register_forward_hook(_gather_outputs)


def _gather_outputs(_network: nn.Module, _images: tuple, logits: Tensor) -> Tensor:
    return whole(logits) if _joined else logits


@contextmanager
def apart() -> Iterator[None]:
    """A block in which joined networks answer for the images that they are given alone."""
    global _joined
    before, _joined = _joined, False
    try:
        yield
    finally:
        _joined = before


def add_up(optimizer: Optimizer) -> Optimizer:
    """Add up the ranks' gradients before each step: of parameters; other tensors are a rank's own rows."""
    if SIZE > 1:
        optimizer.register_step_pre_hook(_add_gradients)
    return optimizer


@torch.no_grad()
def _add_gradients(optimizer: Optimizer, _args: tuple, _kwargs: dict) -> None:
    parameters = [p for group in optimizer.param_groups for p in group["params"] if isinstance(p, nn.Parameter)]
    gradients = [p.grad for p in parameters if p.grad is not None]
    if gradients:
        # One message for all of them; their memory order does not matter, as each goes back where it came from.
        flat = total(torch.cat([g.reshape(-1) for g in gradients]))
        parts = [f.view(g.shape) for f, g in zip(flat.split([g.numel() for g in gradients]), gradients, strict=True)]
        torch._foreach_copy_(gradients, parts)


def synchronize(network: nn.Module) -> None:
    """Let the BatchNorm layers of a network, in train mode, see the whole batch.

    Raises:
        UsageError: one of them is no plain BatchNorm2d: what it does besides, or how, is not known.
    """
    for module in network.modules() if SIZE > 1 else ():
        if type(module) is nn.BatchNorm2d:
            module.__class__, module.process_group = BatchNorm2d, None
        elif isinstance(module, nn.modules.batchnorm._BatchNorm) and type(module) is not BatchNorm2d:
            text = f"{type(module).__name__} would see a process's share of the batch only"
            raise UsageError(f"{text}: start one process, or choose a network with plain BatchNorm2d")
        if isinstance(module, GeneratorA):
            module.whole = whole


class BatchNorm2d(nn.SyncBatchNorm, nn.BatchNorm2d):
    """BatchNorm over all ranks: PyTorch's on a GPU; on a CPU, where it has none, with the same two exchanges."""

    def forward(self, x: Tensor) -> Tensor:
        """Images (N, C, H, W), the rank's share, normalised by the whole batch's statistics."""
        if x.is_cuda or not self.training:
            return super().forward(x)
        y, mean, var = _Normalize.apply(x, self.weight, self.bias, self.eps)
        if self.track_running_stats:
            n = count(x) * x[0, 0].numel()
            self.num_batches_tracked.add_(1)
            rate = 1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
            self.running_mean.lerp_(mean.to(self.running_mean.dtype), rate)
            self.running_var.lerp_((var * n / (n - 1)).to(self.running_var.dtype), rate)
        return y


class _Normalize(torch.autograd.Function):
    """BatchNorm of x (N, C, H, W) by the whole batch's mean and biased variance, which it returns, too."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> tuple[Tensor, ...]:
        mean, var = pool_statistics(torch.cat(channel_statistics(x))).chunk(2)
        ctx.save_for_backward(x, weight, mean, var)
        ctx.mark_non_differentiable(mean, var)
        ctx.eps = eps
        return F.batch_norm(x, mean, var, weight, bias, False, 0.0, eps), mean, var

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor, *_) -> tuple[Tensor | None, ...]:
        x, weight, mean, var = ctx.saved_tensors
        scale = torch.ones_like(mean) if weight is None else weight
        # The sums over the rank's rows that all gradients need.
        _, g_weight, g_bias = torch.ops.aten.native_batch_norm_backward(
            gradient, x, scale, mean, var, None, None, False, ctx.eps, [False, True, True]
        )
        n, width = count(x) * x[0, 0].numel(), (var + ctx.eps).rsqrt()
        along, level = total(torch.stack([g_weight, g_bias])) / n
        # What depends on x alone is a BatchNorm again: the kernel that passes over it fastest.
        fixed = torch.ones_like(var), -scale * width.square() * along, -scale * width * level
        g_x = F.batch_norm(x, mean, *fixed, False, 0.0, 0.0)
        g_x.addcmul_(gradient, (scale * width).to(x.dtype).view(1, -1, 1, 1))
        return g_x, *((None, None) if weight is None else (g_weight, g_bias)), None
