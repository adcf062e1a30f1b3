"""Whether a checkpoint is one that this run can go on from: all of it is looked at before anything is loaded."""

import json
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

from datafree.checkpoint import is_plain
from datafree.distributed import whole

ABOUT = ("command", "commit", "versions", "hardware", "precision")  # what each piece of a run says of itself


def live_state(value) -> dict:
    """What a saved state of `value` is compared with: its own, and in an optimiser's "state" the parameters."""
    if isinstance(value, Optimizer):
        parameters = [p for group in value.param_groups for p in group["params"]]
        # What is no parameter has a rank's own rows, and is saved whole.
        return value.state_dict() | {"state": [p if isinstance(p, Parameter) else whole(p) for p in parameters]}
    return value.state_dict() | {name: live_state(getattr(value, name)) for name in getattr(value, "kept", ())}


ANYTHING = object()


def difference(saved, live, where: str = "") -> str | None:
    """What keeps a saved state from being loaded where `live` is: the first difference, in words, or None.

    Compared are keys, types, shapes and dtypes; where `live` is ANYTHING that may stand, in an empty list as well;
    None is an optimiser's switch that was not set.
    """
    kinds = (bool, int | float, str, Tensor, dict, list | tuple, bool | None)
    kind = next((k for k in kinds if isinstance(live, k)), None)
    if kind is None or kind == (list | tuple) and not live and isinstance(saved, kind):
        return None
    if not isinstance(saved, kind) or isinstance(saved, bool) and kind == (int | float):
        return f"{where} is a {type(saved).__name__}, not a {type(live).__name__}"
    if kind is Tensor and not (is_plain(saved) and (saved.shape, saved.dtype) == (live.shape, live.dtype)):
        sizes = (f"{list(v.shape)} of {str(v.dtype).removeprefix('torch.')}" for v in (saved, live))
        return f"{where} is {' not '.join(sizes)}"
    if kind is dict and saved.keys() != live.keys():
        return f"{where} has or lacks {', '.join(map(str, saved.keys() ^ live.keys()))}"
    if kind is dict and "param_groups" in live:
        slots = {"step", "exp_avg", "exp_avg_sq"} if "betas" in live["param_groups"][0] else {"momentum_buffer"}
        saved, live, parameters = saved.copy(), live.copy(), live["state"]
        state = saved["state"] if isinstance(saved["state"], dict) else {None: None}
        if not all(isinstance(i, int) and 0 <= i < len(parameters) and isinstance(s, dict) for i, s in state.items()):
            return f"{where}.state is no optimiser's"
        saved["state"] = state
        step = torch.zeros(())
        live["state"] = {i: {k: step if k == "step" else parameters[i] for k in slots} for i in state}
    if kind in (dict, list | tuple):
        if len(saved) != len(live):
            return f"{where} has {len(saved)} parts, not {len(live)}"
        keys = live if kind is dict else range(len(live))
        found = (difference(saved[key], live[key], f"{where}.{key}".lstrip(".")) for key in keys)
        return next(filter(None, found), None)
    return f"{where} is {saved!s:.40}" if kind == (int | float) and not abs(saved) < 2**63 else None


def damage(content: Mapping, states: Mapping, n_epochs: int, column: str) -> str | None:
    """What is wrong with a run's last.pt, in words, or None.

    Args:
        content: its content. states: name -> what takes up each state. n_epochs: of the run.
        column: the name of the score.
    """
    run = dict.fromkeys("pieces rows args best_score best_epoch".split(), ANYTHING)
    run |= dict(states={name: live_state(value) for name, value in states.items()})
    run |= dict(rng=dict(cpu=torch.get_rng_state(), cuda=[]))
    if wrong := difference(content, dict(state_dict=ANYTHING, metadata=ANYTHING, epoch=0, run=run)):
        return wrong
    epoch, run = content["epoch"], content["run"]
    if type(epoch) is not int or not -1 <= epoch < n_epochs:
        return f"epoch {epoch} of {n_epochs}"
    kinds = dict(pieces=list, rows=list, args=dict, best_score=int | float, best_epoch=int | None, metadata=dict)
    plain = {name: run.get(name) for name in kinds} | {"metadata": content["metadata"]}
    try:
        json.dumps(plain)
    except (TypeError, ValueError, RecursionError) as error:
        return str(error)
    for name, kind in kinds.items():
        if not isinstance(plain[name], kind):
            return f"{name} is a {type(plain[name]).__name__}"
    piece, row = dict(epochs=[0, 0], seconds=0.0) | dict.fromkeys(ABOUT, ANYTHING), {"epoch": 0, column: 0.0}
    for made, form in [*((made, piece) for made in run["pieces"]), *((made, row) for made in run["rows"])]:
        if not isinstance(made, dict) or not form.keys() <= made.keys():
            return "its record lacks something"
        if wrong := difference({k: made[k] for k in form}, form, "record"):
            return wrong
    if [row["epoch"] for row in run["rows"]] != list(range(1, epoch + 2)):
        return f"its rows are not those of epochs 1 to {epoch + 1}"
    if epoch >= 0 and not isinstance(plain["metadata"].get(column), int | float):
        return f"its metadata has no {column}"
    return None
