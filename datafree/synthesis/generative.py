"""The generator families of DAFL, DFAD, ZSKT and DFQ, as Fast-Datafree compares them."""

import copy
import math
from collections.abc import Iterator

import torch
from torch import Tensor

from datafree.distributed import mean, share
from datafree.hooks import features_of
from datafree.losses import activation_loss, information_entropy_loss, one_hot_loss

from .base import CRITERIA, GENERATOR, STUDENT, Losses, Method, Sample, Synthesizer, Tick, adam, register


class Generative(Synthesizer):
    """One generator, trained through the whole run; the student sees fresh images of it.

    It minimises  bn L_bn + oh L_oh + act L_act - adv D(s, t) + balance sum_c p_c log p_c,  the last term DAFL's L_ie in
    natural logarithms and D the mean absolute difference of the logits (`criterion` "l1") or KL(t || s) ("kl"). The
    published code hands the teacher in as the student, so that D is always 0; so does `as_published`.
    """

    terms = ("bn", "oh", "adv", "act", "balance")
    settings = (*Synthesizer.settings, *terms, "lr_g", "criterion", "as_published")
    kept = ("generator", "optimizer")
    pooled = False
    published_T = 1.0

    def __init__(self, *networks: object, **settings: object):
        super().__init__(*networks, **settings)
        self.optimizer = adam((self.generator.parameters(), self.lr_g))
        self.opponent = self.teacher if self.as_published else self.student

    def round(self, adversarial: bool, tick: Tick) -> Losses:
        for _ in range(self.g_steps):
            losses = self.step(self.latents(), adversarial)
            self.descend(self.weigh(losses), tick, self.optimizer)
        return losses

    def step(self, z: Tensor, adversarial: bool) -> Losses:
        """The losses that are on, of the images of latents z (N, nz), by name."""
        x = self.normalized(self.generate(self.generator, z))
        with self.runtime.autocast():
            with self.hooks.record(bool(self.bn)), features_of(self.teacher, bool(self.act)) as t_features:
                t_logits = self.teacher(x)
            s_logits = self.opponent(x) if self.is_on("adv", adversarial) else None
        return self.losses_of(
            adversarial,
            bn=self.hooks.loss,
            oh=lambda: one_hot_loss(t_logits),
            act=lambda: mean(activation_loss(t_features[0])),
            balance=lambda: information_entropy_loss(t_logits, math.e),
            adv=lambda: -CRITERIA[self.criterion](s_logits, t_logits),
        )

    @torch.no_grad()
    def sample(self, n: int, batch_size: int) -> Iterator[Sample]:
        """n batches of fresh normalised images (batch_size, C, H, W), of the generator in train mode, as published."""
        for _ in range(n):
            z = share(self.generator.latents(batch_size, device=self.runtime.device))
            yield self.normalized(self.generate(self.generator, z)), None

    @torch.no_grad()
    def unseen(self) -> Iterator[Tensor]:
        """1000 normalised images, in batches, that the student never learns from, by a copy of the generator."""
        generator, seed = copy.deepcopy(self.generator), torch.Generator().manual_seed(0)
        for _ in range(4):
            yield self.normalized(self.generate(generator, self.generator.latents(250, generator=seed)))

    @torch.no_grad()
    def pictures(self, n: int) -> Tensor:
        """Images of n latents that stay the same through a run, by the running statistics."""
        seed = torch.Generator().manual_seed(0)
        z = self.generator.latents(n, generator=seed).to(self.runtime.device)
        with self.runtime.eagerly():
            x = self.generator.eval()(z)
        self.generator.train()
        return x


RECIPE = STUDENT | GENERATOR | dict(kd_steps=5, g_steps=1, lr_g=1e-3, adv=0.0, bn=0.0, oh=0.0, act=0.0, balance=0.0)
FLAGS = {"act": "weight of the activation loss", "balance": "weight of the class balance"}
register("zskt", Method(Generative, RECIPE | dict(adv=1.0)), FLAGS)
register("dfad", Method(Generative, RECIPE | dict(adv=1.0, criterion="l1", T=1.0)))
register("dafl", Method(Generative, RECIPE | dict(oh=1.0, act=0.001, balance=20.0, nz=512)))
register("dfq", Method(Generative, RECIPE | dict(kd_steps=10, adv=1.0, bn=1.0, oh=1.0, balance=20.0)))
