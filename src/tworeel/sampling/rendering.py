"""Renders latents with whatever transformer is loaded; experts take turns."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import torch
from torch import Tensor

from tworeel.engine import Split, at_rest
from tworeel.lora.strength import lora_strength
from tworeel.models.family import ModelSource, Picture, Sampling
from tworeel.sampling.stand_ins import Answer, NotYet, StandIn, loaded, missing, remembered


@dataclass(frozen=True, kw_only=True)
class Take:
    """One cell of the contact sheet."""

    row: int
    """Which prompt."""
    strength: float
    picture: Picture


def takes_of(pictures: Sequence[Picture], strengths: Sequence[float]) -> list[Take]:
    """Every prompt with every strength."""
    return [
        Take(row=row, strength=strength, picture=picture)
        for (row, picture), strength in product(enumerate(pictures), strengths)
    ]


class Renderer:
    """Renders takes, for each of the model's experts in its turn.

    Args:
        sampling: of the family.
        source: of the model.
        configs: of its transformers, in the order of their turns.
        device: that the pipelines compute on beside the transformer.
        dtype: of the transformers' inputs.
        seed: of the noise, drawn on the CPU: the same on every device.
        poll: called before each forward; may raise to stop.
    """

    def __init__(
        self,
        sampling: Sampling,
        source: ModelSource,
        configs: Sequence[Any],
        *,
        device: torch.device,
        dtype: torch.dtype,
        seed: int,
        poll: Callable[[], None],
    ) -> None:
        self._sampling = sampling
        self._source = source
        self._configs = configs
        self._device = device
        self._dtype = dtype
        self._seed = seed
        self._poll = poll
        self._memories: dict[tuple[int, int], list[Any]] = defaultdict(list)
        self._latents: dict[int, Tensor] = {}

    def render(
        self, takes: Iterable[Take], turn: int, split: Split, done: Callable[[], None] = lambda: None
    ) -> list[Tensor]:
        """Render takes as far as the transformer goes whose turn it is.

        Args:
            takes: the same in every turn.
            turn: counts the transformers from 0.
            split: the one that is loaded, with its LoRA.
            done: called after each take.

        Returns:
            The latents of the takes, on the CPU; without those that another turn has to finish.
        """
        with at_rest(split):
            for number, take in enumerate(takes):
                if number not in self._latents:
                    with lora_strength(split.model, take.strength):
                        self._render(number, take.picture, turn, split)
                done()
        return [self._latents[number] for number in sorted(self._latents)]

    def _render(self, number: int, picture: Picture, turn: int, split: Split) -> None:
        stand_ins = [
            StandIn(config, self._device, self._dtype, self._answer(number, place, turn, split))
            for place, config in enumerate(self._configs)
        ]
        picture = _with_text_in(picture, self._dtype)
        pipeline = self._sampling.make_pipeline(self._source, stand_ins, picture)
        pipeline.set_progress_bar_config(disable=True)
        try:
            latents = pipeline(
                **self._sampling.arguments(self._source, picture),
                generator=torch.Generator().manual_seed(self._seed),
                output_type="latent",
                return_dict=False,
            )[0]
        except NotYet:
            return
        self._latents[number] = latents.cpu()

    def _answer(self, number: int, place: int, turn: int, split: Split) -> Answer:
        memory = self._memories[number, place]
        if place < turn:
            return remembered(memory)
        if place > turn:
            return missing
        return loaded(split, self._poll, memory if turn + 1 < len(self._configs) else None)


def _with_text_in(picture: Picture, dtype: torch.dtype) -> Picture:
    """Embeddings come in the cache's dtype; not every pipeline casts them to the transformer's."""

    def cast(text: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: tensor.to(dtype) for name, tensor in text.items()}

    negative = None if picture.negative is None else cast(picture.negative)
    return replace(picture, text=cast(picture.text), negative=negative)
