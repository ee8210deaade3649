"""The optimizer, its learning rate and the clipping."""

from __future__ import annotations

import importlib.util
import math

import pytest
import torch
from torch import nn
from torch.optim import AdamW

from tworeel.config.schema import TrainConfig
from tworeel.errors import UserError
from tworeel.training.optimizer import (
    clip_gradients,
    learning_rate,
    make_optimizer,
    require_optimizer,
    set_learning_rate,
)


def with_gradients(*scales: float) -> list[nn.Parameter]:
    parameters = [nn.Parameter(torch.zeros(5, k + 1)) for k in range(len(scales))]
    for parameter, scale in zip(parameters, scales, strict=True):
        generator = torch.Generator().manual_seed(parameter.numel())
        parameter.grad = scale * torch.randn(parameter.shape, generator=generator)
    return parameters


def test_the_rate_rises_over_the_warm_up_and_then_stays() -> None:
    config = TrainConfig(steps=10, warmup_steps=4, learning_rate=1.0)
    assert [learning_rate(config, step) for step in range(6)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]


def test_linear_falls_from_the_peak_towards_0() -> None:
    config = TrainConfig(steps=10, warmup_steps=2, learning_rate=2.0, lr_schedule="linear")
    rates = [learning_rate(config, step) for step in range(10)]
    assert rates[:3] == [1.0, 2.0, 2.0]
    assert rates[2:] == pytest.approx([2.0 - k / 4 for k in range(8)])
    assert min(rates) > 0, "the last step trains too"


def test_cosine_is_half_way_down_in_the_middle() -> None:
    config = TrainConfig(steps=8, learning_rate=1.0, lr_schedule="cosine")
    rates = [learning_rate(config, step) for step in range(8)]
    assert rates == pytest.approx([(1 + math.cos(math.pi * k / 8)) / 2 for k in range(8)])
    assert rates[4] == pytest.approx(0.5)


def test_a_warm_up_over_the_whole_run_is_allowed() -> None:
    config = TrainConfig(steps=3, warmup_steps=3, learning_rate=3.0, lr_schedule="cosine")
    assert [learning_rate(config, step) for step in range(3)] == [1.0, 2.0, 3.0]


def test_options_reach_adamw_and_the_rate_all_groups() -> None:
    config = TrainConfig(learning_rate=0.5, betas=(0.8, 0.9), weight_decay=0.2)
    optimizer = make_optimizer(with_gradients(1.0, 1.0), config)
    assert isinstance(optimizer, AdamW)
    assert optimizer.defaults["fused"] is True
    (group,) = optimizer.param_groups
    assert (group["lr"], group["betas"], group["weight_decay"]) == (0.5, (0.8, 0.9), 0.2)
    set_learning_rate(optimizer, 0.125)
    assert group["lr"] == 0.125


def test_fused_is_left_out_where_a_device_has_no_kernel() -> None:
    parameters = [nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(2, device="meta"))]
    assert not make_optimizer(parameters, TrainConfig()).defaults["fused"]


def test_eight_bit_without_its_package_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    config = TrainConfig(optimizer="adamw8bit")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"train\.optimizer = 'adamw8bit': needs bitsandbytes; pip install"):
        require_optimizer(config)
    with pytest.raises(UserError):
        make_optimizer(with_gradients(1.0), config)


@pytest.mark.parametrize("limit", [0.5, 100.0])
def test_clipping_is_torchs_over_all_parameters_together(limit: float) -> None:
    ours, theirs = with_gradients(1.0, 3.0, 0.1), with_gradients(1.0, 3.0, 0.1)
    norm = clip_gradients(ours, limit)
    assert norm == pytest.approx(float(nn.utils.clip_grad_norm_(theirs, limit)), rel=1e-6)
    for one, other in zip(ours, theirs, strict=True):
        assert one.grad is not None and other.grad is not None
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-6, atol=0)


def test_the_norm_is_the_same_to_the_last_bit_in_any_order() -> None:
    scales = [10.0**k for k in range(-6, 7)]
    straight, backwards = with_gradients(*scales), with_gradients(*scales)[::-1]
    assert clip_gradients(straight, 1.0) == clip_gradients(backwards, 1.0)
    for one, other in zip(straight, backwards[::-1], strict=True):
        assert one.grad is not None and other.grad is not None
        assert torch.equal(one.grad, other.grad)


def test_without_a_limit_nothing_is_changed() -> None:
    parameters, before = with_gradients(1e6, 1.0), with_gradients(1e6, 1.0)
    assert clip_gradients(parameters, None) > 1e6
    for one, other in zip(parameters, before, strict=True):
        assert one.grad is not None and other.grad is not None
        assert torch.equal(one.grad, other.grad)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("limit", [1.0, None])
def test_a_gradient_that_is_not_finite_shows_in_the_norm_and_touches_no_other(
    bad: float, limit: float | None
) -> None:
    parameters = with_gradients(1.0, 1.0)
    assert parameters[0].grad is not None and parameters[1].grad is not None
    parameters[0].grad[0, 0] = bad
    kept = parameters[1].grad.clone()
    assert not math.isfinite(clip_gradients(parameters, limit))
    assert torch.equal(parameters[1].grad, kept)
