"""A run follows its plan, and says what came of it. The cards are those of the table: no GPU is needed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_runs import tiny_config, tiny_model

from tworeel.config.schema import RunConfig
from tworeel.data.clips import Bucket
from tworeel.demo.clips import write_clips
from tworeel.engine import Split
from tworeel.engine.compiling import BlockCompiler
from tworeel.engine.footprints import Footprint
from tworeel.engine.residency import Residency
from tworeel.errors import UserError
from tworeel.planning import measuring
from tworeel.planning.budgets import Budget
from tworeel.planning.cards import known_cards, parse_cards
from tworeel.planning.measurements import FOLDER_VARIABLE
from tworeel.training import planned
from tworeel.training.assembly import load_model, split_model
from tworeel.training.choices import settled
from tworeel.training.loadable import place_again, place_blocks
from tworeel.training.planned import PlannedRun, budgets_of_cards, make_request, plan_job, plan_on
from tworeel.training.preflight import Job, preflight
from tworeel.training.report import SilentRun, StepReport
from tworeel.units import GIB


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[object, Job]:
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path / "home"))
    write_clips(tmp_path / "clips", 3)
    config = tiny_config(tiny_model(tmp_path / "model"), tmp_path / "clips", tmp_path / "run")
    return config, preflight(config, SilentRun())


IMAGE = Bucket(frames=1, height=64, width=64)
ONE_OF_EACH = (Bucket(5, 48, 80), Bucket(5, 80, 48), Bucket(5, 64, 64), IMAGE)
"""Buckets of the job's clips."""


def report(step: int, seconds: float) -> StepReport:
    return StepReport(
        step=step,
        loss=1.0,
        grad_norm=1.0,
        learning_rate=1e-4,
        seconds=seconds,
        memory={"cuda:0": 3 * GIB, "cuda:1": 2 * GIB},
        busy=(0.5, 0.5),
        buckets=ONE_OF_EACH,
    )


CUDA = [torch.device("cuda:0"), torch.device("cuda:1")]


def on_gpus(job: Job) -> Job:
    """The job with an even share of its blocks on each of two GPUs."""
    return place_again(job, CUDA, [2], [0, 0])


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
    for kind, may in (("fp8", True), ("int8", True), ("nf4", False)):
        model = config.model.model_copy(update={"quantize": kind})
        request = make_request(config.model_copy(update={"model": model}), found, pair())
        assert request.may_launch_from_cpp is may
    (int8,) = make_request(left_open(config), found, pair("RTX 3090", "RTX 4090")).less_precise
    assert int8.may_launch_from_cpp


def test_where_there_is_no_compiler_blocks_are_launched_from_python(job) -> None:
    config, found = job
    assert not make_request(config, found, pair(), may_launch_from_cpp=False).may_launch_from_cpp


def test_a_card_is_timed_once_for_all_that_is_weighed(job, monkeypatch: pytest.MonkeyPatch) -> None:
    config, found = job
    timed: list[str] = []

    def measured(budget: Budget) -> Budget:
        timed.append(budget.device)
        return replace(budget, measured=True)

    monkeypatch.setattr(planned, "budgets_of_devices", lambda *_: pair())
    monkeypatch.setattr(measuring, "measured", measured)
    monkeypatch.setattr(measuring, "launching", lambda device: 1.0)
    monkeypatch.setattr(measuring, "link_rate", lambda device: 2e10)
    _, _, run = plan_job(left_open(config), on_gpus(found), print)
    assert timed == ["cuda:0", "cuda:1"] and run is not None and run.plan.calibrated


def test_on_a_cpu_there_is_nothing_to_plan(job) -> None:
    config, found = job
    assert plan_job(config, found, print) == (settled(config), found, None)


def refuse(*_: object) -> None:
    raise RuntimeError("tracing has changed")


def test_a_run_goes_on_where_no_plan_can_be_made(job, monkeypatch: pytest.MonkeyPatch) -> None:
    config, found = job
    monkeypatch.setattr(planned, "budgets_of_devices", refuse)
    said: list[str] = []
    assert plan_job(config, on_gpus(found), said.append) == (settled(config), on_gpus(found), None)
    decided, _, run = plan_job(left_open(config), on_gpus(found), said.append)
    assert decided == settled(left_open(config)) and run is None
    why = "no plan could be made (RuntimeError: tracing has changed); the blocks are shared evenly"
    auto = "model.quantize = 'auto' is bfloat16, engine.stages_per_device = 'auto' is 1"
    assert said == [why, f"{why}, {auto}"]


def test_after_the_first_steps_the_plan_is_held_against_what_was_measured(job) -> None:
    config, found = job
    _, _, run = plan_on(config, found, pair())
    told = [run.heard(report(step, 2.0 if step > 2 else 60.0)) for step in range(1, 8)]
    assert [line is not None for line in told] == [False] * 4 + [True] + [False] * 2
    assert told[4] is not None and told[4].startswith("A clip takes 1.00 s (planned ")
    assert "cuda:0 3.0 GiB (planned 0.3)" in told[4]


def test_where_the_host_limits_that_is_learnt_of_it_and_nothing_of_the_cards(job) -> None:
    config, found = job
    for longer in (3.0, 2.0):
        _, _, run = plan_on(config, found, pair())
        assert run.plan.host_bound and not run.plan.calibrated
        for step in range(1, 6):
            run.heard(report(step, longer * run.plan.seconds_per_step))
        _, _, again = plan_on(config, found, pair())
        assert again.plan.seconds_per_step == pytest.approx(longer * run.plan.seconds_per_step, rel=0.05)
    assert not again.plan.calibrated


def slowdown_after(
    config: RunConfig,
    job: Job,
    times: tuple[float, float],
    buckets: tuple[Bucket, ...] = ONE_OF_EACH,
    **changes: object,
) -> float:
    """What is known of a card after a run on two of it.

    Args:
        config: of the run.
        job: what it works on.
        times: by stage, how many times as long as planned it works.
        buckets: of the clips that it has worked on.
        changes: of the plan's second stage.
    """
    alike = pair("RTX 4090", "RTX 4090")
    _, _, run = plan_on(config, job, alike)
    first, second = run.plan.stages
    # So tiny a model waits for the host.
    run.plan = replace(run.plan, host_bound=False, stages=(first, replace(second, **changes)))
    planned = [run.plan.micro_batches * (stage.forward + stage.backward) for stage in (first, second)]
    worked = [factor * seconds for factor, seconds in zip(times, planned, strict=True)]
    for step in range(1, 6):
        busy = tuple(seconds / sum(worked) for seconds in worked)
        run.heard(replace(report(step, sum(worked)), busy=busy, buckets=buckets))
    return make_request(config, job, alike).budgets[0].slowdown


def test_the_next_plan_rests_on_what_was_measured(job) -> None:
    config, found = job
    assert slowdown_after(config, found, (3.0, 3.0)) == pytest.approx(3.0, rel=1e-3)
    assert plan_on(config, found, pair("RTX 4090", "RTX 4090"))[2].plan.calibrated
    # A run that was planned with it, and took as long as planned, changes nothing.
    assert slowdown_after(config, found, (1.0, 1.0)) == pytest.approx(3.0, rel=1e-3)
    assert slowdown_after(config, found, (2.0, 2.0)) == pytest.approx(6.0, rel=1e-3)


def test_steps_that_had_small_clips_by_chance_make_no_card_faster(job) -> None:
    config, found = job
    planner = plan_on(config, found, pair("RTX 4090", "RTX 4090"))[2].planner
    assert planner.longer_than_average(dict.fromkeys(ONE_OF_EACH, 1)) == pytest.approx(1.0)
    shorter = planner.longer_than_average({IMAGE: 1})
    assert shorter < 0.9
    assert slowdown_after(config, found, (shorter, shorter), (IMAGE, IMAGE)) == pytest.approx(1.0, rel=1e-3)


def test_of_like_cards_both_count_by_their_work(job) -> None:
    config, found = job
    stages = plan_on(config, found, pair("RTX 4090", "RTX 4090"))[2].plan.stages
    first, second = (stage.forward + stage.backward for stage in stages)
    expected = (first + 4 * second) / (first + second)
    assert slowdown_after(config, found, (1.0, 4.0)) == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("changes", [{"streamed": 1}, {"residency": Residency.OFFLOAD_SELECTIVE, "kept": 0}])
def test_of_a_stage_that_copies_beside_its_work_nothing_is_learnt(job, changes: dict[str, object]) -> None:
    config, found = job
    assert slowdown_after(config, found, (1.5, 9.0), **changes) == pytest.approx(1.5, rel=1e-3)


def measured_on(run: PlannedRun, share: float) -> list[dict[str, dict[Residency, Footprint]]]:
    """What is measured on each of a plan's stages, of blocks that take more than their trace."""
    block = run.planner.trace.blocks["blocks"].footprints[Residency.KEEP]
    found = replace(block, kept=int(share * block.kept), working=int(share * block.working))
    return [{"blocks": {Residency.KEEP: found}} for _ in run.plan.stages]


def split_for(run: PlannedRun, config: RunConfig, job: Job) -> Split:
    """The run's model as it is once its blocks are measured."""
    placed = place_again(job, [torch.device("cpu")] * 2, run.plan.split_at, [0, 0])
    division = split_model(config, placed, load_model(config, placed))
    division.footprints = measured_on(run, 1.5)
    return division


def test_the_next_plan_rests_on_the_bytes_that_a_run_has_measured(job) -> None:
    config, found = job
    _, _, run = plan_on(config, found, pair())
    run.keep_bytes(split_for(run, config, found))
    _, _, again = plan_on(config, found, pair())
    assert again.plan.measured_bytes and not run.plan.measured_bytes
    assert sum(again.plan.peaks.values()) > sum(run.plan.peaks.values())
    _, _, other = plan_on(config, found, pair("RTX 4090", "RTX 3090"))
    assert not other.plan.measured_bytes


def test_bytes_are_kept_once_and_again_when_a_larger_clip_was_measured(job, tmp_path: Path) -> None:
    config, found = job
    _, _, run = plan_on(config, found, pair())
    kept = tmp_path / "home" / "bytes.json"
    division = split_for(run, config, found)
    run.keep_bytes(division)
    kept.unlink()
    run.keep_bytes(division)
    assert not kept.exists()
    division.footprints = measured_on(run, 1.6)
    run.keep_bytes(division)
    assert kept.is_file()


def test_of_a_run_that_has_measured_nothing_or_could_not_compile_no_bytes_are_kept(
    job, tmp_path: Path
) -> None:
    config, found = job
    _, _, run = plan_on(config, found, pair())
    division = split_for(run, config, found)
    division.compiler = BlockCompiler()
    division.compiler.failed.add(print)
    run.keep_bytes(division)
    division.footprints = ()
    run.keep_bytes(division)
    assert not (tmp_path / "home" / "bytes.json").exists()


def test_a_card_of_ones_own_is_planned_with(job, monkeypatch: pytest.MonkeyPatch) -> None:
    config, found = job
    given: list[object] = []

    def budgets(_: object, cards: object) -> tuple[Budget, ...]:
        given.append(cards)
        return tuple(replace(budget, measured=True) for budget in pair())

    monkeypatch.setattr(planned, "budgets_of_devices", budgets)
    own = known_cards()[:1]
    plan_job(config, on_gpus(found), print, own)
    assert given == [own]


def test_a_card_too_full_to_be_timed_is_planned_by_its_figures(job, monkeypatch: pytest.MonkeyPatch) -> None:
    config, found = job

    def measured(_: Budget) -> Budget:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(planned, "budgets_of_devices", lambda *_: pair())
    monkeypatch.setattr(measuring, "measured", measured)
    monkeypatch.setattr(measuring, "launching", lambda device: 1.0)
    monkeypatch.setattr(measuring, "link_rate", lambda device: 2e10)
    _, _, run = plan_job(config, on_gpus(found), print)
    assert run is not None and not run.plan.calibrated


def with_streamed(config: RunConfig, *counts: int) -> RunConfig:
    """With so many blocks of each stage in host memory."""
    return config.model_copy(update={"engine": config.engine.model_copy(update={"streamed_blocks": counts})})


def test_streamed_blocks_that_even_shares_do_not_have_go_where_the_plan_has_them(
    job, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, found = job
    config = with_streamed(config, 3, 1)
    placement, streamed = place_blocks(found.transformer, config, found.family, CUDA)
    assert placement.boundaries[1:-1] == (2,) and streamed == ()
    monkeypatch.setattr(planned, "budgets_of_devices", lambda *_: pair())
    monkeypatch.setattr(measuring, "measured", lambda budget: budget)
    monkeypatch.setattr(measuring, "launching", lambda device: 1.0)
    monkeypatch.setattr(measuring, "link_rate", lambda device: 2e10)
    _, placed, run = plan_job(config, replace(on_gpus(found), streamed=streamed), print)
    assert run is not None and placed.placement.boundaries[1:-1] == (3,)
    assert placed.streamed_counts == (3, 1)


def test_streamed_blocks_that_no_boundary_has_are_told_before(job) -> None:
    config, found = job
    with pytest.raises(UserError, match=r"engine.streamed_blocks = \[4, 1\]: the model has 4 blocks"):
        place_blocks(found.transformer, with_streamed(config, 4, 1), found.family, CUDA)
    with pytest.raises(UserError, match=r"\[3, 1\]: stage 0 has 2 blocks"):  # on CPUs shares are even
        place_blocks(found.transformer, with_streamed(config, 3, 1), found.family, [torch.device("cpu")] * 2)


def test_without_a_plan_streamed_blocks_must_fit_even_shares(job, monkeypatch: pytest.MonkeyPatch) -> None:
    config, found = job
    monkeypatch.setattr(planned, "budgets_of_devices", refuse)
    said: list[str] = []
    with pytest.raises(UserError, match=r"engine.streamed_blocks = \[3, 1\]: stage 0 has 2 blocks"):
        plan_job(with_streamed(config, 3, 1), on_gpus(found), said.append)
    assert len(said) == 1
