"""A plan's bytes against those that the whole model's step holds on each device."""

from __future__ import annotations

from dataclasses import replace

import pytest
from counted_steps import counted_peaks
from real_models import budgets_of, request_of, settings_of, source_of

from tworeel.data.clips import Bucket
from tworeel.planning.cards import GIB
from tworeel.planning.drafts import WORKSPACES
from tworeel.planning.planner import Planner
from tworeel.planning.plans import StagePlan
from tworeel.planning.requests import Request

BLOCKS = 5
CLIP = Bucket(frames=33, height=480, width=832)


def request(variant: str) -> Request:
    source = source_of(variant)
    config = {**source.transformer.config, "num_layers": BLOCKS}
    targets = [name for name in settings_of(variant).targets if int(name.split(".")[1]) < BLOCKS]
    return request_of(
        variant,
        source=replace(source, transformer=replace(source.transformer, config=config)),
        trace=settings_of(variant, compile=False, targets=tuple(targets)),
        buckets={CLIP: 1.0},
        budgets=budgets_of("2x H200"),
        micro_batches=3,
        split_at=(2,),
        residency="selective",
    )


def bytes_of_step(stage: StagePlan) -> int:
    """What is planned beside the weights, the moments and what no operation shows."""
    parts = stage.parts
    gradients = parts["LoRA, gradients, optimizer"] // 4
    return parts["activations"] + parts["workspace"] - WORKSPACES + parts["inputs"] + gradients


@pytest.mark.parametrize("variant", ["wan2.2-t2v-a14b", "wan2.1-i2v-14b", "wan2.2-ti2v-5b"])
def test_a_step_holds_what_is_planned(variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """TI2V modulates each token: six hidden states a micro-batch, which arrive ahead of their turn."""
    some = request(variant)
    planned = [bytes_of_step(stage) for stage in Planner(some).best().stages]
    counted = counted_peaks(some, "selective", monkeypatch)
    for here, there in zip(planned, counted, strict=True):
        assert 0.98 * there <= here <= max(1.05 * there, there + 0.5 * GIB), (planned, counted)
