"""The options of the schema as a flat list: section, name, what is allowed, default, one sentence.

Error messages, the template and the reference all read this list, so they cannot disagree.
"""

from __future__ import annotations

import types
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt, MinLen
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from tworeel.config.schema import RunConfig

_NOUNS = {
    bool: ("true or false", "true or false"),
    int: ("an integer", "integers"),
    float: ("a number", "numbers"),
    str: ("a string", "strings"),
    Path: ("a path", "paths"),
}
_COUNTS = {2: "two", 3: "three"}


@dataclass(frozen=True, kw_only=True)
class Option:
    """One key of the TOML file."""

    section: str
    """Table that it stands in: `train`, or `data.sources` for the keys of one dataset."""
    name: str
    allowed: str
    """What may be written there, in words: `an integer > 0`."""
    default: Any
    """The default; meaningless where `required`."""
    required: bool
    optional: bool
    """True where None is allowed."""
    kinds: frozenset[Any]
    """The plain types that are allowed, without None."""
    doc: str

    @property
    def key(self) -> str:
        """The dotted key."""
        return f"{self.section}.{self.name}"

    @property
    def is_text(self) -> bool:
        """Whether every value that is allowed is written as a string."""
        return self.kinds <= {str, Path, Literal}

    @property
    def takes_none(self) -> bool:
        """Whether `"none"` stands for None: TOML has no null, and plain strings mean themselves."""
        return self.optional and not self.kinds & {str, Path}


@cache
def all_options() -> tuple[Option, ...]:
    """Every option, in the order of the schema."""
    return tuple(
        option
        for section, field in RunConfig.model_fields.items()
        for option in _options_of(section, _model_of(field.annotation))
    )


@cache
def sections() -> dict[str, tuple[Option, ...]]:
    """The options by section; `data.sources` is a section of its own."""
    found: dict[str, list[Option]] = {}
    for option in all_options():
        found.setdefault(option.section, []).append(option)
    return {section: tuple(options) for section, options in found.items()}


def find_option(key: str) -> Option | None:
    """Return the option with this dotted key, if there is one."""
    return _by_key().get(key)


@cache
def _by_key() -> dict[str, Option]:
    return {option.key: option for option in all_options()}


def section_doc(section: str) -> str:
    """The sentence that describes a section."""
    model = _model_of(RunConfig.model_fields[section.partition(".")[0]].annotation)
    if "." in section:
        model = _model_of(model.model_fields[section.partition(".")[2]].annotation)
    return " ".join((model.__doc__ or "").split())


def _options_of(section: str, model: type[BaseModel]) -> Iterator[Option]:
    for name, field in model.model_fields.items():
        yield _option(section, name, field)
        if (nested := _model_in(field.annotation)) is not None:
            yield from _options_of(f"{section}.{name}", nested)


def _option(section: str, name: str, field: FieldInfo) -> Option:
    members = tuple(_members(field.annotation))
    option = Option(
        section=section,
        name=name,
        allowed=described(field),
        default=None if field.default is PydanticUndefined else field.default,
        required=field.is_required(),
        optional=type(None) in get_args(field.annotation),
        kinds=frozenset(_kind(member) for member in members),
        doc=" ".join((field.description or "").split()),
    )
    if not option.takes_none:
        return option
    return Option(**{**vars(option), "allowed": f'{option.allowed} or "none"'})


def described(field: FieldInfo) -> str:
    """Say in words what a field of a table takes, beside None."""
    return " or ".join(_describe(member, field.metadata) for member in _members(field.annotation))


def _model_of(annotation: Any) -> type[BaseModel]:
    model = _model_in(annotation)
    assert model is not None, annotation
    return model


def _model_in(annotation: Any) -> type[BaseModel] | None:
    """The table class that an annotation holds, itself or as the item of a tuple."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for arg in get_args(annotation) if (found := _model_in(arg)) is not None), None)


def _members(annotation: Any) -> Iterator[Any]:
    if get_origin(annotation) in (Union, types.UnionType):
        yield from (arg for arg in get_args(annotation) if arg is not type(None))
    else:
        yield annotation


def _kind(annotation: Any) -> Any:
    if get_origin(annotation) is Annotated:
        return _kind(get_args(annotation)[0])
    return get_origin(annotation) or annotation


def _describe(annotation: Any, limits: Iterable[Any] = (), *, plural: bool = False) -> str:
    """Say in words what an annotation allows: `an integer > 0`, `a list of two numbers from 0 to 1`."""
    if get_origin(annotation) is Annotated:
        inner, *more = get_args(annotation)
        return _describe(inner, [*limits, *_flat(more)], plural=plural)
    if get_origin(annotation) is Literal:
        return " or ".join(f'"{choice}"' for choice in get_args(annotation))
    if get_origin(annotation) is tuple:
        return _describe_list(get_args(annotation), limits)
    if (model := _model_in(annotation)) is not None:
        assert plural, f"{model} stands outside a list"
        return "tables"
    return " ".join(filter(None, (_NOUNS[annotation][plural], _bounds(limits))))


def _describe_list(items: tuple[Any, ...], limits: Iterable[Any]) -> str:
    count = "" if items[-1] is Ellipsis else _COUNTS[len(items)]
    if any(isinstance(limit, MinLen) for limit in limits):
        count = "one or more"
    return " ".join(filter(None, ("a list of", count, _describe(items[0], plural=True))))


def _flat(metadata: Iterable[Any]) -> Iterator[Any]:
    for item in metadata:
        if isinstance(item, FieldInfo):
            yield from item.metadata
        else:
            yield item


def _bounds(limits: Iterable[Any]) -> str:
    low = high = ""
    closed: dict[type, Any] = {}
    for limit in limits:
        match limit:
            case Gt(gt):
                low = f"> {gt:g}"
            case Ge(ge):
                low, closed[Ge] = f">= {ge:g}", ge
            case Lt(lt):
                high = f"< {lt:.12g}"
            case Le(le):
                high, closed[Le] = f"<= {le:g}", le
    if len(closed) == 2:
        return f"from {closed[Ge]:g} to {closed[Le]:g}"
    return " and ".join(filter(None, (low, high)))
