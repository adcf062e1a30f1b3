"""Weights by rule and numbers of the published code, for every test that compares with them.

The rule gives each entry of a state_dict a value that depends only on its name and shape, so two
implementations with the same names hold the same weights. Everything is float64.
"""

import json
import math
import zlib
from pathlib import Path

import numpy as np
import torch

REFERENCE = Path(__file__).parent / "reference"


def load_reference(name):
    """The numbers in tests/reference/<name>.json."""
    return json.loads((REFERENCE / f"{name}.json").read_text())


def noise(shape, seed):
    """Standard normal float64 tensor; images of the reference have seed 0, latents seed 1."""
    return torch.from_numpy(np.random.RandomState(seed).standard_normal(shape))


def fill_value(name, shape):
    """The rule's value for one state_dict entry."""
    if name.endswith("num_batches_tracked"):
        return torch.tensor(0)
    n = noise(tuple(shape), zlib.crc32(name.encode()) & 0x7FFFFFFF)
    if name.endswith("running_mean"):
        return 0.1 * n
    if name.endswith("running_var"):
        return 1 + 0.1 * n.abs()
    if name.endswith("bias"):
        return 0.1 * n
    if len(shape) == 1:
        return 1 + 0.1 * n
    return n / math.sqrt(math.prod(shape[1:]))


def fill(module):
    """Fill `module` by the rule, in float64; returns it in eval mode."""
    module.double()
    values = {name: fill_value(name, v.shape) for name, v in module.state_dict().items()}
    module.load_state_dict(values)
    return module.eval()
