"""Files of cards: what they hold, and one line on each mistake in one."""

from __future__ import annotations

import tomllib
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Annotated, Any

from pydantic import Field, ValidationError
from pydantic_core import ErrorDetails

from tworeel.config.fields import described
from tworeel.config.problems import shown, wrong
from tworeel.config.schema import Section
from tworeel.errors import UserError, did_you_mean, raise_if_any

MOST_GIB = 10_000
Rate = Annotated[float, Field(ge=0.001, le=100_000)]
_TABLE = "card"


class CardRow(Section):
    """A card as a file has it; units in `cards.toml`."""

    name: str
    torch_name: str = ""
    memory_gib: Annotated[float, Field(gt=0, lt=MOST_GIB)]
    capability: Annotated[float, Field(gt=0, le=100)] | None = None
    bf16: Rate
    fp8: Rate | None = None
    int8: Rate | None = None
    bandwidth: Rate
    pcie: Rate
    nvlink: Rate | None = None
    source: str


class _File(Section):
    card: Annotated[list[CardRow], Field(min_length=1)]


def card_rows(text: str, source: str) -> list[CardRow]:
    """Read the cards of a file.

    Args:
        text: of the file.
        source: its name.

    Raises:
        UserError: it is no TOML, or lists all that is wrong in it, a line each.
    """
    try:
        tree = tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        why = "is nested too deeply" if isinstance(error, RecursionError) else error
        raise UserError(f"--cards {source}: {why}") from None
    try:
        rows = _File.model_validate(tree).card
    except ValidationError as error:
        lines = dict.fromkeys(_problem(detail, tree) for detail in error.errors())
        raise UserError(*(f"--cards {source}: {line}" for line in lines)) from None
    raise_if_any(f"--cards {source}: {line}" for line in _name_problems(rows))
    return rows


def _name_problems(rows: list[CardRow]) -> Iterator[str]:
    for name, count in Counter(row.name for row in rows).items():
        if not any(map(str.isalnum, name)) or set(name) & set(",+"):
            allowed = "letters or digits, and no comma or plus, which --gpus has between cards"
            yield f"card: name = {shown(name)}: must have {allowed}"
        if count > 1:
            yield f"card {shown(name)}: {count} tables of this name"


def _problem(detail: ErrorDetails, tree: Mapping[str, Any]) -> str:
    match detail["loc"]:
        case ("card", int(number), str(name), *_):
            return _field_problem(detail["type"], number, name, tree[_TABLE][number])
        case ("card", int(number), *_):
            return wrong(f"card {number + 1}", tree[_TABLE][number], "a table, [[card]]")
        case ("card",) if _TABLE in tree:
            return wrong(_TABLE, tree[_TABLE], "one or more tables, [[card]]")
        case ("card",):
            return "no [[card]] is in it"
        case (str(key), *_):
            return f"{key} = {shown(tree[key])}: unknown key{_nearest(key, [_TABLE])}"
    raise AssertionError(detail)


def _field_problem(kind: str, number: int, name: str, row: Mapping[str, Any]) -> str:
    """Of one card, by its name if it has one."""
    named = row.get("name")
    spot = f"card {shown(named) if isinstance(named, str) and named else number + 1}: {name}"
    if kind == "extra_forbidden":
        return f"{spot} = {shown(row[name])}: unknown key{_nearest(name, list(CardRow.model_fields))}"
    allowed = described(CardRow.model_fields[name])
    return wrong(spot, row[name], allowed) if name in row else f"{spot}: missing; must be {allowed}"


def _nearest(key: str, names: list[str]) -> str:
    return did_you_mean(key, names) or f"; allowed: {', '.join(names)}"
