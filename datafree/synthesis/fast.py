"""Fast-Datafree (Fang et al., AAAI 2022): a generator that is meta-learnt across batches."""

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

from datafree.distributed import share, whole

from .base import GENERATOR, STUDENT, Best, Losses, Method, Synthesizer, Tick, adam, redraw, register


class Fast(Synthesizer):
    """Each round inverts one batch from a common generator, and moves that generator.

    With `meta`, a copy of the generator and fresh latents z take `g_steps` steps of Adam on

        L = bn L_bn + oh H(t, y) + adv L_adv,    y random classes,

    and the images of the lowest L go to the pool. The common generator learns by first-order MAML
    (`is_maml` 1: the sum of the copy's gradients over the steps) or by Reptile (0: 67 times the
    difference between it and the copy's end). Without `meta` it takes the steps itself.
    """

    terms = ("bn", "oh", "adv")
    own = ("lr_g", "lr_z", "bn_mmt", "meta", "is_maml", "reset_l0", "reset_bn", "as_published")
    settings = (*Synthesizer.settings, *terms, *own)
    kept = ("generator", "hooks")
    reptile_factor = 67.0
    summed = True  # whether first-order MAML takes the gradients of all steps

    def __init__(self, *networks: object, **settings: object):
        super().__init__(*networks, **settings)
        if self.meta:
            # Its gradients are made of the copies', which are added up.
            self.meta_optimizer = adam((self.generator.parameters(), self.lr_g * self.g_steps), of_share=False)
            self.kept = (*self.kept, "meta_optimizer")

    def invert(self, z: Tensor, targets: Tensor, adversarial: bool, tick: Tick) -> Losses:
        """One round from latents z (N, nz), optimised in place, towards classes targets (N,)."""
        z.requires_grad_()
        inner = copy.deepcopy(self.generator) if self.meta else self.generator
        weights = [p for p in inner.parameters() if p.requires_grad]
        optimizer = adam((weights, self.lr_g), ([z], self.lr_z))
        copies, best = [*weights, z], Best()
        for step in range(self.g_steps):
            images = self.generate(inner, z)
            losses = self.inversion_losses(self.view(images), targets, adversarial)
            loss = self.weigh(losses)
            best.offer(loss, images)
            self.descend(loss, tick, optimizer)
            if self.meta and self.is_maml:
                self._take_gradients(copies, step == 0 or not self.summed)
        if self.bn:
            self.hooks.update()
        if self.meta and not self.is_maml:
            for common, mine in zip(self.common(), copies, strict=False):
                common.grad = self.reptile_factor * (common - mine).detach()
        if self.meta:
            self.meta_step()
        self.best_loss, (images,) = best.loss, best.tensors
        self.pool.add(images)
        return losses

    def common(self) -> list[Tensor]:
        """What the rounds share; the first of a round's copies correspond."""
        return [p for p in self.generator.parameters() if p.requires_grad]

    def _take_gradients(self, copies: list[Tensor], first: bool) -> None:
        """Give the common tensors the gradients of the copies; add them unless they are the `first`."""
        pairs = [(c, p) for c, p in zip(self.common(), copies, strict=False) if p.grad is not None]  # not all are used
        if first:
            for common, mine in pairs:
                common.grad = mine.grad.clone()
        else:
            torch._foreach_add_([common.grad for common, _ in pairs], [mine.grad for _, mine in pairs])

    def meta_step(self) -> None:
        self.meta_optimizer.step()

    def reset(self) -> None:
        """In mid-run --reset_l0 redraws the generator's first linear layer and BatchNorm, --reset_bn all BatchNorms.

        As published, the first BatchNorm's scale gets the mean 0 of a weight instead of 1.
        """
        layers = list(self.generator.modules())
        norms = [m for m in layers if isinstance(m, nn.BatchNorm2d)]
        if self.reset_l0:
            redraw(next(m for m in layers if isinstance(m, nn.Linear | nn.Conv2d)))
            redraw(norms[0], 0.0 if self.as_published else 1.0)
        if self.reset_bn:
            for norm in norms:
                redraw(norm)


class FastLatents(Fast):
    """Fast on ImageNet: its rounds share common latents as they share a common generator.

    A round's copies of both take `g_steps` steps of Adam (lr_g, lr_z), and the common ones a step
    of Adam (meta_lr_g, meta_lr_z): by Reptile (`is_maml` 0) along `reptile_factor` times the difference
    between them and their copies' ends, by first-order MAML (1) along the copies' last gradients. After
    `z_rounds` rounds the common latents are drawn anew, and their Adam begins again.

    In the published code latents and copy share their memory: the difference is 0, the latents are their gradient.
    """

    own = ("lr_g", "lr_z", "meta_lr_g", "meta_lr_z", "z_rounds", "reptile_factor", "is_maml", "bn_mmt")
    settings = (*Synthesizer.settings, *Fast.terms, *own)
    meta, summed = True, False

    def __init__(self, *networks: object, **settings: object):
        super().__init__(*networks, **settings)
        self.meta_optimizer = adam((self.generator.parameters(), self.meta_lr_g), of_share=False)
        self.rounds, self.kept = 0, (*self.kept, "z_optimizer")
        shape = self.synthesis_batch_size, *self.generator.latent_shape
        self.take(share(torch.zeros(shape, device=self.runtime.device)))  # the first round draws them

    def take(self, z: Tensor) -> None:
        """Take latents z (N, nz, h, w) as the common ones of the rounds to come."""
        self.z, self.z_optimizer = z, adam(([z], self.meta_lr_z))

    def common(self) -> list[Tensor]:
        return [*super().common(), self.z]

    def meta_step(self) -> None:
        super().meta_step()
        self.z_optimizer.step()

    def round(self, adversarial: bool, tick: Tick) -> Losses:
        if self.rounds % self.z_rounds == 0:
            self.take(self.latents())
        self.rounds += 1
        return self.invert(self.z.clone(), self.targets(), adversarial, tick)

    def state_dict(self) -> dict[str, object]:
        state = super().state_dict() | {"z": whole(self.z), "rounds": self.rounds}
        return state | {"z_optimizer": _of_rows(state["z_optimizer"], whole)}

    def load_state_dict(self, state: dict[str, object]) -> None:
        self.take(share(state["z"]))
        self.rounds = state["rounds"]
        super().load_state_dict(state | {"z_optimizer": _of_rows(state["z_optimizer"], share)})


def _of_rows(state: dict, change: Callable[[Tensor], Tensor]) -> dict:
    """An optimiser's state whose averages of the latents' rows are changed."""
    slots = {i: {k: change(v) if v.dim() else v for k, v in slot.items()} for i, slot in state["state"].items()}
    return state | {"state": slots}


# What the published scripts choose by teacher and by g_steps.
FAST_BY_TEACHER = {"resnet34": dict(adv=1.33, oh=0.5), "vgg11": dict(adv=1.0, oh=0.5)}
FAST_BY_STEPS = {2: dict(lr_z=0.015, lr_g=5e-3), 5: dict(lr_z=0.01, lr_g=3e-3)}


def adjust(dataset: str, teacher: str, g_steps: int | None) -> dict[str, float]:
    """The settings of Fast that differ from its recipe's."""
    return FAST_BY_TEACHER.get(teacher, {}) | FAST_BY_STEPS.get(g_steps, {})


RECIPE = STUDENT | GENERATOR | dict(n_epochs=220, warmup=20, lr=0.2, g_steps=10, lr_z=0.01, lr_g=2e-3, adv=1.1, bn=10.0,
                                    oh=0.4, bn_mmt=0.9, reset_l0=1, reset_bn=0)  # fmt: skip
FLAGS = {
    "lr_z": "learning rate of the latents", "bn_mmt": "momentum of the batches' BatchNorm statistics",
    "reset_l0": "1: redraw the generator's first layer in mid-run",
    "reset_bn": "1: redraw the generator's BatchNorm layers in mid-run",
    "is_maml": "1: first-order MAML, 0: Reptile",
    "phase1_rounds": "rounds without a student before the first epoch",
    "meta_lr_g": "learning rate of the common generator", "meta_lr_z": "learning rate of the common latents",
    "z_rounds": "rounds with the same common latents", "reptile_factor": "of Reptile's meta gradients",
}  # fmt: skip
# The published settings of datafree_kd_imagenet.py; adv is 1.0 where the student is a ResNet-18.
IMAGENET = dict(n_epochs=400, ep_steps=1000, kd_steps=100, batch_size=100, lr=0.1, weight_decay=1e-4,
                criterion="kl", T=5.0, phase1_rounds=1400, synthesis_batch_size=100,
                g_steps=50, lr_g=2e-4, lr_z=0.01, meta_lr_g=1e-4, meta_lr_z=5e-3, z_rounds=50, reptile_factor=1.0,
                is_maml=0, bn=0.1, oh=0.1, adv=0.1, bn_mmt=0.9, nz=256, ngf=64)  # fmt: skip
register("fast", Method(Fast, RECIPE, dict(meta=False, is_maml=0), adjust), FLAGS)
register("fast_meta", Method(Fast, RECIPE | dict(is_maml=1), dict(meta=True), adjust))
