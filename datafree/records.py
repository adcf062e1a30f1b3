"""Records of finished runs: the result.json files, wherever they were copied to."""

import json
import shlex
from collections.abc import Mapping
from pathlib import Path

from datafree.cli import FREE
from datafree.errors import UsageError

SAME = ("name", "command", "seconds")  # what copies of a record have in common


def read_records(*folders: str | Path) -> list[dict]:
    """The content of every record below the folders, with its "file" there; of copies of a record the first.

    Raises:
        UsageError: there is no such folder, or a file is damaged.
    """
    records = {}
    for folder in map(Path, folders):
        if not folder.is_dir():
            raise UsageError(f"{folder} does not exist: name the folder of the records")
        for path in sorted(folder.rglob("*.json")):
            try:
                content = json.loads(path.read_text(encoding="utf-8"))
                if isinstance(content, dict) and {*SAME, "last", "best", "args", "script"} <= content.keys():
                    same = tuple(content[key] for key in SAME)
                    records.setdefault(same, content | {"file": path.relative_to(folder).as_posix()})
            except (ValueError, TypeError, RecursionError) as error:
                raise UsageError(f"{path} is damaged ({error}): delete it or copy it again") from error
    return list(records.values())


def teacher_of(record: Mapping) -> str:
    """The file of a run's teacher, and its recipe."""
    weights = record.get("teacher_weights")
    return f"{weights['file']} ({weights.get('recipe') or 'no recipe'})" if weights else ""


def precision_of(record: Mapping) -> str:
    """A run's precision, piece by piece if there are several."""
    pieces = [f"{p['epochs'][0]}-{p['epochs'][1]} {p['precision']}" for p in record.get("pieces") or ()]
    return ", ".join(pieces) if len(pieces) > 1 else record["precision"]


def command_of(record: Mapping) -> str:
    """A run's command without the flags that do not matter, and the seed."""
    kept, keep = [], True
    for word in shlex.split(record["command"]):
        if word.startswith("--"):
            keep = word.lstrip("-").split("=")[0] not in FREE | {"seed"}
        kept += [word] if keep else []
    return shlex.join(kept)
