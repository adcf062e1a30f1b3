"""Who makes the images of datafree_kd.py: five families with the same methods, each in its file with what it serves.

- `synthesize(adversarial, tick)`: one round of optimisation; returns the last losses by name.
- `sample(n, batch_size)`: n batches of normalised images for the student, with numbers that tell them apart or None.
- `state_dict()`, `load_state_dict(state)`, `flush()`: all that a resumed run needs.

FastLatents is the variant of Fast in datafree_kd_imagenet.py. A method of one's own enters METHODS, and with it
the command line, by `register("mine", Method(MyFamily, STUDENT | dict(...)))` before a script's `parse_args`.
"""

# ruff: noqa: F401, what is imported here is what the package offers
import importlib
import pkgutil

from .base import CRITERIA, FLAGS, GENERATOR, METHODS, STUDENT, Method, Sample, Synthesizer, register
from .cmi import CMI
from .deepinversion import DeepInversion
from .fast import IMAGENET, Fast, FastLatents
from .generative import Generative

for _family in pkgutil.iter_modules(__path__):  # whose methods come with it
    importlib.import_module(f"{__name__}.{_family.name}")
