"""What runs have measured on a card, kept for later plans: how much longer work took than was planned.

Bytes of blocks are kept beside it: `measured_bytes`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock

from tworeel import __version__
from tworeel.files import write_text_atomic
from tworeel.planning.budgets import Budget
from tworeel.planning.traces import TraceSettings

FOLDER_VARIABLE = "TWOREEL_HOME"
_NAME = "speeds.json"
_LAUNCHING = " | launching"
_LEAST, _MOST = 0.2, 20.0
"""Factors beyond these are another program on the card, not the card."""


def measurements_folder() -> Path:
    """Where measurements are kept: $TWOREEL_HOME, or `.cache/tworeel` in the user's folder."""
    given = os.environ.get(FOLDER_VARIABLE)
    return Path(given) if given else Path.home() / ".cache" / "tworeel"


def calibrated(budget: Budget, settings: TraceSettings) -> Budget:
    """The device with what runs like this one took on its card, and for it the host, if any has been."""
    known, key = read(_NAME), key_of(budget.card, settings)
    launching = _factor(known.get(key + _LAUNCHING))
    if launching is not None:
        budget = replace(budget, launching=launching)
    factor = _factor(known.get(key))
    if factor is None:
        return budget
    return replace(budget, rates=budget.rates.slowed(factor), measured=True, slowdown=factor)


def _factor(found: Any) -> float | None:
    is_one = isinstance(found, int | float) and _LEAST <= found <= _MOST
    return float(found) if is_one else None


def keep(card: str, settings: TraceSettings, slowdown: float) -> None:
    """Keep how much longer than by its figures a card worked."""
    update(_NAME, lambda known: {**known, key_of(card, settings): round(slowdown, 4)})


def keep_launching(card: str, settings: TraceSettings, launching: float) -> None:
    """Keep how much longer than by the figures the host took to launch for a card."""
    key = key_of(card, settings) + _LAUNCHING
    update(_NAME, lambda known: {**known, key: round(launching, 4)})


def update(name: str, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """Replace what a file of the folder holds by what `change` makes of it.

    Nothing is kept where the folder cannot be written: a plan is a help, and no reason to stop a run.
    """
    try:
        folder = measurements_folder()
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / f"{name}.lock"):
            known = change(read(name))
            write_text_atomic(folder / name, json.dumps(known, indent=1, sort_keys=True) + "\n")
    except (OSError, RuntimeError):  # or there is no home
        return


def read(name: str) -> dict[str, Any]:
    """What a file of the folder holds; nothing where it is not there, or damaged."""
    try:
        found = json.loads((measurements_folder() / name).read_text(encoding="utf-8"))
    except (OSError, ValueError, RuntimeError):  # nested too deeply, or there is no home
        return {}
    return found if isinstance(found, dict) else {}


def key_of(card: str, settings: TraceSettings) -> str:
    """Card, versions, precision, and whether blocks are compiled."""
    precision = settings.quantize or str(settings.dtype).removeprefix("torch.")
    kind = "compiled" if settings.compile else "eager"
    if settings.compile and not settings.exact:
        kind += ", not exact"
    return " | ".join((card, f"torch {torch.__version__}", f"tworeel {__version__}", precision, kind))
