"""What runs have found blocks to take on a card, kept for later plans: it stands for what a trace says."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import reduce
from hashlib import sha256
from typing import Any

from tworeel.engine.footprints import TOO_LARGE, Footprint, Footprints
from tworeel.engine.residency import Residency
from tworeel.planning.budgets import Budget
from tworeel.planning.measurements import key_of, read, update
from tworeel.planning.requests import Request
from tworeel.planning.traces import MeasuredBytes, ModelTrace

_NAME = "bytes.json"
_MOST_OFF = 2.0
"""What is measured to be more times as large as its trace, or as small, is a damaged file."""


def known_bytes(request: Request) -> MeasuredBytes:
    """What runs like this one have measured on each of its cards; where these differ, the larger."""
    kept = read(_NAME)
    scopes = dict.fromkeys(_scope(request, budget) for budget in request.budgets)
    cards = [dict(_parsed(kept.get(scope))) for scope in scopes]
    everywhere = [key for key in cards[0] if all(key in card for card in cards)]
    return {key: reduce(_larger, (card[key] for card in cards)) for key in everywhere}


def with_measured(trace: ModelTrace, measured: MeasuredBytes, apart: Mapping[str, int]) -> ModelTrace:
    """The trace with what was measured of its blocks, where that is likely; all else is as it was traced.

    Args:
        trace: of the model.
        measured: of its blocks.
        apart: bytes by list that were measured with a block and that no trace has.
    """
    blocks, is_measured = {}, False
    for name, block in trace.blocks.items():
        footprints = dict(block.footprints)
        for residency, traced in block.footprints.items():
            if (found := measured.get((name, traced.hidden, residency))) is None:
                continue
            found = replace(found, working=max(0, found.working - apart.get(name, 0)))
            if _is_likely(found, traced):
                footprints[residency], is_measured = found, True
        blocks[name] = replace(block, footprints=footprints)
    return replace(trace, blocks=blocks, measured=is_measured)


def keep_bytes(request: Request, stages: Sequence[tuple[Budget, Mapping[str, Footprints]]]) -> None:
    """Keep what a run's blocks were found to take.

    Args:
        request: of the run.
        stages: the device of each, and what was measured there, by the names of the lists.
    """
    fresh: dict[str, dict[str, Footprint]] = defaultdict(dict)
    for budget, blocks in stages:
        own = fresh[_scope(request, budget)]
        for name, footprints in blocks.items():
            for residency, one in footprints.items():
                if one != TOO_LARGE:
                    key = f"{name} {one.hidden} {residency}"
                    own[key] = _larger(one, own.get(key, one))

    def joined(known: dict[str, Any]) -> dict[str, Any]:
        return known | {scope: _written(known.get(scope), found) for scope, found in fresh.items() if found}

    if any(fresh.values()):
        update(_NAME, joined)


def _scope(request: Request, budget: Budget) -> str:
    """Card, versions, and all else that a block's bytes depend on, beside its list and its clip."""
    settings = request.trace
    settings = replace(settings, mode=budget.mode(settings.quantize) or settings.mode)
    config = request.source.transformer.config
    rest = [repr(settings), request.cpp_wrapper, request.attention, config]
    digest = sha256(json.dumps(rest, sort_keys=True, default=str).encode()).hexdigest()[:16]
    variant, rank = request.source.traits.variant, f"rank {settings.rank}"
    return " | ".join((key_of(budget.card, settings), variant, rank, digest))


def _written(known: Any, fresh: Mapping[str, Footprint]) -> dict[str, Any]:
    """Of one card: what a block keeps and what it works with, beside what is known of other clips."""
    return (known if isinstance(known, dict) else {}) | {
        key: [one.kept, one.working] for key, one in fresh.items()
    }


def _parsed(known: Any) -> Iterator[tuple[tuple[str, int, Residency], Footprint]]:
    """What is kept of one card, but for what is damaged."""
    for key, sizes in known.items() if isinstance(known, dict) else ():
        try:
            name, hidden, residency = key.split(" ")
            kept, working = map(int, sizes)
            yield (name, int(hidden), Residency(residency)), Footprint(kept, working, int(hidden))
        except (TypeError, ValueError, OverflowError):
            continue


def _is_likely(found: Footprint, traced: Footprint) -> bool:
    pairs = (found.kept, traced.kept), (found.kept + found.working, traced.kept + traced.working)
    return all(there <= _MOST_OFF * here and here <= _MOST_OFF * there for here, there in pairs)


def _larger(one: Footprint, other: Footprint) -> Footprint:
    return Footprint(max(one.kept, other.kept), max(one.working, other.working), one.hidden)
