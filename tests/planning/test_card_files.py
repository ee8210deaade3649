from __future__ import annotations

from pathlib import Path

import pytest

from tworeel.errors import UserError
from tworeel.planning.card_files import card_rows
from tworeel.planning.cards import known_cards

OWN = """
[[card]]
name = "Workshop 48"
memory_gib = 48
bf16 = 100
bandwidth = 800
pcie = 32
source = "measured"
"""
RATE = "must be a number from 0.001 to 100000"
MEMORY = "must be a number > 0 and < 10000"


def problems(text: str) -> tuple[str, ...]:
    with pytest.raises(UserError) as caught:
        card_rows(text, "own.toml")
    assert all(line.startswith("--cards own.toml: ") for line in caught.value.problems)
    return tuple(line.removeprefix("--cards own.toml: ") for line in caught.value.problems)


@pytest.mark.parametrize(
    ("old", "new", "line"),
    [
        ("bf16 = 100", "bf16 = -1", f'card "Workshop 48": bf16 = -1: {RATE}'),
        ("bf16 = 100", "bf16 = '100'", f'card "Workshop 48": bf16 = "100": {RATE}'),
        ("pcie = 32\n", "", f'card "Workshop 48": pcie: missing; {RATE}'),
        ("bf16 = 100", "bf16 = 100\nfp8 = 'none'", f'card "Workshop 48": fp8 = "none": {RATE}'),
        ("pcie =", "pci =", "card \"Workshop 48\": pci = 32: unknown key (did you mean 'pcie'?)"),
        ('name = "Workshop 48"', "name = 48", "card 1: name = 48: must be a string"),
        ('name = "Workshop 48"\n', "", "card 1: name: missing; must be a string"),
        ("[[card]]", "[[cards]]", "no [[card]] is in it"),
        ("[[card]]", "[card]", "must be one or more tables, [[card]]"),
    ],
)
def test_a_mistake_names_the_card_the_key_and_what_is_allowed(old: str, new: str, line: str) -> None:
    assert any(found.endswith(line) for found in problems(OWN.replace(old, new)))


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("", "no [[card]] is in it"),
        ("card = []", "card = []: must be one or more tables, [[card]]"),
        ("card = [3]", "card 1 = 3: must be a table, [[card]]"),
        (f"kard = 3\n{OWN}", "kard = 3: unknown key (did you mean 'card'?)"),
        ("[[card", "(at end of document)"),
        (f"x = {'[' * 100_000}", "is nested too deeply"),
    ],
)
def test_a_file_that_is_no_list_of_cards_is_told_in_a_line(text: str, line: str) -> None:
    (found,) = problems(text)
    assert found.endswith(line)


@pytest.mark.parametrize("value", ["inf", "nan", "1e20", "0", "-inf"])
@pytest.mark.parametrize(("key", "allowed"), [("memory_gib", MEMORY), ("bandwidth", RATE), ("fp8", RATE)])
def test_figures_that_no_card_has_are_told(key: str, allowed: str, value: str) -> None:
    lines = [line for line in OWN.splitlines() if not line.startswith(key)]
    (found,) = problems("\n".join([*lines, f"{key} = {value}"]))
    assert found.startswith(f'card "Workshop 48": {key} = ') and found.endswith(allowed)


def test_all_mistakes_are_told_at_once() -> None:
    assert len(problems(OWN.replace("bf16 = 100", "bf17 = 100") + OWN.replace("48", "nan"))) > 2


def test_the_users_own_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "own.toml"
    path.write_text("", encoding="utf-8")
    with pytest.raises(UserError) as caught:
        known_cards(path)
    assert caught.value.problems == (f"--cards {path}: no [[card]] is in it",)


def test_two_cards_of_one_name_are_refused() -> None:
    text = OWN + OWN.replace("48", "24") + OWN.replace("memory_gib = 48", "memory_gib = 96")
    assert problems(text) == ('card "Workshop 48": 2 tables of this name',)
