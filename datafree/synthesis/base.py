"""What the families share: the networks, the loss of a teacher's view, the best images so far."""

import torch
import torch.nn.functional as F
from torch import nn

from datafree.hooks import BatchNormHooks
from datafree.losses import decision_adversarial_loss, wide


class Synthesizer:
    """Networks and settings of one family.

    Args:
        teacher, student: in eval mode while images are made; the student's weights are frozen
            then. generator: in train mode, or None.
        transform: augments and normalises. shape: (C, H, W) of an image.
        num_classes: of the teacher. runtime: device and precision. pool: an ImagePool or None.
        settings: the family's own; kept as attributes.
    """

    settings = ()
    pooled = True  # whether images are kept
    published_T = None  # the temperature that the published code distils at, whatever it is told

    def __init__(self, teacher, student, generator, transform, shape, num_classes, runtime, pool, **settings):
        self.teacher, self.student, self.generator = teacher, student, generator
        self.transform, self.shape, self.num_classes = transform, shape, num_classes
        self.runtime, self.pool = runtime, pool
        if settings.keys() != set(self.settings):
            raise TypeError(f"{type(self).__name__} takes {self.settings}, not {set(settings)}")
        vars(self).update(settings)
        self.hooks = BatchNormHooks(teacher, settings.get("bn_mmt", 0.0))

    def latents(self):
        return self.generator.latents(self.synthesis_batch_size, device=self.runtime.device)

    def targets(self):
        return torch.randint(self.num_classes, (self.synthesis_batch_size,), device=self.runtime.device)

    def sample(self, n, batch_size):
        """n batches of normalised images (batch_size, C, H, W), augmented, from the pool."""
        for images in self.pool.batches(batch_size, n):
            yield self.transform(images, train=True)

    def pictures(self, n):
        """The newest n images, (N, C, H, W) in 0..1."""
        return self.pool.images(max(0, len(self.pool) - n)).float() / 255

    def view(self, images):
        """A random crop and flip of images (N, C, H, W) in 0..1, normalised."""
        x = self.transform.normalize(self.transform.augment(images))
        return x.contiguous(memory_format=torch.channels_last)

    def inversion_losses(self, x, targets, adversarial):
        """The terms of bn L_bn + oh L_oh + adv L_adv on normalised images x, by name.

        A term of weight 0 is not computed, L_adv only if `adversarial`. The hooks hold what
        entered the teacher's BatchNorm layers.
        """
        losses = {}
        with self.runtime.autocast():
            with self.hooks:
                t_logits = self.teacher(x)
            s_logits = self.student(x) if self.adv and adversarial else None
        if self.bn:
            losses["loss_bn"] = self.hooks.loss()
        if self.oh:
            losses["loss_oh"] = F.cross_entropy(wide(t_logits), targets)
        if s_logits is not None:
            losses["loss_adv"] = decision_adversarial_loss(s_logits, t_logits)
        return losses

    def weigh(self, losses):
        """The sum of the losses by their weights: the settings of the same name."""
        return sum(getattr(self, name.removeprefix("loss_")) * value for name, value in losses.items())


class Best:
    """The tensors that came with the lowest loss so far, chosen without waiting for a GPU."""

    def __init__(self):
        self.loss = None

    def offer(self, loss, *tensors):
        loss, tensors = loss.detach(), [t.detach() for t in tensors]
        if self.loss is None:
            self.loss, self.tensors = loss, [t.clone() for t in tensors]
            return
        better = loss < self.loss
        self.loss = torch.where(better, loss, self.loss)
        self.tensors = [torch.where(better, new, old) for new, old in zip(tensors, self.tensors, strict=True)]


def adam(*groups):
    """The inner optimiser of all families: groups of (parameters, lr), betas 0.5 and 0.999."""
    return torch.optim.Adam(
        [{"params": list(p), "lr": lr} for p, lr in groups], betas=(0.5, 0.999), fused=True
    )


def redraw(module, gamma=1.0):
    """Fresh weights, N(0, 0.02^2), BatchNorm scales N(gamma, 0.02^2), biases 0 (DCGAN)."""
    for m in module.modules():
        if isinstance(m, nn.Conv2d | nn.ConvTranspose2d | nn.Linear | nn.BatchNorm2d):
            if m.weight is not None:
                mean = gamma if isinstance(m, nn.BatchNorm2d) else 0.0
                nn.init.normal_(m.weight, mean, 0.02)
            if m.bias is not None:
                nn.init.zeros_(m.bias)
