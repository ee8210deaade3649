from __future__ import annotations

import pytest

from tworeel.report.format import short_seconds


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0.0, "0.000 s"),
        (0.00002, "0.000 s"),
        (0.25481, "0.255 s"),
        (14.75, "14.8 s"),
        (118.0, "118 s"),
        (1243.2, "1,243 s"),
        (58_000.0, "58,000 s"),
    ],
)
def test_seconds_have_three_digits_and_never_an_exponent(seconds: float, words: str) -> None:
    assert short_seconds(seconds) == words
