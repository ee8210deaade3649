"""Makes the micro-batches of a step from the cache, one step ahead of the devices."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tworeel.cache.build import CacheIndex
from tworeel.config.schema import TrainConfig
from tworeel.data.clips import Bucket, Clip
from tworeel.models.family import Family, TrainingSample, Traits
from tworeel.training.objective import NoiseLevels, flow_loss
from tworeel.training.order import Order, generator_for


@dataclass(frozen=True, kw_only=True)
class MicroBatch:
    """One clip, noised, and how its loss counts."""

    clip: str
    bucket: Bucket
    sigma: float
    sample: TrainingSample
    weight: float
    """Of its loss in the step: the sampling's weight over the number of micro-batches."""


@dataclass(frozen=True, kw_only=True)
class MicroBatches:
    """All steps of the run: a pure function of the step, so that a resume needs no state."""

    family: Family
    traits: Traits
    clips: tuple[Clip, ...]
    index: CacheIndex
    order: Order
    levels: NoiseLevels
    config: TrainConfig
    dtype: torch.dtype

    @property
    def fingerprint(self) -> str:
        """A hash of everything that is trained on: each clip's pixels, caption and place in the list."""
        keys = [
            [clip.name, self.index.latent_keys[clip.name], self.index.text_keys[clip.name]]
            for clip in self.clips
        ]
        return hashlib.sha256(json.dumps(keys).encode()).hexdigest()

    def of_step(self, step: int) -> list[MicroBatch]:
        """The micro-batches of a step, counted from 0."""
        return [self._make(step, i) for i in range(self.config.micro_batches)]

    def ahead(self, start: int, stop: int) -> Generator[tuple[int, list[MicroBatch]], None, None]:
        """Yield (step, micro-batches) and read the next step's from the cache meanwhile."""
        with ThreadPoolExecutor(1, thread_name_prefix="micro-batches") as pool:
            coming = pool.submit(self.of_step, start)
            for step in range(start, stop):
                ready = coming.result()
                if step + 1 < stop:
                    coming = pool.submit(self.of_step, step + 1)
                yield step, ready

    def _make(self, step: int, number: int) -> MicroBatch:
        key = (self.config.seed, step, number)
        clip = self.clips[self.order.clip_at(step * self.config.micro_batches + number)]
        drop = float(torch.rand((), generator=generator_for(*key, "caption"))) < self.config.caption_dropout
        cached = self.index.load(clip, drop_caption=drop)
        sigma, weight = self.levels.draw(generator_for(*key, "sigma"))
        noise = torch.randn(cached["latents"].shape, generator=generator_for(*key, "noise"))
        sample = self.family.make_sample(
            self.traits,
            cached,
            noise,
            sigma,
            dtype=self.dtype,
            condition_on_image=self.config.condition_on_image,
        )
        return MicroBatch(
            clip=clip.name,
            bucket=clip.bucket,
            sigma=sigma,
            sample=sample,
            weight=weight / self.config.micro_batches,
        )


def run_transformer(model: nn.Module, batch: MicroBatch) -> Tensor:
    """The transformer's prediction for a micro-batch, (1, C, F, H, W)."""
    output: tuple[Any, ...] = model(**batch.sample.inputs, return_dict=False)
    return output[0]


def weighted_loss(output: Tensor, batch: MicroBatch) -> Tensor:
    """The micro-batch's part of the step's loss."""
    return flow_loss(output, batch.sample.target, batch.sample.loss_mask) * batch.weight
