"""What enters the BatchNorm layers of a network: their statistics and their features."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from datafree import distributed
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
        momentum: rate of the running average of batch statistics that `loss` mixes in (Fast-Datafree's bn_mmt), or 0.
    """

    def __init__(self, model: nn.Module, momentum: float = 0.0):
        self.layers = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
        self.momentum, self.buffers, self.statistics, self.means = momentum, [], [], []

    @contextmanager
    def record(self, statistics: bool = True, layers: Sequence[nn.Module] = ()) -> Iterator[None]:
        """Record, while the block lasts, the BatchNorm statistics, and what `features` shows of these layers."""
        with ExitStack() as handles:
            self.statistics = _watch(self.layers if statistics else (), _Statistics.apply, handles)
            self.means = _watch(layers, lambda x: at_least_float32(x).mean((2, 3)), handles)
            yield
        self.statistics = distributed.pool_statistics(self.statistics)

    def loss(self) -> Tensor:
        """L_bn (DeepInversion): sum over layers of |mean' - mean| + |var' - var|.

        Norms are Euclidean over channels, the primes mark the layer's running statistics. Mean and
        biased variance are the last batch's, or with momentum r and buffers r old + (1 - r) new.
        """
        total, mixed = 0, self._mixed() if self.buffers else self.statistics
        for layer, (mean, var) in zip(self.layers, mixed, strict=True):
            total = total + (layer.running_mean - mean).norm() + (layer.running_var - var).norm()
        self.statistics = [[s.detach() for s in pair] for pair in self.statistics]
        return total

    @torch.no_grad()
    def update(self) -> None:
        """Mix the statistics of the last `loss` into the buffers."""
        if self.momentum:
            self.buffers = self._mixed()

    def _mixed(self) -> list[list[Tensor]]:
        """The running average of the layers' statistics, as it is with the last batch's."""
        layers = zip(self.statistics, self.buffers or self.statistics, strict=True)
        return [[torch.lerp(*pair, self.momentum) for pair in zip(new, old, strict=True)] for new, old in layers]

    def features(self) -> Tensor:
        """The spatial means of what entered the recorded `layers`, side by side: (N, sum of channels)."""
        means, self.means = self.means, []
        return distributed.whole(torch.cat(means, dim=1))

    def state_dict(self) -> dict[str, list]:
        return {"buffers": self.buffers}

    def load_state_dict(self, state: dict[str, list]) -> None:
        buffers, sizes = state["buffers"], [[m.running_mean.shape] * 2 for m in self.layers]
        if buffers and [[value.shape for value in pair] for pair in buffers] != sizes:
            raise ValueError("statistics of other BatchNorm layers")
        self.buffers = buffers


def _watch(layers: Sequence[nn.Module], function: Callable[[Tensor], object], handles: ExitStack) -> list:
    """A list that gets, at each pass, the function of what enters each layer, as long as `handles` are open."""
    values = [None] * len(layers)
    for i, layer in enumerate(layers):

        def hook(layer: nn.Module, arguments: tuple, i: int = i) -> None:
            values[i] = function(arguments[0])

        handles.enter_context(layer.register_forward_pre_hook(hook))
    return values


class _Statistics(torch.autograd.Function):
    """Mean and biased variance (C,) of x (N, C, H, W), in float32 at least; backward is one addcmul per element."""

    @staticmethod
    def forward(ctx, x: Tensor) -> tuple[Tensor, Tensor]:
        var, mean = torch.var_mean(at_least_float32(x), (0, 2, 3), correction=0)
        ctx.save_for_backward(x, mean)
        return mean, var

    @staticmethod
    def backward(ctx, g_mean: Tensor, g_var: Tensor) -> Tensor:
        x, mean = ctx.saved_tensors
        n = x.numel() // x.shape[1]
        slope = 2 / n * g_var
        offset = g_mean / n - slope * mean
        offset, slope = (v.to(x.dtype).view(1, -1, 1, 1) for v in (offset, slope))
        return torch.addcmul(offset, x, slope)
