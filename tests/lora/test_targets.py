"""Which layers a LoRA adapts."""

from __future__ import annotations

import pytest

from tworeel.errors import UserError
from tworeel.lora.targets import find_targets


def test_endings_choose_every_layer_that_ends_so_in_model_order(make_wan):
    names = find_targets(make_wan(), ["attn1.to_q", "ffn.net.2"])
    assert names == [f"blocks.{block}.{ending}" for block in (0, 1) for ending in ("attn1.to_q", "ffn.net.2")]


def test_an_ending_ends_at_a_dot(make_wan):
    assert "condition_embedder.time_proj" not in find_targets(make_wan(), ["proj"])


def test_a_star_matches_whole_names(make_wan):
    assert find_targets(make_wan(), ["blocks.1.attn1.to_[qk]*"]) == [
        "blocks.1.attn1.to_q",
        "blocks.1.attn1.to_k",
    ]


def test_no_target_is_refused(make_wan):
    with pytest.raises(UserError, match="nothing would be trained"):
        find_targets(make_wan(), [])


def test_every_pattern_without_a_match_is_named_with_a_suggestion(make_wan):
    with pytest.raises(UserError) as caught:
        find_targets(make_wan(), ["attn1.to_q", "attn1.to_qq", "single_blocks.*"])
    first, second = caught.value.problems
    assert "'attn1.to_qq'" in first and "did you mean 'attn1.to_q'" in first
    assert "'single_blocks.*'" in second


def test_layers_that_are_not_linear_are_no_targets(make_wan):
    with pytest.raises(UserError, match="patch_embedding"):
        find_targets(make_wan(), ["patch_embedding"])


def test_layers_outside_the_blocks_are_refused_where_only_blocks_are_trained(make_wan):
    model = make_wan()
    assert find_targets(model, ["proj_out"]) == ["proj_out"]
    with pytest.raises(UserError, match="outside the blocks"):
        find_targets(model, ["proj_out"], ["blocks"])
    assert all(name.startswith("blocks.") for name in find_targets(model, ["*"], ["blocks"]))
