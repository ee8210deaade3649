"""`tworeel bench` follows a plan where there are GPUs."""

from __future__ import annotations

import pytest
import torch
from listening import Listener

from tworeel.benchmarks.preparing import Settings
from tworeel.benchmarks.run import Bench
from tworeel.benchmarks.shapes import make_cases, model_shape
from tworeel.planning.cards import GIB

pytestmark = pytest.mark.gpu


def test_a_case_runs_with_the_boundaries_of_its_plan_and_takes_what_was_planned(gpu: torch.device) -> None:
    (case,) = make_cases(model_shape("wan-1.3b"), tokens=[1024], micro_batches=[4])
    said, settings = Listener(), Settings(devices=(gpu, gpu), blocks=6, compare_naive=True)
    result = Bench({str(gpu): 1e14}, said).run(case, settings)
    assert result.planned, said.lines
    assert result.planned.fits and result.settings.split_at == result.planned.split_at
    assert result.measured and result.speedup
    assert abs(result.peaks[str(gpu)].allocated - result.planned.peaks[str(gpu)]) < GIB
