"""What enters the BatchNorm layers of a network: their statistics and their features."""

import torch
from torch import nn

from datafree.losses import wide


class BatchNormHooks:
    """Records the input of every BatchNorm layer of `model` during a forward pass.

        hooks = BatchNormHooks(teacher)
        with hooks:
            t_logits = teacher(x)
        loss_bn = hooks.loss()

    Outside the `with` block nothing is recorded. A block around several passes keeps the last.

    Args:
        model: has at least one BatchNorm layer, or every loss is 0.
        momentum: rate of the running average of the batches' statistics that `loss` mixes in
            (Fast-Datafree's bn_mmt); 0 for none.
    """

    def __init__(self, model, momentum=0.0):
        self.layers = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
        self.momentum, self.buffers, self.inputs = momentum, None, []

    def __enter__(self):
        self.inputs = [None] * len(self.layers)

        def record(i):
            def hook(layer, arguments):
                self.inputs[i] = arguments[0]

            return hook

        self.handles = [layer.register_forward_pre_hook(record(i)) for i, layer in enumerate(self.layers)]
        return self

    def __exit__(self, *error):
        for handle in self.handles:
            handle.remove()

    def loss(self):
        """L_bn (DeepInversion): sum over layers of |mean' - mean| + |var' - var|.

        Norms are Euclidean over channels, the primes mark the layer's running statistics. Mean and
        biased variance are the last batch's, or with momentum r and buffers r old + (1 - r) new.
        """
        self.statistics = [_Statistics.apply(x) for x in self.inputs]
        total = 0
        for i, (layer, (mean, var)) in enumerate(zip(self.layers, self.statistics, strict=True)):
            if self.buffers is not None:
                old_mean, old_var = self.buffers[i]
                mean, var = (
                    torch.lerp(new, old, self.momentum) for new, old in ((mean, old_mean), (var, old_var))
                )
            total = total + (layer.running_mean - mean).norm() + (layer.running_var - var).norm()
        return total

    @torch.no_grad()
    def update(self):
        """Mix the statistics of the last `loss` into the buffers."""
        if not self.momentum:
            return
        last = [tuple(s.detach() for s in pair) for pair in self.statistics]
        if self.buffers is not None:
            last = [
                tuple(torch.lerp(new, old, self.momentum) for new, old in zip(*pairs, strict=True))
                for pairs in zip(last, self.buffers, strict=True)
            ]
        self.buffers = last

    def features(self):
        """The spatial means of all recorded inputs, side by side: (N, sum of channels)."""
        return torch.cat([wide(x).mean((2, 3)) for x in self.inputs], dim=1)

    def state_dict(self):
        return {"buffers": self.buffers}

    def load_state_dict(self, state):
        self.buffers = state["buffers"]


class _Statistics(torch.autograd.Function):
    """Mean and biased variance (C,) over batch and space of x (N, C, H, W), at least float32.

    Its gradient is one multiplication and addition per element.
    """

    @staticmethod
    def forward(ctx, x):
        var, mean = torch.var_mean(wide(x), (0, 2, 3), correction=0)
        ctx.save_for_backward(x, mean)
        return mean, var

    @staticmethod
    def backward(ctx, g_mean, g_var):
        x, mean = ctx.saved_tensors
        n = x.numel() // x.shape[1]
        slope = 2 / n * g_var
        offset = g_mean / n - slope * mean
        shape = (1, -1, 1, 1)
        return torch.addcmul(offset.to(x.dtype).view(shape), x, slope.to(x.dtype).view(shape))
