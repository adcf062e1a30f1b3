"""Who makes the images of datafree_kd.py: four families with the same three methods.

FastLatents is the variant of Fast in datafree_kd_imagenet.py.

- `synthesize(adversarial, tick)`: one round of optimisation; returns the last losses by name.
- `sample(n, batch_size)`: n batches of normalised images for the student.
- `state_dict()`, `load_state_dict(state)`: all that a resumed run needs.

`settings` names the keyword arguments of a family, which are flags of the script; `pool` is the
ImagePool that it fills, or None.
"""

from .cmi import CMI
from .deepinversion import DeepInversion
from .fast import Fast
from .fast_latents import FastLatents
from .generative import Generative

__all__ = ["CMI", "DeepInversion", "Fast", "FastLatents", "Generative"]
