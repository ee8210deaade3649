"""Rows of `.csv` and `.jsonl` files, whatever their line ends, with or without a byte order mark."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class Row:
    """One row: its values by column, or what is wrong with it."""

    place: str
    """`row 3` of a .csv, counting the header as 1, or `line 3` of a .jsonl."""
    values: Mapping[str, str] = field(default_factory=dict)
    fault: str = ""
    lists: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Values that are lists of texts, of a .jsonl."""
    others: Mapping[str, str] = field(default_factory=dict)
    """Its values that are neither text nor that nor null, as they are written."""


Table = tuple[list[Row], set[str], list[str]]
"""Rows, the names of all columns, problems of the file as a whole."""


def read_rows(path: Path) -> Table:
    """Read a table; blank rows are left out, values are stripped."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        return [], set(), [f"{path}: is not UTF-8 text (byte {error.start}); save it as UTF-8"]
    except OSError as error:
        return [], set(), [f"{path}: cannot be read: {error.strerror}"]
    if path.suffix.lower() != ".jsonl":
        return _read_csv(path, text)
    if text.lstrip().startswith("["):
        return [], set(), [f"{path}: holds a JSON list; a .jsonl has one object a line, with nothing between"]
    return _read_jsonl(text)


def _read_csv(path: Path, text: str) -> Table:
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    try:
        names = [(name or "").strip() for name in reader.fieldnames or ()]
        if len(names) == 1 and (other := next((mark for mark in ";\t|" if mark in names[0]), None)):
            return [], set(), [f"{path}: its columns are separated by {other!r}; must be commas"]
        doubled = sorted({name for name in names if names.count(name) > 1 and name})
        if doubled:
            return [], set(names), [f"{path}: more than one column '{name}'" for name in doubled]
        reader.fieldnames = names
        rows = [_csv_row(number, values) for number, values in enumerate(reader, start=2)]
    except csv.Error as error:
        return [], set(), [f"{path}: line {reader.line_num} is not proper CSV: {error}"]
    return rows, {name for name in names if name}, []


def _csv_row(number: int, values: dict[str | None, str | list[str] | None]) -> Row:
    place = f"row {number}"
    if None in values:
        return Row(place, fault="more fields than the header has: put texts with commas in double quotes")
    return Row(place, {str(name): value.strip() for name, value in values.items() if isinstance(value, str)})


def _read_jsonl(text: str) -> Table:
    # Not splitlines(): JSON strings may hold line separators that it would split at.
    lines = enumerate(text.replace("\r\n", "\n").split("\n"), start=1)
    rows = [_json_row(f"line {number}", line) for number, line in lines if line.strip()]
    return rows, {name for row in rows for name in row.values}, []


def _json_row(place: str, line: str) -> Row:
    try:
        values = json.loads(line)
    except json.JSONDecodeError as error:
        return Row(place, fault=f"is not JSON: {error.msg} (column {error.colno})")
    except RecursionError:
        return Row(place, fault="is nested too deeply")
    if not isinstance(values, dict):
        return Row(place, fault=f"is not a JSON object: {line.strip()[:40]}")
    lists = {name: tuple(value) for name, value in values.items() if _is_list_of_texts(value)}
    others = {
        name: json.dumps(value)
        for name, value in values.items()
        if name not in lists and value is not None and not isinstance(value, str)
    }
    return Row(place, {name: _text(value) for name, value in values.items()}, lists=lists, others=others)


def _is_list_of_texts(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def _text(value: object) -> str:
    """Strings as they are; lists and numbers are other columns' values, or no text that can be used."""
    return value.strip() if isinstance(value, str) else ""
