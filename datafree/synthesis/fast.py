"""Fast-Datafree (Fang et al., AAAI 2022): a generator that is meta-learnt across batches."""

import copy

import torch
from torch import nn

from datafree.losses import wide

from .base import Best, Synthesizer, adam, redraw


class Fast(Synthesizer):
    """Each round inverts one batch from a common generator, and moves that generator.

    With `meta`, a copy of the generator and fresh latents z take `g_steps` steps of Adam on

        L = bn L_bn + oh H(t, y) + adv L_adv,    y random classes,

    and the images of the lowest L go to the pool. The common generator learns by first-order MAML
    (`is_maml` 1: the sum of the copy's gradients over the steps) or by Reptile (0: 67 times the
    difference between it and the copy's end). Without `meta` it takes the steps itself.
    """

    settings = (
        "synthesis_batch_size",
        "g_steps",
        "lr_g",
        "lr_z",
        "bn",
        "oh",
        "adv",
        "bn_mmt",
        "meta",
        "is_maml",
        "reset_l0",
        "reset_bn",
        "as_published",
    )
    reptile_factor = 67

    def __init__(self, *networks, **settings):
        super().__init__(*networks, **settings)
        if self.meta:
            self.meta_optimizer = adam((self.generator.parameters(), self.lr_g * self.g_steps))

    def synthesize(self, adversarial, tick):
        return self.invert(self.latents(), self.targets(), adversarial, tick)

    def invert(self, z, targets, adversarial, tick):
        """One round from latents z (N, nz) towards classes targets (N,); returns the last losses.

        z is optimised in place.
        """
        z.requires_grad_()
        inner = copy.deepcopy(self.generator) if self.meta else self.generator
        weights = [p for p in inner.parameters() if p.requires_grad]
        meta_weights = [p for p in self.generator.parameters() if p.requires_grad]
        optimizer = adam((weights, self.lr_g), ([z], self.lr_z))
        best, gradients = Best(), None
        for step in range(self.g_steps):
            with self.runtime.autocast():
                images = inner(z)
            images = wide(images)
            losses = self.inversion_losses(self.view(images), targets, adversarial)
            loss = self.weigh(losses)
            best.offer(loss, images)
            optimizer.zero_grad()
            loss.backward()
            if self.meta and self.is_maml:
                if gradients is None:
                    gradients = [p.grad.clone() for p in weights]
                else:
                    torch._foreach_add_(gradients, [p.grad for p in weights])
                if step + 1 == self.g_steps:
                    self._meta_step(meta_weights, gradients)
            optimizer.step()
            tick(loss.detach())
        if self.bn:
            self.hooks.update()
        if self.meta and not self.is_maml:
            with torch.no_grad():
                self._meta_step(
                    meta_weights,
                    [self.reptile_factor * (m - p) for m, p in zip(meta_weights, weights, strict=True)],
                )
        self.best_loss, (images,) = best.loss, best.tensors
        self.pool.add(images)
        return {k: v.detach() for k, v in losses.items()}

    def _meta_step(self, weights, gradients):
        for p, gradient in zip(weights, gradients, strict=True):
            p.grad = gradient
        self.meta_optimizer.step()

    def reset(self):
        """What happens once in mid-run: --reset_l0 redraws the generator's first linear layer and
        first BatchNorm, --reset_bn every BatchNorm.

        As published, that BatchNorm's scale gets the mean 0 of a weight instead of 1.
        """
        layers = list(self.generator.modules())
        norms = [m for m in layers if isinstance(m, nn.BatchNorm2d)]
        if self.reset_l0:
            redraw(next(m for m in layers if isinstance(m, nn.Linear | nn.Conv2d)))
            redraw(norms[0], 0.0 if self.as_published else 1.0)
        if self.reset_bn:
            for norm in norms:
                redraw(norm)

    def state_dict(self):
        return {
            "generator": self.generator.state_dict(),
            "hooks": self.hooks.state_dict(),
            "meta_optimizer": self.meta_optimizer.state_dict() if self.meta else None,
        }

    def load_state_dict(self, state):
        self.generator.load_state_dict(state["generator"])
        self.hooks.load_state_dict(state["hooks"])
        if self.meta:
            self.meta_optimizer.load_state_dict(state["meta_optimizer"])
