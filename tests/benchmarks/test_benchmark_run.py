from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tworeel.benchmarks import baseline, run
from tworeel.benchmarks.preparing import Prepared, Settings
from tworeel.benchmarks.run import Bench
from tworeel.benchmarks.shapes import Case
from tworeel.errors import UserError

RATES = {"cpu": 1e9}


class Listener:
    """Keeps what is said."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, line: str) -> None:
        self.lines.append(line)

    def poll(self) -> None:
        pass


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


def test_blocks_can_wait_in_host_memory(case: Case, settings: Settings) -> None:
    result = Bench(RATES, Listener()).run(case, replace(settings, streamed=(1, 1), slack=0))
    assert result.measured
