"""Tables of results, as Markdown and as CSV."""

import csv
import io
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any


def figure_of(value: float | str | None, std: float | None = None, digits: int = 2, sign: str = "") -> str:
    """A number for a table: '97.90 ± 0.20', or nothing; counts and words as they are."""
    text = f"{value:{sign}.{digits}f}" if isinstance(value, float) else "" if value is None else str(value)
    return text if std is None else f"{text} ± {std:.{digits}f}"


def as_markdown(columns: Mapping[str, str | Callable[[Any], str]], rows: Iterable) -> str:
    """A Markdown table.

    Args:
        columns: heading -> the key of a number (with its deviation in KEY_std) or a text, or what makes one of a row.
    """
    lines = [[c(r) if callable(c) else figure_of(r[c], r.get(f"{c}_std")) for c in columns.values()] for r in rows]
    rule = "|" + "---|" * len(columns)
    return "\n".join([f"| {' | '.join(columns)} |", rule, *(f"| {' | '.join(line)} |" for line in lines), ""])


def as_csv(columns: Sequence[str], rows: Iterable[Mapping]) -> str:
    """These columns of the rows, numbers to four digits."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows([round(v, 4) if isinstance(v, float) else v for v in map(row.get, columns)] for row in rows)
    return buffer.getvalue()
