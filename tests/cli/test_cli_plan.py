from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch

from tworeel.demo.checkpoint import write_checkpoint
from tworeel.demo.clips import write_clips

Run = Callable[..., Any]
PAIR = ("--gpus", "2x RTX 4090")
SMALL = ("--set", "data.resolution=[64,64]", "--set", "data.frames=[1,5]", "--set", "lora.rank=2")


@pytest.fixture
def given(tmp_path: Path) -> tuple[str, ...]:
    """Options that name a tiny model and a few clips."""
    model = write_checkpoint(tmp_path / "model", variant="wan2.1-t2v-1.3b", layout="native")
    write_clips(tmp_path / "clips", 2)
    return ("--model", str(model), "--data", str(tmp_path / "clips"), *SMALL)


def test_a_plan_is_a_table_and_a_verdict_without_a_gpu(
    run: Run, given: tuple[str, ...], tmp_path: Path
) -> None:
    done = run("plan", *given, *PAIR, "--explain", "--json", tmp_path / "plans" / "plan.json")
    assert done.code == 0, done.err
    assert "RTX 4090" in done.out and "It fits." in done.out and "What else was weighed" in done.out
    found = json.loads((tmp_path / "plans" / "plan.json").read_text(encoding="utf-8"))
    assert found["fits"] and len(found["stages"]) == 2 and found["alternatives"]
    assert not (tmp_path / "output").exists()


def test_what_is_left_open_is_decided_and_what_lost_is_shown(run: Run, given: tuple[str, ...]) -> None:
    left_open = ("--set", "model.quantize=auto", "--set", "engine.stages_per_device=auto")
    done = run("plan", *given, *PAIR, *left_open)
    assert done.code == 0, done.err
    assert "bfloat16" in done.out and "What else was weighed" in done.out
    assert "two stages a device" in done.out


def test_what_does_not_fit_is_told_and_scripts_see_it(run: Run, given: tuple[str, ...]) -> None:
    done = run("plan", *given, "--gpus", "RTX 4090", "--memory-gib", "0.9")
    assert done.code == 1, done.err
    assert "It does not fit: cuda:0 would need" in done.out
    assert "With one of these it would" in done.out or "nothing that is known" in done.out


def test_the_verdict_does_not_wait_for_what_would_fit_instead(
    run: Run, given: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(_: object) -> Iterator[None]:
        raise KeyboardInterrupt

    monkeypatch.setattr("tworeel.planning.explaining.changes", stopped)
    done = run("plan", *given, "--gpus", "RTX 4090", "--memory-gib", "0.9")
    assert done.code == 130
    assert "It does not fit: cuda:0 would need" in done.out


def test_a_card_of_ones_own_can_be_planned_for(run: Run, given: tuple[str, ...], tmp_path: Path) -> None:
    (tmp_path / "cards.toml").write_text(
        '[[card]]\nname = "Workshop 48"\nmemory_gib = 48\nbf16 = 100\n'
        'bandwidth = 800\npcie = 32\nsource = "own"\n',
        encoding="utf-8",
    )
    done = run("plan", *given, "--gpus", "2x Workshop 48", "--cards", tmp_path / "cards.toml")
    assert done.code == 0, done.err
    assert "Workshop 48" in done.out


def test_host_memory_that_this_machine_lacks_may_be_another_ones(
    run: Run, given: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    parked = (*PAIR, "--set", "engine.residency=offload")
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=0))
    here = run("plan", *given, *parked)
    assert "of host memory would be pinned" in here.out and "--host-memory-gib plans for another" in here.out
    assert "It fits." in run("plan", *given, *parked, "--host-memory-gib", "128").out


def test_planning_needs_no_package_that_only_training_needs(
    run: Run, given: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    asked = ("--set", "model.quantize=nf4", "--set", "train.optimizer=adamw8bit")
    done = run("plan", *given, *PAIR, *asked)
    assert done.code == 0, done.err
    assert "nf4" in done.out
    assert run("check", *given, *asked).err.count("needs bitsandbytes") == 2


def test_cards_that_need_not_be_here_take_the_better_order_whatever_devices_are_set(
    run: Run, given: tuple[str, ...], tmp_path: Path
) -> None:
    found = []
    for number, devices in enumerate(((), ("--set", 'engine.devices=["cuda:0","cuda:1"]'))):
        file = tmp_path / f"{number}.json"
        assert run("plan", *given, "--gpus", "RTX 3060, H200", *devices, "--json", file).code == 0
        found.append([stage["card"] for stage in json.loads(file.read_text(encoding="utf-8"))["stages"]])
    assert found[0] == found[1]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--gpus", "2x RTX 4091"), "no card 'RTX 4091' is known (did you mean 'RTX 4090'?)"),
        ((*PAIR, "--memory-gib", "-3"), "--memory-gib -3: must be above 0 and below 10000"),
        ((*PAIR, "--memory-gib", "20000"), "--memory-gib 20000: must be above 0 and below 10000"),
        ((*PAIR, "--host-memory-gib", "-3"), "--host-memory-gib -3: must be above 0"),
        ((*PAIR, "--host-memory-gib", "1e300"), "1e+300: must be above 0 and below 100000"),
        ((*PAIR, "--host-memory-gib", "nan"), "--host-memory-gib nan: must be above 0 and below 100000"),
        ((*PAIR, "--devices", "cuda:7"), "--devices cuda:7: are devices of this machine; leave it out"),
        ((*PAIR, "--memory-gib", "0.5,24"), "RTX 4090 with 0.5 GiB: CUDA itself takes 0.6 GiB"),
        (("--gpus", "2x H100"), "'H100' may be H100 PCIe, H100 80GB; name one of them"),
        (("--gpus", "RTX"), "RTX 4080 Super, RTX 4090"),
        (
            (*PAIR, "--set", "engine.streamed_blocks=[99,1]"),
            "engine.streamed_blocks = [99, 1]: the model has",
        ),
        ((*PAIR, "--memory-gib", "1,2,3"), "2 cards need one number, or 2"),
        (("--memory-gib", "3"), "--memory-gib: needs --gpus"),
        ((*PAIR, "--cards", "nothing.toml"), "--cards nothing.toml: No such file"),
        ((*PAIR, "--set", "engine.split_at=[99]"), "boundaries must rise"),
        (("--gpus", "16x RTX 4090"), "16 stages for"),
    ],
)
def test_a_mistake_is_one_clear_line(
    run: Run, given: tuple[str, ...], arguments: tuple[str, ...], words: str
) -> None:
    done = run("plan", *given, *arguments)
    assert done.code == 2
    assert done.err.splitlines()[-1].startswith("error: ") and words in done.err


def test_mistakes_of_the_cards_the_options_and_the_model_are_told_together(
    run: Run, given: tuple[str, ...]
) -> None:
    cards = ("--gpus", "2x RTX 4091", "--memory-gib", "-3", "--host-memory-gib", "-1")
    done = run("plan", "--model", "nowhere", *given[2:], *cards)
    assert done.code == 2
    for words in ("'RTX 4091'", "--memory-gib -3", "--host-memory-gib -1", "model.path"):
        assert words in done.err


def test_a_model_and_a_dataset_that_are_not_there_are_told_together(run: Run, tmp_path: Path) -> None:
    done = run("plan", "--model", "nowhere", "--data", tmp_path / "empty", *PAIR)
    assert done.code == 2
    assert "model.path" in done.err and "empty" in done.err


def test_a_dataset_with_nothing_usable_is_told(run: Run, given: tuple[str, ...], tmp_path: Path) -> None:
    (tmp_path / "nothing").mkdir()
    done = run("plan", *given[:2], "--data", tmp_path / "nothing", *PAIR)
    assert done.code == 2
    assert "nothing is left to train on" in done.err


@pytest.mark.skipif(torch.accelerator.is_available(), reason="there is an accelerator")
def test_without_a_gpu_some_must_be_named(run: Run, given: tuple[str, ...]) -> None:
    done = run("plan", *given)
    assert done.code == 2
    assert "there is no GPU here to plan for; name some" in done.err
