"""Which text encoders embed the captions."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch

from tworeel.errors import raise_if_any
from tworeel.models.family import Family, ModelSource, TextOptions, TextWorker


def text_workers(
    family: Family,
    source: ModelSource,
    devices: Sequence[torch.device],
    dtype: torch.dtype,
    options: TextOptions,
) -> Sequence[TextWorker]:
    """Say which text encoders embed the captions: the family's choice, or one on each device."""
    if family.text_workers is not None:
        return family.text_workers(source, devices, dtype, options)
    raise_if_any(text_option_problems(family, options))
    places = [torch.device("cpu")] if options.placement == "cpu" else devices
    return [
        TextWorker(device=place, open=partial(family.open_text_encoder, source, place, dtype))
        for place in places
    ]


def text_option_problems(family: Family, options: TextOptions) -> list[str]:
    """Say what a family's text encoder cannot do; one that places itself finds out when it does."""
    if family.text_workers is not None:
        return []
    problems = []
    if options.placement == "spread":
        problems.append(
            "cache.text_placement = 'spread': this model's text encoder runs whole on each device; "
            "allowed are auto, each, cpu"
        )
    if options.quantize not in (None, "auto"):
        problems.append(
            f"cache.text_quantize = '{options.quantize}': this model's text encoder is not quantized; "
            "leave it out"
        )
    return problems
