"""Micro-batches are a pure function of the seed and the step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from tworeel.config.schema import RunConfig
from tworeel.training.assembly import cache_clips, make_micro_batches
from tworeel.training.micro_batches import MicroBatch, MicroBatches, weighted_loss
from tworeel.training.objective import flow_loss
from tworeel.training.order import generator_for
from tworeel.training.preflight import preflight
from tworeel.training.report import SilentRun

MakeConfig = Callable[..., RunConfig]


@pytest.fixture
def make_batches(make_config: MakeConfig) -> Callable[..., MicroBatches]:
    def make(**sections: Any) -> MicroBatches:
        config = make_config(**sections)
        job = preflight(config, SilentRun())
        return make_micro_batches(config, job, cache_clips(config, job, SilentRun()))

    return make


def tensors(batch: MicroBatch) -> dict[str, Tensor]:
    inputs = {name: value for name, value in batch.sample.inputs.items() if isinstance(value, Tensor)}
    return {**inputs, "target": batch.sample.target}


def assert_equal(ours: list[MicroBatch], theirs: list[MicroBatch]) -> None:
    for one, other in zip(ours, theirs, strict=True):
        assert (one.clip, one.sigma, one.weight) == (other.clip, other.sigma, other.weight)
        assert tensors(one).keys() == tensors(other).keys()
        assert all(torch.equal(value, tensors(other)[name]) for name, value in tensors(one).items())


def test_a_step_is_the_same_whenever_it_is_made(make_batches: Callable[..., MicroBatches]) -> None:
    first, again = make_batches(), make_batches()
    straight = [first.of_step(step) for step in range(4)]
    torch.manual_seed(99)  # nothing hangs on the global generator
    for step in (3, 0, 2, 1):
        assert_equal(again.of_step(step), straight[step])
    sigmas = [batch.sigma for step in straight for batch in step]
    assert len(set(sigmas)) == len(sigmas)


def test_reading_ahead_gives_the_same_steps_from_any_start(
    make_batches: Callable[..., MicroBatches],
) -> None:
    batches = make_batches()
    ahead = list(batches.ahead(2, 5))
    assert [step for step, _ in ahead] == [2, 3, 4]
    for step, ready in ahead:
        assert_equal(ready, batches.of_step(step))


def test_reading_ahead_may_be_given_up(make_batches: Callable[..., MicroBatches]) -> None:
    ahead = make_batches().ahead(0, 100)
    next(ahead)
    ahead.close()
    with pytest.raises(StopIteration):
        next(ahead)


def test_another_seed_gives_other_noise(make_batches: Callable[..., MicroBatches]) -> None:
    one, other = make_batches().of_step(0), make_batches(train={"seed": 1}).of_step(0)
    assert [batch.sigma for batch in one] != [batch.sigma for batch in other]


def test_x_t_and_the_target_follow_from_the_cached_clip_and_the_noise(
    make_batches: Callable[..., MicroBatches],
) -> None:
    batches = make_batches()
    for number, batch in enumerate(batches.of_step(3)):
        clip = next(clip for clip in batches.clips if clip.name == batch.clip)
        latents = batches.index.load(clip)["latents"]
        noise = torch.randn(latents.shape, generator=generator_for(0, 3, number, "noise"))
        assert torch.equal(batch.sample.target[0], noise - latents)
        noisy = (1 - batch.sigma) * latents + batch.sigma * noise
        torch.testing.assert_close(batch.sample.inputs["hidden_states"][0], noisy, rtol=1e-5, atol=1e-6)


def test_the_losses_of_a_step_add_up_to_their_weighted_mean(
    make_batches: Callable[..., MicroBatches],
) -> None:
    batches = make_batches(train={"micro_batches": 3, "timestep_sampling": "bell"})
    ready = batches.of_step(0)
    total = 0.0
    for batch in ready:
        output = torch.zeros_like(batch.sample.target)
        _, bell = batches.levels.draw(generator_for(0, 0, ready.index(batch), "sigma"))
        assert batch.weight == pytest.approx(bell / 3)
        total += float(flow_loss(output, batch.sample.target, None)) * bell
        assert float(weighted_loss(output, batch)) == pytest.approx(
            float(flow_loss(output, batch.sample.target, None)) * bell / 3, rel=1e-6
        )
    assert sum(float(weighted_loss(torch.zeros_like(b.sample.target), b)) for b in ready) == pytest.approx(
        total / 3, rel=1e-6
    )


@pytest.mark.parametrize(("share", "expected"), [(0.0, 0), (1.0, 40)])
def test_caption_dropout_takes_all_or_none(
    make_batches: Callable[..., MicroBatches], share: float, expected: int
) -> None:
    assert dropped(make_batches(train={"caption_dropout": share})) == expected


def test_caption_dropout_takes_about_its_share(make_batches: Callable[..., MicroBatches]) -> None:
    batches = make_batches(train={"caption_dropout": 0.5})
    assert 10 <= dropped(batches) <= 30
    assert batches.index.empty_text is not None


def dropped(batches: MicroBatches) -> int:
    """How many of 40 micro-batches see the empty caption: one token, the end."""
    texts = [
        batch.sample.inputs["encoder_hidden_states"][0]
        for step in range(20)
        for batch in batches.of_step(step)
    ]
    return sum(not text[1:].any() for text in texts)


def test_the_fingerprint_follows_clips_captions_and_their_order(
    make_batches: Callable[..., MicroBatches],
) -> None:
    batches = make_batches()
    assert make_batches().fingerprint == batches.fingerprint
    assert make_batches(data={"frames": (1,), "clip_rule": "uniform"}).fingerprint != batches.fingerprint
    assert replace(batches, clips=batches.clips[::-1]).fingerprint != batches.fingerprint
    text = dict.fromkeys(batches.index.text_keys, "text/0")
    other = replace(batches, index=replace(batches.index, text_keys=text))
    assert other.fingerprint != batches.fingerprint
