"""Numbers as people read them, and the running mean that curves are smoothed with."""

from __future__ import annotations

import math


def clock_time(seconds: float) -> str:
    """3723.4 -> `1:02:03`."""
    whole = max(0, round(seconds))
    return f"{whole // 3600}:{whole // 60 % 60:02}:{whole % 60:02}"


def short_seconds(seconds: float) -> str:
    """1243.2 -> `1,243 s`, 0.2548 -> `0.255 s`: three digits, or all of a whole number."""
    digits = 2 - math.floor(math.log10(max(seconds, 0.001)))
    return f"{seconds:,.{min(3, max(0, digits))}f} s"


class RunningMean:
    """Exponential moving mean without a bias to its start.

    m_n = (Σ d^(n-i) x_i) / (Σ d^(n-i)) with decay d, so the first value counts as itself.
    """

    def __init__(self, decay: float) -> None:
        assert 0 <= decay < 1
        self._decay = decay
        self._sum = self._weight = 0.0

    def add(self, value: float) -> float:
        """Take in one more value and return the mean."""
        self._sum = self._decay * self._sum + value
        self._weight = self._decay * self._weight + 1
        return self._sum / self._weight
