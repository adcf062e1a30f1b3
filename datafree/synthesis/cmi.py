"""CMI, Contrastive Model Inversion (Fang et al., IJCAI 2021): new images differ from old ones."""

import copy
import re
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from datafree.distributed import count, from_first, share
from datafree.errors import UsageError
from datafree.losses import contrastive_loss
from datafree.pool import read_rows, write_rows

from .base import GENERATOR, STUDENT, Best, Losses, Method, Synthesizer, Tick, adam, redraw, register


class CMI(Synthesizer):
    """Each round inverts one batch, from a redrawn generator, that can be told from older ones.

    Latents z and the generator take `g_steps` steps of Adam on

        L = cr L_cr + bn L_bn + oh H(t, y) + adv L_adv

    where L_cr tells apart, in the space of a small head on the teacher's features, a strong and a weak crop of the same
    image from those of other images: of the batch and of `n_neg` random ones of the last `bank_size`, whose features
    the memory bank keeps. The images of the lowest L go to the pool and their features to the bank.

    Features are spatial means of what enters the teacher's BatchNorm layers (`feature_layers` "bn") or its
    stages ("blocks": `layer1`, `layer2` ... of ResNets, as CMI's repository has it for its ResNet-34).

    Raises:
        UsageError: "blocks" of a teacher without such stages.
    """

    terms = ("bn", "oh", "adv", "cr")
    settings = (*Synthesizer.settings, *terms, "lr_g", "cr_T", "bank_size", "n_neg", "head_dim", "feature_layers")
    kept, fresh = ("generator",), True

    def __init__(self, *networks: object, **settings: object):
        super().__init__(*networks, **settings)
        if not self.cr:  # the features are read by L_cr alone
            return
        self.layers = self.hooks.layers if self.feature_layers == "bn" else stages(self.teacher)
        with torch.no_grad():
            x = torch.zeros(1, *self.shape, device=self.runtime.device, dtype=next(self.teacher.parameters()).dtype)
            width = self.features(x).shape[1]
        layers = nn.Linear(width, width), nn.ReLU(), nn.Linear(width, self.head_dim)
        self.head = nn.Sequential(*layers).to(self.runtime.device)
        # On each rank it sees the whole batch: nothing is added up.
        self.head_optimizer = torch.optim.Adam(self.head.parameters(), self.lr_g, fused=True)
        path = self.pool.path.with_name("bank.f32")
        self.bank = MemoryBank(self.bank_size, 2 * width, self.runtime.device, path)  # local half, then global half
        self.kept = ("generator", "head", "head_optimizer", "bank")

    def batch(self, adversarial: bool, tick: Tick) -> Losses:
        redraw(self.generator)
        return super().batch(adversarial, tick)

    def set_apart(self) -> Tensor:
        cr, self.cr = self.cr, 0.0  # neither the head nor the bank learns of it
        state = copy.deepcopy(self.generator.state_dict())
        made = super().set_apart()
        self.generator.load_state_dict(state)
        self.cr = cr
        return made

    def invert(self, z: Tensor, targets: Tensor, adversarial: bool, tick: Tick) -> Losses:
        """One round from latents z (N, nz), optimised in place, towards classes targets (N,)."""
        z.requires_grad_()
        optimizers = [adam((self.generator.parameters(), self.lr_g), ([z], self.lr_g))]
        optimizers += [self.head_optimizer] if self.cr else []
        best = Best()
        for _ in range(self.g_steps):
            images = self.generate(self.generator, z)
            losses, features = self.losses(images, targets, adversarial)
            loss = self.weigh(losses)
            best.offer(loss, images, *features)
            self.descend(loss, tick, *optimizers)
        images, *features = best.tensors
        self.pool.add(images)
        for rows in features:
            self.bank.add(rows)
        return losses

    def losses(self, images: Tensor, targets: Tensor, adversarial: bool) -> tuple[Losses, list[Tensor]]:
        """The terms of weight above 0 by name; with L_cr, the features (N, 2 D) of both views, else nothing."""
        losses = self.inversion_losses(self.view(images), targets, adversarial, self.layers if self.cr else ())
        if not self.cr:
            return losses, []
        global_features = self.hooks.features()
        local_features = self.features(self.strong_view(images))
        bank_local, bank_global = self.bank.draw(self.n_neg).chunk(2, dim=1)
        local = self.project(local_features, bank_local)
        with torch.no_grad():
            others = self.project(global_features, bank_global)
        losses["loss_cr"] = contrastive_loss(local, others, self.cr_T, count(images))
        return losses, [torch.cat([local_features, global_features], dim=1)]

    def features(self, x: Tensor) -> Tensor:
        """The teacher's features (N, D) of normalised images x."""
        with self.runtime.autocast(), self.hooks.record(False, self.layers):
            self.teacher(x)
        return self.hooks.features()

    def project(self, features: Tensor, bank: Tensor) -> Tensor:
        return F.normalize(self.head(torch.cat([features, bank])), dim=1)

    @torch.no_grad()
    def start_from(self, images: Tensor) -> None:
        """Fill pool and bank with images (N, C, H, W), uint8, inverted before."""
        self.pool.add(share(images))
        for part in images[-self.bank_size :].split(self.synthesis_batch_size) if self.cr else ():
            x = share(part).to(self.runtime.device).float() / 255
            self.bank.add(torch.cat([self.features(view(x)) for view in (self.strong_view, self.view)], dim=1))

    def strong_view(self, images: Tensor) -> Tensor:
        """A crop of 1/4 to all of the area at its own place and size for each image, resized."""
        n, _, height, width = images.shape
        u = share(torch.rand(3, count(images), device=images.device, dtype=images.dtype), 1)
        scale = (0.25 + 0.75 * u[0]).sqrt()
        offset = (1 - scale) * (2 * u[1:] - 1)  # in the grid's units, -1..1 from edge to edge
        zero, across = torch.zeros_like(scale), scale
        if self.transform.flip:
            across = torch.where(share(torch.rand(count(images), device=images.device)) < 0.5, -scale, scale)
        matrix = torch.stack([across, zero, offset[0], zero, scale, offset[1]], dim=1).view(n, 2, 3)
        grid = F.affine_grid(matrix, (n, 1, height, width), align_corners=False)
        return self.normalized(F.grid_sample(images, grid, align_corners=False, padding_mode="border"))

    def flush(self) -> None:
        if self.cr:
            self.bank.flush()


def stages(network: nn.Module) -> list[nn.Module]:
    """`layer1`, `layer2` ... of a ResNet. Raises UsageError if the network has none."""
    found = [m for name, m in network.named_children() if re.fullmatch(r"layer\d", name)]
    if not found:
        text = "has no stages layer1, layer2 ... as ResNets have: give --feature_layers bn"
        raise UsageError(f"--feature_layers blocks: a {type(network).__name__} {text}")
    return found


class MemoryBank:
    """The newest `size` rows (width,) of features: a ring, allocated once.

    `flush` writes what is new to `path`, a ring of twice as many rows, and a checkpoint holds their number:
    what a killed run wrote behind its last checkpoint took the places of rows that this one does not need.
    """

    def __init__(self, size: int, width: int, device: torch.device, path: Path):
        self.rows, self.path = torch.empty(size, width, device=device), path
        self.count = self.new = self.saved = 0  # rows so far; of these, not in the file; ever written to it

    def __len__(self) -> int:
        return min(self.count, len(self.rows))

    def _at(self, positions: Tensor) -> Tensor:
        """Where the rows of these positions, 0 for the oldest, are."""
        return (self.count - len(self) + positions) % len(self.rows)

    def add(self, rows: Tensor) -> None:
        """Append rows (N, width); the oldest beyond `size` are forgotten."""
        rows = rows[-len(self.rows) :]
        self.count += len(rows)
        self.new = min(self.new + len(rows), len(self.rows))
        newest = torch.arange(len(self) - len(rows), len(self), device=rows.device)
        self.rows[self._at(newest)] = rows

    def draw(self, n: int) -> Tensor:
        """n random rows, or all, from the oldest on, if there are no more."""
        positions = (torch.arange if len(self) <= n else torch.randperm)(len(self), device=self.rows.device)
        return self.rows[self._at(positions[:n])]

    def _pieces(self, first: int, rows: Tensor) -> list[tuple[int, Tensor]]:
        """Rows number `first` ... of the file, in its order, each piece with the byte where it begins."""
        room, width = 2 * len(self.rows), self.rows.shape[1] * self.rows.element_size()
        head = room - first % room
        return [(first % room * width, rows[:head]), (0, rows[head:])]

    def flush(self) -> None:
        """Write the new rows to the file."""
        newest = torch.arange(len(self) - self.new, len(self), device=self.rows.device)
        write_rows(self.path, *self._pieces(self.saved, self.rows[self._at(newest)]), new=not self.saved)
        self.saved, self.new = self.saved + self.new, 0

    def state_dict(self) -> dict[str, int]:
        return {"rows": self.saved + self.new}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.saved, self.new = state["rows"], 0
        self.count = min(self.saved, len(self.rows))
        if self.count:
            self.rows[: self.count] = from_first(self._read).to(self.rows.device)

    def _read(self) -> Tensor:
        rows = torch.empty(self.count, self.rows.shape[1])
        read_rows(self.path, *self._pieces(self.saved - self.count, rows))
        return rows


RECIPE = STUDENT | GENERATOR | dict(g_steps=200, lr_g=1e-3, adv=0.5, bn=1.0, oh=1.0, cr=0.8, cr_T=0.2, bank_size=40960,
                                    n_neg=4096, head_dim=256, feature_layers="bn")  # fmt: skip
FLAGS = {
    "cr": "weight of the contrastive loss", "cr_T": "temperature of the contrastive loss",
    "bank_size": "images in the memory bank", "n_neg": "of the bank, negatives of a step",
    "head_dim": "output size of the instance discriminator",
    "feature_layers": "what it sees: the means of what enters the BatchNorm layers, or the stages of a ResNet",
}  # fmt: skip


def adjust(dataset: str, teacher: str, g_steps: int | None) -> dict[str, str]:
    """The settings of CMI that differ from its recipe's."""
    return {"feature_layers": "blocks"} if teacher == "resnet34" else {}


register("cmi", Method(CMI, RECIPE, adjust=adjust), FLAGS, {"feature_layers": dict(choices=("bn", "blocks"))})
