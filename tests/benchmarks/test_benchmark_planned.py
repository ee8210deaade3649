"""A case is planned as a run is. The cards are those of the table: no GPU is needed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from listening import Listener
from torch import Tensor

from tworeel.benchmarks import models, planned
from tworeel.benchmarks.planned import Planners, Plans, bucket_of, request_of_case
from tworeel.benchmarks.preparing import Settings
from tworeel.benchmarks.results import Planned
from tworeel.benchmarks.shapes import Case, make_cases, model_shape
from tworeel.benchmarks.widths import FLUX2_DEV, MODELS, TEXT_TOKENS, TINY, WAN_14B, ModelShape
from tworeel.data.buckets import tokens
from tworeel.engine.residency import Residency
from tworeel.planning import measuring, planner
from tworeel.planning.budgets import Budget
from tworeel.planning.cards import known_cards, parse_cards
from tworeel.planning.measurements import FOLDER_VARIABLE, keep
from tworeel.training.planned import budgets_of_cards
from tworeel.units import GIB

PAIR = (torch.device("cuda:0"), torch.device("cuda:1"))
SETTINGS = Settings(devices=PAIR)
BLOCKS = 12


def case_of(model: ModelShape = WAN_14B, shape: str = "image-1024", micro_batches: int = 8) -> Case:
    (found,) = make_cases(model, shapes=[shape], micro_batches=[micro_batches])
    return found


def cards(gpus: str, gib: float | None = None) -> tuple[Budget, ...]:
    found = budgets_of_cards(parse_cards(gpus, known_cards()))
    if gib is None:
        return found
    return tuple(replace(budget, total=int(gib * GIB), free=int(gib * GIB)) for budget in found)


def plan(
    case: Case, settings: Settings, budgets: Sequence[Budget], said: Listener | None = None
) -> tuple[Settings, Planned]:
    plans = Plans(said or Listener())
    return plans.follow_on(request_of_case(case, settings, BLOCKS, budgets), settings)


def test_a_slower_card_gets_fewer_blocks() -> None:
    settings, found = plan(case_of(), SETTINGS, cards("RTX 4090, RTX 3060 12GB"))
    assert settings == replace(SETTINGS, split_at=found.split_at)
    assert BLOCKS / 2 < found.split_at[0] < BLOCKS
    assert found.fits and found.devices == ("cuda:0", "cuda:1") and found.seconds_per_clip > 0


def test_cards_whose_order_is_free_get_the_better_one() -> None:
    free = replace(SETTINGS, may_reorder=True)
    budgets = cards("RTX 3060 12GB, RTX 4090")
    case = case_of(shape="480x832x49")
    (kept, as_given), (settings, found) = (plan(case, one, budgets) for one in (SETTINGS, free))
    assert kept.devices == PAIR and tuple(map(str, settings.devices)) == found.devices
    assert found.seconds_per_clip <= as_given.seconds_per_clip


def test_weights_wait_in_host_memory_from_the_start_where_a_limit_needs_that() -> None:
    settings, found = plan(case_of(), SETTINGS, cards("2x RTX 4090", 4))
    assert settings.streamed == found.streamed and min(found.streamed) > 0
    assert settings.may_stream  # more, if it turns out to be needed
    assert found.host_memory > 0 and max(found.peaks.values()) < 4 * GIB


def test_what_is_given_is_kept() -> None:
    given = replace(SETTINGS, split_at=(2,), streamed=(1, 3))
    settings, found = plan(case_of(), given, cards("2x RTX 4090"))
    assert settings == given and (found.split_at, found.streamed) == ((2,), (1, 3))


def test_each_device_gets_as_many_stages_as_are_asked_for() -> None:
    twice = replace(SETTINGS, stages_per_device=2)
    settings, found = plan(case_of(), twice, cards("2x RTX 4090"))
    assert settings.devices == PAIR and found.devices == ("cuda:0", "cuda:1") * 2
    assert len(settings.split_at or ()) == 3 and set(found.peaks) == {"cuda:0", "cuda:1"}


def test_two_stages_a_device_peak_where_two_h200s_did() -> None:
    """As docs/benchmarks.md has it: 84.1 and 68.8 GiB."""
    (case,) = make_cases(WAN_14B, shapes=("832x480x49",), micro_batches=[4])
    twice = Settings(devices=PAIR, stages_per_device=2, split_at=(3, 8, 13), residency="keep", compile=True)
    found = Planners().planner(request_of_case(case, twice, 16, cards("2x H200")))
    peaks = planned.figures_of(found, found.best()).peaks
    assert list(peaks.values()) == [pytest.approx(peak * GIB, rel=0.025) for peak in (84.1, 68.8)]


def test_peaks_are_those_of_steps_without_an_optimizer() -> None:
    request = request_of_case(case_of(), SETTINGS, BLOCKS, cards("2x RTX 4090"))
    found = Planners().planner(request)
    best = found.best()
    optimizer = sum(best.peaks.values()) - sum(planned.figures_of(found, best).peaks.values())
    lora = sum(stage.parts["LoRA, gradients, optimizer"] for stage in best.stages)
    assert optimizer == pytest.approx(lora / 2, rel=1e-6)


def test_a_plan_that_does_not_fit_is_told_and_leaves_the_rest_to_the_engine() -> None:
    said = Listener()
    request = request_of_case(case_of(shape="480x832x49"), SETTINGS, BLOCKS, cards("2x RTX 4090", 2))
    settings, found = Plans(said).follow_on(replace(request, host_free=GIB), SETTINGS)
    assert not found.fits and found.host_memory > GIB
    assert settings.streamed is None and settings.may_stream is None
    (line,) = said.lines
    assert line.startswith("  the plan does not fit, and is tried all the same: ")


@pytest.mark.parametrize(
    ("model", "shape", "compile"),
    [
        (WAN_14B, "image-1024", True),
        (WAN_14B, "480x832x49", False),
        (MODELS["wan-5b"], "832x480x17", False),
        (FLUX2_DEV, "512x512", False),
    ],
)
def test_images_and_clips_are_planned_with_their_tokens(model: ModelShape, shape: str, compile: bool) -> None:
    case = case_of(model, shape)
    settings = replace(SETTINGS, compile=compile)
    found = Planners().planner(request_of_case(case, settings, 4, cards("2x H200")))
    assert found.best().tokens == case.tokens
    hidden = {block.footprints[Residency.KEEP].hidden for block in found.trace.blocks.values()}
    text = TEXT_TOKENS if model.family == "flux2" else 0
    assert hidden == {2 * (case.tokens + text) * model.dim}


@pytest.mark.parametrize("name", list(MODELS))
def test_every_case_has_a_bucket_of_its_tokens(name: str) -> None:
    model = model_shape(name)
    traits = models.source_of(model).traits
    for case in make_cases(model, shapes=["standard"], tokens=[2, 64, 1000]):
        assert tokens(bucket_of(case), traits) == case.tokens


@pytest.mark.parametrize("name", list(MODELS))
def test_what_is_traced_has_the_shapes_of_what_is_run(name: str) -> None:
    (case,) = make_cases(model_shape(name), tokens=[64], micro_batches=[1])
    request = request_of_case(case, SETTINGS, case.model.blocks, cards("2x H200"))
    (bucket,) = request.buckets
    shapes = request.family.cached_shapes(request.source, bucket.frames, bucket.height, bucket.width)
    cached = {key: torch.empty(shape) for key, shape in shapes.items()}
    sample = request.family.make_sample(
        request.source.traits,
        cached,
        torch.empty(shapes["latents"]),
        0.5,
        dtype=request.trace.dtype,
        condition_on_image=request.trace.condition_on_image,
    )
    (batch,) = models.make_batches(case, request.trace.dtype, torch.device("cpu"))
    assert described(sample.inputs) == described(batch)


def described(inputs: dict[str, Any]) -> dict[str, Any]:
    return {
        name: (value.shape, value.dtype) if isinstance(value, Tensor) else value
        for name, value in inputs.items()
    }


def test_a_clip_is_traced_once_for_all_its_cases(monkeypatch: pytest.MonkeyPatch) -> None:
    trace, traced = planner.trace_model, []

    def watched(*args: Any, **launching: bool) -> Any:
        traced.append(args)
        return trace(*args, **launching)

    monkeypatch.setattr(planner, "trace_model", watched)
    planners = Planners()
    for gib, micro_batches in ((24, 8), (12, 8), (24, 4)):
        case = case_of(TINY, "64x64x5", micro_batches)
        request = request_of_case(case, SETTINGS, 4, cards("2x RTX 4090", gib))
        assert planners.planner(request).best().tokens == case.tokens
    assert len(traced) == 1


def test_what_runs_have_measured_on_a_card_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path))
    monkeypatch.setattr(measuring, "launching", lambda device: 1.5)
    monkeypatch.setattr(measuring, "link_rate", lambda device: 2e10)
    request = request_of_case(case_of(), SETTINGS, BLOCKS, cards("RTX 4090, RTX 3060 12GB"))
    for budget, slowdown in zip(request.budgets, (1.5, 2.0), strict=True):
        keep(budget.card, request.trace, slowdown)
    found = Plans(Listener())._as_fast(request)
    assert [(budget.measured, budget.slowdown) for budget in found.budgets] == [(True, 1.5), (True, 2.0)]
    assert [budget.launching for budget in found.budgets] == [1.5, 1.5]
    assert [budget.rates.host for budget in found.budgets] == [2e10, 2e10]


def test_on_cpus_there_is_no_plan(case: Case, settings: Settings) -> None:
    said = Listener()
    assert Plans(said).follow(case, settings, 4) == (settings, None) and said.lines == []


def test_a_case_without_a_plan_is_told_and_stays_as_it_is(case: Case) -> None:
    said = Listener()
    nowhere = replace(SETTINGS, devices=(torch.device("xpu:7"),) * 2)
    given = replace(nowhere, split_at=(3,))
    assert [Plans(said).follow(case, one, 4) for one in (nowhere, given)] == [(nowhere, None), (given, None)]
    first, second = said.lines
    assert first.startswith("  no plan could be made (") and first.endswith("; even shares of the blocks")
    assert second.endswith("; the boundaries are kept")
