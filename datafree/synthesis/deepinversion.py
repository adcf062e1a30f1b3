"""Adaptive DeepInversion (Yin et al., CVPR 2020): the pixels themselves are optimised."""

from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor

from datafree.distributed import mean, norm, share
from datafree.hooks import BatchNormHooks
from datafree.losses import at_least_float32, js_loss, total_variation

from .base import STUDENT, Best, Losses, Method, Synthesizer, Tick, register


class DeepInversion(Synthesizer):
    """Each round starts from noise and takes `g_steps` steps of Adam (betas 0.5, 0.99) on

        bn (L_bn(teacher) - 0.001 L_bn(student)) + oh H(t, y) - adv JS(s, t) + tv L_tv + l2 |x|

    with the batch x rolled by up to an eighth of its size and, on one toss of a coin, mirrored, and pixels
    clipped to the valid range behind each step. |x| is the norm of the whole batch. The images of the lowest
    loss go to the pool; as published, the last do, because their "best" shares the variable's memory.
    """

    terms = ("bn", "oh", "adv", "tv", "l2")
    settings = (*Synthesizer.settings, *terms, "lr_g", "as_published")
    fresh = True

    def __init__(self, *networks: object, **settings: object):
        super().__init__(*networks, **settings)
        self.student_hooks, self.alone = BatchNormHooks(self.student), False

    def set_apart(self) -> Tensor:
        """By the teacher alone, so that a resumed run, whose student knows more, makes the same."""
        self.alone = True
        try:
            return super().set_apart()
        finally:
            self.alone = False

    def latents(self) -> Tensor:
        """What a round starts from: noise as normalised images (N, C, H, W)."""
        return share(torch.randn(self.synthesis_batch_size, *self.shape, device=self.runtime.device))

    def invert(self, x: Tensor, targets: Tensor, adversarial: bool, tick: Tick) -> Losses:
        """One round from normalised images x (N, C, H, W), which are optimised in place."""
        x = x.contiguous(memory_format=torch.channels_last).requires_grad_()
        low, high = (self.transform.normalize(torch.full_like(x[:1], v)) for v in (0.0, 1.0))
        optimizer = torch.optim.Adam([x], self.lr_g, betas=(0.5, 0.99), fused=True)
        best = Best()
        for _ in range(self.g_steps):
            losses = self.losses(x, self.jitter(x), targets, adversarial)
            loss = self.weigh(losses)
            best.offer(loss, x)
            self.descend(loss, tick, optimizer)
            with torch.no_grad():
                x.clamp_(low, high)
        self.pool.add(self.transform.denormalize(x.detach() if self.as_published else best.tensors[0]))
        return losses

    def jitter(self, x: Tensor) -> Tensor:
        """The batch rolled by one random offset in each direction and, with probability 1/2, mirrored as a whole."""
        height, width = (side // 8 for side in x.shape[2:])
        rows, columns = (int(torch.randint(-m, m + 1, ())) for m in (height, width))
        x = x.roll((rows, columns), (2, 3))
        return x.flip(3) if self.transform.flip and torch.rand(()) < 0.5 else x

    def losses(self, x: Tensor, seen: Tensor, targets: Tensor, adversarial: bool) -> Losses:
        """The terms that are on, by name; the networks look at `seen`, the priors at x."""
        with self.runtime.autocast():
            with self.hooks.record(bool(self.bn)):
                t_logits = self.teacher(seen)
            student_bn = bool(self.bn) and not self.alone
            if student_bn or self.is_on("adv", adversarial):
                # Watched anew each time, it would be compiled each time.
                compiled = self.runtime.eagerly() if student_bn else nullcontext()
                with compiled, self.student_hooks.record(student_bn):
                    s_logits = self.student(seen)
        return self.losses_of(
            adversarial,
            bn=lambda: self.hooks.loss() - (0.001 * self.student_hooks.loss() if student_bn else 0),
            oh=lambda: F.cross_entropy(at_least_float32(t_logits), targets),
            adv=lambda: -js_loss(s_logits, t_logits),
            tv=lambda: mean(total_variation(x)),
            l2=lambda: norm(x.norm()),
        )


RECIPE = STUDENT | dict(g_steps=1000, lr_g=0.1, adv=1.0, bn=10.0, oh=1.0, tv=0.0, l2=0.0)
FLAGS = {"tv": "weight of the total variation", "l2": "weight of the batch's norm"}
register("deepinv", Method(DeepInversion, RECIPE), FLAGS)
