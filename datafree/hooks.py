"""What enters the BatchNorm layers of a network: their statistics and their features."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from datafree.losses import at_least_float32


class BatchNormHooks:
    """Records statistics of what enters the BatchNorm layers of `model` during a forward pass.

        hooks = BatchNormHooks(teacher)
        with hooks.record():
            t_logits = teacher(x)
        loss_bn = hooks.loss()

    They are computed as the layers are met: no activation is kept, but by autograd until the backward pass.
    A block around several passes keeps the last.

    Args:
        model: has at least one BatchNorm layer, or every loss is 0.
        momentum: rate of the running average of the batches' statistics that `loss` mixes in
            (Fast-Datafree's bn_mmt); 0 for none.
    """

    def __init__(self, model: nn.Module, momentum: float = 0.0):
        self.layers = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
        self.momentum, self.buffers, self.statistics, self.means = momentum, [], [], []

    @contextmanager
    def record(self, statistics: bool = True, layers: Sequence[nn.Module] = ()) -> Iterator[None]:
        """Record, while the block lasts, the BatchNorm statistics, and what `features` shows of these layers."""
        statistical = self.layers if statistics else []
        self.statistics, self.means = [None] * len(statistical), [None] * len(layers)
        handles = [
            layer.register_forward_pre_hook(_keep(values, i, function))
            for values, function, recorded in (
                (self.statistics, _Statistics.apply, statistical),
                (self.means, lambda x: at_least_float32(x).mean((2, 3)), layers),
            )
            for i, layer in enumerate(recorded)
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def loss(self) -> Tensor:
        """L_bn (DeepInversion): sum over layers of |mean' - mean| + |var' - var|.

        Norms are Euclidean over channels, the primes mark the layer's running statistics. Mean and
        biased variance are the last batch's, or with momentum r and buffers r old + (1 - r) new.
        """
        total = 0
        for i, (layer, (mean, var)) in enumerate(zip(self.layers, self.statistics, strict=True)):
            if self.buffers:
                mean, var = (
                    torch.lerp(*pair, self.momentum) for pair in zip((mean, var), self.buffers[i], strict=True)
                )
            total = total + (layer.running_mean - mean).norm() + (layer.running_var - var).norm()
        self.statistics = [[s.detach() for s in pair] for pair in self.statistics]
        return total

    @torch.no_grad()
    def update(self) -> None:
        """Mix the statistics of the last `loss` into the buffers."""
        if self.momentum:
            self.buffers = [
                [torch.lerp(*pair, self.momentum) for pair in zip(new, old, strict=True)]
                for new, old in zip(self.statistics, self.buffers or self.statistics, strict=True)
            ]

    def features(self) -> Tensor:
        """The spatial means of what entered the recorded `layers`, side by side: (N, sum of channels)."""
        means, self.means = self.means, []
        return torch.cat(means, dim=1)

    def state_dict(self) -> dict:
        return {"buffers": self.buffers}

    def load_state_dict(self, state: dict) -> None:
        self.buffers = state["buffers"]


def _keep(values: list, i: int, function: Callable[[Tensor], object]) -> Callable:
    """A hook that sets values[i] to the function of what enters the layer."""

    def hook(layer, arguments):
        values[i] = function(arguments[0])

    return hook


class _Statistics(torch.autograd.Function):
    """Mean and biased variance (C,) over batch and space of x (N, C, H, W), at least float32.

    Its gradient is one multiplication and addition per element.
    """

    @staticmethod
    def forward(ctx, x):
        var, mean = torch.var_mean(at_least_float32(x), (0, 2, 3), correction=0)
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
