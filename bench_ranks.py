"""Ours by several processes and by one, in turn in one run: what `bench.py --ranks 1 2` does.

For each N of --ranks, N processes with one thread each, as torchrun starts them, share the batch (on GPUs: one each).
Beside them, on a CPU: the limits, N processes that know nothing of each other, each with the whole batch, which shows
what the machine's cores, caches and memory leave of N times the speed, and each with a rank's share of it, which shows
what is left as weights and their updates are whole; and one process with N threads. Efficiency is the speed of N ranks
over N times that of one with one thread. Bytes are those of the tensors that the collectives of a step are given by
one rank, on GPUs without BatchNorm's.
"""

import os
import socket
import statistics
from argparse import Namespace
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

from datafree import distributed
from datafree.runtime import Runtime


class Group:
    """Processes that run steps at the same time: ranks of one job, or `apart`, each by itself."""

    def __init__(self, size: int, threads: int, apart: bool = False):
        self.apart, self.processes = apart, []
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        for rank in range(size):
            ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size,
                     "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "bench"}  # fmt: skip
            environment = {"OMP_NUM_THREADS": threads} | ({} if apart else ranks)
            before = dict(os.environ)
            os.environ.update({k: str(v) for k, v in environment.items()})
            self.processes.append(ProcessPoolExecutor(1, get_context("spawn")))
            self.processes[-1].submit(os.getpid).result()  # it starts now, in this environment
            os.environ.clear()
            os.environ.update(before)

    def ask(self, function: Callable, *arguments: object) -> list:
        """The answers of all processes, asked at once."""
        return [answer.result() for answer in [p.submit(function, *arguments) for p in self.processes]]

    def end(self) -> None:
        for process in self.processes:
            process.shutdown()


def bytes_of(step: Callable[[], object]) -> int:
    """In a process: the bytes that a step gives to collectives."""
    sent, gather, total = 0, distributed._gather, distributed.total

    def counted(collective):
        def call(x):
            nonlocal sent
            sent += x.nbytes
            return collective(x)

        return call

    distributed._gather, distributed.total = counted(gather), counted(total)
    step()
    distributed._gather, distributed.total = gather, total
    return sent


def compare(
    args: Namespace, runtime: Runtime, labels: Iterable[str], start: Callable[..., None], measure: Callable[..., float]
) -> Iterator[dict[str, dict]]:
    """Measure and print; yields the figures so far after each label.

    Args:
        labels: of the steps. start, measure: bench.py's functions, which the processes call.
    """
    cpu, batch, figures = runtime.device.type == "cpu", args.batch_size, {}
    for n in args.ranks:
        groups, shared = {"1 rank": Group(1, 1, apart=True)}, f"{n} apart, shares"
        if n > 1:
            groups[f"{n} ranks"] = Group(n, 1)
        if n > 1 and cpu:
            groups |= {name: Group(n, 1, apart=True) for name in (f"{n} apart", shared)}
            groups[f"{n} threads"] = Group(1, n, apart=True)
        own = {name: Namespace(**vars(args)) for name in groups}
        if shared in own:
            own[shared].batch_size = batch // n
        for name, group in groups.items():
            group.ask(start, "ours", own[name])
        for label in labels:
            rates = {name: [] for name in groups}
            for _ in range(args.repeats + 1):
                for name, group in groups.items():
                    seconds = group.ask(measure, "seconds", label, 1 if "round" in label else args.steps)
                    done = own[name].batch_size
                    rates[name].append(sum(done / s for s in seconds) if group.apart else done / max(seconds))
            rate = {name: statistics.median(values[1:]) for name, values in rates.items()}  # the first does not count
            shown = {k: v / rate["1 rank"] / n for k, v in rate.items() if k in (f"{n} ranks", f"{n} apart", shared)}
            sent = groups[f"{n} ranks"].ask(measure, "bytes", label)[0] if n > 1 else 0
            print(
                f"{args.setting}, {label}, batch {batch}, {runtime.precision}: "
                + ", ".join(f"{name} {r:.0f} images/s" for name, r in rate.items())
                + "".join(f"; efficiency of {k} {v:.2f}" for k, v in shown.items())
                + (f"; {sent / 1e6:.2f} MB a step and rank" if n > 1 else ""),
                flush=True,
            )
            figures[f"{label}, {n}"] = dict(images_per_second=rate, efficiency=shown, bytes_per_step=sent, rates=rates)
            yield figures
        for group in groups.values():
            group.end()
