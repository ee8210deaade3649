"""A number that is not finite stops the run before the update, and the report names where (R14)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny_runs import Watcher, losses_of
from torch import Tensor, nn

from tworeel.cache.store import CacheStore
from tworeel.config.schema import RunConfig, TrainConfig
from tworeel.data.clips import Bucket
from tworeel.engine import Pipeline, split
from tworeel.lora.inject import inject_lora
from tworeel.lora.state import lora_parameters, lora_state
from tworeel.models.family import TrainingSample
from tworeel.signals import Stopped
from tworeel.training import run
from tworeel.training.loop import NonFinite, Trainer
from tworeel.training.micro_batches import MicroBatch
from tworeel.training.optimizer import make_optimizer
from tworeel.training.report import SilentRun

MakeConfig = Callable[..., RunConfig]
BAD = [math.nan, math.inf]
BAD_STEP = 2


@pytest.fixture
def trainer_of(monkeypatch: pytest.MonkeyPatch) -> list[Trainer]:
    """The trainers that runs make, so that a test can look at their weights."""
    made: list[Trainer] = []

    class Kept(Trainer):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            made.append(self)

    monkeypatch.setattr(run, "Trainer", Kept)
    return made


class Injecting(Watcher):
    """Does something to the model before the last-but-one step."""

    def __init__(self, trainers: list[Trainer], inject: Callable[[nn.Module], None]) -> None:
        super().__init__()
        self.before: dict[str, Tensor] = {}
        self._trainers = trainers
        self._inject = inject

    def step(self, report: Any) -> None:
        super().step(report)
        if report.step == BAD_STEP:
            (trainer,) = self._trainers
            self.before = lora_state(trainer.model)
            self._inject(trainer.model)


def assert_stopped_untouched(config: RunConfig, trainers: list[Trainer], injecting: Injecting) -> str:
    with pytest.raises(NonFinite) as caught:
        run.train(config, observer=injecting)
    after = lora_state(trainers[0].model)
    assert injecting.before.keys() == after.keys()
    assert all(torch.equal(injecting.before[name], after[name]) for name in after)
    assert [step for step, *_ in losses_of(config)] == [1, 2]
    checkpoints = sorted(path.name for path in (config.train.output / "checkpoints").glob("step-*"))
    assert checkpoints == ["step-00000002"], "nothing of the bad step was saved"
    assert not config.train.output.joinpath("lora.safetensors").exists()
    (line,) = caught.value.problems
    assert line.startswith(f"step {BAD_STEP + 1}: the loss is ")
    assert line.count(" at timestep ") == config.train.micro_batches
    assert "0/clip_" in line or "0/image" in line
    return line


@pytest.mark.parametrize("bad", BAD)
def test_an_activation_that_is_not_finite(
    make_config: MakeConfig, trainer_of: list[Trainer], bad: float
) -> None:
    def inject(model: nn.Module) -> None:
        model.get_submodule("blocks.3.norm2").register_forward_hook(lambda _, args, output: output + bad)

    line = assert_stopped_untouched(make_config(), trainer_of, Injecting(trainer_of, inject))
    assert "the loss is nan" in line


@pytest.mark.parametrize("bad", BAD)
def test_a_loss_that_is_not_finite(
    make_config: MakeConfig, trainer_of: list[Trainer], monkeypatch: pytest.MonkeyPatch, bad: float
) -> None:
    def inject(model: nn.Module) -> None:
        trainer = trainer_of[0]
        count = iter(range(10))
        own = trainer._loss
        monkeypatch.setattr(
            trainer, "_loss", lambda output, batch: own(output, batch) * (bad if next(count) == 1 else 1)
        )

    line = assert_stopped_untouched(make_config(), trainer_of, Injecting(trainer_of, inject))
    assert f"the loss is {bad:g}" in line
    first, second = line.split("Losses: ")[1].split(", ")
    assert second.endswith(f": {bad:g}") and math.isfinite(float(first.rpartition(": ")[2]))


@pytest.mark.parametrize("bad", [*BAD, -math.inf])
def test_a_gradient_that_is_not_finite(
    make_config: MakeConfig, trainer_of: list[Trainer], bad: float
) -> None:
    def inject(model: nn.Module) -> None:
        parameter = lora_parameters(model)["blocks.1.attn1.to_v.lora_B"]

        def spoil(gradient: Tensor) -> Tensor:
            gradient = gradient.clone()
            gradient[0, 0] = bad
            return gradient

        parameter.register_hook(spoil)

    line = assert_stopped_untouched(make_config(), trainer_of, Injecting(trainer_of, inject))
    assert f"and the gradient norm {abs(bad):g}" in line
    assert "the loss is nan" not in line


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("kind", ["latents", "text"])
def test_a_cached_tensor_that_is_not_finite(
    make_config: MakeConfig, trainer_of: list[Trainer], monkeypatch: pytest.MonkeyPatch, bad: float, kind: str
) -> None:
    spoiled: list[bool] = []
    own = CacheStore.read

    def read(self: CacheStore, key: str) -> dict[str, Tensor]:
        tensors = own(self, key)
        if spoiled and kind in tensors:
            tensors[kind].view(-1)[7] = bad
        return tensors

    monkeypatch.setattr(CacheStore, "read", read)
    config = make_config(train={"steps": 20})
    watcher = Injecting(trainer_of, lambda model: spoiled.append(True))
    with pytest.raises(NonFinite) as caught:
        run.train(config, observer=watcher)
    # The next step's micro-batches were read already: the one after them is bad.
    assert str(caught.value).startswith(f"step {BAD_STEP + 2}: the loss is ")
    assert [step for step, *_ in losses_of(config)] == [1, 2, 3]


def test_memory_rate_and_busy_shares_are_reported(make_config: MakeConfig) -> None:
    watcher = Watcher()
    run.train(make_config(train={"warmup_steps": 2}), observer=watcher)
    assert [report.step for report in watcher.steps] == [1, 2, 3, 4]
    assert [report.learning_rate for report in watcher.steps] == [5e-4, 1e-3, 1e-3, 1e-3]
    for report in watcher.steps:
        assert report.memory.keys() == {"cpu"}
        assert len(report.busy) == 2 and all(0 < share <= 1 for share in report.busy)
        assert report.seconds > 0 and report.grad_norm > 0


class Chain(nn.Module):
    """Two blocks, no more."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


class StopsAfter(SilentRun):
    """Stops at a later poll."""

    def __init__(self, polls: int) -> None:
        self.left = polls

    def poll(self) -> None:
        self.left -= 1
        if self.left < 0:
            raise Stopped(15)


def test_a_signal_stops_within_a_step_and_leaves_the_weights_of_the_step_before() -> None:
    torch.manual_seed(0)
    model = Chain()
    inject_lora(model, rank=2, alpha=2.0, targets=["0", "1"])
    config = TrainConfig(micro_batches=2, learning_rate=1e-2)
    pipeline = Pipeline(split(model, ["cpu", "cpu"]), forward=lambda m, b: m(**b.sample.inputs))
    optimizer = make_optimizer(lora_parameters(model).values(), config)
    trainer = Trainer(pipeline, optimizer, config, StopsAfter(3))
    sample = TrainingSample(inputs={"x": torch.ones(1, 4)}, target=torch.zeros(1, 4))
    batch = MicroBatch(
        clip="a.mp4", bucket=Bucket(frames=5, height=64, width=64), sigma=0.5, sample=sample, weight=0.5
    )
    trainer.step(0, [batch, batch])
    before = lora_state(model)
    with pytest.raises(Stopped):
        trainer.step(1, [batch, batch])
    assert all(torch.equal(before[name], value) for name, value in lora_state(model).items())
