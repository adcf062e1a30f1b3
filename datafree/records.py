"""Records of finished runs: the result.json files, wherever they were copied to."""

import json
from pathlib import Path

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
