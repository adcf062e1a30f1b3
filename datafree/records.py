"""Records of finished runs: the result.json files, wherever they were copied to."""

import json
from pathlib import Path

from datafree.errors import UsageError


def read_records(folder: str | Path) -> list[dict]:
    """The content of every record below `folder`, with its "file", sorted by it.

    Raises:
        UsageError: there is no such folder, or a file is damaged.
    """
    if not Path(folder).is_dir():
        raise UsageError(f"{folder} does not exist: name the folder of the records")
    records = []
    for path in sorted(Path(folder).rglob("*.json")):
        try:
            content = json.loads(path.read_text())
        except ValueError as error:
            raise UsageError(f"{path} is damaged ({error}): delete it or copy it again") from error
        if isinstance(content, dict) and {"last", "best", "args", "script"} <= content.keys():
            records.append({**content, "file": path.relative_to(folder).as_posix()})
    return records
