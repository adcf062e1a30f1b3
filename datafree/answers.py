"""A frozen teacher's answers, remembered: a pool's images come again in the same forms, and it says the same."""

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor

from datafree.errors import UsageError
from datafree.pool import read_rows, write_rows


class Answers:
    """The teacher's logits of images that may come again: it is asked once for each.

    Crops by 4 pixels and mirroring give an image 162 forms, and a student of Fast-Datafree meets each image of its pool
    364 times in the mean: two thirds of what it meets it has met before, and most of its step's time is the teacher's.
    `flush` appends what is new to `path`, and `state_dict` is the number of answers there, as with the pool's images.

    Args:
        teacher: normalised images (N, C, H, W) -> logits (N, num_classes). path: the file. n: how many there can be; 0,
            or more than fit into ROOM, and the teacher is asked each time, as it is for a batch with more.
    """

    ROOM = 2**30  # bytes of logits: 220 epochs of Fast-Datafree with 10 classes take a third of it

    def __init__(self, teacher: Callable[[Tensor], Tensor], num_classes: int, path: Path, n: int):
        self.teacher, self.path = teacher, path
        # Memory of answers that never come is never taken.
        logits = torch.empty(0, num_classes)
        self.logits = logits.new_empty(n if n * num_classes * logits.element_size() <= self.ROOM else 0, num_classes)
        self.known = torch.zeros(len(self.logits), dtype=torch.bool)
        self.row_bytes = 8 + num_classes * logits.element_size()  # in the file: a number, and the logits
        self.saved, self.new = 0, []

    def __call__(self, x: Tensor, numbers: Tensor | None) -> Tensor:
        """The logits of images x, which `numbers` (N,) below n tell apart; None says that none of them come again."""
        if numbers is None or not len(self.known) or len(self.known) <= numbers.max():
            return self.teacher(x)
        known = self.known[numbers]
        order, n = known.argsort(stable=True), len(x) - int(known.sum())
        # Sixteens: each size of a batch has its own kernels, which take as long to make as to run.
        asked = order[: -(-n // 16) * 16]
        logits = self.logits[numbers]
        if n:
            said = self.teacher(x[asked].contiguous(memory_format=torch.channels_last))
            new, logits[order[:n]] = numbers[order[:n]], said[:n].to(logits.dtype)
            self.logits[new], self.known[new] = logits[order[:n]], True
            self.new.append(new)
        return logits

    def __len__(self) -> int:
        return self.saved + sum(map(len, self.new))

    def flush(self) -> None:
        """Write what is new behind what the file holds."""
        numbers = torch.cat([self.known.new_empty(0, dtype=torch.int64), *self.new])
        if len(numbers):
            rows = torch.cat([part.view(torch.uint8) for part in (numbers[:, None], self.logits[numbers])], 1)
            write_rows(self.path, (self.saved * self.row_bytes, rows), new=not self.saved)
            self.saved, self.new = len(self), []

    def state_dict(self) -> dict[str, int]:
        return {"answers": len(self)}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Read the answers; where their file is gone, as after a run's end, or damaged, the teacher is asked again."""
        rows = torch.empty(max(0, state["answers"]) * bool(len(self.known)), self.row_bytes, dtype=torch.uint8)
        with suppress(UsageError):
            read_rows(self.path, (0, rows))
            numbers = rows[:, :8].contiguous().view(torch.int64)[:, 0]
            if len(rows) and numbers.min() >= 0 and numbers.max() < len(self.known):
                self.logits[numbers] = rows[:, 8:].contiguous().view(self.logits.dtype)
                self.known[numbers], self.saved = True, len(rows)
