"""Values and whole configurations as TOML text."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from tworeel.config.fields import sections
from tworeel.config.schema import RunConfig


def toml_value(value: object) -> str:
    """Write one value as TOML; None becomes `"none"`, which `load_config` reads back where it is allowed."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, str | Path):
        return _toml_string(str(value))
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(toml_value, value))}]"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_toml_key(key)} = {toml_value(item)}" for key, item in value.items()) + "}"
    return _toml_string("none") if value is None else str(value)


def dump_config(config: RunConfig) -> str:
    """Write a resolved configuration as TOML; `load_config` reads it back equal."""
    parts = []
    for section, options in sections().items():
        if "." in section:
            continue
        table = getattr(config, section)
        names = [option.name for option in options if _is_written(table, option.name, option.default)]
        parts.append("\n".join([f"[{section}]", *_lines(table, names)]))
        parts.extend(_array_tables(section, table))
    return "\n\n".join(parts) + "\n"


def _is_written(table: BaseModel, name: str, default: object) -> bool:
    value = getattr(table, name)
    return not _is_array_of_tables(value) and not (value is None and default is None)


def _array_tables(section: str, table: BaseModel) -> Iterable[str]:
    for name in type(table).model_fields:
        value = getattr(table, name)
        if _is_array_of_tables(value):
            for item in value:
                yield "\n".join([f"[[{section}.{name}]]", *_lines(item, type(item).model_fields)])


def _is_array_of_tables(value: Any) -> bool:
    return isinstance(value, tuple) and bool(value) and isinstance(value[0], BaseModel)


def _lines(table: BaseModel, names: Iterable[str]) -> list[str]:
    return [f"{name} = {toml_value(getattr(table, name))}" for name in names]


def _toml_key(key: object) -> str:
    text = str(key)
    return (
        text if text.isascii() and text.replace("_", "a").replace("-", "a").isalnum() else _toml_string(text)
    )


def _toml_string(text: str) -> str:
    # A JSON string is a TOML string but for DEL, which TOML wants escaped.
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")
