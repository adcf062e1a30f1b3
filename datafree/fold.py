"""A frozen network without the BatchNorm layers that a convolution can absorb."""

import copy

from torch import fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval


def fold_batch_norm(model: nn.Module) -> nn.Module:
    """A network with the same logits as `model` (in eval mode) up to rounding, but faster.

    Each BatchNorm that alone follows a convolution becomes part of that convolution's weights. A model that cannot be
    traced, or has no such pair, is returned as it is. The copy takes images only, and keeps the weights of now.
    """
    try:
        graph = fx.Tracer().trace(model, concrete_args={"return_features": False})
    except (fx.proxy.TraceError, NameError, TypeError):  # control flow, or layers made on the fly
        return model
    folded = fx.GraphModule(copy.deepcopy(model), graph)
    layers, found = dict(folded.named_modules()), False
    calls = [node for node in graph.nodes if node.op == "call_module" and node.args]
    for node in calls:
        before = node.args[0]
        if not isinstance(layers[node.target], nn.BatchNorm2d) or before not in calls or len(before.users) > 1:
            continue
        if type(layers[before.target]) is nn.Conv2d:
            folded.set_submodule(before.target, fuse_conv_bn_eval(layers[before.target], layers[node.target]))
            node.replace_all_uses_with(before)
            graph.erase_node(node)
            found = True
    if not found:
        return model
    folded.recompile()
    return folded.eval().requires_grad_(False)
