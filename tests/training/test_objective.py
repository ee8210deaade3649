"""The schedule, what is drawn from it, and the loss."""

from __future__ import annotations

from typing import Literal

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor

from tworeel.errors import UserError
from tworeel.models.wan.variants import traits
from tworeel.training.objective import NoiseLevels, flow_loss

EXPERTS = [
    ("wan2.2-t2v-a14b", "high"),
    ("wan2.2-t2v-a14b", "low"),
    ("wan2.2-i2v-a14b", "high"),
    ("wan2.2-i2v-a14b", "low"),
    ("wan2.1-t2v-14b", None),
]
BOUNDARY_INDEX = {"wan2.2-t2v-a14b": 417, "wan2.2-i2v-a14b": 358}


def draws(levels: NoiseLevels, count: int, seed: int = 0) -> list[tuple[float, float]]:
    generator = torch.Generator().manual_seed(seed)
    return [levels.draw(generator) for _ in range(count)]


def schedule() -> Tensor:
    """The formula of the authors, written once more: s = 1 - i/1000, sigma = 5s / (1 + 4s)."""
    level = 1 - torch.arange(1000, dtype=torch.float64) / 1000
    return 5 * level / (1 + 4 * level)


def test_the_schedule_is_shift_5_as_in_diffusers_scheduler() -> None:
    ours = torch.tensor(sorted({sigma for sigma, _ in draws(NoiseLevels(), 20_000)}, reverse=True))
    assert len(ours) == 1000
    torch.testing.assert_close(ours.double(), schedule(), rtol=1e-6, atol=0)
    theirs = FlowMatchEulerDiscreteScheduler(shift=5.0).sigmas
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_all_1000_timesteps_differ_in_fp32() -> None:
    timesteps = {
        float(torch.tensor(1000 * sigma, dtype=torch.float32)) for sigma, _ in draws(NoiseLevels(), 20_000)
    }
    assert len(timesteps) == 1000
    rounded = {float(torch.tensor(timestep).bfloat16()) for timestep in timesteps}
    assert len(rounded) < 300  # what would be left of them in bf16


def test_bell_weights_are_those_of_the_authors() -> None:
    levels = NoiseLevels(sampling="bell")
    weights = {round(1000 * sigma, 1): weight for sigma, weight in draws(levels, 30_000)}
    assert len(weights) == 1000
    assert sum(weights.values()) / 1000 == pytest.approx(1, abs=1e-9)

    def near(timestep: float) -> float:
        return weights[min(weights, key=lambda known: abs(known - timestep))]

    assert near(500) == pytest.approx(2.08, abs=0.005)
    assert near(875) == pytest.approx(0.78, abs=0.005)
    assert near(1000) == 0


def test_uniform_and_logit_normal_losses_all_count_the_same() -> None:
    assert {weight for _, weight in draws(NoiseLevels(), 100)} == {1.0}
    assert {weight for _, weight in draws(NoiseLevels(sampling="logit_normal"), 100)} == {1.0}


@pytest.mark.parametrize(("variant", "expert"), EXPERTS)
@pytest.mark.parametrize("sampling", ["uniform", "bell", "logit_normal"])
@pytest.mark.parametrize("shift", [1.0, 5.0, 8.0])
def test_every_draw_lies_in_the_experts_range(
    variant: str, expert: str | None, sampling: Literal["uniform", "bell", "logit_normal"], shift: float
) -> None:
    low, high = traits(variant, expert).sigma_range
    levels = NoiseLevels(sampling=sampling, shift=shift, sigma_range=(low, high))
    rounding = 2**-24  # sigma is rounded to fp32 once it is drawn
    for sigma, weight in draws(levels, 2000):
        assert low * (1 - rounding) < sigma <= high * (1 + rounding)
        assert 0 < sigma <= 1 and weight >= 0
        assert sigma == float(torch.tensor(sigma, dtype=torch.float32))


@pytest.mark.parametrize(("variant", "expert"), EXPERTS[:4])
@pytest.mark.parametrize("sampling", ["uniform", "bell"])
def test_an_expert_draws_exactly_the_steps_of_its_share(
    variant: str, expert: str, sampling: Literal["uniform", "bell"]
) -> None:
    levels = NoiseLevels(sampling=sampling, sigma_range=traits(variant, expert).sigma_range)
    all_steps = [float(sigma.float()) for sigma in schedule()]
    drawn = {min(range(1000), key=lambda i: abs(all_steps[i] - sigma)) for sigma, _ in draws(levels, 8000)}
    boundary = BOUNDARY_INDEX[variant]
    assert drawn == set(range(boundary) if expert == "high" else range(boundary, 1000))


@pytest.mark.parametrize(("variant", "expert"), EXPERTS)
def test_logit_normal_is_the_part_of_the_whole_distribution_in_the_range(
    variant: str, expert: str | None
) -> None:
    low, high = traits(variant, expert).sigma_range
    levels = NoiseLevels(sampling="logit_normal", sigma_range=(low, high))
    ours = torch.tensor([sigma for sigma, _ in draws(levels, 6000)], dtype=torch.float64)
    u = torch.sigmoid(torch.randn(400_000, generator=torch.Generator().manual_seed(9), dtype=torch.float64))
    everything = 5 * u / (1 + 4 * u)
    theirs = everything[(everything > low) & (everything <= high)]
    for share in (0.05, 0.25, 0.5, 0.75, 0.95):
        # Where our quantile lies among theirs: its standard deviation is below 0.0065.
        assert float((theirs <= ours.quantile(share)).double().mean()) == pytest.approx(share, abs=0.03)


def test_the_same_generator_draws_the_same() -> None:
    levels = NoiseLevels(sampling="logit_normal")
    assert draws(levels, 5, seed=3) == draws(levels, 5, seed=3) != draws(levels, 5, seed=4)


def test_a_shift_that_leaves_an_expert_nothing_is_refused() -> None:
    levels = NoiseLevels(shift=1e6, sigma_range=traits("wan2.2-t2v-a14b", "low").sigma_range)
    with pytest.raises(UserError, match=r"train\.shift = 1e\+06: leaves no noise level between 0\.000 and"):
        levels.require_some()
    NoiseLevels(sigma_range=traits("wan2.2-t2v-a14b", "low").sigma_range).require_some()


def test_the_loss_is_the_mean_square_in_fp32() -> None:
    generator = torch.Generator().manual_seed(0)
    output = torch.randn(1, 16, 3, 4, 4, generator=generator).bfloat16()
    target = torch.randn(1, 16, 3, 4, 4, generator=generator)
    loss = flow_loss(output, target, None)
    assert loss.dtype == torch.float32 and loss.shape == ()
    assert float(loss) == pytest.approx(float((output.double() - target.double()).square().mean()), rel=1e-6)


def test_what_the_mask_leaves_out_neither_counts_nor_thins_the_mean() -> None:
    output = torch.zeros(1, 16, 3, 4, 4, requires_grad=True)
    target = torch.full((1, 16, 3, 4, 4), 2.0)
    target[:, :, 0] = 1e3
    mask = torch.ones(1, 1, 3, 1, 1)
    mask[:, :, 0] = 0
    loss = flow_loss(output, target, mask)
    loss.backward()
    assert loss.item() == pytest.approx(4.0)
    assert output.grad is not None
    assert not output.grad[:, :, 0].any() and output.grad[:, :, 1:].all()
