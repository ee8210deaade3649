"""A LoRA in memory, whatever form its file has."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor


@dataclass(frozen=True, kw_only=True, eq=False)
class LoraTensors:
    """The update of one linear layer: `alpha / rank · up @ down`."""

    down: Tensor
    """LoRA's A, shape (rank, in)."""
    up: Tensor
    """LoRA's B, shape (out, rank)."""
    alpha: Tensor | None = None
    """One number, as it was stored; None where the file has none, which means the rank."""
    magnitude: Tensor | None = None
    """DoRA's magnitude: the length of each row of the merged weight, shape (out,)."""

    @property
    def rank(self) -> int:
        """Rows of `down`."""
        return self.down.shape[0]

    @property
    def alpha_value(self) -> float:
        """Alpha as a number."""
        return float(self.rank) if self.alpha is None else float(self.alpha)

    @property
    def scale(self) -> float:
        """What `up @ down` is multiplied by."""
        return self.alpha_value / self.rank


@dataclass(frozen=True, kw_only=True, eq=False)
class LoraFile:
    """What a LoRA file holds."""

    modules: Mapping[str, LoraTensors]
    """By the names that the linear layers have in the transformer (diffusers' names)."""
    metadata: Mapping[str, str] = field(default_factory=dict)
    form: str | None = None
    """The form it was read in; None if it comes from a model."""
