"""A device that runs out of memory: the error says so, and nothing that was saved is lost."""

from __future__ import annotations

import gc
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tiny_runs import Watcher, tiny_config, tiny_model

from tworeel.config.schema import RunConfig
from tworeel.demo.clips import write_clips
from tworeel.errors import UserError
from tworeel.planning.measurements import FOLDER_VARIABLE
from tworeel.training.checkpoint import CheckpointStore
from tworeel.training.report import StepReport
from tworeel.training.run import train

pytestmark = pytest.mark.gpu
TAKE_ALL = """
import sys, torch
held = []
for size in (2**30, 2**26, 2**21):
    try:
        while True:
            held.append(torch.empty(size, dtype=torch.uint8, device=sys.argv[1]))
    except torch.OutOfMemoryError:
        pass
print("taken", flush=True)
sys.stdin.read()
"""


class Shortage:
    """Takes all of a device's memory away, and gives it back."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._held: list[torch.Tensor] = []

    def begin(self) -> None:
        """Let torch get nothing more from the device, and use up what it has."""
        gc.collect()
        torch.cuda.empty_cache()
        total = torch.cuda.get_device_properties(self._device).total_memory
        torch.cuda.set_per_process_memory_fraction(1000 / total, self._device)
        self.use_up()

    def use_up(self) -> None:
        """Leave none of what torch has got already."""
        for size in (2**20, 2**16, 2**12, 2**9):
            while self._take(size):
                pass

    def end(self) -> None:
        """Let torch have everything again."""
        self._held.clear()
        torch.cuda.set_per_process_memory_fraction(1.0, self._device)

    def _take(self, size: int) -> bool:
        try:
            self._held.append(torch.empty(size, dtype=torch.uint8, device=self._device))
        except torch.OutOfMemoryError:
            return False
        return True


class Neighbour(Shortage):
    """Another program that takes all of a device's memory, and ends."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self._program: subprocess.Popen[str] | None = None

    def begin(self) -> None:
        """Start it once this process has given back what it does not use, and use up what it has."""
        gc.collect()
        torch.cuda.empty_cache()
        command = [sys.executable, "-c", TAKE_ALL, str(self._device)]
        self._program = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self._program.stdout is not None and self._program.stdout.readline() == "taken\n"
        self.use_up()

    def end(self) -> None:
        """Let it end."""
        if self._program is not None:
            self._program.communicate(timeout=60)
            self._program = None
        super().end()


@pytest.fixture
def neighbour(cuda: torch.device) -> Iterator[Neighbour]:
    """Not started yet; gone after the test."""
    neighbour = Neighbour(cuda)
    yield neighbour
    neighbour.end()


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Measurements of these runs tell nothing of the card."""
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path / "home"))


@pytest.fixture
def shortage(cuda: torch.device) -> Iterator[Shortage]:
    """Not begun yet; over after the test."""
    shortage = Shortage(cuda)
    yield shortage
    shortage.end()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Has a model and clips; runs lie beside them and share a cache."""
    write_clips(tmp_path / "clips", count=2)
    return tmp_path


def config_of(folder: Path, name: str, device: torch.device | str) -> RunConfig:
    """Six steps, both stages on one device, with a checkpoint after every second."""
    model = tiny_model(folder / "model", dim=256, ffn_dim=512)
    engine = {"devices": (str(device), str(device))}
    return tiny_config(model, folder / "clips", folder / name, train={"steps": 6}, engine=engine)


class FallsShort(Watcher):
    """Takes the device's memory away after a step."""

    def __init__(self, shortage: Shortage, after: int) -> None:
        super().__init__()
        self._shortage = shortage
        self._after = after

    def step(self, report: StepReport) -> None:
        super().step(report)
        if report.step == self._after:
            self._shortage.begin()


def planned_peak(config: RunConfig) -> float:
    """GiB of the first device, from the plan in the run's folder."""
    plan = json.loads((config.train.output / "plan.json").read_text(encoding="utf-8"))
    peak: float = plan["peaks"]["cuda:0"] / 2**30
    return peak


def test_memory_that_another_program_took_is_told_and_the_run_goes_on_when_that_has_ended(
    folder: Path, neighbour: Neighbour, cuda: torch.device
) -> None:
    config = config_of(folder, "run", cuda)
    with pytest.raises(UserError) as caught:
        train(config, observer=FallsShort(neighbour, after=3))
    (line,) = caught.value.problems
    for words in (
        f"out of memory on {cuda}: ",
        "Tried to allocate",
        f"Peaks so far: {cuda} ",
        f"(planned {planned_peak(config):.1f} GiB)",
        f"The checkpoints in {config.train.output / 'checkpoints'} are intact.",
        f"There is less memory now than was planned with: {cuda} ",
        "What would fit it: ",
    ):
        assert words in line
    checkpoint, skipped = CheckpointStore(config.train.output / "checkpoints").newest_intact()
    assert checkpoint is not None and checkpoint.step == 2 and not skipped
    neighbour.end()
    watcher = Watcher()
    assert train(config, resume=True, observer=watcher).lora.is_file()
    assert [report.step for report in watcher.steps] == [3, 4, 5, 6]


def test_out_of_memory_in_a_step_is_told_and_the_run_goes_on_from_its_checkpoint(
    folder: Path, shortage: Shortage, cuda: torch.device
) -> None:
    config = config_of(folder, "run", cuda)
    with pytest.raises(UserError) as caught:
        train(config, observer=FallsShort(shortage, after=3))
    (line,) = caught.value.problems
    for words in ("out of memory", "Tried to allocate", "Peaks so far: cuda:0 ", "are intact", "offload"):
        assert words in line
    assert f"(planned {planned_peak(config):.1f} GiB)" in line
    store = CheckpointStore(config.train.output / "checkpoints")
    checkpoint, skipped = store.newest_intact()
    assert checkpoint is not None and checkpoint.step == 2 and not skipped
    shortage.end()
    watcher = Watcher()
    result = train(config, resume=True, observer=watcher)
    assert [report.step for report in watcher.steps] == [3, 4, 5, 6]
    assert result.lora.is_file()


def test_out_of_memory_while_loading_is_told_too(
    folder: Path, shortage: Shortage, cuda: torch.device
) -> None:
    train(config_of(folder, "cpu", "cpu"))  # fills the cache
    config = config_of(folder, "run", cuda)
    shortage.begin()
    with pytest.raises(UserError, match="out of memory"):
        train(config, anyway=True)
    assert CheckpointStore(config.train.output / "checkpoints").steps() == []
