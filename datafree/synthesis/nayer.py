"""NAYER (Tran et al., CVPR 2024): labels, not latents, make images; a noisy layer that is drawn anew makes them differ.

A label's embedding is fixed. A linear layer on it, drawn from N(0, 1) before each batch, carries all randomness: a few
steps fit it and the generator behind it to the batch.
"""

import argparse
import math
from collections.abc import Mapping
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
import torch
from torch import Tensor, nn

from datafree.cli import count, path
from datafree.distributed import share
from datafree.errors import UsageError
from datafree.hooks import features_of
from models.generator import NoisyLayers

from .base import GENERATOR, STUDENT, Best, Losses, Method, Synthesizer, Tick, adam, register


class Nayer(Synthesizer):
    """Each round makes `g_loops` batches, in warm-up `gwp_loops`; every `g_life` rounds its generator begins anew.

    A batch has all classes in turn. Its noisy layers are drawn; they and the generator take `g_steps` steps of a new
    Adam on

        L = bn L_bn + oh H(t, y) + adv L_adv,    x = G(noisy(embedding of y)),

    and the images of the lowest L go to the pool. As published, the student is in train mode from a round's second
    batch on, and the generator also begins anew when the rounds since `warmup` are a multiple of `g_life`.
    """

    terms = ("bn", "oh", "adv")
    own = ("lr_g", "bn_mmt", "g_loops", "gwp_loops", "g_life", "warmup", "label_embedding", "as_published")
    settings = (*Synthesizer.settings, *terms, *own)
    kept = ("generator", "hooks")
    early = False

    def __init__(self, *networks: object, **settings: object):
        super().__init__(*networks, **settings)
        self.embedding = embeddings(self.label_embedding, self.teacher, self.num_classes, self.shape)
        self.embedding = self.embedding.to(self.runtime.device)
        n = -(-self.synthesis_batch_size // self.num_classes)
        nz = math.prod(self.generator.latent_shape)
        self.noisy = NoisyLayers(self.embedding.shape[1], nz, self.num_classes, n).to(self.runtime.device)
        self.rounds = 0

    @classmethod
    def batches(cls, settings: Mapping[str, object], adversarial: bool) -> int:
        return settings["g_loops" if adversarial else "gwp_loops"]

    def round(self, adversarial: bool, tick: Tick) -> Losses:
        n, self.rounds = self.rounds, self.rounds + 1
        if n % self.g_life == 0 or self.as_published and (n - self.warmup) % self.g_life == 0:
            self.begin_anew()
        for _ in range(self.batches(vars(self), adversarial)):
            losses = self.batch(adversarial, tick)
            if self.as_published:
                self.student.train()
        return losses

    def batch(self, adversarial: bool, tick: Tick) -> Losses:
        self.noisy.redraw()
        return self.invert(self.targets(), adversarial, tick)

    def begin_anew(self) -> None:
        """A brand-new generator: every layer as PyTorch makes it."""
        for module in (*self.generator.modules(), self.noisy.n1):
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()

    def targets(self) -> Tensor:
        """All classes in turn, as often as they fit, and random ones behind them: (N,)."""
        n, classes = self.synthesis_batch_size, torch.arange(self.num_classes, device=self.runtime.device)
        rest = torch.randint(self.num_classes, (n % self.num_classes,), device=self.runtime.device)
        return torch.cat([classes.repeat(n // self.num_classes), rest])

    def invert(self, targets: Tensor, adversarial: bool, tick: Tick) -> Losses:
        """One batch of the classes targets (N,)."""
        optimizer, best = adam(([*self.generator.parameters(), *self.noisy.parameters()], self.lr_g)), Best()
        for _ in range(self.g_steps):
            images = self.images_of(targets)
            losses = self.inversion_losses(self.view(images), targets, adversarial)
            loss = self.weigh(losses)
            best.offer(loss, images)
            self.descend(loss, tick, optimizer)
        if self.bn:
            self.hooks.update()
        self.best_loss, (images,) = best.loss, best.tensors
        self.pool.add(images)
        return losses

    def images_of(self, targets: Tensor) -> Tensor:
        """Images (N, C, H, W) in 0..1 of classes targets (N,): of several processes each has its share of them."""
        with self.runtime.autocast():
            # Every process computes the whole batch's, whose blocks are of rows.
            z = share(self.noisy(self.embedding[targets]))
        return self.generate(self.generator, z.view(len(z), *self.generator.latent_shape))

    def state_dict(self) -> dict[str, object]:
        return super().state_dict() | dict(rounds=self.rounds, n1=self.noisy.n1.state_dict(), embedding=self.embedding)

    def load_state_dict(self, state: dict[str, object]) -> None:
        super().load_state_dict(state)
        self.rounds = state["rounds"]
        self.noisy.n1.load_state_dict(state["n1"])
        self.embedding.copy_(state["embedding"])


def embeddings(source: str, teacher: nn.Module, num_classes: int, shape: tuple[int, int, int]) -> Tensor:
    """What stands for each label: (num_classes, E).

    Args:
        source: orthogonal: random rows at right angles, of variance 1, E 512; teacher: the rows of its last layer; else
            a file of a NumPy array.
        teacher: of images of `shape`, in eval mode.

    Raises:
        UsageError: the file is none or of another number of classes; the teacher's last layer is not found.
    """
    if source == "orthogonal":
        width = max(512, num_classes)
        return nn.init.orthogonal_(torch.empty(num_classes, width), width**0.5)
    if source == "teacher":
        example = next(teacher.parameters(), torch.empty(0))
        with features_of(teacher, named=False) as found, torch.no_grad():
            teacher(torch.zeros(1, *shape, device=example.device, dtype=example.dtype))
        rows = getattr(found[1], "weight", None) if found else None
        if rows is None or len(rows) != num_classes:
            text = "--label_embedding teacher: its last layer, a row for each class, is not found"
            raise UsageError(f"{text}: take orthogonal, or a file")
        return rows.detach().flatten(1).clone()
    try:
        rows = np.load(Path(source), allow_pickle=False, mmap_mode="r")
        if not isinstance(rows, np.ndarray):
            raise ValueError("it holds several arrays")
        if rows.ndim != 2 or len(rows) != num_classes or rows.dtype.kind not in "fiu":
            raise ValueError(f"its array is {rows.dtype} of shape {rows.shape}")
        rows = torch.from_numpy(np.array(rows, dtype=np.float64)).to(torch.get_default_dtype())
    except (OSError, ValueError, EOFError, MemoryError, BadZipFile) as error:
        text = f"--label_embedding {source}: {error}"
        raise UsageError(f"{text}: it must be a .npy file of {num_classes} rows, one for each class") from error
    if not rows.isfinite().all():
        raise UsageError(f"--label_embedding {source} has values that are not finite: make it anew")
    return rows


# The published settings; of NAYER-100, -200 and -300, 120, 220 and 320 epochs, those of CIFAR-100, the longest.
RECIPE = STUDENT | GENERATOR | dict(n_epochs=320, warmup=20, batch_size=512, synthesis_batch_size=400, lr=0.2,
                                    g_steps=40, lr_g=4e-3, g_loops=2, gwp_loops=10, g_life=10, adv=1.33, bn=10.0,
                                    oh=0.5, bn_mmt=0.9, nz=1000, label_embedding="orthogonal")  # fmt: skip
FLAGS = {
    "g_loops": "batches of a round", "gwp_loops": "batches of a round of the warm-up",
    "g_life": "rounds after which the generator begins anew",
    "label_embedding": "what stands for each label: orthogonal (random rows), teacher (the rows of its last layer), "
                       "or a .npy file of classes x E, such as text features, which the paper takes",
}  # fmt: skip


def label_source(text: str) -> str:
    """An argparse type: orthogonal, teacher or a file."""
    if text in ("orthogonal", "teacher") or Path(path(text)).is_file():
        return text
    raise argparse.ArgumentTypeError(f"{text} is no file: it takes orthogonal, teacher, or a .npy file")


TYPES = dict.fromkeys(("g_loops", "gwp_loops", "g_life"), count)
TYPES |= {"label_embedding": dict(type=label_source, metavar="NAME")}


BY_DATA = {
    "cifar10": dict(g_steps=30),
    "tiny-imagenet": dict(g_steps=60, g_loops=4, gwp_loops=20, synthesis_batch_size=200, batch_size=256, lr=0.1,
                          ep_steps=1000, kd_steps=1000),
}  # fmt: skip


def adjust(dataset: str, teacher: str, g_steps: int | None) -> dict[str, float]:
    """The settings of NAYER that differ from its recipe's."""
    return BY_DATA.get(dataset, {})


register("nayer", Method(Nayer, RECIPE, adjust=adjust), FLAGS, TYPES)
