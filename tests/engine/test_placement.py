from __future__ import annotations

import pytest
import torch
from diffusers import Flux2Transformer2DModel, WanTransformer3DModel
from torch import nn
from toy_wan import COMMON

from tworeel.engine.placement import find_block_lists, place


@pytest.fixture(scope="module")
def wan() -> WanTransformer3DModel:
    with torch.device("meta"):
        return WanTransformer3DModel(**COMMON)


@pytest.fixture(scope="module")
def flux2() -> Flux2Transformer2DModel:
    with torch.device("meta"):
        return Flux2Transformer2DModel(
            num_layers=2,
            num_single_layers=6,
            num_attention_heads=2,
            attention_head_dim=8,
            joint_attention_dim=8,
            axes_dims_rope=(2, 2, 2, 2),
        )


def test_block_lists_are_found_in_wan_and_flux2(wan, flux2):
    assert list(find_block_lists(wan)) == ["blocks"]
    assert list(find_block_lists(flux2)) == ["transformer_blocks", "single_transformer_blocks"]


def test_what_comes_before_the_blocks_is_first_and_what_comes_after_is_last(wan):
    placement = place(wan, ["cpu", "cpu", "cpu"])
    stages = {unit.name: unit.stage for unit in placement.units}
    assert {stages[n] for n in ("rope", "patch_embedding", "condition_embedder")} == {0}
    assert {stages[n] for n in ("norm_out", "proj_out")} == {2}
    assert placement.stage_of("scale_shift_table") == 0
    assert placement.stage_of("blocks.4.ffn.net.2.weight") == 2


def test_names_that_share_a_beginning_are_told_apart():
    model = nn.Module()
    model.blocks = nn.ModuleList(nn.Linear(2, 2) for _ in range(12))
    placement = place(model, ["cpu", "cpu"], at=[2])
    assert placement.stage_of("blocks.1.weight") == 0
    assert placement.stage_of("blocks.11.weight") == 1


def test_boundaries_are_taken_over_all_lists(flux2):
    placement = place(flux2, ["cpu", "cpu"], at=[3])
    assert placement.stage_of("transformer_blocks.1") == 0
    assert placement.stage_of("single_transformer_blocks.0") == 0
    assert placement.stage_of("single_transformer_blocks.1") == 1
    assert [list(placement.blocks_of(s)) for s in (0, 1)] == [[0, 1, 2], [3, 4, 5, 6, 7]]


def test_default_shares_are_even_in_bytes():
    model = nn.Module()
    model.blocks = nn.ModuleList(nn.Linear(4, width, bias=False) for width in (60, 20, 20, 20, 20, 20))
    assert place(model, ["cpu", "cpu"]).boundaries == (0, 2, 6)


def test_every_stage_has_a_block_when_there_are_as_many_stages_as_blocks(wan):
    assert place(wan, ["cpu"] * 5).boundaries == (0, 1, 2, 3, 4, 5)


@pytest.mark.parametrize(
    ("devices", "at", "message"),
    [
        (["cpu"] * 6, None, "6 stages for 5 blocks"),
        (["cpu", "cpu"], [1, 2], "2 stages need 1 boundaries"),
        (["cpu", "cpu"], [0], "rise from 1 to 4"),
        (["cpu", "cpu"], [5], "rise from 1 to 4"),
        (["cpu"] * 3, [3, 2], "rise from 1 to 4"),
        ([], None, "at least one device"),
    ],
)
def test_impossible_splits_are_refused(wan, devices, at, message):
    with pytest.raises(ValueError, match=message):
        place(wan, devices, at=at)


def test_a_model_without_block_lists_is_refused():
    with pytest.raises(ValueError, match=r"Linear has no list of blocks: name them"):
        place(nn.Linear(2, 2), ["cpu"])
    with pytest.raises(ValueError, match="no list of blocks named layers"):
        place(nn.Linear(2, 2), ["cpu"], blocks=["layers"])


def test_a_device_without_a_number_is_the_first_of_its_kind(wan):
    assert [str(d) for d in place(wan, ["cuda", "meta", "cpu"]).devices] == ["cuda:0", "meta:0", "cpu"]


def test_modules_that_are_listed_behind_the_blocks_but_run_before_can_be_named():
    model = nn.Module()
    model.blocks = nn.ModuleList(nn.Linear(2, 2) for _ in range(4))
    model.modulation, model.head = nn.Linear(2, 2), nn.Linear(2, 2)
    placement = place(model, ["cpu", "cpu"], first=["modulation"])
    assert placement.stage_of("modulation.weight") == 0
    assert placement.stage_of("head.weight") == 1
    with pytest.raises(ValueError, match=r"no module around .* named blocks\.1; known: head, modulation$"):
        place(model, ["cpu", "cpu"], first=["blocks.1"])
    with pytest.raises(ValueError, match=r"named head\.0"):  # it goes where all of the head does
        place(model, ["cpu", "cpu"], first=["head.0", "modulation"])
