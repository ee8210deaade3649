from __future__ import annotations

from pathlib import Path

from tworeel.config.fields import all_options
from tworeel.config.reference import reference

PAGE = Path(__file__).parents[2] / "docs" / "config.md"


def test_the_page_is_what_the_schema_gives() -> None:
    """If this fails: `python -m tworeel.config.reference > docs/config.md`."""
    assert PAGE.read_text(encoding="utf-8") == reference()


def test_every_option_has_a_row() -> None:
    rows = [line for line in reference().splitlines() if line.startswith("| `")]
    assert len(rows) == len(all_options())
