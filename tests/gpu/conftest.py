"""Every test here needs an accelerator, some need two; where there is none they are skipped."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tworeel.engine.attention import before_first_product

for room in ("benchmarks", "engine", "planning", "training"):
    sys.path.append(str(Path(__file__).parents[1] / room))  # for listening, toy_wan, real_models, tiny_runs

before_first_product("deterministic")
PLACES = ("one twice", "one and the CPU", "two")


@pytest.fixture(autouse=True)
def accelerator() -> Iterator[None]:
    """Skip without one, and leave nothing on it."""
    if not torch.accelerator.is_available():
        pytest.skip("no accelerator on this machine")
    yield
    gc.collect()
    torch.accelerator.empty_cache()


@pytest.fixture
def gpu(accelerator: None) -> torch.device:
    """The first accelerator."""
    return accelerators()[0]


@pytest.fixture
def two_gpus(accelerator: None) -> list[torch.device]:
    """The first two."""
    if len(accelerators()) < 2:
        pytest.skip("needs two accelerators, there is one")
    return accelerators()[:2]


@pytest.fixture(params=PLACES)
def devices(request: pytest.FixtureRequest, gpu: torch.device) -> list[torch.device]:
    """Devices of two stages: one GPU twice, one GPU and the CPU, two GPUs."""
    if request.param == "two":
        pair: list[torch.device] = request.getfixturevalue("two_gpus")
        return pair
    return [gpu, gpu if request.param == "one twice" else torch.device("cpu")]


@pytest.fixture
def cuda(gpu: torch.device) -> torch.device:
    """The first GPU, if it is CUDA's (or ROCm's under that name)."""
    if gpu.type != "cuda":
        pytest.skip("only CUDA can limit and pin memory in the way that is tested")
    return gpu


def accelerators() -> list[torch.device]:
    """All that there are."""
    kind = torch.accelerator.current_accelerator()
    assert kind is not None
    return [torch.device(kind.type, i) for i in range(torch.accelerator.device_count())]
