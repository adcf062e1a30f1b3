"""CMI, Contrastive Model Inversion (Fang et al., IJCAI 2021): new images differ from old ones."""

import torch
import torch.nn.functional as F
from torch import nn

from datafree.losses import contrastive_loss, wide

from .base import Best, Synthesizer, adam, redraw


class CMI(Synthesizer):
    """Each round inverts one batch, from a redrawn generator, that can be told from older ones.

    Latents z and the generator take `g_steps` steps of Adam on

        L = cr L_cr + bn L_bn + oh H(t, y) + adv L_adv

    where L_cr tells apart, in the space of a small head on the teacher's BatchNorm inputs, a strong
    and a weak crop of the same image from those of other images: of the batch and of `n_neg` random
    ones of the last `bank_size`, whose features the memory bank keeps. The images of the lowest L
    go to the pool and their features to the bank.
    """

    settings = (
        "synthesis_batch_size",
        "g_steps",
        "lr_g",
        "bn",
        "oh",
        "adv",
        "cr",
        "cr_T",
        "bank_size",
        "n_neg",
        "head_dim",
    )

    def __init__(self, *networks, **settings):
        super().__init__(*networks, **settings)
        width = sum(layer.num_features for layer in self.hooks.layers)
        device = self.runtime.device
        self.head = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, self.head_dim)).to(
            device
        )
        self.head_optimizer = torch.optim.Adam(self.head.parameters(), self.lr_g, fused=True)
        self.bank = torch.empty(0, 2 * width, device=device)  # local half, then global half

    def synthesize(self, adversarial, tick):
        redraw(self.generator)
        return self.invert(self.latents(), self.targets(), adversarial, tick)

    def invert(self, z, targets, adversarial, tick):
        """One round from latents z (N, nz), optimised in place, towards classes targets (N,)."""
        z.requires_grad_()
        optimizer = adam((self.generator.parameters(), self.lr_g), ([z], self.lr_g))
        best = Best()
        for _ in range(self.g_steps):
            with self.runtime.autocast():
                images = self.generator(z)
            images = wide(images)
            losses, features = self.losses(images, targets, adversarial)
            loss = self.weigh(losses)
            best.offer(loss, images, features)
            optimizer.zero_grad()
            self.head_optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            self.head_optimizer.step()
            tick(loss.detach())
        self.best_loss, (images, features) = best.loss, best.tensors
        self.pool.add(images)
        self.remember(features)
        return {k: v.detach() for k, v in losses.items()}

    def losses(self, images, targets, adversarial):
        """The terms of weight above 0 by name, and the features (N, 2 D) of both views."""
        losses = self.inversion_losses(self.view(images), targets, adversarial)
        global_features = self.hooks.features()
        with self.runtime.autocast(), self.hooks:
            self.teacher(self.strong_view(images))
        local_features = self.hooks.features()
        if self.cr:
            bank_local, bank_global = self.negatives().chunk(2, dim=1)
            local = self.project(local_features, bank_local)
            with torch.no_grad():
                others = self.project(global_features, bank_global)
            losses["loss_cr"] = contrastive_loss(local, others, self.cr_T, len(images))
        return losses, torch.cat([local_features, global_features], dim=1)

    def project(self, features, bank):
        return F.normalize(self.head(torch.cat([features, bank])), dim=1)

    def negatives(self):
        """`n_neg` random rows of the bank, or all if there are no more."""
        if len(self.bank) <= self.n_neg:
            return self.bank
        return self.bank[torch.randperm(len(self.bank), device=self.bank.device)[: self.n_neg]]

    def remember(self, features):
        """Append features (N, 2 D) to the bank, which forgets its oldest rows beyond bank_size."""
        self.bank = torch.cat([self.bank, features])[-self.bank_size :]

    @torch.no_grad()
    def start_from(self, images):
        """Fill pool and bank with images (N, C, H, W), uint8, inverted before."""
        self.pool.add(images)
        for part in images[-self.bank_size :].split(self.synthesis_batch_size):
            x = part.to(self.runtime.device).float() / 255
            halves = []
            for view in (self.strong_view, self.view):
                with self.runtime.autocast(), self.hooks:
                    self.teacher(view(x))
                halves.append(self.hooks.features())
            self.remember(torch.cat(halves, dim=1))

    def strong_view(self, images):
        """A crop of 1/4 to all of the area at its own place and size for each image, resized."""
        n, _, height, width = images.shape
        u = torch.rand(3, n, device=images.device, dtype=images.dtype)
        scale = (0.25 + 0.75 * u[0]).sqrt()
        offset = (1 - scale) * (2 * u[1:] - 1)  # in the grid's units, -1..1 from edge to edge
        matrix = torch.zeros(n, 2, 3, device=images.device, dtype=images.dtype)
        matrix[:, 0, 0] = matrix[:, 1, 1] = scale
        matrix[:, :, 2] = offset.t()
        if self.transform.flip:
            mirror = torch.rand(n, device=images.device) < 0.5
            matrix[:, 0, 0] = torch.where(mirror, -scale, scale)
        grid = F.affine_grid(matrix, (n, 1, height, width), align_corners=False)
        x = F.grid_sample(images, grid, align_corners=False, padding_mode="border")
        return self.transform.normalize(x).contiguous(memory_format=torch.channels_last)

    def state_dict(self):
        return {
            "generator": self.generator.state_dict(),
            "head": self.head.state_dict(),
            "head_optimizer": self.head_optimizer.state_dict(),
            "bank": self.bank,
        }

    def load_state_dict(self, state):
        self.generator.load_state_dict(state["generator"])
        self.head.load_state_dict(state["head"])
        self.head_optimizer.load_state_dict(state["head_optimizer"])
        self.bank = state["bank"]
