"""Adaptive DeepInversion (Yin et al., CVPR 2020): the pixels themselves are optimised."""

import torch
import torch.nn.functional as F

from datafree.augment import random_flip
from datafree.hooks import BatchNormHooks
from datafree.losses import js_loss, total_variation, wide

from .base import Best, Synthesizer


class DeepInversion(Synthesizer):
    """Each round starts from noise and takes `g_steps` steps of Adam (betas 0.5, 0.99) on

        bn (L_bn(teacher) - 0.001 L_bn(student)) + oh H(t, y) - adv JS(s, t) + tv L_tv + l2 |x|

    with x rolled by up to an eighth of its size and mirrored at random, and pixels clipped to the
    valid range behind each step. |x| is the norm of the whole batch. The images of the lowest loss
    go to the pool; as published, the last do, because their "best" shares the variable's memory.
    """

    settings = ("synthesis_batch_size", "g_steps", "lr_g", "bn", "oh", "adv", "tv", "l2", "as_published")

    def __init__(self, *networks, **settings):
        super().__init__(*networks, **settings)
        self.student_hooks = BatchNormHooks(self.student)

    def synthesize(self, adversarial, tick):
        x = torch.randn(self.synthesis_batch_size, *self.shape, device=self.runtime.device)
        return self.invert(x, self.targets(), adversarial, tick)

    def invert(self, x, targets, adversarial, tick):
        """One round from normalised images x (N, C, H, W), which are optimised in place."""
        x = x.contiguous(memory_format=torch.channels_last).requires_grad_()
        low, high = (self.transform.normalize(torch.full_like(x[:1], v)) for v in (0.0, 1.0))
        optimizer = torch.optim.Adam([x], self.lr_g, betas=(0.5, 0.99), fused=True)
        best = Best()
        for _ in range(self.g_steps):
            losses = self.losses(x, self.jitter(x), targets, adversarial)
            loss = self.weigh(losses)
            best.offer(loss, x)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            with torch.no_grad():
                x.clamp_(low, high)
            tick(loss.detach())
        chosen = x.detach() if self.as_published else best.tensors[0]
        self.best_loss, images = best.loss, self.transform.denormalize(chosen)
        self.pool.add(images)
        return {k: v.detach() for k, v in losses.items()}

    def jitter(self, x):
        """x rolled by one random offset in both directions and mirrored with probability 1/2."""
        height, width = (side // 8 for side in x.shape[2:])
        rows, columns = (int(torch.randint(-m, m + 1, ())) for m in (height, width))
        x = x.roll((rows, columns), (2, 3))
        return random_flip(x) if self.transform.flip else x

    def losses(self, x, seen, targets, adversarial):
        """The terms of weight above 0 by name; the networks look at `seen`, the priors at x."""
        losses = {}
        with self.runtime.autocast(), self.hooks:
            t_logits = self.teacher(seen)
            if (self.adv and adversarial) or self.bn:
                with self.student_hooks:
                    s_logits = self.student(seen)
        if self.bn:
            losses["loss_bn"] = self.hooks.loss() - 0.001 * self.student_hooks.loss()
        if self.oh:
            losses["loss_oh"] = F.cross_entropy(wide(t_logits), targets)
        if self.adv and adversarial:
            losses["loss_adv"] = -js_loss(s_logits, t_logits)
        if self.tv:
            losses["loss_tv"] = total_variation(x)
        if self.l2:
            losses["loss_l2"] = x.norm()
        return losses

    def state_dict(self):
        return {}  # a round leaves nothing behind but its images

    def load_state_dict(self, state):
        pass
