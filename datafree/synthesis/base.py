"""What the families share: networks, the losses of a view of images, the best ones so far, the table of methods."""

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from datafree.augment import Transform
from datafree.cli import TYPES
from datafree.distributed import add_up, share
from datafree.hooks import BatchNormHooks
from datafree.losses import at_least_float32, decision_adversarial_loss, kd_loss, l1_loss
from datafree.pool import ImagePool, Shape
from datafree.runtime import Runtime
from models import GENERATORS

Losses = dict[str, Tensor]  # scalars by name
Sample = tuple[Tensor, Tensor | None]  # images, and numbers that tell them apart if they may come again
Tick = Callable[[Tensor], None]  # is told the loss of each update
# Distances of student and teacher, (s_logits, t_logits, T) -> scalar.
CRITERIA = {"kl": kd_loss, "l1": lambda s_logits, t_logits, T=1.0: l1_loss(s_logits, t_logits)}
# The student's part of every published recipe, and the generator of those that have one.
STUDENT = dict(n_epochs=200, warmup=0, ep_steps=400, kd_steps=400, batch_size=256, synthesis_batch_size=256, lr=0.1,
               weight_decay=1e-4, criterion="kl", T=20.0)  # fmt: skip
GENERATOR = dict(generator="fast", nz=256, ngf=64)
# What a recipe can set, flag -> help; their types are in datafree.cli.
FLAGS = {
    "n_epochs": "epochs of ep_steps", "warmup": "epochs without student steps and adversarial term",
    "ep_steps": "student steps of an epoch", "kd_steps": "student steps of a round",
    "g_steps": "updates that make a batch", "batch_size": "images of a student step",
    "synthesis_batch_size": "images of a round", "lr": "learning rate of the student (SGD, momentum 0.9)",
    "weight_decay": "of the student", "T": "temperature of the student's loss",
    "criterion": "the student's loss: KL at temperature T, or mean absolute difference of logits",
    "lr_g": "learning rate of the generator (deepinv: of the pixels)", "adv": "weight of the adversarial term",
    "bn": "weight of the BatchNorm statistics", "oh": "weight of the cross-entropy",
    "generator": "one of %(choices)s", "nz": "length of a latent", "ngf": "width of the generator",
}  # fmt: skip
TYPES |= {"criterion": dict(choices=CRITERIA), "generator": dict(choices=GENERATORS, metavar="NAME")}


class Synthesizer:
    """Networks and settings of one family.

    Args:
        teacher, student: in eval mode while images are made; the student's weights are frozen then.
        generator: in train mode, or None. shape: (C, H, W) of an image. num_classes: of the teacher.
        settings: the family's own; kept as attributes.
    """

    terms: tuple[str, ...] = ()  # the losses it minimises: `adv` weighs `loss_adv`
    settings: tuple[str, ...] = ("synthesis_batch_size", "g_steps")  # these weights, and the rest
    pooled = True  # whether images are kept
    fresh = False  # whether a batch is made of nothing that earlier ones left
    kept: tuple[str, ...] = ()  # the attributes whose states a resumed run needs
    early = True  # whether the published code turns the adversarial term on an epoch before the student
    published_T: float | None = None  # the temperature that the published code distils at, whatever it is told

    def __init__(
        self, teacher: nn.Module, student: nn.Module, generator: nn.Module | None, transform: Transform, shape: Shape,
        num_classes: int, runtime: Runtime, pool: ImagePool | None, **settings: object,
    ):  # fmt: skip
        self.teacher, self.student, self.generator = teacher, student, generator
        self.transform, self.shape, self.num_classes = transform, shape, num_classes
        self.runtime, self.pool = runtime, pool
        if settings.keys() != set(self.settings):
            raise TypeError(f"{type(self).__name__} takes {self.settings}, not {set(settings)}")
        vars(self).update(settings)
        self.hooks, self.apart = BatchNormHooks(teacher, settings.get("bn_mmt", 0.0)), None

    def synthesize(self, adversarial: bool, tick: Tick) -> Losses:
        """One round; returns the last losses by name, none where no term is on.

        Args:
            adversarial: whether the adversarial term is on. tick: called with the loss of each update.
        """
        losses = self.round(adversarial, tick) if self.has_terms(adversarial) else {}
        return {k: v.detach() for k, v in losses.items()}

    @classmethod
    def batches(cls, settings: Mapping[str, object], adversarial: bool) -> int:
        """How many batches of images a round makes, by settings that include the family's own."""
        return 1

    def updates(self, adversarial: bool) -> int:
        """How often a round calls `tick`."""
        return self.has_terms(adversarial) * self.g_steps * self.batches(vars(self), adversarial)

    def has_terms(self, adversarial: bool) -> bool:
        """Whether a round makes images."""
        return any(self.is_on(term, adversarial) for term in self.terms)

    def is_on(self, term: str, adversarial: bool) -> bool:
        """Whether the weight of a term is above 0; that of the adversarial one counts only if it is on."""
        return bool(getattr(self, term)) and (adversarial or term != "adv")

    def losses_of(self, adversarial: bool, **terms: Callable[[], Tensor]) -> Losses:
        """The terms that are on, computed, as `loss_<name>`."""
        return {f"loss_{name}": loss() for name, loss in terms.items() if self.is_on(name, adversarial)}

    def round(self, adversarial: bool, tick: Tick) -> Losses:
        """What a family does in `synthesize`: one batch, if it does no other."""
        return self.batch(adversarial, tick)

    def batch(self, adversarial: bool, tick: Tick) -> Losses:
        """One batch for the pool, from latents and classes."""
        return self.invert(self.latents(), self.targets(), adversarial, tick)

    def latents(self) -> Tensor:
        return share(self.generator.latents(self.synthesis_batch_size, device=self.runtime.device))

    def targets(self) -> Tensor:
        return torch.randint(self.num_classes, (self.synthesis_batch_size,), device=self.runtime.device)

    def sample(self, n: int, batch_size: int) -> Iterator[Sample]:
        """n batches from the pool, augmented: normalised images (batch_size, C, H, W), and what tells them apart."""
        for rows, images in self.pool.batches(batch_size, n):
            images, form = self.transform.vary(images)
            seen = None if form is None else rows.to(form.device, non_blocking=True) * self.transform.forms + form
            yield self.transform(images), seen

    def pictures(self, n: int) -> Tensor:
        """The newest n images, (N, C, H, W) in 0..1."""
        return self.pool.images(max(0, len(self.pool) - n)).float() / 255

    def unseen(self) -> Iterator[Tensor]:
        """A batch of normalised images, made as the pool's are, that the student never learns from.

        Where batches are made of nothing that earlier ones left (`fresh`), it is always the same one.
        """
        if self.apart is None or not self.fresh:
            self.apart = self.set_apart()
        yield self.transform(self.apart)

    def set_apart(self) -> Tensor:
        """A process's share of a batch, uint8 (N, C, H, W), which leaves no trace; without the adversarial term."""
        pool, self.pool = self.pool, ImagePool(self.shape, self.runtime.device, "unsaved")
        state = None if self.fresh else copy.deepcopy(self.state_dict())
        devices = [self.runtime.device] if self.runtime.device.type == "cuda" else []
        with torch.enable_grad(), torch.random.fork_rng(devices):
            torch.manual_seed(0)
            self.batch(not self.has_terms(False), lambda loss: None)
        if state is not None:
            self.load_state_dict(state)
        made, self.pool = self.pool.near, pool
        return made

    def generate(self, generator: nn.Module, z: Tensor) -> Tensor:
        """The generator's images (N, C, H, W) in 0..1 of latents z, at least float32."""
        with self.runtime.autocast():
            images = generator(z.to(self.runtime.device))
        return at_least_float32(images)

    def normalized(self, images: Tensor) -> Tensor:
        """Images (N, C, H, W) in 0..1 as the networks take them."""
        return self.transform.normalize(images).contiguous(memory_format=torch.channels_last)

    def view(self, images: Tensor) -> Tensor:
        """A random crop and flip of images (N, C, H, W) in 0..1, normalised."""
        return self.normalized(self.transform.augment(images))

    def inversion_losses(
        self, x: Tensor, targets: Tensor, adversarial: bool, layers: Sequence[nn.Module] = ()
    ) -> Losses:
        """The terms of bn L_bn + oh L_oh + adv L_adv that are on, of normalised images x; records `layers`, too."""
        with self.runtime.autocast():
            with self.hooks.record(bool(self.bn), layers):
                t_logits = self.teacher(x)
            s_logits = self.student(x) if self.is_on("adv", adversarial) else None
        return self.losses_of(
            adversarial,
            bn=self.hooks.loss,
            oh=lambda: F.cross_entropy(at_least_float32(t_logits), targets),
            adv=lambda: decision_adversarial_loss(s_logits, t_logits),
        )

    def weigh(self, losses: Mapping[str, Tensor]) -> Tensor:
        """The sum of the losses by their weights: the settings of the same name."""
        return sum(getattr(self, name.removeprefix("loss_")) * value for name, value in losses.items())

    def descend(self, loss: Tensor, tick: Tick, *optimizers: torch.optim.Optimizer) -> None:
        """One step of the optimisers along the gradient of `loss`, which `tick` is told."""
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
        tick(loss.detach())

    def flush(self) -> None:
        """Write what a checkpoint leaves to files of the synthesizer's own."""

    def state_dict(self) -> dict[str, object]:
        """All that a resumed run needs: tensors and numbers in dictionaries and lists."""
        return {name: getattr(self, name).state_dict() for name in self.kept}

    def load_state_dict(self, state: dict[str, object]) -> None:
        for name in self.kept:
            getattr(self, name).load_state_dict(state[name])


@dataclass(frozen=True)
class Method:
    """A choice of `datafree_kd.py --method`.

    Args:
        family: who makes the images. fixed: settings of it that are no flags.
        recipe: the published settings, flag -> value: STUDENT's, GENERATOR's unless it has none, the family's.
        adjust: what the published scripts choose by the data set, the teacher's name and --g_steps (None if left out).
    """

    family: type[Synthesizer]
    recipe: Mapping[str, object]
    fixed: Mapping[str, object] = field(default_factory=dict)
    adjust: Callable[[str, str, int | None], dict] = lambda dataset, teacher, g_steps: {}


METHODS: dict[str, Method] = {}


def register(name: str, method: Method, flags: Mapping | None = None, types: Mapping | None = None) -> None:
    """Offer `method` by `name`, to the command line as well. Raises ValueError if the name is taken.

    Args:
        flags: help of settings that no other method has, flag -> text.
        types: argparse types of these, or dictionaries of its options, see `datafree.cli.TYPES`; without one, a
            setting is a loss's weight, a number from 0 on.
    """
    if name in METHODS:
        raise ValueError(f"the name {name!r} is taken: register the method under another one")
    METHODS[name] = method
    FLAGS.update(flags or {})
    TYPES.update(types or {})


class Best:
    """The tensors that came with the lowest loss so far, chosen without waiting for a GPU."""

    def __init__(self):
        self.loss = None

    def offer(self, loss: Tensor, *tensors: Tensor) -> None:
        """Keep copies of these tensors if `loss` (0-d) is the lowest so far."""
        loss, tensors = loss.detach(), [t.detach() for t in tensors]
        if self.loss is None:
            self.loss, self.tensors = loss, tensors
        better = loss < self.loss
        self.loss = torch.where(better, loss, self.loss)
        self.tensors = [torch.where(better, new, old) for new, old in zip(tensors, self.tensors, strict=True)]


def adam(*groups: tuple[Iterable[Tensor], float], of_share: bool = True) -> torch.optim.Adam:
    """The inner optimiser of all families: groups of (parameters, lr), betas 0.5 and 0.999; as `make_optimizer`'s."""
    groups = [{"params": list(p), "lr": lr} for p, lr in groups]
    optimizer = torch.optim.Adam(groups, betas=(0.5, 0.999), fused=True)
    return add_up(optimizer) if of_share else optimizer


def redraw(module: nn.Module, gamma: float = 1.0) -> None:
    """Fresh weights, N(0, 0.02^2), BatchNorm scales N(gamma, 0.02^2), biases 0 (DCGAN)."""
    for m in module.modules():
        if isinstance(m, nn.Conv2d | nn.ConvTranspose2d | nn.Linear | nn.BatchNorm2d):
            if m.weight is not None:
                nn.init.normal_(m.weight, gamma if isinstance(m, nn.BatchNorm2d) else 0.0, 0.02)
            if m.bias is not None:
                nn.init.zeros_(m.bias)
