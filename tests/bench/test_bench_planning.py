"""The plan beside what is measured runs as it is run by hand, at toy size; no case ends the others."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from bench_scripts import BENCH, read, run

from tworeel.planning import planner
from tworeel.planning.measured_bytes import keep_bytes, known_bytes
from tworeel.planning.measurements import FOLDER_VARIABLE

sys.path.append(str(BENCH))

import planning_runs
from planning_cases import CASES, PHASES, TINY_PHASES, Case, chosen

import planning

CPUS = [torch.device("cpu")] * 2
CASE = TINY_PHASES["cases"][0]


def test_the_plan_is_held_against_what_is_measured(tmp_path: Path) -> None:
    phases = ("--phase", "cases", "edges", "splits")
    printed = run("planning.py", "--devices", "cpu,cpu", *phases, "--json", tmp_path / "planning.json")
    results = read(tmp_path / "planning.json")
    kinds = [name.split()[0] for name in results if name != "machine"]
    assert kinds == ["case", "case", "edge", "edge", "split"]
    cases = [value for name, value in results.items() if name.startswith("case")]
    assert ["flux2" in case["case"] for case in cases] == [False, True]
    for case in cases:
        assert case["plan"]["fits"] and case["measured"]["seconds"] > 0 and case["took"] > 0
    accepted, refused = (value for name, value in results.items() if name.startswith("edge"))
    assert accepted["plan"]["fits"] and not refused["plan"]["fits"]
    assert [edge["refused"] for edge in (accepted, refused)] == [False, True]
    for words in ("planned", "measured", "off", "s in all", "fastest at"):
        assert words in printed


def test_cases_are_told_without_being_run() -> None:
    printed = run("planning.py", "--list", "--stages", "1", "--cases", "2", "--blocks", "1")
    assert printed == "cases 2: tiny-flux2 tiny 1 frames bf16 1 stage eager 1 blocks\n"


def test_cases_are_chosen_by_number_or_by_a_part_of_their_name() -> None:
    assert [number for number, _ in chosen(CASES, [])] == list(range(1, len(CASES) + 1))
    assert chosen(CASES, ["2"]) == [(2, CASES[1])]
    assert {case.model for _, case in chosen(CASES, ["flux2", "ti2v"])} == {"flux2-dev", "ti2v-5b"}


def test_there_are_as_many_cases_as_a_plan_has_to_be_held_against() -> None:
    assert len(CASES) >= 16 and len(PHASES["edges"]) == 10
    assert len({case.name for case in CASES}) == len(CASES)
    assert {case.stages for case in CASES} == {1, 2, 4}
    assert {case.frames for case in CASES} == {1, 17, 49, 81}
    assert {case.quantize for case in CASES} == {None, "fp8", "int8"}


def test_a_model_is_traced_once_for_all_its_cases(monkeypatch: pytest.MonkeyPatch) -> None:
    trace, traced = planner.trace_model, []

    def watched(*args: Any, **launching: bool) -> Any:
        traced.append(args)
        return trace(*args, **launching)

    monkeypatch.setattr(planner, "trace_model", watched)
    bench = planning_runs.Bench(CPUS)
    for changed in ({}, {"residency": "recompute"}, {"at": (1,)}, {"caps": (1.0,)}):
        assert bench.planner(Case(**{**vars(CASE), **changed})).best().stages
    assert len(traced) == 1


def test_a_plan_that_is_held_against_a_measurement_does_not_rest_on_an_earlier_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path))
    bench = planning_runs.Bench(CPUS)
    found = bench.planner(CASE)
    stages = [{name: block.footprints for name, block in found.trace.blocks.items()}] * 2
    keep_bytes(found.request, list(zip(found.request.budgets, stages, strict=True)))
    assert known_bytes(found.request)
    assert not planning_runs.Bench(CPUS).planner(CASE).best().measured_bytes


def test_a_case_without_memory_is_told_and_the_next_one_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    train, calls = planning_runs._train, []

    def short(*args: Any) -> Any:
        calls.append(args)
        if len(calls) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return train(*args)

    monkeypatch.setattr(planning_runs, "_train", short)
    failed = planning.run_phase("cases", [(1, CASE), (2, CASE)], planning_runs.Bench(CPUS), tmp_path / "x")
    assert failed == [] and len(calls) == 2
    assert capsys.readouterr().out.count("ran out of memory") == 1
    assert read(tmp_path / "x")[f"case {CASE.name}"]["measured"]["seconds"] > 0


def test_what_the_host_limits_is_planned_once_more_by_what_it_has_taken(tmp_path: Path) -> None:
    bench = planning_runs.Bench(CPUS, again=True)
    assert planning.run_phase("cases", [(1, CASE)], bench, tmp_path / "x") == []
    first, again = read(tmp_path / "x").values()
    taken = first["measured"]["seconds"]
    assert again["plan"]["host_bound"] and again["plan"]["seconds_per_step"] == pytest.approx(taken, rel=0.01)


def test_a_case_that_fails_is_written_down_and_the_next_one_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(_: object, case: Case) -> Iterator[tuple[str, dict[str, Any]]]:
        if case.frames == 5:
            raise RuntimeError("no driver")
        yield case.name, {"fine": True}

    monkeypatch.setitem(planning.RUNS, "cases", broken)
    other = Case(model="tiny", size="tiny", frames=1)
    failed = planning.run_phase("cases", [(1, CASE), (2, other)], planning_runs.Bench(CPUS), tmp_path / "x")
    assert failed == [f"case {CASE.name}"]
    results = read(tmp_path / "x")
    assert results[f"case {CASE.name}"] == {"error": "RuntimeError: no driver"}
    assert results[f"case {other.name}"]["fine"]


def test_a_case_of_more_stages_than_there_are_devices_is_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    planning.run_phase("cases", [(1, CASE)], planning_runs.Bench(CPUS[:1]), tmp_path / "x")
    assert "left out, there are 1 devices" in capsys.readouterr().out and not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("seconds", "peak", "refused", "words"),
    [
        (1.0, 95, False, "trained as planned, its peak is 95.0 %"),
        (None, 99, False, "NOT AS PLANNED"),
        (None, 99, True, "ran out of memory: as planned; its peak is 99.0 %"),
        (1.0, 91, True, "near enough"),
        (1.0, 80, True, "REFUSED WITHOUT NEED"),
    ],
)
def test_an_edge_is_judged_by_what_happened(
    seconds: float | None, peak: int, refused: bool, words: str
) -> None:
    plan = planning_runs.Bench(CPUS[:1]).planner(Case(**{**vars(CASE), "stages": 1})).best()
    (stage,) = plan.stages
    found = {"seconds": seconds, "peaks": {"cpu": peak / 100 * stage.free}}
    assert words in planning._told_edge(plan, found, refused)
