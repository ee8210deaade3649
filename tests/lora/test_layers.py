"""The parts that replace peft's: the same function as peft's, less memory, full-precision gradients."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model

from tworeel.lora.inject import inject_lora, lora_layers
from tworeel.lora.layers import row_norms
from tworeel.lora.state import lora_parameters

TARGETS = ("attn1.to_q", "attn2.to_k", "ffn.net.0.proj", "ffn.net.2")


def plain_peft(model, twin, dora, rslora):
    """Give `model` peft's own LoRA with the values of `twin`'s."""
    targets = list(lora_layers(twin))
    config = LoraConfig(r=4, lora_alpha=6, target_modules=targets, use_dora=dora, use_rslora=rslora)
    inject_adapter_in_model(config, model)
    parameters = {}
    for name, layer in lora_layers(model).items():
        parameters[f"{name}.lora_A"] = layer.lora_A["default"].weight
        parameters[f"{name}.lora_B"] = layer.lora_B["default"].weight
        if dora:
            parameters[f"{name}.magnitude"] = layer.lora_magnitude_vector["default"].weight
    for name, parameter in lora_parameters(twin).items():
        parameters[name].data.copy_(parameter.data)
    return parameters


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.float64, 1e-12)])
def test_outputs_and_gradients_are_those_of_plain_peft(
    make_wan, make_trained, inputs, dtype, tolerance, dora, rslora
):
    inputs = {name: tensor.to(dtype) for name, tensor in inputs.items()}
    ours = make_trained(dtype=dtype, targets=TARGETS, alpha=6.0, dora=dora, rslora=rslora)
    theirs = make_wan(dtype)
    peft_parameters = plain_peft(theirs, ours, dora, rslora)
    outputs = [model(**inputs).sample for model in (ours, theirs)]
    torch.testing.assert_close(*outputs, rtol=0, atol=tolerance)
    for output in outputs:
        output.square().mean().backward()
    for name, parameter in lora_parameters(ours).items():
        expected = peft_parameters[name].grad
        scale = expected.abs().max().item()
        torch.testing.assert_close(parameter.grad, expected, rtol=0, atol=10 * tolerance * scale, msg=name)


@contextmanager
def saved_for_backward(saved):
    def pack(tensor):
        saved.append((tensor.dtype, tuple(tensor.shape)))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield


@pytest.mark.parametrize("dora", [False, True])
def test_no_full_precision_copy_of_activations_is_kept_for_the_backward(dora):
    base = torch.nn.Sequential(torch.nn.Linear(48, 96), torch.nn.Linear(96, 32)).to(torch.bfloat16)
    inject_lora(base, rank=4, alpha=4.0, targets=("0", "1"), dora=dora)
    x = torch.randn(7, 5, 48, dtype=torch.bfloat16, requires_grad=True)
    saved: list[tuple[torch.dtype, tuple[int, ...]]] = []
    with saved_for_backward(saved):
        base(x)
    activations = [dtype for dtype, shape in saved if shape[:2] == (7, 5) or shape[0] == 35]
    assert activations and set(activations) == {torch.bfloat16}


@pytest.mark.parametrize("dora", [False, True])
def test_a_bf16_base_gives_finite_fp32_gradients_near_the_fp32_ones(make_trained, inputs, dora):
    options = {"targets": TARGETS, "dora": dora}
    reference, model = make_trained(**options), make_trained(dtype=torch.bfloat16, **options)
    for which in (reference, model):
        cast = {name: tensor.to(which.dtype) for name, tensor in inputs.items()}
        which(**cast).sample.float().square().mean().backward()
    expected = lora_parameters(reference)
    for name, parameter in lora_parameters(model).items():
        assert parameter.grad.dtype == torch.float32
        assert torch.isfinite(parameter.grad).all()
        alike = torch.cosine_similarity(parameter.grad.flatten(), expected[name].grad.flatten(), dim=0)
        assert alike > 0.98, name


def test_row_norms_are_those_of_the_merged_weight():
    generator = torch.Generator().manual_seed(0)
    weight, down, up = (
        torch.randn(*shape, generator=generator, dtype=torch.float64)
        for shape in ((12, 20), (3, 20), (12, 3))
    )
    torch.testing.assert_close(row_norms(weight, down, up, 0.7), (weight + 0.7 * up @ down).norm(dim=1))
