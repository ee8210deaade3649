"""What is done with a fit, with made-up measurements: real ones need an accelerator (tests/gpu)."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from toy_wan import assert_close, gradients, make_micro_batch, make_wan, run_unsplit, square_loss

from tworeel import Pipeline, split
from tworeel.engine import fitter, parking
from tworeel.engine.fitting import StageMemory
from tworeel.engine.footprints import TOO_LARGE, Footprint
from tworeel.engine.probing import Probe
from tworeel.engine.residency import Residency
from tworeel.engine.schedule import Held
from tworeel.engine.weight_streaming import Streamed, pinned_bytes

SIZES = {
    Residency.KEEP: Footprint(kept=2000, working=1000, hidden=100),
    Residency.SELECTIVE: Footprint(kept=200, working=1500, hidden=100),
}


class Devices:
    """Takes the place of what is measured: devices of so much memory, that fit a forward after some tries.

    Weights may go as far as the split lets them; a block has `weights` bytes. With less than `tight` of its
    blocks streamed, stage 1 has room for none.
    """

    def __init__(
        self,
        monkeypatch: pytest.MonkeyPatch,
        available: int,
        tries: int = 0,
        inputs: int = 0,
        weights: int = 10**6,
        tight: int = 0,
    ) -> None:
        self._tries = tries
        self._inputs = inputs
        self._weights = weights
        self._tight = tight
        self._available = available
        monkeypatch.setattr(fitter, "_memory", self.memory)
        monkeypatch.setattr(fitter, "_measure", self.measure)
        monkeypatch.setattr(fitter, "_accelerated", lambda split: list(range(split.placement.num_stages)))
        monkeypatch.setattr(torch.accelerator, "empty_cache", lambda: None)
        monkeypatch.setattr(parking, "SMALLEST", 0)

    def memory(self, split, stage, held):
        blocks, streamed = split.placement.blocks_of(stage), split.streamed_on(stage)
        some = StageMemory(available=self._available, num_blocks=len(blocks), may_keep=0, held=held)
        may_stream = split.may_stream * (len(blocks) - len(streamed))
        return replace(
            some,
            may_keep=len(blocks) - len(streamed),
            streamed=len(streamed),
            # The slots take nothing, so that two blocks have something to give.
            streaming=[
                Streamed(more * self._weights, pinned_bytes([self._weights] * more))
                for more in range(may_stream + 1)
            ],
        )

    def measure(self, split, forward, memories):
        self._tries -= 1
        if self._tries >= 0:
            return None
        probe = Probe([replace(memory, inputs=self._inputs) for memory in memories])
        probe.footprints = [dict.fromkeys(split.placement.block_kinds, SIZES) for _ in memories]
        if len(split.streamed_on(1)) < self._tight:
            probe.footprints[1] = dict.fromkeys(split.placement.block_kinds, dict.fromkeys(SIZES, TOO_LARGE))
        return probe


def fitted(**options) -> Pipeline:
    """A pipeline of two stages, of two blocks and three, after two steps whose gradients are right."""
    batches = [make_micro_batch("t2v", torch.float64, seed) for seed in range(4)]
    _, expected = run_unsplit(make_wan("t2v", torch.float64), batches)
    model = make_wan("t2v", torch.float64)
    pipeline = Pipeline(model, ["cpu", "cpu"], residency="auto", **options)
    pipeline.split.is_auto = True
    for _ in range(2):
        model.zero_grad()
        pipeline.step(batches, square_loss)
        assert_close(gradients(model), expected, 1e-10)
    return pipeline


def test_with_room_all_blocks_keep(monkeypatch):
    Devices(monkeypatch, available=100_000)
    assert fitted().split.residency_in_words() == "stage 0: 2 keep; stage 1: 3 keep"


def test_what_was_measured_of_each_stage_is_there_to_be_read(monkeypatch):
    assert not split(make_wan("t2v", torch.float64), ["cpu", "cpu"], residency="auto").footprints
    Devices(monkeypatch, available=100_000)
    assert fitted().split.footprints == [{"blocks": SIZES}] * 2


def test_inputs_that_wait_on_a_later_stage_take_room(monkeypatch):
    """Two micro-batches are under way on the first stage, so the second one holds the inputs of two."""
    kept = {}
    for inputs in (0, 1500):
        Devices(monkeypatch, available=10_000, inputs=inputs)
        residencies = fitted().split.residencies
        kept[inputs] = residencies[2:].count(Residency.KEEP)
    assert kept[0] == 3 > kept[1500]


def test_the_first_blocks_of_a_stage_recompute_first(monkeypatch):
    Devices(monkeypatch, available=2 * (2000 + 200 + 2 * 100) + 1500)
    pipeline = fitted()
    assert pipeline.split.residency_in_words() == "stage 0: 1 selective, 1 keep; stage 1: 1 selective, 2 keep"
    assert pipeline.split.residencies[0] is Residency.SELECTIVE


def test_weights_are_streamed_where_parked_activations_do_not_fit(monkeypatch):
    Devices(monkeypatch, available=100)
    pipeline = fitted()
    words = pipeline.split.residency_in_words()
    assert words == "stage 0: 2 offload-selective, weights of 1 streamed; " + (
        "stage 1: 3 offload-selective, weights of 1 streamed"
    )
    assert pipeline.split.streamed_bytes > 0 and pipeline.split.host_pool.held > 0


def test_a_forward_that_does_not_fit_has_more_and_more_weights_streamed(monkeypatch):
    Devices(monkeypatch, available=100_000, tries=1)
    assert fitted().split.residency_in_words() == (
        "stage 0: 1 keep, 1 selective, weights of 1 streamed; "
        "stage 1: 2 selective, 1 keep, weights of 2 streamed"
    )


def test_where_not_one_block_fits_beside_the_weights_more_of_them_are_streamed(monkeypatch):
    """Its size is known then, and no more has to give way than is needed."""
    Devices(monkeypatch, available=100_000, tight=1)
    assert fitted().split.residency_in_words() == (
        "stage 0: 2 keep; stage 1: 2 selective, 1 keep, weights of 2 streamed"
    )


def test_a_block_that_never_fits_is_tried_with_all_weights_streamed(monkeypatch):
    Devices(monkeypatch, available=100_000, tight=4)
    assert "stage 1: 3 offload, weights of 3 streamed" in fitted().split.residency_in_words()


def test_nothing_more_is_streamed_than_was_asked_for(monkeypatch):
    Devices(monkeypatch, available=100)
    pipeline = fitted(streamed=(1, 0))
    assert pipeline.split.residency_in_words() == (
        "stage 0: 2 offload-selective, weights of 1 streamed; stage 1: 3 offload-selective"
    )


def test_where_streamed_weights_are_not_enough_only_the_blocks_inputs_are_parked(monkeypatch):
    recompute = {Residency.RECOMPUTE: Footprint(kept=100, working=1000, hidden=100)}
    monkeypatch.setitem(globals(), "SIZES", SIZES | recompute)
    Devices(monkeypatch, available=1350, weights=150)
    assert fitted().split.residency_in_words() == (
        "stage 0: 2 offload, weights of 1 streamed; stage 1: 3 offload"
    )


def test_no_more_weights_are_streamed_than_host_memory_may_hold(monkeypatch):
    Devices(monkeypatch, available=100)
    without = fitted().split
    assert [len(without.streamed_on(stage)) for stage in (0, 1)] == [1, 1]
    limit = without.streamed_bytes * 3 // 4
    division = split(make_wan("t2v", torch.float64), ["cpu", "cpu"], residency="auto", host_limit=limit)
    division.is_auto = True
    Pipeline(division).step([make_micro_batch("t2v", torch.float64, 0)], square_loss)
    assert [len(division.streamed_on(stage)) for stage in (0, 1)] == [1, 0]
    assert division.streamed_bytes <= limit


def test_weights_that_come_to_the_host_leave_less_of_it_to_activations():
    division = split(
        make_wan("t2v", torch.float32),
        ["cpu", "cpu"],
        residency="recompute",
        streamed=(1, 0),
        host_limit=10**8,
    )
    there = division.streamed_bytes
    assert division.host_pool.limit == 10**8 - there
    division.stream(1, 2)
    assert division.host_pool.limit == 10**8 - division.streamed_bytes < 10**8 - there


def test_a_larger_clip_is_fitted_again_and_a_smaller_one_is_not(monkeypatch):
    fits: list[int] = []
    pipeline = Pipeline(make_wan("t2v", torch.float32), ["cpu", "cpu"], residency="auto")
    pipeline.split.is_auto = True
    monkeypatch.setattr("tworeel.engine.pipeline.fit", lambda split, forward, depths: fits.append(depths[0]))
    small, large = make_micro_batch("t2v", torch.float32, 0), make_micro_batch("t2v", torch.float32, 5)
    for batches in ([small], [small], [large], [small], [small] * 4, [large] * 4, [small] * 4):
        pipeline.step(batches, square_loss)
    assert fits == [1, 1, 2, 2]


def test_a_step_that_is_deeper_on_a_later_stage_is_fitted_again(monkeypatch):
    """Two devices with two stages each hold [4, 3, 2, 1] micro-batches of four, and [3, 3, 3, 1] of three."""
    fits = []
    pipeline = Pipeline(make_wan("t2v", torch.float32), ["cpu:0", "cpu:1"] * 2, residency="keep")
    pipeline.split.is_auto = True
    monkeypatch.setattr("tworeel.engine.pipeline.fit", lambda split, forward, depths: fits.append(depths))
    small = make_micro_batch("t2v", torch.float32, 0)
    for count in (4, 3, 2):
        pipeline.step([small] * count, square_loss)
    assert fits == [[4, 3, 2, 1], [3, 3, 3, 1]]


def test_what_runs_beside_a_block_counts_with_it():
    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = torch.nn.ModuleList(torch.nn.Linear(4, 4) for _ in range(4))
            self.side = torch.nn.Linear(4, 4)

    probe = Probe([None, None])
    probe.memories = [StageMemory(available=0, num_blocks=2, may_keep=2, held=Held(1, 1, 1))] * 2
    large = {way: replace(one, kept=10 * one.kept, working=10) for way, one in SIZES.items()}
    probe.footprints = [{"blocks": SIZES, "side": large}, {"blocks": SIZES}]
    division = split(Model(), ["cpu", "cpu"], blocks=["blocks"], beside={"side": "blocks.1"})
    first, second = (fitter._of_stage(division, stage, probe) for stage in range(2))
    assert first.kept == [24000, 22000, 0] and second.kept == [4000, 2000, 0]
    assert first.working == second.working
    probe.footprints[0] = {"blocks": SIZES, "side": dict.fromkeys(SIZES, TOO_LARGE)}
    assert fitter._of_stage(division, 0, probe).most_left[-1] == TOO_LARGE.kept


def test_after_a_fit_that_failed_half_way_gradients_are_right_and_the_next_step_is_fitted(monkeypatch):
    """It has streamed weights of blocks that had kept all."""
    small, large = (make_micro_batch("t2v", torch.float32, seed) for seed in (0, 5))
    _, expected = run_unsplit(make_wan("t2v", torch.float32), [small])
    model = make_wan("t2v", torch.float32)
    pipeline = Pipeline(model, ["cpu", "cpu"], residency="keep")
    pipeline.split.is_auto = True
    fits: list[int] = []

    def fit(division, forward, depths):
        fits.append(depths[0])
        if len(fits) == 2:
            division.stream(0, 1)
            raise torch.OutOfMemoryError("full")

    monkeypatch.setattr("tworeel.engine.pipeline.fit", fit)
    pipeline.step([small], square_loss)
    with pytest.raises(torch.OutOfMemoryError):
        pipeline.step([large], square_loss)
    model.zero_grad()
    pipeline.step([small], square_loss)
    assert_close(gradients(model), expected, 1e-5)
    pipeline.step([large], square_loss)
    assert len(fits) == 3
