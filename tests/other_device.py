"""A device that is not the CPU, computed on the CPU: what a GPU would refuse or wait for shows.

    python tests/other_device.py SCRIPT 'FLAGS' ['FLAGS' ...]

runs a script once for each string of flags, with the tensors of the device "fakegpu" wrapped. An
operation that mixes them with the CPU's ends in an error, as it would with CUDA. At the end it
prints, as JSON, where within `train_epoch` the host had to wait for the device, and how often.
"""

import importlib
import json
import shlex
import sys
import traceback
from collections import Counter
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from storm import few_digits  # noqa: E402

from data import SOURCES  # noqa: E402
from datafree import checkpoint, session  # noqa: E402
from datafree.runtime import Runtime  # noqa: E402


class Backend(_DummyBackendModule):
    """What PyTorch asks of a device's module."""

    def get_amp_supported_dtype(self):
        return [torch.bfloat16]


_setup_privateuseone_for_python_backend("fakegpu", backend_module=Backend())
DEVICE = torch.device("fakegpu", 0)
aten = torch.ops.aten
COPIES = (aten.copy_.default, aten._to_copy.default)
# The values may be on the device and the rows on the CPU, as CUDA allows, too.
INDEXED = (aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default)
waits = Counter()


class Wrapped(torch.Tensor):
    """A tensor of DEVICE; `inner` is the CPU's tensor with its values."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(
            cls,
            inner.size(),
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=DEVICE,
        )

    def __init__(self, inner):
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return dispatch(func, args, kwargs or {})

    def new_tensor(self, data, dtype=None):
        return new_tensor(data, dtype=dtype or self.dtype, device=DEVICE)


class Everything(TorchDispatchMode):
    """Operations without a wrapped argument, too: those that make tensors."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return dispatch(func, args, kwargs or {})


def dispatch(func, args, kwargs):
    """Run an operation on the inner tensors; wrap what belongs to the device."""
    tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
    wrapped = [t for t in tensors if isinstance(t, Wrapped)]
    others = [t for t in tensors if not isinstance(t, Wrapped)]
    ours = bool(wrapped)
    if kwargs.get("device") is not None:
        ours = torch.device(kwargs["device"]).type == DEVICE.type
        kwargs = kwargs | {"device": "cpu", "pin_memory": False}
    if func in INDEXED:
        refused = wrapped and not isinstance(args[0], Wrapped)
    else:
        refused = wrapped and func not in COPIES and any(t.dim() for t in others)
    if refused:
        raise RuntimeError(f"{func} mixes tensors of {DEVICE.type} and of the CPU")
    masks = func in INDEXED and any(t.dtype == torch.bool for t in args[1] if t is not None)
    fetched = func in COPIES and not (ours and isinstance(args[0], Wrapped)) and args[0].numel()
    if wrapped and (masks or fetched or func in (aten._local_scalar_dense.default, aten.nonzero.default)):
        note_wait(func)
    inner = tree_map(lambda t: t.inner if isinstance(t, Wrapped) else t, (args, kwargs))
    known = {id(t.inner): t for t in wrapped}  # an operation in place gives its argument back
    out = tree_map(
        lambda t: known.get(id(t), Wrapped(t) if ours else t) if isinstance(t, torch.Tensor) else t,
        func(*inner[0], **inner[1]),
    )
    if not wrapped or not ours or func in COPIES or func._schema.is_mutable:
        return out
    return return_and_correct_aliasing(func, args, kwargs, out)


def note_wait(func):
    frames = traceback.extract_stack()
    if any(frame.name == "train_epoch" for frame in frames):
        place = [f for f in frames if f.filename != __file__ and "torch" not in f.filename][-1]
        waits[f"{func} in {Path(place.filename).name}:{place.lineno}"] += 1


def new_tensor(data, *, dtype=None, device=None):
    """torch.tensor; PyTorch's own makes no tensor of a device that Python defines."""
    made = cpu_tensor(data, dtype=dtype)
    return made if device is None else made.to(device)


cpu_tensor, torch.tensor = torch.tensor, new_tensor


def setup(args, real=session.setup):
    real(args)
    return Runtime(DEVICE, "fp32")


def save(content, path, real=checkpoint.save):
    real(tree_map(lambda t: t.detach().inner if isinstance(t, Wrapped) else t, content), path)


def read(path, device="cpu", real=checkpoint.read):
    return tree_map(lambda t: t.to(device) if isinstance(t, torch.Tensor) else t, real(path))


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.__future__.set_swap_module_params_on_conversion(True)
    session.setup, checkpoint.save, checkpoint.read = setup, save, read
    SOURCES["digits"] = few_digits()
    script = importlib.import_module(sys.argv[1])
    with Everything():
        for flags in sys.argv[2:]:
            script.main(script.parse_args(shlex.split(flags)))
    print(json.dumps(waits))
