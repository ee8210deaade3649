"""One line on each mistake in a configuration: the key, its value, what is allowed or was probably meant."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from pydantic_core import ErrorDetails

from tworeel.config.fields import all_options, sections
from tworeel.config.schema import RunConfig
from tworeel.config.writing import toml_value
from tworeel.errors import did_you_mean

_LONGEST_VALUE = 60
_DATASETS = "data.sources"
_FLAGS = {"model.path": "--model", _DATASETS: "--data"}


def problems_by_key(details: Iterable[ErrorDetails], tree: Mapping[str, Any]) -> dict[str, str]:
    """Return the line for each key that is wrong; several errors on one key give one line."""
    found: dict[str, str] = {}
    for detail in details:
        found.setdefault(*_problem(detail, tree))
    if any(key.startswith(f"{_DATASETS}[") for key in found):
        # A wrong dataset is not counted, so that the list may seem empty.
        found.pop(_DATASETS, None)
    return found


def wrong(spot: str, value: Any, allowed: str) -> str:
    """The line on a value that is not allowed."""
    return f"{spot} = {shown(value)}: must be {allowed}"


def shown(value: object) -> str:
    """A value as TOML has it, cut if it is long."""
    text = toml_value(value)
    return text if len(text) <= _LONGEST_VALUE else f"{text[: _LONGEST_VALUE - 3]}..."


def _problem(detail: ErrorDetails, tree: Mapping[str, Any]) -> tuple[str, str]:
    match detail["loc"]:
        case (str(section),):
            return section, _section_problem(section, tree[section])
        case ("data", "sources", int(number)):
            spot, dataset = f"{_DATASETS}[{number}]", tree["data"]["sources"][number]
            return spot, wrong(spot, dataset, "a table with a path, [[data.sources]]")
        case ("data", "sources", int(number), str(name), *_):
            dataset = tree["data"]["sources"][number]
            return _option_problem(detail["type"], f"{_DATASETS}[{number}]", _DATASETS, name, dataset)
        case (str(section), str(name), *_):
            return _option_problem(detail["type"], section, section, name, tree[section])
    raise AssertionError(detail)


def _section_problem(section: str, value: Any) -> str:
    if section in RunConfig.model_fields:
        return wrong(section, value, f"a table, [{section}]")
    if isinstance(value, Mapping):
        return f"[{section}]: unknown section{_nearest_section(section)}"
    return f"{section} = {shown(value)}: unknown key{_nearest_key('', section)}"


def _option_problem(
    kind: str, where: str, section: str, name: str, table: Mapping[str, Any]
) -> tuple[str, str]:
    spot = f"{where}.{name}"
    if kind == "extra_forbidden":
        return spot, f"{spot} = {shown(table[name])}: unknown key{_nearest_key(section, name)}"
    option = next(option for option in sections()[section] if option.name == name)
    if kind == "missing" and name not in table:
        flag = _FLAGS.get(option.key)
        return spot, f"{spot}: missing{f' (on the command line: {flag})' if flag else ''}; {option.doc}"
    each = ", each [[data.sources]] with a path" if option.key == _DATASETS else ""
    return spot, wrong(spot, table[name], option.allowed + each)


def _nearest_key(section: str, key: str) -> str:
    """Say what to write instead of an unknown key; `section` is empty for a key outside all tables."""
    homes = [_brackets(option.section) for option in all_options() if option.name == key]
    if homes:
        return f" (belongs to {' or '.join(homes)})"
    names = [option.name for option in sections().get(section, ())]
    if own := did_you_mean(key, names):
        return own
    for home, options in sections().items():
        if near := did_you_mean(key, [option.name for option in options]):
            return f"{near.removesuffix('?)')} in {_brackets(home)}?)"
    return f"; allowed: {', '.join(names or sections())}"


def _nearest_section(section: str) -> str:
    return did_you_mean(section, sections()) or f"; allowed: {', '.join(sections())}"


def _brackets(section: str) -> str:
    return f"[[{section}]]" if section == _DATASETS else f"[{section}]"
