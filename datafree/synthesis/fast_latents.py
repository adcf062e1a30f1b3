"""Fast-Datafree on ImageNet (Fang et al., AAAI 2022): the latents are meta-learnt, too."""

from torch import Tensor

from .base import FLAGS, Synthesizer, adam
from .fast import Fast


class FastLatents(Fast):
    """Fast whose rounds share common latents as they share a common generator.

    A round's copies of both take `g_steps` steps of Adam (lr_g, lr_z), and the common ones a step
    of Adam (meta_lr_g, meta_lr_z): by Reptile (`is_maml` 0) along `reptile_factor` times the difference
    between them and their copies' ends, by first-order MAML (1) along the copies' last gradients. After
    `z_rounds` rounds the common latents are drawn anew, and their Adam begins again.

    In the published code latents and copy share their memory: the difference is 0, the latents are their gradient.
    """

    own = ("lr_g", "lr_z", "meta_lr_g", "meta_lr_z", "z_rounds", "reptile_factor", "is_maml", "bn_mmt")
    settings = (*Synthesizer.settings, *Fast.terms, *own)
    meta, summed = True, False

    def __init__(self, *networks, **settings):
        super().__init__(*networks, **settings)
        self.meta_optimizer = adam((self.generator.parameters(), self.meta_lr_g))
        self.rounds = 0

    def share(self, z: Tensor) -> None:
        """Take latents z (N, nz, h, w) as the common ones of the rounds to come."""
        self.z, self.z_optimizer = z, adam(([z], self.meta_lr_z))

    def common(self) -> list[Tensor]:
        return [*super().common(), self.z]

    def meta_step(self) -> None:
        super().meta_step()
        self.z_optimizer.step()

    def round(self, adversarial, tick):
        if self.rounds % self.z_rounds == 0:
            self.share(self.latents())
        self.rounds += 1
        return self.invert(self.z.clone(), self.targets(), adversarial, tick)

    def kept(self):
        return *super().kept(), "z_optimizer"

    def state_dict(self) -> dict:
        return super().state_dict() | {"z": self.z, "rounds": self.rounds}

    def load_state_dict(self, state: dict) -> None:
        self.share(state["z"])
        self.rounds = state["rounds"]
        super().load_state_dict(state)


# The published settings of datafree_kd_imagenet.py; adv is 1.0 where the student is a ResNet-18.
# fmt: off
IMAGENET = dict(n_epochs=400, ep_steps=1000, kd_steps=100, batch_size=100, lr=0.1, weight_decay=1e-4,
                milestones=[0.6, 0.75, 0.9], criterion="kl", T=5.0, phase1_rounds=1400, synthesis_batch_size=100,
                g_steps=50, lr_g=2e-4, lr_z=0.01, meta_lr_g=1e-4, meta_lr_z=5e-3, z_rounds=50, reptile_factor=1.0,
                is_maml=0, bn=0.1, oh=0.1, adv=0.1, bn_mmt=0.0, nz=256, ngf=64)
# fmt: on
FLAGS |= {
    "milestones": "lr x 0.1 at these fractions of the epochs",
    "phase1_rounds": "rounds without a student before the first epoch",
    "meta_lr_g": "learning rate of the common generator",
    "meta_lr_z": "learning rate of the common latents",
    "z_rounds": "rounds with the same common latents",
    "reptile_factor": "of Reptile's meta gradients",
}
