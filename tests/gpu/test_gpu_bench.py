"""`tworeel bench` follows a plan where there are GPUs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from listening import Listener

from tworeel.benchmarks.models import mean_square
from tworeel.benchmarks.planned import request_of_case
from tworeel.benchmarks.preparing import Settings, prepare
from tworeel.benchmarks.run import Bench, make_pipeline
from tworeel.benchmarks.shapes import make_cases, model_shape
from tworeel.planning.devices import budgets_of_devices
from tworeel.planning.measured_bytes import keep_bytes, known_bytes
from tworeel.planning.measurements import FOLDER_VARIABLE
from tworeel.planning.planner import Planner
from tworeel.units import GIB

pytestmark = pytest.mark.gpu


def test_a_case_runs_with_the_boundaries_of_its_plan_and_takes_what_was_planned(gpu: torch.device) -> None:
    (case,) = make_cases(model_shape("wan-1.3b"), tokens=[1024], micro_batches=[4])
    said, settings = Listener(), Settings(devices=(gpu, gpu), blocks=6, compare_naive=True)
    result = Bench({str(gpu): 1e14}, said).run(case, settings)
    assert result.planned, said.lines
    assert result.planned.fits and result.settings.split_at == result.planned.split_at
    assert result.measured and result.speedup
    assert abs(result.peaks[str(gpu)].allocated - result.planned.peaks[str(gpu)]) < GIB


@pytest.mark.parametrize("compile_blocks", [False, True], ids=["eager", "compiled"])
def test_a_plan_rests_on_what_a_step_has_found_blocks_to_take(
    gpu: torch.device, compile_blocks: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path / "home"))
    (case,) = make_cases(model_shape("wan-1.3b"), tokens=[1024], micro_batches=[4])
    settings = Settings(devices=(gpu, gpu), blocks=6, compile=compile_blocks)
    request = request_of_case(case, settings, 6, budgets_of_devices(settings.devices))
    prepared = prepare(case, settings, 6)
    pipeline = make_pipeline(prepared, settings)
    pipeline.step(prepared.batches, lambda output, _: mean_square(output))

    keep_bytes(request, list(zip(request.budgets, pipeline.split.footprints, strict=True)))
    traced = Planner(request)
    planner = Planner(replace(request, measured=known_bytes(request)), like=traced)
    plan, before = planner.best(), traced.best()
    assert plan.measured_bytes and not before.measured_bytes
    assert abs(plan.peaks[str(gpu)] - before.peaks[str(gpu)]) < 0.05 * before.peaks[str(gpu)]
