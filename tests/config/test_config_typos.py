"""The goal: at least 99 % of one-edit typos of all option names get the right suggestion, within 2 s."""

from __future__ import annotations

import random
import string
import time

import pytest

from tworeel.config import load_config
from tworeel.config.fields import Option, all_options
from tworeel.errors import UserError

EDITS_PER_OPTION = 30
LETTERS = string.ascii_lowercase + "_"


def one_edit(word: str, draw: random.Random) -> str:
    """Delete, replace, insert or swap one letter."""
    at = draw.randrange(len(word))
    letter = draw.choice(LETTERS)
    swapped = word[:at] + word[at + 1 : at + 2] + word[at] + word[at + 2 :]
    return draw.choice(
        [
            word[:at] + word[at + 1 :],
            word[:at] + letter + word[at + 1 :],
            word[:at] + letter + word[at:],
            swapped,
        ]
    )


def typos() -> list[tuple[Option, str]]:
    draw = random.Random(0)
    names = {(option.section, option.name) for option in all_options()}
    return [
        (option, typo)
        for option in all_options()
        for typo in (one_edit(option.name, draw) for _ in range(EDITS_PER_OPTION))
        if (option.section, typo) not in names
    ]


def complaint(option: Option, typo: str) -> str:
    overrides: dict[str, object] = {"model.path": "wan", "data.sources": [{"path": "clips"}]}
    if option.section == "data.sources":
        overrides["data.sources"] = [{"path": "clips", typo: 1}]
    else:
        overrides[f"{option.section}.{typo}"] = 1
    with pytest.raises(UserError) as caught:
        load_config(None, overrides)
    return str(caught.value)


def test_one_edit_typos_get_the_right_suggestion() -> None:
    cases = typos()
    assert len(cases) > 1000
    wrong = [
        (option.key, typo)
        for option, typo in cases
        if f"mean '{option.name}'?" not in complaint(option, typo)
    ]
    assert len(wrong) <= 0.01 * len(cases), wrong


def test_a_hundred_typos_at_once_are_reported_within_two_seconds() -> None:
    overrides: dict[str, object] = {
        f"{option.section}.{typo}": 1 for option, typo in typos() if option.section != "data.sources"
    }
    start = time.perf_counter()
    with pytest.raises(UserError) as caught:
        load_config(None, overrides)
    assert time.perf_counter() - start < 2
    assert len(caught.value.problems) >= 100
