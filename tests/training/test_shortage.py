"""Running out of memory all the same: what is told, and that nothing that was saved is lost."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from tiny_runs import digest_of

from tworeel.config.schema import RunConfig
from tworeel.config.writing import dump_config
from tworeel.planning.choosing import choose
from tworeel.training import shortage
from tworeel.training.checkpoint import CheckpointStore
from tworeel.training.planned import PlannedRun
from tworeel.training.run import train
from tworeel.training.shortage import out_of_memory
from tworeel.units import GIB

sys.path.append(str(Path(__file__).parents[1] / "planning"))

from real_models import budgets_of, request_of

ROOT = Path(__file__).parents[2]
CUDA = [torch.device("cuda:0"), torch.device("cuda:1")]
ERROR = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 1 has …\nmore lines")
KEPT = "The checkpoints in run/ are intact."


@pytest.fixture(scope="module")
def planned() -> PlannedRun:
    """Clips of 49 frames with a 14B model on two cards of 24 GB."""
    choice = choose(request_of(budgets=budgets_of("2x RTX 4090")))
    return PlannedRun(choice.plan, choice.planner)


@pytest.fixture
def told(planned: PlannedRun, monkeypatch: pytest.MonkeyPatch) -> Callable[[Mapping[str, float]], str]:
    """A function (GiB that there are now by device) -> the error's line."""

    def tell(gib: Mapping[str, float]) -> str:
        room = {name: int(size * GIB) for name, size in gib.items()}
        peaks = {name: int(19.5 * GIB) for name in gib}
        monkeypatch.setattr(shortage, "room", lambda _: room)
        monkeypatch.setattr(shortage, "peak_memory", lambda _: peaks)
        (line,) = out_of_memory(ERROR, CUDA, KEPT, planned).problems
        return line

    return tell


def test_without_a_plan_it_says_where_how_much_and_what_would_need_less() -> None:
    error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 …\nmore lines")
    (line,) = out_of_memory(error, [torch.device("cpu")], KEPT).problems
    assert line.startswith("out of memory: CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 …")
    assert "more lines" not in line
    for words in ("Peaks so far: cpu ", "GiB", KEPT, "engine.residency", "fewer data.frames"):
        assert words in line


def test_the_device_its_peak_and_the_plans_figure_are_named(
    told: Callable[[Mapping[str, float]], str], planned: PlannedRun
) -> None:
    line = told({"cuda:0": 23, "cuda:1": 9})
    assert line.startswith("out of memory on cuda:1: CUDA out of memory. Tried to allocate 2.00 GiB.")
    first = planned.plan.peaks["cuda:0"] / GIB
    assert f"Peaks so far: cuda:0 19.5 GiB (planned {first:.1f} GiB), cuda:1 19.5 GiB" in line
    assert KEPT in line and "cuda:1 9.0 GiB (planned with 23.0 GiB)" in line


def test_where_a_new_plan_fits_what_is_left_it_is_enough_to_resume(
    told: Callable[[Mapping[str, float]], str],
) -> None:
    assert "What would fit it: the same run with a new plan" in told({"cuda:0": 23, "cuda:1": 15})


def test_where_no_plan_fits_the_changes_that_do_are_named(
    told: Callable[[Mapping[str, float]], str],
) -> None:
    line = told({"cuda:0": 8, "cuda:1": 8})
    assert "What would fit it: " in line and "clips of at most" in line
    assert "the same run" not in line


def test_where_nothing_fits_what_needs_less_is_told(told: Callable[[Mapping[str, float]], str]) -> None:
    assert "nothing that is known. What needs less: " in told({"cuda:0": 0.5, "cuda:1": 0.5})


def test_where_the_memory_is_as_planned_no_other_program_is_blamed(
    told: Callable[[Mapping[str, float]], str],
) -> None:
    line = told({"cuda:0": 23, "cuda:1": 23})
    assert "less memory now" not in line and "What needs less: " in line


def test_what_is_set_needlessly_is_named_first() -> None:
    request = request_of(budgets=budgets_of("2x RTX 4090"), residency="offload-selective", streamed=(6, 6))
    choice = choose(request)
    assert choice.plan.fits
    found = PlannedRun(choice.plan, choice.planner).would_fit({"cuda:0": 17 * GIB, "cuda:1": 17 * GIB})
    assert found is not None and found[0].startswith("engine.streamed_blocks not set (")


def test_a_plan_that_cannot_be_made_hides_no_shortage(
    told: Callable[[Mapping[str, float]], str], planned: PlannedRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("tracing has changed")

    monkeypatch.setattr(PlannedRun, "would_fit", broken)
    assert "What needs less: " in told({"cuda:0": 8, "cuda:1": 8})


@pytest.mark.slow
def test_a_run_that_runs_out_of_memory_says_all_of_it_and_goes_on_from_an_intact_checkpoint(
    make_config: Callable[..., RunConfig], tmp_path: Path
) -> None:
    steps = {"steps": 6, "save_every": 2}
    whole, run = (make_config(name, train=steps) for name in ("whole", "run"))
    train(whole)
    (tmp_path / "run.toml").write_text(dump_config(run), encoding="utf-8")
    # Seven forwards: three steps of two clips, and one clip of the fourth.
    script = Path(__file__).with_name("short_of_memory.py")
    done = subprocess.run(
        [sys.executable, str(script), "7", "2", "train", str(tmp_path / "run.toml")],
        capture_output=True,
        text=True,
        encoding="utf-8",
        env={**os.environ, "PYTHONPATH": str(ROOT / "src"), "PYTHONIOENCODING": "utf-8"},
        timeout=250,
        check=False,
    )
    assert done.returncode == 2, done.stderr
    line = " ".join(done.stderr.split())
    assert "Traceback" not in line
    for words in (
        "error: out of memory: CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has",
        "Process 4711 has 20.00 GiB memory in use",
        "Peaks so far: cpu ",
        "GiB (planned 0.6 GiB)",
        f"The checkpoints in {run.train.output / 'checkpoints'} are intact.",
        "cpu 2.0 GiB (planned with 23.0 GiB)",
        "What would fit it: the same run with a new plan, which --resume makes",
    ):
        assert words in line
    checkpoint, skipped = CheckpointStore(run.train.output / "checkpoints").newest_intact()
    assert checkpoint is not None and checkpoint.step == 2 and skipped == []
    train(run, resume=True)
    assert digest_of(run) == digest_of(whole)
