"""Values in and out of a model."""

from __future__ import annotations

import pytest
import torch
from lora_samples import BLOCK_ENDINGS, disturb

from tworeel.errors import UserError
from tworeel.lora.files import cast
from tworeel.lora.inject import inject_lora
from tworeel.lora.state import export_lora, load_lora_state, lora_parameters, lora_state, start_from
from tworeel.lora.tensors import LoraFile


def test_a_loaded_state_is_the_saved_one_to_the_bit(make_trained, make_wan):
    state = lora_state(make_trained(dora=True))
    other = make_wan()
    inject_lora(other, rank=4, alpha=4.0, targets=BLOCK_ENDINGS, dora=True, seed=5)
    load_lora_state(other, state)
    assert list(lora_state(other)) == list(state)
    assert all(torch.equal(tensor, state[name]) for name, tensor in lora_state(other).items())


def test_a_saved_state_does_not_follow_the_training(make_trained):
    model = make_trained()
    state = lora_state(model)
    disturb(model, seed=9)
    assert not any(torch.equal(state[name], parameter) for name, parameter in lora_parameters(model).items())


def test_every_difference_of_a_state_is_named(make_trained):
    model = make_trained()
    state = lora_state(model)
    first, second, third, *_ = state
    state["blocks.9.attn1.to_q.lora_A"] = state.pop(first)
    state[second] = state[second].half()
    state[third] = state[third][:1]
    with pytest.raises(UserError) as caught:
        load_lora_state(model, state)
    text = str(caught.value)
    assert len(caught.value.problems) == 4
    assert "blocks.9.attn1.to_q.lora_A" in text and first in text
    assert f"'{second}' is float16" in text and "this run needs float32" in text


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize(("alpha", "rslora"), [(4.0, False), (7.0, False), (7.0, True)])
def test_a_run_that_starts_from_a_file_has_its_output_under_its_own_scale(
    make_trained, make_wan, inputs, alpha, rslora, dora
):
    source = make_trained(alpha=3.0, dora=dora)
    model = make_wan()
    inject_lora(model, rank=4, alpha=alpha, targets=BLOCK_ENDINGS, rslora=rslora, dora=dora)
    assert start_from(model, export_lora(source), "old.safetensors") == []
    torch.testing.assert_close(model(**inputs).sample, source(**inputs).sample, rtol=0, atol=1e-5)


def test_a_dora_run_can_start_from_a_plain_lora(make_trained, make_wan, inputs):
    source = make_trained(alpha=3.0)
    model = make_wan()
    inject_lora(model, rank=4, alpha=4.0, targets=BLOCK_ENDINGS, dora=True)
    start_from(model, export_lora(source), "old.safetensors")
    torch.testing.assert_close(model(**inputs).sample, source(**inputs).sample, rtol=0, atol=1e-5)


def test_layers_that_the_file_lacks_are_listed_and_start_anew(make_trained, make_wan):
    model = make_wan()
    inject_lora(model, rank=4, alpha=4.0, targets=("to_q", "to_k"))
    before = lora_state(model)
    missing = start_from(model, export_lora(make_trained(targets=("to_q",))), "old.safetensors")
    assert missing == [f"blocks.{block}.attn{part}.to_k" for block in (0, 1) for part in (1, 2)]
    after = lora_state(model)
    changed = {name for name, tensor in after.items() if not torch.equal(tensor, before[name])}
    assert changed and all(".to_q." in name for name in changed)


def test_a_file_that_does_not_fit_is_refused_with_both_sides_named(make_trained, make_wan):
    model = make_wan()
    inject_lora(model, rank=8, alpha=8.0, targets=("to_q",))
    source = make_trained(targets=("to_q", "ffn.net.2"), dora=True)
    with pytest.raises(UserError) as caught:
        start_from(model, export_lora(source), "old.safetensors")
    text = str(caught.value)
    assert "old.safetensors: 2 of its layers are not among the run's targets" in text
    assert "has rank 4, the run has lora.rank = 8" in text
    assert "lora.dora = false" in text


def test_a_file_with_values_that_are_not_finite_is_refused(make_trained):
    model = make_trained()
    broken = cast(export_lora(model), torch.float16)
    next(iter(broken.modules.values())).up[0, 0] = torch.inf
    with pytest.raises(UserError, match="not finite"):
        start_from(model, broken, "old.safetensors")
    with pytest.raises(UserError, match="holds no LoRA"):
        start_from(model, LoraFile(modules={}), "empty.safetensors")
