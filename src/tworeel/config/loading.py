"""Read a run's configuration from a TOML file and from the command line; report every mistake at once."""

from __future__ import annotations

import json
import math
import os
import tomllib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from tworeel.config.fields import Option, find_option, sections
from tworeel.config.problems import problems_by_key
from tworeel.config.rules import broken_rules
from tworeel.config.schema import RunConfig, TrainConfig
from tworeel.errors import UserError

Tree = dict[str, Any]
"""Tables by section; what is no table stays as it was written, and is reported later."""

_MODEL_FILES = frozenset(option.key for option in sections()["model"] if option.kinds == {str})
"""Options that name a file or folder, or else a hub id."""


def load_config(path: Path | None, overrides: Mapping[str, Any]) -> RunConfig:
    """Read and check a configuration.

    Paths in the file are relative to the file's folder, those in `overrides` to the current folder; in the
    result they are absolute. Without a file all options come from `overrides` and the defaults.

    Args:
        path: the TOML file, or None.
        overrides: values by dotted key (`train.steps`), stronger than the file's. A string is read as a TOML
            value where it is one and the option takes more than text.

    Raises:
        UserError: lists everything that is wrong.
    """
    tree: Tree = {"model": {}, "data": {}, "train": {}}
    # The default folder is beside the file, as one that the file names is.
    _merge(tree, _resolved({"train": {"output": _default_output()}}, path.parent if path else Path()))
    if path:
        _merge(tree, _resolved(_read_toml(path), path.parent))
    _merge(tree, _resolved(_override_tree(overrides), Path()))
    return _validated(_each_option(tree, _none_for))


def _default_output() -> str:
    return str(TrainConfig.model_fields["output"].default)


def _merge(tree: Tree, stronger: Tree) -> None:
    for section, table in stronger.items():
        both = isinstance(tree.get(section), dict) and isinstance(table, dict)
        tree[section] = {**tree[section], **table} if both else table


def _read_toml(path: Path) -> Tree:
    try:
        # Windows' editors put a byte-order mark in front, which TOML does not know.
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: must be a TOML file in UTF-8") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        hint = "; write paths with / or in 'single quotes'" if "\\" in text else ""
        raise UserError(f"{path}: not valid TOML: {error}{hint}") from None
    except RecursionError:
        raise UserError(f"{path}: is nested too deeply") from None


def _override_tree(overrides: Mapping[str, Any]) -> Tree:
    tree: Tree = {}
    for key, value in overrides.items():
        parsed = _parse(value, find_option(key)) if isinstance(value, str) else value
        section, dot, name = key.partition(".")
        if dot:
            tree.setdefault(section, {})[name] = parsed
        else:
            tree[key] = parsed
    return tree


def _parse(text: str, option: Option | None) -> Any:
    """Read a value of the command line; what is no TOML value, or belongs to an option of text, is text."""
    try:
        table = tomllib.loads(f"value = {text}")
    except (tomllib.TOMLDecodeError, RecursionError):
        return text
    is_text = option is not None and option.is_text and not isinstance(table["value"], str)
    return text if is_text or len(table) > 1 else table["value"]


def _resolved(tree: Tree, base: Path) -> Tree:
    """Make paths absolute: `~` is the home folder, and relative ones start at `base`."""
    return _each_option(tree, lambda key, value: _resolve(key, value, base))


def _resolve(key: str, value: Any, base: Path) -> Any:
    option = find_option(key)
    if option is None or not value or not isinstance(value, str | Path):
        return value
    there = os.path.abspath(base / Path(value).expanduser())
    looks_local = str(value).startswith(("~", "./", "../", ".\\", "..\\"))
    if Path in option.kinds or (key in _MODEL_FILES and (looks_local or os.path.exists(there))):
        return there
    return value


def _none_for(key: str, value: Any) -> Any:
    option = find_option(key)
    return None if option and option.takes_none and value == "none" else value


def _each_option(tree: Tree, change: Callable[[str, Any], Any]) -> Tree:
    """Return the tree with `change(key, value)` for each value, those of the datasets included."""
    return {section: _each_value(section, table, change) for section, table in tree.items()}


def _each_value(section: str, table: Any, change: Callable[[str, Any], Any]) -> Any:
    if not isinstance(table, dict):
        return table
    done = {}
    for name, value in table.items():
        key = f"{section}.{name}"
        if key == "data.sources" and isinstance(value, list | tuple):
            done[name] = [_each_value(key, dataset, change) for dataset in value]
        else:
            done[name] = change(key, value)
    return done


def _validated(tree: Tree) -> RunConfig:
    try:
        # JSON's rules suit TOML: lists for tuples, strings for paths, 1 for 1.0, but no "1" and no true.
        config = RunConfig.model_validate_json(json.dumps(_as_json(tree)))
    except ValidationError as error:
        problems = problems_by_key(error.errors(include_url=False), tree)
        raise UserError(*problems.values(), *broken_rules(tree, problems)) from None
    if broken := tuple(broken_rules(tree, ())):
        raise UserError(*broken)
    return config


def _as_json(value: Any) -> Any:
    """Keep what JSON has too; dates, NaN and infinity become a table, which no option takes."""
    if isinstance(value, dict):
        return {key: _as_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_as_json(item) for item in value]
    if isinstance(value, Path):
        return str(value)
    if value is None or isinstance(value, str | int) or (isinstance(value, float) and math.isfinite(value)):
        return value
    return {"value": str(value)}
