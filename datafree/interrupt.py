"""Imported first by every script: from here on Ctrl-C ends it in one line, also while torch is still imported."""

import os
import sys
from pathlib import Path


def _say(kind: type, error: BaseException, trace) -> None:
    if not issubclass(kind, KeyboardInterrupt):
        return sys.__excepthook__(kind, error, trace)
    print(f"{Path(sys.argv[0]).name}: interrupted", file=sys.stderr, flush=True)
    os._exit(130)


sys.excepthook = _say
