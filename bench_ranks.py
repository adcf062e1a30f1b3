"""Ours by several processes and by one, in turn in one run: what `bench.py --ranks 1 2` does.

For each N of --ranks, N processes with one thread each, as torchrun starts them, share the batch (on GPUs: one each).
Beside them, on a CPU: the limit, N processes that know nothing of each other, each with the whole batch, which shows
what the machine's cores, caches and memory leave of N times the speed; and one process with N threads. Efficiency is
the speed of N ranks over N times that of one with one thread. Bytes are those of the tensors that the collectives of a
step are given by one rank.
"""

import os
import socket
import statistics
from argparse import Namespace
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import torch
import torch.distributed as dist

import bench
from datafree import distributed
from datafree.runtime import setup


class Group:
    """Processes that run steps at the same time: ranks of one job, or `apart`, each by itself."""

    def __init__(self, args: Namespace, size: int, threads: int, apart: bool = False):
        self.size, self.apart, self.processes = size, apart, []
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        for rank in range(size):
            ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1",
                     "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "bench"}  # fmt: skip
            environment = {"OMP_NUM_THREADS": threads} | ({} if apart else ranks)
            before = dict(os.environ)
            os.environ.update({k: str(v) for k, v in environment.items()})
            self.processes.append(ProcessPoolExecutor(1, get_context("spawn")))
            self.processes[-1].submit(os.getpid).result()  # it starts now, in this environment
            os.environ.clear()
            os.environ.update(before)
        self.ask(start, args, threads)

    def ask(self, function, *arguments) -> list:
        """The answers of all processes, asked at once."""
        return [answer.result() for answer in [p.submit(function, *arguments) for p in self.processes]]

    def images_per_second(self, label: str, batch_size: int, count: int) -> float:
        seconds = self.ask(bench.measure, "seconds", label, count)
        return sum(batch_size / s for s in seconds) if self.apart else batch_size / max(seconds)


def start(args: Namespace, threads: int) -> None:
    """In a process: meet the others, and make our way's networks."""
    torch.set_num_threads(threads)
    distributed.meet()
    bench.start_process("ours", args)


def bytes_of(label: str) -> int:
    """In a process: the bytes that a step gives to collectives."""
    sent, gather, reduce = 0, dist.all_gather, dist.all_reduce

    def counted(collective, tensor_at):
        def call(*arguments, **options):
            nonlocal sent
            sent += arguments[tensor_at].nbytes
            return collective(*arguments, **options)

        return call

    dist.all_gather, dist.all_reduce = counted(gather, 1), counted(reduce, 0)
    bench.way.steps[label](bench.way)
    dist.all_gather, dist.all_reduce = gather, reduce
    return sent


def main(args: Namespace) -> dict[str, object]:
    """Measure and print; returns the figures."""
    runtime = setup(args)
    cpu, figures = runtime.device.type == "cpu", {}
    for n in args.ranks:
        groups = {"1 rank": Group(args, 1, 1, apart=True)}
        if n > 1:
            groups[f"{n} ranks"] = Group(args, n, 1)
            if cpu:
                groups[f"{n} apart"] = Group(args, n, 1, apart=True)
                groups[f"{n} threads"] = Group(args, 1, n, apart=True)
        for label in bench.SETTINGS[args.setting].steps:
            count = 1 if "round" in label else args.steps
            rates = {name: [] for name in groups}
            for _ in range(args.repeats + 1):
                for name, group in groups.items():
                    rates[name].append(group.images_per_second(label, args.batch_size, count))
            rate = {name: statistics.median(values[1:]) for name, values in rates.items()}  # the first does not count
            shown = {k: v / rate["1 rank"] / n for k, v in rate.items() if k in (f"{n} ranks", f"{n} apart")}
            sent = groups[f"{n} ranks"].ask(bytes_of, label)[0] if n > 1 else 0
            print(
                f"{args.setting}, {label}, batch {args.batch_size}, {runtime.precision}: "
                + ", ".join(f"{name} {r:.0f} images/s" for name, r in rate.items())
                + "".join(f"; efficiency of {k} {v:.2f}" for k, v in shown.items())
                + (f"; {sent / 1e6:.2f} MB a step and rank" if n > 1 else "")
            )
            figures[f"{label}, {n}"] = dict(images_per_second=rate, efficiency=shown, bytes_per_step=sent, rates=rates)
        for group in groups.values():
            for process in group.processes:
                process.shutdown()
    return bench.finish(args, runtime, setting=args.setting, batch_size=args.batch_size, ranks=figures)
