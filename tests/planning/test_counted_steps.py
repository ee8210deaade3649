"""A plan's bytes against those that the whole model's step holds on each device."""

from __future__ import annotations

from dataclasses import replace

import pytest
import test_flux2_plans
from counted_steps import counted_peaks
from real_models import budgets_of, request_of, settings_of, source_of

from tworeel.data.clips import Bucket
from tworeel.lora.targets import find_targets
from tworeel.models.flux2.family import FLUX2
from tworeel.planning.drafts import WORKSPACES
from tworeel.planning.planner import Planner
from tworeel.planning.plans import Plan
from tworeel.planning.requests import Request
from tworeel.planning.traces import TraceSettings
from tworeel.units import GIB

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


def bytes_of_step(plan: Plan) -> list[int]:
    """What is planned for each device beside the weights, the moments and what no operation shows."""
    found = plan.peaks
    for stage in plan.stages:
        moments = stage.parts["LoRA, gradients, optimizer"] * 3 // 4
        found[stage.device] -= stage.parts["weights"] + moments
    return [held - WORKSPACES for held in found.values()]


def assert_held(some: Request, monkeypatch: pytest.MonkeyPatch, *, over: float = 0.05) -> None:
    """Within `over`'s share or half a GiB, and never more than 2 % under it."""
    planned = bytes_of_step(Planner(some).best())
    counted = counted_peaks(some, some.residency, monkeypatch)
    for here, there in zip(planned, counted, strict=True):
        assert 0.98 * there <= here <= max((1 + over) * there, there + 0.5 * GIB), (planned, counted)


@pytest.mark.parametrize("variant", ["wan2.2-t2v-a14b", "wan2.1-i2v-14b", "wan2.2-ti2v-5b"])
def test_a_step_holds_what_is_planned(variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """TI2V modulates each token: six hidden states a micro-batch, which arrive ahead of their turn."""
    assert_held(request(variant), monkeypatch)


@pytest.mark.parametrize("variant", ["wan2.2-t2v-a14b", "wan2.2-ti2v-5b"])
@pytest.mark.parametrize("residency", ["offload", "offload-selective"])
def test_a_step_that_parks_holds_what_is_planned(
    residency: str, variant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The hidden state that the first block is given among it, which needs no gradient."""
    assert_held(replace(request(variant), residency=residency), monkeypatch)


def test_inputs_that_were_sent_far_ahead_are_held(monkeypatch: pytest.MonkeyPatch) -> None:
    some = replace(request("wan2.2-t2v-a14b"), micro_batches=6, slack=4)
    assert_held(some, monkeypatch, over=0.1)  # how far ahead is the threads' affair


def test_four_stages_without_slack_hold_what_is_planned(monkeypatch: pytest.MonkeyPatch) -> None:
    some = request("wan2.2-ti2v-5b")
    budgets = budgets_of("4x H200")
    assert_held(replace(some, budgets=budgets, split_at=(2, 3, 4), micro_batches=6, slack=0), monkeypatch)


def test_three_stages_hold_what_is_planned(monkeypatch: pytest.MonkeyPatch) -> None:
    some = request("wan2.2-ti2v-5b")
    some = replace(some, budgets=budgets_of("3x H200"), split_at=(2, 3), micro_batches=4)
    assert_held(some, monkeypatch)


@pytest.mark.parametrize(
    ("variant", "residency", "micro_batches"),
    [("wan2.2-t2v-a14b", "selective", 4), ("wan2.2-ti2v-5b", "keep", 7)],
)
def test_two_stages_a_device_hold_what_is_planned(
    variant: str, residency: str, micro_batches: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their peaks together would be a fifth to two thirds more."""
    some = replace(request(variant), stages_per_device=2, split_at=(1, 2, 4), residency=residency)
    # What waits is the threads' affair.
    assert_held(replace(some, micro_batches=micro_batches), monkeypatch, over=0.18)


def test_blocks_of_two_kinds_hold_what_is_planned(monkeypatch: pytest.MonkeyPatch) -> None:
    """FLUX.2, split inside of its double blocks."""
    source = test_flux2_plans.source_of()
    config = {**source.transformer.config, "num_layers": 2, "num_single_layers": 3}
    model = FLUX2.build_transformer(replace(source.transformer, config=config))
    targets = find_targets(model, FLUX2.lora_presets["all-linear"], FLUX2.block_lists)
    some = request_of(
        family=FLUX2,
        source=replace(source, transformer=replace(source.transformer, config=config)),
        trace=TraceSettings(targets=tuple(targets), compile=False),
        buckets={test_flux2_plans.SQUARE: 1.0},
        budgets=budgets_of("2x H200"),
        micro_batches=3,
        split_at=(1,),
        residency="recompute",
    )
    assert_held(some, monkeypatch)
