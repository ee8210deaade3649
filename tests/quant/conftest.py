"""Every test draws the same numbers; the tiny models can be imported."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))  # for quantized_wan


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
