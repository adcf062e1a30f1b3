"""What enters the BatchNorm layers of a network: their statistics and their features."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from datafree import distributed
from datafree.errors import UsageError
from datafree.losses import at_least_float32, channel_statistics


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
        layers = (m for m in model.modules() if isinstance(m, nn.BatchNorm2d))
        self.layers = [m for m in layers if m.running_mean is not None]
        self.momentum, self.pairs, self.means, self.buffers = momentum, [], [], None
        self.statistics: Tensor | None = None  # all layers' means, then all their variances, side by side
        # Which of the vectors, whose norms are summed, an element of them belongs to.
        self.vector = torch.repeat_interleave(torch.tensor(2 * [m.num_features for m in self.layers], dtype=torch.long))

    @contextmanager
    def record(self, statistics: bool = True, layers: Sequence[nn.Module] = ()) -> Iterator[None]:
        """Record, while the block lasts, the BatchNorm statistics, and what `features` shows of these layers."""
        with ExitStack() as handles:
            self.pairs = _watch(self.layers if statistics else (), _Statistics.apply, handles)
            self.means = _watch(layers, lambda x: at_least_float32(x).mean((2, 3)), handles)
            yield
        if self.pairs:
            # A layer that did not run, as an auxiliary head's in eval mode, sees what it expects.
            pairs = [pair or own for pair, own in zip(self.pairs, self._expected(), strict=True)]
            self.statistics = distributed.pool_statistics(_side_by_side(pairs))
            self.pairs = []

    def _expected(self) -> list[tuple[Tensor, Tensor]]:
        return [(layer.running_mean, layer.running_var) for layer in self.layers]

    def loss(self) -> Tensor | int:
        """L_bn (DeepInversion): sum over layers of |mean' - mean| + |var' - var|.

        Norms are Euclidean over channels, the primes mark the layer's running statistics. Mean and
        biased variance are the last batch's, or with momentum r and buffers r old + (1 - r) new.
        All layers' are computed at once: hundreds of small kernels would take a GPU longer than the network's.
        """
        if self.statistics is None:
            return 0
        gaps = _side_by_side(self._expected()) - self._mixed()
        self.vector = self.vector.to(gaps.device)
        squares = gaps.new_zeros(2 * len(self.layers)).index_add(0, self.vector, gaps.square())
        self.statistics = self.statistics.detach()
        return squares.clamp_min(torch.finfo(squares.dtype).tiny).sqrt().sum()  # of 0 the root has no gradient

    @torch.no_grad()
    def update(self) -> None:
        """Mix the statistics of the last `loss` into the buffers."""
        if self.momentum:
            self.buffers = self._mixed()

    def _mixed(self) -> Tensor:
        """The running average of the layers' statistics, as it is with the last batch's."""
        return self.statistics if self.buffers is None else torch.lerp(self.statistics, self.buffers, self.momentum)

    def features(self) -> Tensor:
        """The spatial means of what entered the recorded `layers`, side by side: (N, sum of channels)."""
        means, self.means = self.means, []
        return distributed.whole(torch.cat([mean for mean in means if mean is not None], dim=1))

    def state_dict(self) -> dict[str, list]:
        return {"buffers": [] if self.buffers is None else [self.buffers]}

    def load_state_dict(self, state: dict[str, list]) -> None:
        (buffers,) = state["buffers"] or [None]
        if buffers is not None and buffers.shape != self.vector.shape:
            raise ValueError("statistics of other BatchNorm layers")
        self.buffers = buffers


def _side_by_side(pairs: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """Pairs of (mean, variance), each (C,): all means, then all variances."""
    return torch.cat([part for kind in zip(*pairs, strict=True) for part in kind])


def _watch(layers: Sequence[nn.Module], function: Callable[[Tensor], object], handles: ExitStack) -> list:
    """A list that gets, at each pass, the function of what enters each layer, as long as `handles` are open."""
    values = [None] * len(layers)
    for i, layer in enumerate(layers):

        def hook(layer: nn.Module, arguments: tuple, i: int = i) -> None:
            values[i] = function(arguments[0])

        handles.enter_context(layer.register_forward_pre_hook(hook))
    return values


@contextmanager
def features_of(network: nn.Module, wanted: bool = True, named: bool = True) -> Iterator[list]:
    """A list that holds, once `network` has run in the block, its features and the layer that they enter.

    It is named by `network.features_enter` where there is such an attribute, unless `named` is False; else it is the
    last linear layer or 1x1 convolution that ran. Not `wanted`: nothing is hooked, and the list stays empty.
    """
    seen, name = [], getattr(network, "features_enter", None) if named else None
    layers = [network.get_submodule(name)] if name else filter(_is_linear, network.modules())

    def keep(layer: nn.Module, given: tuple) -> None:
        seen[:] = *given[:1], layer

    with ExitStack() as handles:
        for layer in layers if wanted else ():
            handles.enter_context(layer.register_forward_pre_hook(keep))
        yield seen


def _is_linear(layer: nn.Module) -> bool:
    return isinstance(layer, nn.Linear) or isinstance(layer, nn.Conv2d) and layer.kernel_size == (1, 1)


@torch.no_grad()
def settle_features(network: nn.Module, x: Tensor, name: str | None = None) -> None:
    """See that `features_of` reads what enters the layer `name`, by default the one that makes the logits.

    Args:
        network: in eval mode. x: images (N, C, H, W) as it takes them.

    Raises:
        UsageError: there is no such layer.
    """
    text = f"the features, which L_a reads, are not found in this {type(network).__name__}: "
    cure = "give --feature_layer NAME, whose input they are, or leave L_a out (its weight 0)"
    if name:
        names = [key for key, _ in network.named_modules() if key]
        if name not in names:
            raise UsageError(f"--feature_layer {name}: there is no such layer, but {', '.join(names[-6:]) or 'none'}")
        network.features_enter = name
    with features_of(network) as features:
        logits = network(x)
    if not features or not isinstance(features[0], Tensor):
        raise UsageError(text + cure)
    if not getattr(network, "features_enter", None) and len(features[1].weight) != logits.shape[1]:
        raise UsageError(f"{text}its last linear layer has {len(features[1].weight)} outputs: {cure}")


class _Statistics(torch.autograd.Function):
    """Mean and biased variance (C,) of x (N, C, H, W), in float32 at least; backward is one addcmul per element."""

    @staticmethod
    def forward(ctx, x: Tensor) -> tuple[Tensor, Tensor]:
        mean, var = channel_statistics(x)
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
