"""Fast-Datafree on ImageNet (Fang et al., AAAI 2022): the latents are meta-learnt, too."""

import torch

from .base import adam
from .fast import Fast


class FastLatents(Fast):
    """Fast with Reptile, whose rounds share common latents as they share a common generator.

    A round's copies of both take `g_steps` steps of Adam (lr_g, lr_z), and the common ones a step
    of Adam (meta_lr_g, meta_lr_z) along `reptile_factor` times the difference between them and
    their copies' ends. After `z_rounds` rounds the common latents are drawn anew, and their Adam
    begins again.

    In the published code latents and copy share their memory, so that this difference is 0.
    """

    settings = (
        "synthesis_batch_size",
        "g_steps",
        "lr_g",
        "lr_z",
        "meta_lr_g",
        "meta_lr_z",
        "z_rounds",
        "reptile_factor",
        "bn",
        "oh",
        "adv",
    )
    meta, is_maml = True, 0

    def __init__(self, *networks, **settings):
        super().__init__(*networks, **settings)
        self.meta_optimizer = adam((self.generator.parameters(), self.meta_lr_g))
        self.rounds = 0

    def share(self, z):
        """Take latents z (N, nz, h, w) as the common ones of the rounds to come."""
        self.z, self.z_optimizer = z, adam(([z], self.meta_lr_z))

    def synthesize(self, adversarial, tick):
        if self.rounds % self.z_rounds == 0:
            self.share(self.latents())
        self.rounds += 1
        z = self.z.clone()
        losses = self.invert(z, self.targets(), adversarial, tick)
        with torch.no_grad():
            self.z.grad = self.reptile_factor * (self.z - z)
        self.z_optimizer.step()
        return losses

    def state_dict(self):
        return super().state_dict() | {
            "z": self.z,
            "z_optimizer": self.z_optimizer.state_dict(),
            "rounds": self.rounds,
        }

    def load_state_dict(self, state):
        super().load_state_dict(state)
        self.share(state["z"])
        self.z_optimizer.load_state_dict(state["z_optimizer"])
        self.rounds = state["rounds"]
