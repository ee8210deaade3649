"""A tiny case on two stages of the CPU."""

from __future__ import annotations

import pytest
import torch

from tworeel.benchmarks.preparing import Prepared, Settings, prepare
from tworeel.benchmarks.shapes import Case, make_cases
from tworeel.benchmarks.widths import TINY

CPU = torch.device("cpu")


@pytest.fixture
def case() -> Case:
    (found,) = make_cases(TINY, tokens=[16], micro_batches=[3])
    return found


@pytest.fixture
def settings() -> Settings:
    return Settings(devices=(CPU, CPU), residency="recompute", rank=2, rounds=2)


@pytest.fixture
def prepared(case: Case, settings: Settings) -> Prepared:
    return prepare(case, settings, blocks=2)
