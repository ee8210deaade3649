"""`tworeel train` that runs out of memory in the middle of a step, on the CPU.

    python short_of_memory.py FORWARDS GIB train config.toml

The plan is that of two cards of the table. After so many forwards one of the pipeline's threads gets the
error that a GPU gives; then there are so many GiB for the run.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from threading import Lock
from typing import Any

import torch

from tworeel.cli.app import main
from tworeel.config.schema import RunConfig
from tworeel.planning.cards import Card, known_cards, parse_cards
from tworeel.training import run, shortage
from tworeel.training.planned import PlannedRun, budgets_of_cards, plan_on
from tworeel.training.preflight import Job
from tworeel.units import GIB

ERROR = (
    "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 23.64 GiB of which "
    "1.06 GiB is free. Process 4711 has 20.00 GiB memory in use."
)
run_transformer = run.run_transformer


def plan_for_cards(
    config: RunConfig, job: Job, _say: Callable[[str], None], _cards: Sequence[Card]
) -> tuple[RunConfig, Job, PlannedRun]:
    """The blocks stay where they are."""
    cards = budgets_of_cards(parse_cards("2x RTX 4090", known_cards()))
    decided, _, planned = plan_on(config, job, [replace(card, device="cpu") for card in cards])
    return decided, job, planned


class FallsShort:
    """Runs the transformer so often."""

    def __init__(self, forwards: int) -> None:
        self._left = forwards
        self._lock = Lock()

    def __call__(self, *args: Any) -> Any:
        with self._lock:
            self._left -= 1
            if self._left < 0:
                raise torch.OutOfMemoryError(ERROR)
        return run_transformer(*args)


if __name__ == "__main__":
    forwards, gib = int(sys.argv.pop(1)), float(sys.argv.pop(1))
    run.plan_job = plan_for_cards
    run.run_transformer = FallsShort(forwards)
    shortage.room = lambda _devices: {"cpu": int(gib * GIB)}
    main()
