"""A run follows its plan, and says what came of it. The cards are those of the table: no GPU is needed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_runs import tiny_config, tiny_model

from tworeel.config.schema import RunConfig
from tworeel.demo.clips import write_clips
from tworeel.planning.budgets import Budget
from tworeel.planning.cards import GIB, known_cards, parse_cards
from tworeel.planning.measurements import FOLDER_VARIABLE
from tworeel.training import planned
from tworeel.training.assembly import load_model, split_model
from tworeel.training.choices import settled
from tworeel.training.loadable import place_again
from tworeel.training.planned import budgets_of_cards, make_request, plan_job, plan_on
from tworeel.training.preflight import Job, preflight
from tworeel.training.report import SilentRun, StepReport


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[object, Job]:
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path / "home"))
    write_clips(tmp_path / "clips", 3)
    config = tiny_config(tiny_model(tmp_path / "model"), tmp_path / "clips", tmp_path / "run")
    return config, preflight(config, SilentRun())


def report(step: int, seconds: float) -> StepReport:
    return StepReport(
        step=step,
        loss=1.0,
        grad_norm=1.0,
        learning_rate=1e-4,
        seconds=seconds,
        memory={"cuda:0": 3 * GIB, "cuda:1": 2 * GIB},
        busy=(0.5, 0.5),
    )


def pair(first: str = "RTX 4090", second: str = "RTX 3060 12GB"):
    return budgets_of_cards(parse_cards(f"{first}, {second}", known_cards()))


def test_a_request_has_what_the_configuration_says(job) -> None:
    config, found = job
    request = make_request(config, found, pair())
    assert request.trace.rank == 2 and request.trace.targets == found.targets
    assert request.micro_batches == 2 and request.steps == 4
    assert sum(request.buckets.values()) == len(found.clips) == request.clips_per_epoch
    assert not request.may_reorder  # the configuration names the devices


def test_blocks_go_where_the_plan_says(job) -> None:
    config, found = job
    _, placed, run = plan_on(config, found, pair())
    assert placed.placement.boundaries[1:-1] == run.plan.split_at
    assert [str(device) for device in placed.placement.devices] == ["cuda:0", "cuda:1"]


def test_weights_that_the_plan_streams_wait_in_host_memory_from_the_start(job) -> None:
    config, found = job
    _, placed, run = plan_on(config, found, [replace(budget, free=320 * 2**20) for budget in pair()])
    assert run.plan.num_streamed > 0
    assert placed.streamed_counts == tuple(stage.streamed for stage in run.plan.stages)


def test_what_is_planned_to_be_streamed_is_and_more_may_be(job) -> None:
    config, found = job
    placed = place_again(found, [torch.device("cpu")] * 2, [2], [1, 0])
    model = load_model(config, placed)
    division = split_model(config, placed, model)
    assert [len(division.streamed_on(stage)) for stage in (0, 1)] == [1, 0] and division.may_stream


def left_open(config: RunConfig) -> RunConfig:
    """With precision and stages for the plan to decide."""
    model = config.model.model_copy(update={"quantize": "auto", "dtype": "bfloat16"})
    engine = config.engine.model_copy(update={"stages_per_device": "auto"})
    return config.model_copy(update={"model": model, "engine": engine})


@pytest.mark.parametrize(
    ("first", "second", "kind"),
    [
        ("RTX 4090", "RTX 5090", "fp8"),
        ("RTX 3090", "RTX 4090", "int8"),
        ("Radeon RX 7900 XTX", "Radeon RX 7900 XTX", "fp8"),
    ],
)
def test_the_eight_bits_that_may_be_chosen_are_those_that_all_cards_multiply(
    job, first: str, second: str, kind: str
) -> None:
    config, found = job
    (other,) = make_request(left_open(config), found, pair(first, second)).less_precise
    assert other.trace.quantize == kind
    assert make_request(config, found, pair(first, second)).less_precise == ()


def test_a_run_has_nothing_open_once_it_is_planned(job) -> None:
    config, found = job
    decided, placed, run = plan_on(left_open(config), found, pair("RTX 4090", "RTX 4090"))
    assert decided.model.quantize is None and run.planner.request.trace.quantize is None
    assert decided.engine.stages_per_device == run.plan.stages_per_device
    assert len(placed.placement.devices) == 2 * run.plan.stages_per_device


def test_in_a_long_run_several_cards_are_launched_from_cpp_where_that_is_left_open(job) -> None:
    config, found = job
    _, placed, run = plan_on(config, found, pair())
    assert not placed.cpp_wrapper, "a minute more at the first step is not worth it"
    config = config.model_copy(update={"train": config.train.model_copy(update={"steps": 1_000_000})})
    decided, placed, run = plan_on(left_open(config), found, pair())
    assert placed.cpp_wrapper and run.plan.cpp_wrapper
    assert decided.engine.cpp_wrapper == "auto", "a resumed run, or one on another machine, decides anew"
    engine = config.engine.model_copy(update={"cpp_wrapper": False})
    _, placed, run = plan_on(config.model_copy(update={"engine": engine}), found, pair())
    assert not placed.cpp_wrapper and not run.plan.cpp_wrapper


@pytest.mark.parametrize("change", [{"compile": False}, {"cpp_wrapper": False}])
def test_what_is_not_compiled_or_not_wanted_is_not_launched_from_cpp(job, change: dict[str, bool]) -> None:
    config, found = job
    config = config.model_copy(update={"engine": config.engine.model_copy(update=change)})
    assert not make_request(config, found, pair()).may_launch_from_cpp


def test_kernels_that_were_not_tried_so_are_launched_from_python(job) -> None:
    config, found = job
    for kind, may in (("fp8", True), ("int8", False), ("nf4", False)):
        model = config.model.model_copy(update={"quantize": kind})
        request = make_request(config.model_copy(update={"model": model}), found, pair())
        assert request.may_launch_from_cpp is may
    (int8,) = make_request(left_open(config), found, pair("RTX 3090", "RTX 4090")).less_precise
    assert not int8.may_launch_from_cpp


def test_where_there_is_no_compiler_blocks_are_launched_from_python(job) -> None:
    config, found = job
    assert not make_request(config, found, pair(), may_launch_from_cpp=False).may_launch_from_cpp


def test_a_card_is_timed_once_for_all_that_is_weighed(job, monkeypatch: pytest.MonkeyPatch) -> None:
    config, found = job
    timed: list[str] = []

    def measured(budget: Budget) -> Budget:
        timed.append(budget.device)
        return replace(budget, measured=True)

    monkeypatch.setattr(planned, "budgets_of_devices", lambda _: pair())
    monkeypatch.setattr(planned, "measured", measured)
    on_gpus = place_again(found, [torch.device("cuda:0"), torch.device("cuda:1")], [2], [0, 0])
    _, _, run = plan_job(left_open(config), on_gpus, print)
    assert timed == ["cuda:0", "cuda:1"] and run is not None and run.plan.calibrated


def test_on_a_cpu_there_is_nothing_to_plan(job) -> None:
    config, found = job
    assert plan_job(config, found, print) == (settled(config), found, None)


def test_a_run_goes_on_where_no_plan_can_be_made(job, monkeypatch: pytest.MonkeyPatch) -> None:
    config, found = job
    on_gpus = place_again(found, [torch.device("cuda:0"), torch.device("cuda:1")], [2], [0, 0])

    def refuse(*_: object) -> None:
        raise RuntimeError("tracing has changed")

    monkeypatch.setattr(planned, "budgets_of_devices", refuse)
    said: list[str] = []
    assert plan_job(config, on_gpus, said.append) == (settled(config), on_gpus, None)
    assert said == ["no plan could be made (RuntimeError: tracing has changed); the blocks are shared evenly"]


def test_after_the_first_steps_the_plan_is_held_against_what_was_measured(job) -> None:
    config, found = job
    _, _, run = plan_on(config, found, pair())
    told = [run.heard(report(step, 2.0 if step > 2 else 60.0)) for step in range(1, 8)]
    assert [line is not None for line in told] == [False] * 4 + [True] + [False] * 2
    assert told[4] is not None and told[4].startswith("A clip takes 1.00 s (planned ")
    assert "cuda:0 3.0 GiB (planned 0.3)" in told[4]


def test_where_the_host_limits_nothing_is_learnt_of_the_cards(job) -> None:
    config, found = job
    _, _, run = plan_on(config, found, pair())
    assert run.plan.host_bound
    for step in range(1, 6):
        run.heard(report(step, 1.0))
    _, _, again = plan_on(config, found, pair())
    assert not again.plan.calibrated


def test_the_next_plan_rests_on_what_was_measured(job) -> None:
    config, found = job
    _, _, run = plan_on(config, found, pair())
    run.plan = replace(run.plan, host_bound=False)  # so tiny a model waits for the host
    once = run.plan.stages[0].forward + run.plan.stages[0].backward
    # Each stage works for half of a step of two clips: three times what was planned for the first one.
    for step in range(1, 6):
        run.heard(report(step, 2 * 2 * 3 * once))
    _, _, again = plan_on(config, found, pair())
    assert again.plan.calibrated and not run.plan.calibrated
    first = again.plan.stages[0]
    assert (first.forward + first.backward) / first.num_blocks == pytest.approx(
        3 * once / run.plan.stages[0].num_blocks, rel=0.01
    )
