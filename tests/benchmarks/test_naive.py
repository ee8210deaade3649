from __future__ import annotations

import torch
from torch import Tensor, nn

from tworeel.benchmarks.models import mean_square
from tworeel.benchmarks.naive import device_hooks
from tworeel.benchmarks.preparing import Prepared, gradients_of
from tworeel.engine import split


def gradients(prepared: Prepared) -> dict[str, Tensor]:
    prepared.model.zero_grad(set_to_none=True)
    for batch in prepared.batches:
        mean_square(prepared.model(**batch)).backward()
    return gradients_of(prepared.model)


def hooked(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if "forward" in module.__dict__]


def test_hooks_give_the_gradients_of_the_plain_model(prepared: Prepared) -> None:
    plain = gradients(prepared)
    with device_hooks(prepared.model, prepared.placement):
        naive = gradients(prepared)
    assert all(float(gradient.norm()) > 0 for gradient in plain.values())
    for name in plain:
        torch.testing.assert_close(naive[name], plain[name])


def test_every_block_and_what_is_around_them_has_a_hook_until_the_end(prepared: Prepared) -> None:
    with device_hooks(prepared.model, prepared.placement):
        names = hooked(prepared.model)
    assert {"patch_embedding", "blocks.0", "blocks.1", "proj_out"} <= set(names)
    assert hooked(prepared.model) == []


def test_blocks_are_recomputed(prepared: Prepared) -> None:
    calls = []
    prepared.model.get_submodule("blocks.0.attn1").register_forward_hook(lambda *_: calls.append(1))
    with device_hooks(prepared.model, prepared.placement):
        mean_square(prepared.model(**prepared.batches[0])).backward()
    assert len(calls) == 2


def test_the_same_model_can_be_split_afterwards_and_nothing_is_moved(prepared: Prepared) -> None:
    with device_hooks(prepared.model, prepared.placement):
        gradients(prepared)
    before = {name: tensor.data_ptr() for name, tensor in prepared.model.named_parameters()}
    split(prepared.model, prepared.placement.devices, at=prepared.placement.boundaries[1:-1])
    assert {name: tensor.data_ptr() for name, tensor in prepared.model.named_parameters()} == before
