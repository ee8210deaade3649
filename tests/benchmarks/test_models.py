from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tworeel.benchmarks.models import make_batches, mean_square
from tworeel.benchmarks.preparing import Prepared, Settings, prepare
from tworeel.benchmarks.shapes import Case
from tworeel.errors import UserError
from tworeel.lora.state import lora_parameters


def test_a_model_is_the_same_each_time(case: Case, settings: Settings) -> None:
    first, second = (dict(prepare(case, settings, blocks=2).model.named_parameters()) for _ in range(2))
    assert not any(parameter.is_meta for parameter in first.values())
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_only_the_lora_is_trained_and_all_of_it_gets_a_gradient(prepared: Prepared) -> None:
    trained = {id(p) for p in prepared.model.parameters() if p.requires_grad}
    lora = lora_parameters(prepared.model)
    assert trained == {id(parameter) for parameter in lora.values()}
    mean_square(prepared.model(**prepared.batches[0])).backward()
    assert all(p.grad is not None and float(p.grad.norm()) > 0 for p in lora.values())


def test_a_clip_has_its_real_latents(case: Case) -> None:
    clip = replace(case, grid=(13, 30, 52), micro_batches=1)
    (batch,) = make_batches(clip, torch.float32, torch.device("cpu"))
    assert batch["hidden_states"].shape == (1, 16, 13, 60, 104)
    assert batch["encoder_hidden_states"].shape == (1, 512, case.model.text_dim)


@pytest.mark.parametrize("kind", ["fp8", "int8"])
def test_the_blocks_can_be_quantized(case: Case, settings: Settings, kind: str) -> None:
    quantized = prepare(case, replace(settings, quantize=kind), blocks=2).model  # type: ignore[arg-type]
    plain = prepare(case, settings, blocks=2).model
    assert size(quantized) < 0.5 * size(plain)


def size(model: torch.nn.Module) -> int:
    tensors = [*model.named_parameters(), *model.named_buffers()]
    return sum(t.nbytes for name, t in tensors if name.startswith("blocks.") and "lora" not in name)


def test_more_stages_than_blocks_are_a_users_mistake(case: Case, settings: Settings) -> None:
    with pytest.raises(UserError, match="--devices, --split-at: 2 stages for 1 blocks"):
        prepare(case, settings, blocks=1)
