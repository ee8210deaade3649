"""A device that runs out of memory: the error says so, and nothing that was saved is lost."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tiny_runs import Watcher, tiny_config, tiny_model

from tworeel.config.schema import RunConfig
from tworeel.demo.clips import write_clips
from tworeel.errors import UserError
from tworeel.training.checkpoint import CheckpointStore
from tworeel.training.report import StepReport
from tworeel.training.run import train

pytestmark = pytest.mark.gpu


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


def test_out_of_memory_in_a_step_is_told_and_the_run_goes_on_from_its_checkpoint(
    folder: Path, shortage: Shortage, cuda: torch.device
) -> None:
    config = config_of(folder, "run", cuda)
    with pytest.raises(UserError) as caught:
        train(config, observer=FallsShort(shortage, after=3))
    (line,) = caught.value.problems
    for words in ("out of memory", "Tried to allocate", "Peaks so far: cuda:0 ", "are intact", "offload"):
        assert words in line
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
        train(config)
    assert CheckpointStore(config.train.output / "checkpoints").steps() == []
