"""Runs whose plan does not fit the cards: stopped before any work, unless they are to try all the same.

The plan is that of a pair of small cards; the blocks stay on the CPU.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_runs import Watcher, digest_of

from tworeel.config.schema import RunConfig
from tworeel.engine import Split
from tworeel.engine.fitting import SPARE
from tworeel.errors import UserError
from tworeel.planning.cards import known_cards, parse_cards
from tworeel.planning.measurements import FOLDER_VARIABLE
from tworeel.training import run, shortage
from tworeel.training.assembly import split_model
from tworeel.training.checkpoint import CheckpointStore
from tworeel.training.planned import PlannedRun, budgets_of_cards, plan_on
from tworeel.training.preflight import Job
from tworeel.training.run import train

MakeConfig = Callable[..., RunConfig]
TWO = {"steps": 2, "save_every": 2}
KEEP = {"residency": "keep"}
"""A setting with which it does not fit, and without which it would."""


def on_small_cards(config: RunConfig, job: Job, *_: object) -> tuple[RunConfig, Job, PlannedRun]:
    """The plan for a pair of cards that are a MiB too small for all activations."""
    pair = budgets_of_cards(parse_cards("2x RTX 4090", known_cards()))
    budgets = [replace(card, device="cpu") for card in pair]
    _, _, roomy = plan_on(config, job, budgets)
    enough = int(sum(roomy.plan.peaks.values()) / (1 - SPARE))
    small = [replace(card, total=enough - 2**20, free=enough - 2**20) for card in budgets]
    decided, _, planned = plan_on(config, job, small)
    return decided, job, planned


@pytest.fixture
def small_cards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs are planned for a pair of cards that are too small for them."""
    monkeypatch.setattr(run, "plan_job", on_small_cards)


def refused(config: RunConfig, **options: Any) -> str:
    """The line with which the plan stops a run."""
    with pytest.raises(UserError) as caught:
        train(config, **options)
    (line,) = caught.value.problems
    return line


@pytest.mark.usefixtures("small_cards")
def test_a_run_whose_plan_does_not_fit_stops_before_anything_is_encoded_or_loaded(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    config, watcher = make_config(cache={"folder": tmp_path / "new"}, engine=KEEP), Watcher()
    line = refused(config, observer=watcher)
    assert line.startswith("the plan does not fit: cpu would need 0.3 GiB and has 0.3 GiB (")
    assert " MiB too few, most is " in line
    assert "What would fit it: engine.residency = 'auto' (0.0" in line
    assert line.endswith("--anyway trains all the same")
    assert [said.split(" (")[0] for said in watcher.lines][:2] == ["Plan: cpu"] * 2
    assert not list((tmp_path / "new").iterdir())
    assert not (config.train.output / "config.toml").exists()


@pytest.mark.usefixtures("small_cards")
def test_it_trains_all_the_same_where_that_is_asked_for(make_config: MakeConfig) -> None:
    config, watcher = make_config(train=TWO, engine=KEEP), Watcher()
    assert train(config, anyway=True, observer=watcher).lora.is_file()
    (warned,) = [line for line in watcher.lines if "may run out of memory" in line]
    assert "What would fit it: engine.residency = 'auto'" in warned


def test_a_run_keeps_what_its_first_step_has_measured_of_the_blocks(
    make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path / "home"))
    plans: list[PlannedRun] = []

    def planned(*args: Any) -> tuple[RunConfig, Job, PlannedRun]:
        found = on_small_cards(*args)
        plans.append(found[2])
        return found

    def measured(*args: Any) -> Split:
        division = split_model(*args)
        assert not division.footprints, "blocks on a CPU are not measured"
        blocks = plans[0].planner.trace.blocks
        division.footprints = [{name: block.footprints for name, block in blocks.items()}] * 2
        return division

    monkeypatch.setattr(run, "plan_job", planned)
    monkeypatch.setattr(run, "split_model", measured)
    for name in ("first", "second"):
        train(make_config(name, train=TWO))
    assert [one.plan.measured_bytes for one in plans] == [False, True]


def test_a_resumed_run_stops_too_and_keeps_what_it_has(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(begun := make_config(train=TWO, engine=KEEP))
    before = digest_of(begun)
    monkeypatch.setattr(run, "plan_job", on_small_cards)
    longer = begun.model_copy(update={"train": begun.train.model_copy(update={"steps": 4})})
    assert "the plan does not fit" in refused(longer, resume=True)
    assert CheckpointStore(begun.train.output / "checkpoints").steps() == [2]
    assert digest_of(begun) == before
    assert train(longer, resume=True, anyway=True).steps == 4


@pytest.mark.usefixtures("small_cards")
def test_running_out_of_memory_then_names_what_the_plan_said_would_fit(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config(engine=KEEP)
    fitting = refused(config).partition("What would fit it: ")[2].partition(". --anyway")[0]

    def fall_short(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(run, "load_model", fall_short)
    monkeypatch.setattr(shortage, "room", lambda _: {"cpu": 2**40})
    short = refused(config, anyway=True)
    assert short.startswith("out of memory: ") and "The plan did not fit: cpu would need" in short
    assert f"What would fit it: {fitting}" in short
