"""torchrun with processes that are forks of this one, where this is a fork of a `storm.Server`: no seconds for imports.

torchrun.py FLAGS SCRIPT ...   as torchrun's own command line, or with -m MODULE
"""

import atexit
import importlib
import runpy
import socket
import sys
from dataclasses import replace
from pathlib import Path

from torch.distributed import run

ROOT = Path(__file__).resolve().parent.parent
OWN = {path.stem for path in ROOT.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}


def work(_unbuffered: str, what: str, *argv: str) -> None:
    """A rank: what `python -u SCRIPT ...` does in a new process."""
    atexit._clear()  # what the server would do at its own end
    for name in [name for name in sys.modules if name.partition(".")[0] in OWN]:
        del sys.modules[name]  # they look at what rank they are when they are imported
    if what == "-m":
        what, *argv = argv
    sys.argv = [what, *argv]
    try:
        runpy.run_path(what, run_name="__main__") if what.endswith(".py") else runpy.run_module(what, None, "__main__")
    finally:
        atexit._run_exitfuncs()  # a fork would leave them out


if __name__ == "__main__":
    importlib.reload(socket)  # the server's has no network
    launch = run.elastic_launch
    run.elastic_launch = lambda config, entrypoint: launch(replace(config, start_method="fork"), work)
    run.main()
