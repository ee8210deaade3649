from __future__ import annotations

from tworeel.units import gibibytes


def test_sizes_are_readable() -> None:
    assert gibibytes(21.34 * 2**30) == "21.3 GiB"
