from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from real_models import budgets_of

from tworeel.planning.measurements import FOLDER_VARIABLE, calibrated, keep, keep_launching
from tworeel.planning.traces import TraceSettings
from tworeel.planning.work import Work

WORK = Work({torch.bfloat16: 1e15})
SETTINGS = TraceSettings(targets=())


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path / "home"))
    return tmp_path / "home"


def test_what_a_run_took_is_used_from_then_on() -> None:
    (budget,) = budgets_of("RTX 4090")
    assert calibrated(budget, SETTINGS) == budget and not budget.measured
    keep(budget.card, SETTINGS, 1.5)
    found = calibrated(budget, SETTINGS)
    assert found.measured and found.slowdown == 1.5
    assert found.rates.forward(WORK) == pytest.approx(1.5 * budget.rates.forward(WORK))


def test_what_the_host_took_is_kept_beside_it() -> None:
    (budget,) = budgets_of("RTX 4090")
    keep_launching(budget.card, SETTINGS, 1.25)
    assert calibrated(budget, SETTINGS) == replace(budget, launching=1.25)
    keep(budget.card, SETTINGS, 1.5)
    found = calibrated(budget, SETTINGS)
    assert (found.launching, found.slowdown) == (1.25, 1.5)
    keep_launching(budget.card, SETTINGS, 0.0)
    assert calibrated(budget, SETTINGS).launching is None


def test_other_cards_precisions_and_eager_blocks_are_apart() -> None:
    one, other = budgets_of("RTX 4090, RTX 3090")
    keep(one.card, SETTINGS, 1.5)
    assert not calibrated(other, SETTINGS).measured
    for changes in ({"quantize": "fp8"}, {"compile": False}):
        assert not calibrated(one, replace(SETTINGS, **changes)).measured


@pytest.mark.parametrize("content", ["", "{", "[]", '{"a": 1}', "[" * 100_000])
def test_a_damaged_file_is_as_none(folder: Path, content: str) -> None:
    (budget,) = budgets_of("RTX 4090")
    folder.mkdir()
    (folder / "speeds.json").write_text(content, encoding="utf-8")
    assert calibrated(budget, SETTINGS) == budget
    keep(budget.card, SETTINGS, 1.5)
    assert calibrated(budget, SETTINGS).measured


def test_absurd_factors_are_not_used(folder: Path) -> None:
    (budget,) = budgets_of("RTX 4090")
    keep(budget.card, SETTINGS, 1000.0)
    assert json.loads((folder / "speeds.json").read_text(encoding="utf-8"))
    assert calibrated(budget, SETTINGS) == budget


def test_without_a_home_nothing_is_kept_and_nothing_stops(monkeypatch: pytest.MonkeyPatch) -> None:
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv(FOLDER_VARIABLE)
    monkeypatch.setattr(Path, "home", homeless)
    (budget,) = budgets_of("RTX 4090")
    keep(budget.card, SETTINGS, 1.5)
    assert calibrated(budget, SETTINGS) == budget


def test_a_folder_that_cannot_be_written_stops_nothing(folder: Path) -> None:
    folder.touch()
    (budget,) = budgets_of("RTX 4090")
    keep(budget.card, SETTINGS, 1.5)
    assert calibrated(budget, SETTINGS) == budget
