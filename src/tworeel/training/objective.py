"""Noise levels and the loss: flow matching over the shifted schedule.

Schedule with shift s: u = linspace(1, 0, 1001)[:-1], sigma = s u / (1 + (s - 1) u), timestep = 1000 sigma
(https://arxiv.org/abs/2403.03206, section 5.3.2). An expert sees only the noise levels of its own range.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from tworeel.engine.streams import send
from tworeel.errors import UserError

STEPS = 1000
USUAL_SHIFT = 5.0
_NORMAL = torch.distributions.Normal(torch.tensor(0.0, dtype=torch.float64), torch.tensor(1.0))


@dataclass(frozen=True, kw_only=True)
class NoiseLevels:
    """How sigmas are drawn and how their losses are weighted.

    Attributes:
        sampling: `uniform` over the schedule's steps; `bell`, the same with bell-shaped loss weights;
            `logit_normal`, a standard normal through the logistic function and the shift.
        shift: of the schedule.
        usual_shift: that the model is trained with by default, for messages.
        sigma_range: the part (low, high] that is drawn from.
    """

    sampling: Literal["uniform", "bell", "logit_normal"] = "uniform"
    shift: float = USUAL_SHIFT
    usual_shift: float = USUAL_SHIFT
    sigma_range: tuple[float, float] = (0.0, 1.0)

    def draw(self, generator: torch.Generator) -> tuple[float, float]:
        """Return a sigma in the range, as a number that fp32 holds, and the weight of its loss."""
        if self.sampling == "logit_normal":
            return _as_fp32(self._logit_normal(generator)), 1.0
        index = self._allowed[int(torch.randint(len(self._allowed), (), generator=generator))]
        return _as_fp32(self._sigmas[index]), float(self._weights[index])

    def require_some(self) -> None:
        """Raise UserError if the schedule has no noise level in the range, as extreme shifts do."""
        if not self._allowed:
            low, high = self.sigma_range
            raise UserError(
                f"train.shift = {self.shift:g}: leaves no noise level between {low:.3f} and {high:.3f}, "
                f"the share of the expert; {self.usual_shift:.3g} is usual"
            )

    @cached_property
    def _sigmas(self) -> Tensor:
        u = torch.linspace(1, 0, STEPS + 1, dtype=torch.float64)[:-1]
        return self._shifted(u)

    @cached_property
    def _allowed(self) -> list[int]:
        low, high = self.sigma_range
        return torch.nonzero((self._sigmas > low) & (self._sigmas <= high)).flatten().tolist()

    @cached_property
    def _weights(self) -> Tensor:
        """exp(-2 ((t - 500) / 1000)^2) less its minimum, scaled to a mean of 1 over the schedule."""
        if self.sampling == "uniform":
            return torch.ones(STEPS, dtype=torch.float64)
        bell = torch.exp(-2 * (self._sigmas - 0.5) ** 2)
        bell = bell - bell.min()
        return bell / bell.mean()

    def _logit_normal(self, generator: torch.Generator) -> Tensor:
        """Draw from the part of the distribution that lies in the range, by its inverse."""
        low, high = (_NORMAL.cdf(torch.logit(self._unshifted(edge))) for edge in self.sigma_range)
        share = torch.rand((), generator=generator, dtype=torch.float64)
        # Open at the ends: a share of exactly 0 would be a noise level of 0 or infinitely far out.
        quantile = (low + (high - low) * share).clamp(1e-9, 1 - 1e-9)
        return self._shifted(torch.sigmoid(_NORMAL.icdf(quantile)))

    def _shifted(self, u: Tensor) -> Tensor:
        return self.shift * u / (1 + (self.shift - 1) * u)

    def _unshifted(self, sigma: float) -> Tensor:
        return torch.tensor(sigma / (self.shift - (self.shift - 1) * sigma), dtype=torch.float64)


def _as_fp32(sigma: Tensor) -> float:
    return float(sigma.to(torch.float32))


def flow_loss(output: Tensor, target: Tensor, mask: Tensor | None) -> Tensor:
    """Mean squared error in fp32 over what the mask counts; a scalar on the output's device.

    Args:
        output: the transformer's prediction, (1, C, F, H, W) or tokens (1, L, C); what it has beyond the
            target along axis 1 is of tokens that only condition, and is left out.
        target: noise - x_0, fp32.
        mask: fp32, broadcastable; 0 where the loss is not counted.
    """
    squared = (output[:, : target.shape[1]].float() - send(target, output.device)).square()
    if mask is None:
        return squared.mean()
    mask = send(mask, output.device).expand_as(squared)
    return (squared * mask).sum() / mask.sum()
