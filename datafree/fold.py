"""A frozen network without the BatchNorm layers that a convolution can absorb."""

from torch import fx, nn
from torch.fx.experimental.optimization import fuse


def fold_batch_norm(model: nn.Module) -> nn.Module:
    """A network with the same logits as `model` (in eval mode) up to rounding, but faster.

    Each BatchNorm that alone follows a convolution becomes part of that convolution's weights. A model that cannot be
    traced, or has no such pair, is returned as it is. The copy takes images only, and keeps the weights of now.
    """
    try:
        graph = fx.Tracer().trace(model, concrete_args={"return_features": False})
    except (fx.proxy.TraceError, NameError, TypeError):  # control flow, or layers made on the fly
        return model
    folded = fuse(fx.GraphModule(model, graph), no_trace=True)  # a copy
    return model if len(folded.graph.nodes) == len(graph.nodes) else folded.eval().requires_grad_(False)
