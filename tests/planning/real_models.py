"""Models of real size by their configuration alone: no file, no weight."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from tworeel.benchmarks.models import config_of
from tworeel.benchmarks.shapes import model_shape
from tworeel.data.clips import Bucket
from tworeel.lora.targets import find_targets
from tworeel.models.family import Component, ModelSource, Traits
from tworeel.models.wan.family import WAN
from tworeel.planning.budgets import Budget, budget_of_card
from tworeel.planning.cards import known_cards, parse_cards, with_memory
from tworeel.planning.requests import Request
from tworeel.planning.traces import TraceSettings
from tworeel.units import GIB

CLIP = Bucket(frames=49, height=480, width=832)
IMAGE = Bucket(frames=1, height=512, width=512)

_WAN_14B = config_of(model_shape("wan-14b"))
_WITH_IMAGE = {**_WAN_14B, "in_channels": 36, "image_dim": 1280, "added_kv_proj_dim": 5120}
_CONFIGS: dict[str, dict[str, Any]] = {
    "wan2.2-t2v-a14b": _WAN_14B,
    "wan2.1-i2v-14b": _WITH_IMAGE,
    "wan2.1-flf2v-14b": {**_WITH_IMAGE, "pos_embed_seq_len": 514},
    "wan2.2-ti2v-5b": config_of(model_shape("wan-5b")),
    "wan2.1-t2v-1.3b": config_of(model_shape("wan-1.3b")),
}
_IMAGES = {
    "wan2.1-i2v-14b": ("first_image",),
    "wan2.1-flf2v-14b": ("first_image", "last_image"),
    "wan2.2-ti2v-5b": ("first_image",),
}
VARIANTS = tuple(_CONFIGS)


def source_of(variant: str) -> ModelSource:
    """The model as if it had been found on disk."""
    five = variant == "wan2.2-ti2v-5b"
    traits = Traits(
        family="wan",
        variant=variant,
        frame_rate=24 if five else 16,
        spatial_multiple=32 if five else 16,
        temporal_stride=4,
        tokens_per_pixel_area=1024 if five else 256,
        image_inputs=_IMAGES.get(variant, ()),
        image_optional=five,
    )
    transformer = Component(files=(), layout="native", config=_CONFIGS[variant])
    return ModelSource(traits=traits, transformer=transformer)


def settings_of(variant: str, **changes: Any) -> TraceSettings:
    """bf16, compiled, rank 32, a LoRA on all linear layers of the blocks."""
    model = WAN.build_transformer(source_of(variant).transformer)
    targets = tuple(find_targets(model, WAN.lora_presets["all-linear"], WAN.block_lists))
    return replace(TraceSettings(targets=targets), **changes)


def budgets_of(gpus: str, memory_gib: str | None = None) -> tuple[Budget, ...]:
    """Cards of the table."""
    cards = parse_cards(gpus, known_cards())
    cards = cards if memory_gib is None else with_memory(cards, memory_gib)
    return tuple(budget_of_card(card, number) for number, card in enumerate(cards))


def limited(budgets: Sequence[Budget], gib: float) -> tuple[Budget, ...]:
    """The same cards with so much memory for this process."""
    return tuple(replace(budget, total=int(gib * GIB), free=int(gib * GIB)) for budget in budgets)


def request_of(variant: str = "wan2.2-t2v-a14b", /, **changes: Any) -> Request:
    """Eight clips of 480 × 832 × 49 a step on two H100s."""
    usual = Request(
        family=WAN,
        source=source_of(variant),
        buckets={CLIP: 1.0},
        trace=settings_of(variant),
        budgets=budgets_of("2x H100 80GB"),
        may_reorder=False,
        micro_batches=8,
        slack=1,
        stages_per_device=1,
        split_at=None,
        residency="auto",
        streamed=None,
        host_free=180 * GIB,
        steps=1000,
        clips_per_epoch=100,
    )
    return replace(usual, **changes)
