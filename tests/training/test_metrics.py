"""The log of a run, over crashes and resumes."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from tworeel.errors import UserError
from tworeel.training.metrics import MetricsLog, read_metrics
from tworeel.training.space import OutOfSpace


def steps(path: Path) -> list[int]:
    return [values["step"] for values in read_metrics(path)]


def write_steps(path: Path, first: int, last: int, resume_step: int = 0) -> None:
    with MetricsLog(path, resume_step) as log:
        for step in range(first, last + 1):
            log.write(step, {"loss": 1 / (step + 2), "samples": ["a", "b"]})


def test_each_line_is_on_disk_as_soon_as_it_is_written(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with MetricsLog(path) as log:
        log.write(1, {"loss": 0.1})
        assert json.loads(path.read_text()) == {"step": 1, "loss": 0.1}
        log.sync()


def test_floats_read_back_bit_by_bit(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    values = [0.1 + 0.2, 5e-324, 1.7976931348623157e308, -0.0, math.pi * 1e-7]
    with MetricsLog(path) as log:
        for step, value in enumerate(values, 1):
            log.write(step, {"loss": value})
    assert [line["loss"].hex() for line in read_metrics(path)] == [value.hex() for value in values]


def test_a_resumed_run_has_the_same_log_as_one_that_never_stopped(tmp_path: Path) -> None:
    straight, resumed = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    write_steps(straight, 1, 20)
    write_steps(resumed, 1, 13)
    with resumed.open("ab") as file:
        file.write(b'{"step": 14, "lo')
    write_steps(resumed, 11, 20, resume_step=10)
    assert resumed.read_bytes() == straight.read_bytes()


def test_a_torn_last_line_is_left_out_wherever_it_is_torn(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write_steps(path, 1, 3)
    data = path.read_bytes()
    ends = [number + 1 for number, byte in enumerate(data) if byte == ord("\n")]
    for length in range(len(data) + 1):
        path.write_bytes(data[:length])
        assert steps(path) == list(range(1, sum(end <= length for end in ends) + 1))


def test_zeros_that_a_power_cut_left_are_dropped(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write_steps(path, 1, 3)
    with path.open("ab") as file:
        file.write(bytes(500))
    write_steps(path, 4, 5, resume_step=3)
    assert steps(path) == [1, 2, 3, 4, 5]


def test_a_damaged_line_in_the_middle_is_named(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write_steps(path, 1, 3)
    path.write_bytes(path.read_bytes().replace(b'{"step": 2', b'{"ste\x00: 2'))
    with pytest.raises(UserError, match=r"metrics\.jsonl: line 2 is damaged"):
        MetricsLog(path, 3)


def test_a_value_that_is_not_finite_is_refused(tmp_path: Path) -> None:
    with MetricsLog(tmp_path / "metrics.jsonl") as log, pytest.raises(ValueError, match="not JSON compliant"):
        log.write(1, {"loss": math.nan})
    assert read_metrics(tmp_path / "metrics.jsonl") == []


def test_a_full_disk_keeps_the_lines_before(tiny_disk: Path) -> None:
    path = tiny_disk / "metrics.jsonl"
    with MetricsLog(path) as log:
        for step in range(1, 21):
            log.write(step, {"text": "x" * 30_000})
        with pytest.raises(OutOfSpace, match="the disk filled up while a line of metrics"):
            log.write(21, {"text": "x" * 600_000})
    assert steps(path) == list(range(1, 21))


def test_tensorboard_shows_a_resumed_run_without_the_lines_that_were_cut(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    board = tmp_path / "tensorboard"
    for first, resume_step in ((1, 0), (5, 4)):
        with MetricsLog(tmp_path / "metrics.jsonl", resume_step, board) as log:
            for step in range(first, first + 8):
                log.write(step, {"loss": float(step * 10 + resume_step), "name": "x", "flag": True})
    events = accumulator.EventAccumulator(str(board)).Reload()
    assert events.Tags()["scalars"] == ["loss"]
    shown = {event.step: event.value for event in events.Scalars("loss")}
    assert shown == {step: step * 10 + (4 if step > 4 else 0) for step in range(1, 13)}
