"""Injection: what is trained, how it starts, what stays as it was."""

from __future__ import annotations

import pytest
import torch

from tworeel.errors import UserError
from tworeel.lora.inject import inject_lora, lora_layers, start_of_down
from tworeel.lora.state import lora_parameters, lora_state

OPTIONS = {"rank": 4, "alpha": 4.0, "targets": ("attn1.to_q", "ffn.net.2")}


@pytest.mark.parametrize(
    ("base", "trained"),
    [
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_only_the_lora_is_trained_and_it_has_full_precision(make_wan, base, trained):
    model = make_wan(base)
    names = inject_lora(model, **OPTIONS, dora=True)
    parameters = lora_parameters(model)
    assert len(parameters) == 3 * len(names)
    assert {parameter.dtype for parameter in parameters.values()} == {trained}
    assert {id(p) for p in model.parameters() if p.requires_grad} == {id(p) for p in parameters.values()}


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_new_lora_does_not_change_the_output(make_wan, inputs, dora, dtype):
    model = make_wan(dtype)
    inputs = {name: tensor.to(dtype) for name, tensor in inputs.items()}
    before = model(**inputs).sample
    inject_lora(model, **OPTIONS, dora=dora)
    torch.testing.assert_close(model(**inputs).sample, before, rtol=0, atol=0.02 if dora else 0)


def test_the_start_depends_on_seed_and_name_only(make_wan):
    model, other, reseeded = make_wan(), make_wan(torch.bfloat16, num_layers=3), make_wan()
    inject_lora(model, **OPTIONS, seed=7)
    torch.manual_seed(99)
    inject_lora(other, rank=4, alpha=1.0, targets=("attn1.to_q", "attn1.to_k", "ffn.net.2"), seed=7)
    inject_lora(reseeded, **OPTIONS, seed=8)
    mine, theirs, third = lora_state(model), lora_state(other), lora_state(reseeded)
    assert all(torch.equal(theirs[name], tensor) for name, tensor in mine.items())
    downs = [name for name in mine if name.endswith("lora_A")]
    assert not any(torch.equal(third[name], mine[name]) for name in downs)
    assert len({mine[name].sum().item() for name in downs}) == len(downs)


def test_injection_leaves_the_global_generator_alone(make_wan):
    model = make_wan()
    state = torch.get_rng_state()
    inject_lora(model, **OPTIONS)
    assert torch.equal(torch.get_rng_state(), state)


def test_the_start_has_pefts_distribution():
    down = start_of_down(64, 1024, 0, "layer")
    assert down.abs().max() <= 1 / 32
    torch.testing.assert_close(down.std(), torch.tensor(1 / 32 / 3**0.5), rtol=0.02, atol=0)


def test_scales_are_those_of_lora_and_rslora(make_wan):
    for rslora, scale in ((False, 2.0), (True, 4.0)):
        model = make_wan()
        inject_lora(model, rank=4, alpha=8.0, targets=("to_q",), rslora=rslora)
        assert {layer.scaling["default"] for layer in lora_layers(model).values()} == {scale}


def test_many_targets_are_adapted_and_no_others(make_wan):
    model = make_wan(num_layers=3)
    names = inject_lora(model, rank=2, alpha=2.0, targets=("blocks.1.*", "blocks.2.attn1.to_q"))
    assert len(names) == 11
    assert list(lora_layers(model)) == names


def test_targets_that_match_nothing_leave_the_model_as_it_was(make_wan):
    model = make_wan()
    with pytest.raises(UserError, match="to_qqq"):
        inject_lora(model, rank=4, alpha=4.0, targets=("to_q", "to_qqq"))
    assert not lora_layers(model)


def test_a_rank_above_the_layers_width_is_allowed(make_wan):
    model = make_wan()
    assert inject_lora(model, rank=300, alpha=300.0, targets=("attn1.to_q",))


def test_a_model_on_meta_is_adapted_on_meta():
    from diffusers import WanTransformer3DModel

    with torch.device("meta"):
        model = WanTransformer3DModel(num_layers=1, num_attention_heads=2, ffn_dim=64, text_dim=32)
    inject_lora(model, **OPTIONS, dora=True)
    assert all(parameter.is_meta for parameter in lora_parameters(model).values())
