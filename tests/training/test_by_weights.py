"""Where a transformer goes that only renders. The cards are made up: no GPU is needed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tworeel.config.schema import RunConfig
from tworeel.planning.budgets import budget_of_card
from tworeel.planning.cards import known_cards, parse_cards
from tworeel.planning.shares import WEIGHTS_SHARE
from tworeel.training.by_weights import placed_by_weights
from tworeel.training.run import train
from tworeel.training.sample import sample
from tworeel.training.sample_job import Turn, sample_preflight

MakeConfig = Callable[..., RunConfig]
SAMPLE = {"prompts": ("a red ball",), "steps": 3, "size": (64, 32), "frames": 5, "strengths": (0.0,)}


@pytest.fixture
def cards(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """A function (bytes of each stage's card): takes the place of what is free."""

    def give(*free: float) -> None:
        found = [
            replace(budget_of_card(card, number), free=int(size))
            for number, (size, card) in enumerate(
                zip(free, parse_cards(f"{len(free)}x RTX 4090", known_cards()), strict=True)
            )
        ]
        monkeypatch.setattr("tworeel.training.by_weights.budgets_on", lambda devices: tuple(found))

    return give


@pytest.fixture
def turn(make_config: MakeConfig, tmp_path: Path) -> tuple[RunConfig, Turn]:
    config = make_config(sample=SAMPLE)
    return config, sample_preflight(config, {}, tmp_path / "sheet").turns[0]


def with_engine(config: RunConfig, **changes: Any) -> RunConfig:
    return config.model_copy(update={"engine": config.engine.model_copy(update=changes)})


def bytes_of(turn: Turn) -> tuple[int, list[int]]:
    """Of all, and of each block."""
    placement = turn.placement
    blocks = [turn.transformer.get_submodule(name) for name in placement.block_names]
    return sum(p.nbytes for p in turn.transformer.parameters()), [
        sum(p.nbytes for p in block.parameters()) for block in blocks
    ]


def test_on_cpus_all_stays_as_it_is(turn: tuple[RunConfig, Turn]) -> None:
    config, found = turn
    assert placed_by_weights(found, config) is found


def test_what_fits_is_not_streamed(turn: tuple[RunConfig, Turn], cards: Callable[..., None]) -> None:
    config, found = turn
    whole, _ = bytes_of(found)
    cards(2 * whole, 2 * whole)
    placed = placed_by_weights(found, config)
    assert placed.streamed == () and placed.placement.boundaries == found.placement.boundaries


def test_the_larger_card_gets_more_blocks(turn: tuple[RunConfig, Turn], cards: Callable[..., None]) -> None:
    config, found = turn
    whole, blocks = bytes_of(found)
    cards(4 * whole, 1.9 * blocks[-1] / WEIGHTS_SHARE)
    placed = placed_by_weights(found, with_engine(config, split_at=None))
    assert placed.placement.boundaries[1] == len(blocks) - 1 and placed.streamed == ()


def test_what_does_not_fit_is_streamed(turn: tuple[RunConfig, Turn], cards: Callable[..., None]) -> None:
    config, found = turn
    whole, blocks = bytes_of(found)
    rest = whole - sum(blocks)
    cards(4 * whole, (rest + 0.5 * blocks[-1]) / WEIGHTS_SHARE)
    placed = placed_by_weights(found, with_engine(config, split_at=(2,)))
    assert placed.streamed_counts == (0, 2)


@pytest.mark.parametrize(
    ("change", "counts"), [({"streamed_blocks": (1, 0)}, (1, 0)), ({"residency": "keep"}, None)]
)
def test_what_is_set_is_kept(
    turn: tuple[RunConfig, Turn], cards: Callable[..., None], change: dict[str, Any], counts: object
) -> None:
    config, found = turn
    cards(1000, 1000)
    placed = placed_by_weights(found, with_engine(config, split_at=(2,), **change))
    assert placed.streamed_counts == counts and placed.placement.boundaries[1] == 2


def test_counts_that_are_set_are_those_of_even_shares(
    turn: tuple[RunConfig, Turn], cards: Callable[..., None]
) -> None:
    config, found = turn
    whole, blocks = bytes_of(found)
    cards(4 * whole, 1.9 * blocks[-1] / WEIGHTS_SHARE)
    placed = placed_by_weights(found, with_engine(config, streamed_blocks=(0, 2)))
    assert placed.streamed_counts == (0, 2) and placed.placement.boundaries == found.placement.boundaries


def test_counts_that_even_shares_have_no_blocks_for_are_left_to_the_weights(
    turn: tuple[RunConfig, Turn], cards: Callable[..., None]
) -> None:
    config, found = turn
    whole, _ = bytes_of(found)
    cards(4 * whole, 4 * whole)
    assert placed_by_weights(found, with_engine(config, streamed_blocks=(3, 1))).streamed == ()


def test_with_streamed_weights_the_same_is_rendered(
    make_config: MakeConfig, tmp_path: Path, cards: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    rendered: list[Tensor] = []
    streamed: list[int] = []

    def keep(folder: Path, prompts: Any, takes: Any, latents: list[Tensor], *rest: Any) -> None:
        rendered.extend(latents)

    def load(config: RunConfig, turn: Turn, poll: Any) -> None:
        streamed.append(len(turn.streamed))
        load_transformer(config, turn, poll)

    from tworeel.training.assembly import load_transformer

    monkeypatch.setattr("tworeel.training.sample.write_takes", keep)
    monkeypatch.setattr("tworeel.training.sample.load_transformer", load)
    config = make_config(train={"steps": 2}, sample={**SAMPLE, "strengths": (1.0,)})
    train(config)
    sample(config, folder=tmp_path / "plain")
    cards(1000, 1000)
    sample(config, folder=tmp_path / "streamed")
    assert streamed[0] == 0 < streamed[1]
    assert torch.equal(*rendered)
