"""Defects of DiffSynth that change results, and what becomes of them here.

These fail when DiffSynth repairs them: then what we do about them can go.
"""

from __future__ import annotations

import pytest
import torch
from test_diffsynth_variants import assert_alike, gradients_of, inputs_of, loss_of, made
from torch import nn
from variants import basic, model_function, wan

import tworeel

pytestmark = pytest.mark.usefixtures("diffsynth_package")


def test_s2v_with_diffsynths_own_checkpointing_fails_on_the_write_to_its_input() -> None:
    """test_variants.py shows that ours has the gradients of S2V without checkpointing."""
    toy = made("s2v")
    output = model_function("s2v")(**toy.models, **inputs_of(toy), use_gradient_checkpointing=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss_of(output).backward()


def test_s2v_with_diffsynths_own_offloaded_checkpointing_has_wrong_gradients() -> None:
    """Its block number is read when the block is computed again: by then it is that of the last block."""
    gradients = []
    for offload in (False, True):
        toy = made("s2v")
        output = model_function("s2v")(
            **toy.models, **inputs_of(toy), use_gradient_checkpointing_offload=offload
        )
        loss_of(output).backward()
        gradients.append(gradients_of(toy.models))
    with pytest.raises(AssertionError):
        assert_alike(gradients[1], gradients[0])


def test_the_forward_of_wans_transformer_is_broken_and_training_does_not_use_it() -> None:
    """Issue 1063 there: it takes two results of `patchify`, which returns one."""
    dit = wan()
    given = basic()
    with pytest.raises((ValueError, TypeError)):
        dit(given["latents"], given["timestep"], given["context"])
    output = model_function("t2v")(dit=dit, **given)
    assert output.shape == given["latents"].shape


def test_split_alone_serves_the_transformer_through_its_model_function() -> None:
    torch.manual_seed(0)
    dit, given = wan(), basic()
    expected = model_function("t2v")(dit=dit, **given)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.dit = dit

        def forward(self, **inputs: object) -> torch.Tensor:
            return model_function("t2v")(dit=self.dit, **inputs)

    model = Model()
    tworeel.split(model, ["cpu", "cpu"], between=True)
    assert torch.equal(model(**given), expected)
