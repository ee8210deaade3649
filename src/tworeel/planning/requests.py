"""What is to be planned. Data alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from tworeel.data.clips import Bucket
from tworeel.models.family import Family, ModelSource
from tworeel.planning.budgets import Budget
from tworeel.planning.traces import MeasuredBytes, TraceSettings


@dataclass(frozen=True, kw_only=True)
class Request:
    """What is to be planned."""

    family: Family
    source: ModelSource
    buckets: Mapping[Bucket, float]
    """How often a clip of each bucket is drawn."""
    trace: TraceSettings
    budgets: tuple[Budget, ...]
    """Of the devices, in the order of the stages, once over."""
    may_reorder: bool
    """Whether the devices may take the stages in another order."""
    micro_batches: int
    slack: int
    stages_per_device: int
    split_at: tuple[int, ...] | None
    residency: str
    streamed: tuple[int, ...] | None
    host_free: int
    """Bytes of host memory that may be pinned."""
    steps: int
    clips_per_epoch: float
    moments: float = 2.0
    """What the optimizer keeps, in sizes of the LoRA: AdamW's two moments."""
    may_interleave: bool = False
    """Whether each device may have two stages where it is asked for one."""
    cpp_wrapper: bool = False
    """Whether compiled blocks are launched from C++."""
    may_launch_from_cpp: bool = False
    """Whether they may be where that is better."""
    less_precise: tuple[Request, ...] = ()
    """The same with other weights, which may be taken where these do not fit; in order of preference."""
    attention: str = "auto"
    """Which attention kernel is asked for; only what was measured depends on it."""
    measured: MeasuredBytes = field(default_factory=dict)
    """What runs like it have measured of blocks; by default all is planned as it is traced."""

    def in_order(self, devices: Sequence[str]) -> Request:
        """The request with its devices in this order and no other: to try all orders anew takes long."""
        budgets = tuple(sorted(self.budgets, key=lambda budget: devices.index(budget.device)))
        return replace(self, budgets=budgets, may_reorder=False)
