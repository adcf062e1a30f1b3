"""Who has which run, where several machines share a folder of runs.

The lock of a run's folder (`run.lock`) is the system's, and not every shared disk carries it to other machines. A claim
does: .locks/<run>.claim is made by one process alone, names it and its machine, and is renewed every minute. That of a
process that died is free at once on its own machine; elsewhere, once it was seen unchanged for five minutes, by the
watcher's own clock.
"""

import contextlib
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from filelock import SoftFileLease, Timeout

from datafree.errors import TimeLimit

BEAT, LEASE = 60, 300  # seconds between a claim's signs of life, and without one until it is free
LOST = getattr(signal, "SIGUSR1", signal.SIGINT)  # tells a script that its claim is; Windows has only the latter
WAIT = 1  # seconds that are given to a process that lets go


class Busy(TimeLimit):
    """Another process has the run. Exit code 75, too: run again, later."""


class _Lease(SoftFileLease):
    # From filelock 4.2 on; earlier ones rename.
    def _take_over(self, marker: os.stat_result, breaker_pid: int | None) -> None:
        """Take a dead process's place; where the disk exchanges no two files, as NFS, free it for the next try.

        There filelock leaves it as it is: a plain rename would leave a moment in which two could have it.
        """
        super()._take_over(marker, breaker_pid)
        file, guard = Path(self.lock_file), Path(f"{self.lock_file}.freed")
        if self._is(file, marker):
            with contextlib.suppress(OSError):  # such as a guard of one that died here, long ago
                if time.time() - guard.stat().st_mtime > LEASE:
                    guard.rmdir()
            with contextlib.suppress(FileExistsError):  # another process frees it
                guard.mkdir()
                try:
                    if self._is(file, marker):
                        file.unlink()
                finally:
                    guard.rmdir()

    @staticmethod
    def _is(file: Path, marker: os.stat_result) -> bool:
        with contextlib.suppress(OSError):
            now = file.lstat()
            return (now.st_ino, now.st_mtime_ns) == (marker.st_ino, marker.st_mtime_ns)
        return False


def _claim(out: str | Path, run: str, lost: Callable | None = None) -> SoftFileLease:
    file = Path(out) / ".locks" / f"{run}.claim"
    file.parent.mkdir(parents=True, exist_ok=True)
    return _Lease(file, lease_duration=LEASE, heartbeat_interval=BEAT, on_compromise=lost)


def _interrupt(_lost) -> None:
    signal.pthread_kill(threading.main_thread().ident, LOST)


def _owner(claim: SoftFileLease) -> tuple[str, float]:
    """Who has a claim, and the seconds since the last sign of life, by the clocks of two machines."""
    try:
        owner, age = claim.owner, time.time() - Path(claim.lock_file).stat().st_mtime
    except OSError:
        owner, age = None, math.inf
    return f"process {owner.pid} on {owner.hostname.partition('?')[0]}" if owner else "another process", age


@contextlib.contextmanager
def claimed(out: str | Path, run: str) -> Iterator[None]:
    """Have a run to oneself while the block works.

    Args:
        out: the shared parent of the run folders. run: the folder's name.

    Raises:
        Busy: another process has it, or took it since this one gave no sign of life.
    """
    claim = _claim(out, run, _interrupt)
    who, age = _owner(claim)
    try:
        # A clock that goes wrong makes this wait, or come again, in vain: whether a claim is free is not read from it.
        claim.acquire(timeout=WAIT if age < LEASE else LEASE + 2 * BEAT, poll_interval=0.2)
    except Timeout as error:
        raise Busy(f"{run} is run by {who}: the same command goes on once that is over") from error
    # It ends the script that the block waits for, as Ctrl-C does, which is ignored in the background.
    before = signal.signal(LOST, signal.default_int_handler)
    try:
        yield
    except KeyboardInterrupt as error:
        if claim.compromise:
            raise Busy(f"{run} went to {_owner(claim)[0]}, after {LEASE} s without a sign of life") from error
        raise
    finally:
        signal.signal(LOST, before)
        claim.release()


class Claims:
    """Looks at the claims of a folder, again and again; those of the dead it takes away."""

    def __init__(self, out: str | Path):
        self.out, self.known = Path(out), {}

    def running(self) -> dict[str, str]:
        """Run -> process and machine, of all runs that are claimed."""
        found = {}
        for file in sorted((self.out / ".locks").glob("*.claim")):
            run = file.name.removesuffix(".claim")
            claim = self.known[run] = self.known.get(run) or _claim(self.out, run)
            who, age = _owner(claim)
            try:
                claim.acquire(blocking=False)
                claim.release()
            except OSError:  # Timeout is one; another's folder may be read-only
                found[run] = who if age < LEASE else f"{who}, silent for {age / 60:.0f} min"
        return found
