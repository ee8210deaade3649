from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from listening import Listener

from tworeel.benchmarks import baseline, run
from tworeel.benchmarks.baseline import Baselines
from tworeel.benchmarks.planned import Plans, request_of_case
from tworeel.benchmarks.preparing import Prepared, Settings, homes, prepare
from tworeel.benchmarks.results import Planned
from tworeel.benchmarks.run import Bench
from tworeel.benchmarks.shapes import Case
from tworeel.errors import UserError
from tworeel.planning.cards import known_cards, parse_cards
from tworeel.training.planned import budgets_of_cards
from tworeel.units import GIB

RATES = {"cpu": 1e9}


def test_a_case_is_measured_and_agrees_with_the_naive_run(case: Case, settings: Settings) -> None:
    result = Bench(RATES, Listener()).run(case, replace(settings, compare_naive=True, check=True, blocks=2))
    measured, naive = result.measured, result.naive
    assert measured and naive and naive.seconds_per_clip and measured.agreement
    assert measured.agreement.worst_cosine > 0.9999
    assert result.speedup == naive.seconds_per_clip / measured.seconds_per_clip
    assert len(measured.seconds_per_step) == settings.rounds
    assert len(measured.spans) == 2 * 2 * case.micro_batches
    assert 0 < measured.bubble < 1 and 0 < measured.ideal_share < 1.5
    assert measured.residency == "stage 0: 1 recompute; stage 1: 1 recompute"


def test_stages_that_share_a_cpu_leave_no_bubble_below_nothing(case: Case, settings: Settings) -> None:
    result = Bench(RATES, Listener()).run(case, replace(settings, stages_per_device=2))
    assert result.measured and 0 < result.measured.bubble < 1
    assert len(result.measured.busy) == 4


def test_what_is_compiled_is_kept_where_a_run_looks_for_it(
    prepared: Prepared, settings: Settings, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
    run.make_pipeline(prepared, replace(settings, compile=True))
    assert Path(os.environ["TORCHINDUCTOR_CACHE_DIR"]) == tmp_path / "cache" / "compiled"


def test_a_case_that_does_not_fit_is_told_and_the_next_one_runs(
    case: Case, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    make = run.make_pipeline

    def refuse(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(run, "make_pipeline", refuse)
    result = Bench(RATES, Listener()).run(case, replace(settings, compare_naive=True))
    assert result.measured is None and result.speedup is None
    assert result.naive and result.naive.seconds_per_clip
    assert result.as_json()["fits"] is False
    monkeypatch.setattr(run, "make_pipeline", make)
    assert Bench(RATES, Listener()).run(case, settings).measured


def test_a_naive_run_that_does_not_fit_leaves_the_pipeline_to_measure(
    case: Case, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(baseline, "device_hooks", refuse)
    result = Bench(RATES, Listener()).run(case, replace(settings, compare_naive=True, check=True))
    assert result.naive and result.naive.seconds_per_clip is None
    assert result.measured and result.measured.agreement is None


def test_what_the_engine_refuses_is_a_users_mistake(case: Case, settings: Settings) -> None:
    with pytest.raises(UserError, match="streamed"):
        Bench(RATES, Listener()).run(case, replace(settings, streamed=(1, 1, 1)))


def test_too_little_host_memory_for_streamed_weights_is_told(
    case: Case, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "host_limit", lambda *_: 1)
    with pytest.raises(UserError, match=r"--streamed: streamed=\[1, 1\]: these blocks' weights take"):
        Bench(RATES, Listener()).run(case, replace(settings, streamed=(1, 1)))


def test_interleaved_stages_are_compared_with_a_naive_run_of_a_part_a_device(
    case: Case, settings: Settings
) -> None:
    interleaved = replace(settings, stages_per_device=2, split_at=(1, 2, 3), compare_naive=True)
    assert Bench(RATES, Listener()).run(case, interleaved).speedup


class PlansOfCards(Plans):
    """Plans for two cards of the table, which stand for stages on the CPU."""

    cards = "2x RTX 4090"
    gib = 24.0

    def follow(self, case: Case, settings: Settings, blocks: int) -> tuple[Settings, Planned | None]:
        size = int(self.gib * GIB)
        budgets = [
            replace(budget, device="cpu", total=size, free=size)
            for budget in budgets_of_cards(parse_cards(self.cards, known_cards()))
        ]
        return self.follow_on(request_of_case(case, settings, blocks, budgets), settings)


@pytest.fixture
def planned(monkeypatch: pytest.MonkeyPatch) -> type[PlansOfCards]:
    monkeypatch.setattr(run, "Plans", PlansOfCards)
    return PlansOfCards


def prepared_at(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...] | None]:
    """The boundaries of each model that is made from now on."""
    found: list[tuple[int, ...] | None] = []

    def watched(case: Case, settings: Settings, blocks: int) -> Prepared:
        found.append(settings.split_at)
        return prepare(case, settings, blocks)

    for module in (baseline, run):
        monkeypatch.setattr(module, "prepare", watched)
    return found


def test_a_plan_is_followed_and_its_figures_stand_beside_the_measured_ones(
    planned: type[PlansOfCards], case: Case, settings: Settings
) -> None:
    result = Bench(RATES, Listener()).run(case, settings)
    assert result.measured and result.planned and result.planned.fits
    assert result.settings.split_at == result.planned.split_at
    at = result.planned.split_at[0]
    assert result.measured.residency == f"stage 0: {at} recompute; stage 1: {4 - at} recompute"
    found = json.loads(json.dumps(result.as_json(), default=str))
    assert found["settings"]["split_at"] == found["planned"]["split_at"] == [at]
    assert found["planned"]["seconds_per_clip"] > 0 and found["planned"]["peaks"]["cpu"] > 0


def test_given_boundaries_are_run_and_planned_with(
    planned: type[PlansOfCards], case: Case, settings: Settings
) -> None:
    result = Bench(RATES, Listener()).run(case, replace(settings, split_at=(3,), compare_naive=True))
    assert result.measured and result.measured.residency == "stage 0: 3 recompute; stage 1: 1 recompute"
    assert result.planned and result.planned.split_at == (3,) and result.naive and result.speedup


def test_a_plan_that_streams_nothing_gives_the_naive_run_the_same_weights_in_the_same_places(
    planned: type[PlansOfCards], case: Case, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = prepared_at(monkeypatch)
    compared = replace(settings, compare_naive=True, check=True)
    result = Bench(RATES, Listener()).run(case, compared)
    assert result.planned and made == [result.planned.split_at]
    assert result.measured and result.measured.agreement
    assert result.measured.agreement.worst_cosine > 0.9999


def test_a_plan_that_streams_leaves_the_naive_run_even_shares(
    planned: type[PlansOfCards], case: Case, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(planned, "gib", 0.67)
    made = prepared_at(monkeypatch)
    compared = replace(settings, blocks=12, residency="auto", compare_naive=True)
    result = Bench(RATES, Listener()).run(case, compared)
    assert result.settings.streamed and any(result.settings.streamed) and result.speedup
    assert made == [None, result.settings.split_at]
    made.clear()
    # Gradients are compared only between weights that were drawn in the same places.
    result = Bench(RATES, Listener()).run(case, replace(compared, check=True))
    assert made == [result.settings.split_at] * 2
    assert result.measured and result.measured.agreement
    assert result.measured.agreement.worst_cosine > 0.9999


def test_a_naive_run_that_does_not_fit_the_plans_shares_has_even_ones(
    case: Case, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    def short(case: Case, settings: Settings, blocks: int) -> Prepared:
        if settings.split_at:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return prepare(case, settings, blocks)

    monkeypatch.setattr(baseline, "prepare", short)
    said, shared = Listener(), replace(settings, split_at=(3,))
    found = Baselines(said).run(case, shared, 4, may_be_even=True)
    assert found.naive.seconds_per_clip and found.prepared is None
    assert said.lines[0] == "  the baseline does not fit the plan's shares: it has even ones"
    given = Baselines(Listener()).run(case, shared, 4, may_be_even=False)
    assert given.naive.seconds_per_clip is None


def test_cases_that_differ_in_micro_batches_share_a_naive_run_at_whatever_boundaries(
    case: Case, settings: Settings
) -> None:
    said = Listener()
    baselines = Baselines(said)
    first = baselines.run(case, replace(settings, split_at=(1,)), 4, may_be_even=True)
    more = replace(case, micro_batches=5)
    second = baselines.run(more, replace(settings, split_at=(3,)), 4, may_be_even=True)
    assert second.naive == first.naive and len(said.lines) == 1


def test_gradients_of_weights_in_other_places_are_not_compared(
    case: Case, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    places = iter([torch.device("cuda:0"), torch.device("cuda:1")])
    monkeypatch.setattr(baseline, "homes", lambda *_: [next(places)])
    said = Listener()
    found = Baselines(said).run(case, replace(settings, check=True), 4, may_be_even=True)
    assert found.naive.seconds_per_clip and found.gradients is None
    assert said.lines[0] == "  gradients are not compared: the baseline has its blocks in other places"


def test_interleaved_stages_have_their_blocks_in_other_places_than_a_part_a_device(
    case: Case, settings: Settings
) -> None:
    pair = replace(settings, devices=(torch.device("cuda:0"), torch.device("cuda:1")))
    first, second = (homes(case, replace(pair, stages_per_device=count), 4) for count in (1, 2))
    assert len(first) == len(second) and first != second


def test_blocks_can_wait_in_host_memory(case: Case, settings: Settings) -> None:
    result = Bench(RATES, Listener()).run(case, replace(settings, streamed=(1, 1), slack=0))
    assert result.measured
