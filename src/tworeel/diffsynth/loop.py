"""DiffSynth's training loop, with the micro-batches of an optimizer step overlapping."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from tworeel.engine.pipeline import Pipeline
from tworeel.engine.split import Split


def train_in_micro_batches(
    accelerator: Any, dataset: Any, model: Any, model_logger: Any, args: Any, division: Split
) -> None:
    """Train as DiffSynth's `launch_training_task` does, with the same options, order, losses and files.

    Its loop computes the micro-batches of an accumulated step one after the other. Here they are drawn in the
    same order, and computed when the last one of the step is there.
    """
    runner: Any = importlib.import_module("diffsynth.diffusion.runner")
    runner.save_training_args(args)
    optimizer = runner.get_optimizer_class(args.customized_optimizer)(
        model.trainable_modules(), lr=args.learning_rate, weight_decay=args.weight_decay
    )
    scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer)
    loader = DataLoader(dataset, shuffle=True, collate_fn=_first, num_workers=args.dataset_num_workers)
    model.to(device=accelerator.device)
    model, optimizer, loader, scheduler = accelerator.prepare(model, optimizer, loader, scheduler)
    step = _Step(accelerator, model, division, from_cache=bool(dataset.load_from_cache))
    for epoch in range(args.num_epochs):
        for data in runner.tqdm(loader):
            with accelerator.accumulate(model):
                losses = step.add(data)
                # As if each had been computed in its turn: before the step, but for the last.
                for loss in losses[:-1]:
                    model_logger.on_step_end(accelerator, model, args.save_steps, loss=loss)
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
                for loss in losses[-1:]:
                    model_logger.on_step_end(accelerator, model, args.save_steps, loss=loss)
        if args.save_steps is None:
            model_logger.on_epoch_end(accelerator, model, epoch)
    model_logger.on_training_end(accelerator, model, args.save_steps)


def _first(batch: list[Any]) -> Any:
    """DiffSynth's batches are of one sample. A function of a module: workers of the loader must find it."""
    return batch[0]


class _Step:
    """The micro-batches of an optimizer step, until there are as many as it takes."""

    def __init__(self, accelerator: Any, model: Any, division: Split, *, from_cache: bool) -> None:
        self._accelerator = accelerator
        self._model = model
        self._from_cache = from_cache
        self._waiting: list[Any] = []
        self._pipeline = Pipeline(division, forward=self._forward)

    def add(self, data: Any) -> list[Tensor]:
        """Take one more; when the step is whole, compute it and return its losses."""
        self._waiting.append(data)
        if not self._accelerator.sync_gradients:
            return []
        micro_batches, self._waiting = self._waiting, []
        share = self._accelerator.gradient_accumulation_steps
        losses: dict[int, Tensor] = {}

        def shared(loss: Tensor, numbered: tuple[int, Any]) -> Tensor:
            losses[numbered[0]] = loss.detach()
            return loss / share

        self._pipeline.step(list(enumerate(micro_batches)), shared)
        return [losses[number] for number in range(len(micro_batches))]

    def _forward(self, models: Any, numbered: tuple[int, Any]) -> Any:
        """From the encoders and the noise, which are drawn in the order of the micro-batches, to the loss."""
        _, data = numbered
        if self._from_cache:
            return models(lambda: self._model({}, inputs=data))
        return models(lambda: self._model(data))
