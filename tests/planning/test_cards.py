from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from tworeel.errors import UserError
from tworeel.planning.cards import card_of_device, known_cards, parse_cards, with_memory
from tworeel.units import GIB

CARDS = known_cards()
OWN = """
[[card]]
name = "Workshop 48"
torch_name = "NVIDIA Workshop 48"
memory_gib = 48
bf16 = 100
bandwidth = 800
pcie = 32
source = "measured"
"""


def test_every_card_has_a_source_and_rates_that_belong_together() -> None:
    assert len(CARDS) > 40 and len({card.name for card in CARDS}) == len(CARDS)
    for card in CARDS:
        assert card.source and 8 * GIB <= card.memory <= 300 * GIB, card.name
        assert 1e13 < card.bf16 < 1e16 and 1e11 < card.bandwidth < 1e13, card.name
        assert card.fp8 is None or 1.5 < card.fp8 / card.bf16 < 2.5, card.name


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("2x RTX 4090", ["RTX 4090", "RTX 4090"]),
        ("2 × nvidia geforce rtx 4090", ["RTX 4090", "RTX 4090"]),
        ("4090, 3060 12GB", ["RTX 4090", "RTX 3060 12GB"]),
        ("RTX 3060", ["RTX 3060 12GB"]),
        ("pro 4500", ["RTX PRO 4500 Blackwell"]),
        ("W7900", ["Radeon PRO W7900"]),
        ("1x H200 + 1x RTX 5090", ["H200", "RTX 5090"]),
    ],
)
def test_cards_are_found_however_they_are_spelled(text: str, names: list[str]) -> None:
    assert [card.name for card in parse_cards(text, CARDS)] == names


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("2x RTX 4091", "no card 'RTX 4091' is known (did you mean 'RTX 4090'?); names are as in"),
        ("4090,", "a card is missing"),
        ("0x RTX 4090", "0 cards; allowed are 1 to 16"),
        ("99x RTX 4090", "99 cards; allowed are 1 to 16"),
        ("RTX 4091, nothing", "no card 'nothing' is known"),
        ("H100", "'H100' may be H100 PCIe, H100 80GB; name one of them"),
        ("2x A100", "'A100' may be A100 40GB, A100 40GB PCIe, A100 80GB, A100 80GB PCIe; name"),
        ("RTX PRO 6000", "'RTX PRO 6000' may be RTX PRO 6000 Blackwell, RTX PRO 6000 Blackwell Max-Q, RTX"),
        ("NVIDIA GeForce RTX 3080", "may be RTX 3080 10GB, RTX 3080 12GB; name one of them"),
    ],
)
def test_a_name_that_is_no_card_or_several_is_told_with_those_that_are_near(text: str, words: str) -> None:
    with pytest.raises(UserError) as caught:
        parse_cards(text, CARDS)
    assert words in str(caught.value)


def test_all_unknown_cards_are_told_at_once() -> None:
    with pytest.raises(UserError) as caught:
        parse_cards("RTX 1, RTX 2", CARDS)
    assert len(caught.value.problems) == 2


def test_memory_may_be_another_for_all_or_for_each() -> None:
    pair = parse_cards("2x RTX 4090", CARDS)
    assert [card.memory for card in with_memory(pair, "22.5")] == [int(22.5 * GIB)] * 2
    assert [card.memory for card in with_memory(pair, "22.5,15")] == [int(22.5 * GIB), 15 * GIB]


@pytest.mark.parametrize("text", ["-3", "0", "20000", "many", "1,2,3", "nan", "inf", ""])
def test_memory_that_no_card_has_is_told(text: str) -> None:
    with pytest.raises(UserError, match="--memory-gib"):
        with_memory(parse_cards("2x RTX 4090", CARDS), text)


def test_a_card_that_is_there_is_known_by_torchs_name_and_its_size() -> None:
    found = card_of_device("NVIDIA GeForce RTX 3080", int(11.7 * GIB), CARDS)
    assert found is not None and found.name == "RTX 3080 12GB"
    found = card_of_device("NVIDIA H100 80GB HBM3", int(79.2 * GIB), CARDS)
    assert found is not None and found.name.startswith("H100")
    assert card_of_device("Abacus 3000", GIB, CARDS) is None


def test_a_user_can_add_a_card(tmp_path: Path) -> None:
    (tmp_path / "own.toml").write_text(OWN, encoding="utf-8")
    (card,) = parse_cards("Workshop 48", known_cards(tmp_path / "own.toml"))
    assert card.memory == 48 * GIB and card.fp8 is None and card.crossing == card.pcie


def test_a_card_without_torchs_name_is_none_but_by_its_own(tmp_path: Path) -> None:
    own = OWN.replace('torch_name = "NVIDIA Workshop 48"\n', "")
    (tmp_path / "own.toml").write_text(own, encoding="utf-8")
    cards = known_cards(tmp_path / "own.toml")
    assert card_of_device("NVIDIA", GIB, cards) is None
    for vendor in ("NVIDIA", "GeForce", "-"):
        with pytest.raises(UserError, match=f"no card '{vendor}' is known"):
            parse_cards(vendor, cards)
    with pytest.raises(UserError, match=r"'rtx' may be RTX 3060 12GB, .*; name one of them"):
        parse_cards("rtx", cards)
    assert parse_cards("workshop", cards)[0].name == "Workshop 48"


def test_a_file_that_is_not_there_is_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--cards .*nothing\.toml: No such file"):
        known_cards(tmp_path / "nothing.toml")


@pytest.mark.parametrize(
    ("name", "fp8", "int8"),
    [
        ("H100 80GB", "rowwise", "fused"),
        ("RTX 4090", "tensorwise", "fused"),
        ("RTX 3090", "weight-only", "fused"),
        ("RX 7900 XTX", "weight-only", "weight-only"),
    ],
)
def test_a_card_multiplies_8_bit_weights_as_it_can(name: str, fp8: str, int8: str) -> None:
    (card,) = parse_cards(name, CARDS)
    assert (card.fp8_mode, card.int8_mode) == (fp8, int8)


@pytest.mark.parametrize(
    ("name", "capability", "fp8", "int8"),
    [
        ("Card", None, "tensorwise", "fused"),
        ("Turing", 7.5, "tensorwise", "tensorwise"),
        ("Ultra", 10.3, "rowwise", "fused"),
        ("Consumer", 12.0, "tensorwise", "fused"),
        ("Intel Arc", None, "weight-only", "weight-only"),
    ],
)
def test_a_card_of_ones_own_multiplies_8_bit_weights_as_its_like_do(
    name: str, capability: float | None, fp8: str, int8: str
) -> None:
    card = replace(CARDS[0], name=name, torch_name="", capability=capability, fp8=1.0, int8=1.0)
    assert (card.fp8_mode, card.int8_mode) == (fp8, int8)
