"""DiffSynth's variants over two GPUs: the losses and gradients of its own model function on one."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
from test_diffsynth_variants import assert_overlapping_is_alike, assert_split_is_alike
from test_template import assert_template_is_alike
from torch import nn
from variants import VARIANTS

from tworeel.diffsynth.encoders import keep_in_host_memory

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("diffsynth_package")]
PLACES = {2: ("cuda:0", "cuda:1"), 3: ("cuda:0", "cuda:1", "cuda:0")}
"""Stages and their devices."""


@pytest.fixture(autouse=True)
def _two_gpus_without_tf32(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    yield
    torch.cuda.empty_cache()


@pytest.mark.parametrize("stages", PLACES)
@pytest.mark.parametrize("name", VARIANTS)
def test_a_variant_over_two_gpus_has_the_loss_and_gradients_of_one(name: str, stages: int) -> None:
    assert_split_is_alike(name, PLACES[stages])


@pytest.mark.parametrize("name", VARIANTS)
def test_overlapping_micro_batches_over_two_gpus_have_those_of_one_after_the_other(name: str) -> None:
    assert_overlapping_is_alike(name, PLACES[2])


@pytest.mark.parametrize("stages", PLACES)
def test_a_template_model_over_two_gpus_has_the_gradients_of_one(stages: int) -> None:
    assert_template_is_alike(PLACES[stages])


def test_a_text_encoder_in_host_memory_is_pinned_and_computes_on_the_first_gpu() -> None:
    encoder = nn.Sequential(
        nn.Embedding(8, 4), nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3))
    ).requires_grad_(False)
    ids = torch.arange(8)
    expected = encoder(ids)
    copy.deepcopy(encoder).to("cuda:0")(ids.to("cuda:0"))  # the first product makes its workspaces
    begin = torch.cuda.memory_allocated(0)
    keep_in_host_memory(encoder, torch.device("cuda:0"))
    encoder.to("cuda:0")
    found = encoder(ids.to("cuda:0"))
    assert found.device.type == "cuda" and all(tensor.is_pinned() for tensor in encoder.parameters())
    torch.testing.assert_close(found.cpu(), expected)
    del found
    assert torch.cuda.memory_allocated(0) <= begin + 512
