"""Cards: what they hold and how fast they are, by name; a user can add some."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from importlib import resources
from pathlib import Path

from tworeel.errors import UserError, did_you_mean, raise_if_any
from tworeel.planning.card_files import MOST_GIB, card_rows
from tworeel.quant.matmul import Mode
from tworeel.units import GIB

_TABLE = "cards.toml"
_MOST_CARDS = 16


@dataclass(frozen=True, kw_only=True)
class Card:
    """One card, by its vendor's figures. Rates are dense, with fp32 sums; per second."""

    name: str
    torch_name: str
    """What torch calls it; cards of several sizes share a name."""
    memory: int
    """Bytes, nominal."""
    capability: float | None
    """NVIDIA's compute capability, where it is known."""
    bf16: float
    fp8: float | None
    int8: float | None
    bandwidth: float
    """Bytes of its memory."""
    pcie: float
    """Bytes each way between it and the host."""
    nvlink: float | None
    """Bytes each way between two of them, if they are linked."""
    source: str

    @property
    def fp8_mode(self) -> Mode:
        """How it multiplies fp8 weights; as `tworeel.quant.matmul.matmul_mode` finds it out on a card."""
        if self.fp8 is None or not _is_nvidias(self):
            return "weight-only"
        return "rowwise" if int(self.capability or 0) in (9, 10) else "tensorwise"

    @property
    def int8_mode(self) -> Mode:
        """How it multiplies int8 weights."""
        if self.int8 is None or not _is_nvidias(self):
            return "weight-only"
        return "tensorwise" if self.capability is not None and self.capability < 8 else "fused"

    @property
    def crossing(self) -> float:
        """Bytes a second from one of these cards to the next."""
        return self.nvlink or self.pcie


def _is_nvidias(card: Card) -> bool:
    others = ("AMD", "Radeon", "RX ", "MI3", "Intel", "Arc ")
    return not any(word in f"{card.name} {card.torch_name}" for word in others)


def known_cards(extra: Path | None = None) -> tuple[Card, ...]:
    """All cards of the table, those of the user's file first.

    Raises:
        UserError: the file cannot be read, or is not as the table.
    """
    own = _read(extra) if extra is not None else ()
    return (*own, *_built_in())


def parse_cards(text: str, cards: Sequence[Card]) -> tuple[Card, ...]:
    """Turn `2x RTX 4090` or `RTX 4090, RTX 3060 12GB` into cards, in this order.

    Raises:
        UserError: lists every part that names no card, with names that are near, or several cards.
    """
    found: list[Card] = []
    problems: list[str] = []
    for part in re.split(r"[,+]", text):
        counted = re.fullmatch(r"(?:(\d+)\s*[x×]\s*)?(.+)", part.strip())
        if counted is None:
            problems.append(f"--gpus {text!r}: a card is missing")
            continue
        count, name = int(counted[1] or 1), counted[2]
        if not 1 <= count <= _MOST_CARDS:
            problems.append(f"--gpus {text!r}: {count} cards; allowed are 1 to {_MOST_CARDS}")
        elif len(matches := _named(name, cards)) != 1:
            problems.append(f"--gpus {text!r}: {_not_one(name, matches, cards)}")
        else:
            found += matches * count
    raise_if_any(problems)
    return tuple(found)


def memory_sizes(text: str) -> list[float]:
    """`22.5,15` as GiB.

    Raises:
        UserError: not numbers above 0.
    """
    try:
        sizes = [float(part) for part in text.split(",")]
    except ValueError:
        raise UserError(
            f"--memory-gib {text}: must be numbers with commas between, for example 22.5,15"
        ) from None
    if any(not 0 < size < MOST_GIB for size in sizes):
        raise UserError(f"--memory-gib {text}: must be above 0 and below {MOST_GIB}")
    return sizes


def with_memory(cards: Sequence[Card], text: str) -> tuple[Card, ...]:
    """The cards with other sizes, in GiB: `22.5` for all, or one for each, `22.5,15`.

    Raises:
        UserError: not numbers above 0, or as many as there are no cards.
    """
    sizes = memory_sizes(text)
    if len(sizes) == 1:
        sizes *= len(cards)
    if len(sizes) != len(cards):
        raise UserError(f"--memory-gib {text}: {len(cards)} cards need one number, or {len(cards)}")
    return tuple(replace(card, memory=int(size * GIB)) for card, size in zip(cards, sizes, strict=True))


def card_of_device(name: str, memory: int, cards: Sequence[Card]) -> Card | None:
    """The card that torch calls so, of the size that is nearest; None if the table has none.

    Args:
        name: torch's.
        memory: bytes that torch says it has.
        cards: to choose from.
    """
    plain = _plain(name)
    same = [card for card in cards if plain and plain in (_plain(card.torch_name), _plain(card.name))]
    return min(same, key=lambda card: abs(card.memory - memory), default=None)


def _named(name: str, cards: Sequence[Card]) -> list[Card]:
    """The card of this name, however it is spelled; else all whose names begin with it, or contain it."""
    plain = _plain(name)
    if not plain:  # a maker's or a series' name alone, or no name at all
        named = any(map(str.isalnum, name))
        return [card for card in cards if named and name.lower() in card.name.lower()]
    if exact := [card for card in cards if plain == _plain(card.name)]:
        return exact[:1]
    called = [card for card in cards if plain == _plain(card.torch_name)]
    starts = [card for card in cards if _plain(card.name).startswith(plain)]
    return called or starts or [card for card in cards if plain in _plain(card.name)]


def _not_one(name: str, matches: Sequence[Card], cards: Sequence[Card]) -> str:
    """Why a name stands for no card."""
    if matches:
        return f"{name!r} may be {', '.join(card.name for card in matches)}; name one of them"
    near = did_you_mean(name, [card.name for card in cards])
    return f"no card {name!r} is known{near}; names are as in 2x RTX 4090, and --cards adds one"


def _plain(name: str) -> str:
    """What tells a card from others: `NVIDIA GeForce RTX 4090` -> `4090`."""
    return re.sub(r"nvidia|geforce|amd|radeon|rtx|generation|[^a-z0-9]", "", name.lower())


@cache
def _built_in() -> tuple[Card, ...]:
    table = resources.files("tworeel.planning").joinpath(_TABLE)
    return _parse(table.read_text(encoding="utf-8"), _TABLE)


def _read(path: Path) -> tuple[Card, ...]:
    try:
        return _parse(path.read_text(encoding="utf-8"), str(path))
    except OSError as error:
        raise UserError(f"--cards {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UserError(f"--cards {path}: is not UTF-8 text") from None


def _parse(text: str, source: str) -> tuple[Card, ...]:
    return tuple(
        Card(
            name=row.name,
            torch_name=row.torch_name,
            memory=int(row.memory_gib * GIB),
            capability=row.capability,
            bf16=row.bf16 * 1e12,
            fp8=row.fp8 and row.fp8 * 1e12,
            int8=row.int8 and row.int8 * 1e12,
            bandwidth=row.bandwidth * 1e9,
            pcie=row.pcie * 1e9,
            nvlink=row.nvlink and row.nvlink * 1e9,
            source=row.source,
        )
        for row in card_rows(text, source)
    )
