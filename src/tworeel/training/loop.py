"""The training loop: micro-batches through the pipeline, then one update."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence

from torch import Tensor, nn
from torch.optim import Optimizer

from tworeel.config.schema import TrainConfig
from tworeel.engine import Pipeline, StepResult
from tworeel.engine.timeline import busy_shares
from tworeel.errors import UserError
from tworeel.lora.state import lora_parameters
from tworeel.training.devices import peak_memory
from tworeel.training.micro_batches import MicroBatch, weighted_loss
from tworeel.training.optimizer import clip_gradients, learning_rate, set_learning_rate
from tworeel.training.report import RunObserver, StepReport
from tworeel.training.selfcheck import CHECKED_STEPS, SelfCheck


class NonFinite(UserError):
    """The loss or the gradient is NaN or infinite; the weights are those of the step before."""


class Trainer:
    """Does one optimizer step at a time.

    Args:
        pipeline: of the model with its LoRA.
        optimizer: of the LoRA's parameters.
        config: of the training.
        observer: polled for each micro-batch, so that a signal ends a step within it.
    """

    def __init__(
        self, pipeline: Pipeline, optimizer: Optimizer, config: TrainConfig, observer: RunObserver
    ) -> None:
        self.model: nn.Module = pipeline.split.model
        self.optimizer = optimizer
        self._pipeline = pipeline
        self._config = config
        self._observer = observer
        self._devices = pipeline.split.placement.devices
        self._lora = lora_parameters(self.model)
        self._steps_done = 0
        self._residency = ""
        layers = {name: pipeline.split.placement.device_of(name) for name in self._lora}
        self._self_check: SelfCheck | None = SelfCheck(self.model, self._lora, layers, optimizer)

    def step(self, step: int, batches: Sequence[MicroBatch]) -> StepReport:
        """Do one step, counted from 0.

        Raises:
            NonFinite: before the update; nothing was changed.
            SelfCheckError: in the first two steps, if the LoRA does not train.
        """
        begin = time.perf_counter()
        if self._self_check is not None:
            self._self_check.before_step()
        rate = learning_rate(self._config, step)
        set_learning_rate(self.optimizer, rate)
        self.optimizer.zero_grad(set_to_none=True)
        result = self._pipeline.step(batches, self._loss, timed=True)
        self._tell_residency()
        loss = math.fsum(float(loss) for loss in result.losses)
        norm = clip_gradients(self._lora.values(), self._config.max_grad_norm)
        _require_finite(step, loss, norm, batches, result)
        self._update(rate, loss)
        return StepReport(
            step=step + 1,
            loss=loss,
            grad_norm=norm,
            learning_rate=rate,
            seconds=time.perf_counter() - begin,
            memory=peak_memory(self._devices),
            busy=tuple(busy_shares(result.spans, len(self._devices))),
            buckets=tuple(batch.bucket for batch in batches),
        )

    def _tell_residency(self) -> None:
        """Once, and whenever a larger clip changes it."""
        chosen = self._pipeline.split.residency_in_words()
        if self._pipeline.split.is_auto and chosen != self._residency:
            self._residency = chosen
            self._observer.say(f"What the blocks leave behind for their backward: {chosen}")

    def _loss(self, output: Tensor, batch: MicroBatch) -> Tensor:
        self._observer.poll()
        return weighted_loss(output, batch)

    def _update(self, rate: float, loss: float) -> None:
        if self._self_check is not None:
            self._self_check.before_update()
        self.optimizer.step()
        if self._self_check is not None:
            self._self_check.after_update(rate, loss)
        self._steps_done += 1
        if self._steps_done == CHECKED_STEPS:
            self._self_check = None


def _require_finite(
    step: int, loss: float, norm: float, batches: Sequence[MicroBatch], result: StepResult
) -> None:
    if math.isfinite(loss) and math.isfinite(norm):
        return
    each = ", ".join(
        f"{batch.clip} at timestep {1000 * batch.sigma:.1f}: {float(value):g}"
        for batch, value in zip(batches, result.losses, strict=True)
    )
    raise NonFinite(
        f"step {step + 1}: the loss is {loss:g} and the gradient norm {norm:g}; stopped before the update, "
        f"nothing of this step was saved. Losses: {each}"
    )
