"""What every frozen layer does, whatever its weight is kept in."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from tworeel.lora.inject import inject_lora
from tworeel.lora.state import lora_parameters
from tworeel.quant import KINDS, quantize_blocks

pytest.importorskip("bitsandbytes")
KINDS_8_BIT = ("fp8", "int8")


def make(kind, inputs=64, outputs=96, dtype=torch.float32, bias=True):
    model = nn.Sequential(nn.Linear(inputs, outputs, bias=bias, dtype=dtype))
    quantize_blocks(model, kind, ["0"])
    return model[0]


def with_gradient(function, x):
    x = x.detach().clone().requires_grad_()
    y = function(x)
    direction = torch.randn(y.shape, generator=torch.Generator().manual_seed(9)).to(y.dtype)
    (y * direction).sum().backward()
    return y.detach(), x.grad


def error(ours, reference):
    return ((ours.double() - reference.double()).norm() / reference.double().norm()).item()


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_in_fp64_output_and_gradient_are_those_of_the_dequantized_weight(kind, bias):
    layer = make(kind, dtype=torch.float64, bias=bias)
    x = torch.randn(2, 5, 64, dtype=torch.float64)
    ours = with_gradient(layer, x)
    theirs = with_gradient(lambda x: functional.linear(x, layer.dequantized(), layer.bias), x)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_finite_differences(kind):
    layer = make(kind, inputs=16, outputs=16, dtype=torch.float64)
    x = torch.randn(3, 16, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(layer, (x,))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("kind", "bound"), [("fp8", 0.045), ("int8", 0.014), ("nf4", 0.11)])
def test_output_and_gradient_are_near_those_of_the_weight_itself(kind, bound, dtype):
    linear = nn.Linear(256, 384)
    model = nn.Sequential(nn.Linear(256, 384)).to(dtype)
    model[0].load_state_dict(linear.state_dict())
    quantize_blocks(model, kind, ["0"])
    x = torch.randn(100, 256)
    (output, gradient), (expected, expected_gradient) = (
        with_gradient(model, x.to(dtype)),
        with_gradient(linear, x),
    )
    assert output.dtype == gradient.dtype == dtype
    assert error(output, expected) < bound
    assert error(gradient, expected_gradient) < bound


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("kind", "bound"), [("fp8", 0.045), ("int8", 0.014)])
def test_small_gradients_of_a_small_weight_are_not_lost_in_16_bits(kind, bound, dtype):
    torch.manual_seed(0)
    linear = nn.Linear(3072, 64).to(dtype)
    model = copy.deepcopy(nn.Sequential(linear))
    quantize_blocks(model, kind, ["0"])
    x, upstream = torch.randn(32, 3072, dtype=dtype), (torch.randn(32, 64) * 1e-3).to(dtype)
    ours, theirs = (
        torch.autograd.grad(layer(x.requires_grad_()), x, upstream)[0] for layer in (model, linear)
    )
    assert error(ours, theirs) < bound


@pytest.mark.parametrize("shape", [(64,), (1, 64), (3, 64), (2, 3, 64), (2, 1, 17, 64)])
@pytest.mark.parametrize("kind", KINDS)
def test_inputs_of_any_leading_shape_are_taken(kind, shape):
    layer = make(kind)
    output, gradient = with_gradient(layer, torch.randn(shape))
    assert output.shape == (*shape[:-1], 96)
    assert gradient.shape == shape


@pytest.mark.parametrize(("inputs", "outputs"), [(40, 96), (64, 24), (7, 5)])
@pytest.mark.parametrize("kind", KINDS_8_BIT)
def test_widths_that_the_kernels_do_not_take_are_dequantized(kind, inputs, outputs):
    layer = make(kind, inputs, outputs)
    x = torch.randn(6, inputs)
    ours = with_gradient(layer, x)
    theirs = with_gradient(lambda x: functional.linear(x, layer.dequantized(), layer.bias), x)
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize(
    ("kind", "mode"),
    [
        ("fp8", "rowwise"),
        ("fp8", "tensorwise"),
        ("fp8", "weight-only"),
        ("int8", "tensorwise"),
        ("int8", "weight-only"),
    ],
)
def test_all_ways_to_multiply_agree(monkeypatch, kind, mode):
    layer = make(kind, dtype=torch.bfloat16)
    x = torch.randn(40, 64, dtype=torch.bfloat16)
    expected = with_gradient(lambda x: functional.linear(x, layer.dequantized(), layer.bias), x)
    monkeypatch.setattr("tworeel.quant.scaled.matmul_mode", lambda device, dtype: mode)
    for ours, theirs in zip(with_gradient(layer, x), expected, strict=True):
        assert error(ours, theirs) < 0.04


@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_zeros_give_the_bias_and_no_nan(kind):
    layer = make(kind)
    x = torch.zeros(4, 64, requires_grad=True)
    output = layer(x)
    (output * 0).sum().backward()
    torch.testing.assert_close(output, layer.bias.expand(4, -1), rtol=0, atol=1e-6)
    assert torch.equal(x.grad, torch.zeros(4, 64))


@pytest.mark.parametrize("kind", KINDS)
def test_a_channel_of_zeros_gives_zeros(kind):
    model = nn.Sequential(nn.Linear(64, 32, bias=False))
    model[0].weight.data[3] = 0
    quantize_blocks(model, kind, ["0"])
    output, gradient = with_gradient(model, torch.randn(4, 64))
    assert output[:, 3].abs().max() < 1e-6
    assert torch.isfinite(gradient).all()


@pytest.mark.parametrize("kind", KINDS)
def test_only_references_to_what_is_stored_are_kept_for_the_backward(kind):
    layer = make(kind, dtype=torch.bfloat16)
    stored = {tensor.data_ptr() for tensor in (*layer.parameters(), *layer.buffers())}
    saved = []
    x = torch.randn(40, 64, dtype=torch.bfloat16, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda t: t):
        layer(x)
    assert saved and {tensor.data_ptr() for tensor in saved} <= stored


@pytest.mark.parametrize("kind", KINDS)
def test_no_gradient_is_made_for_an_input_that_needs_none(kind):
    layer = make(kind)
    assert not layer(torch.randn(4, 64)).requires_grad
    assert not any(parameter.requires_grad for parameter in layer.parameters())


@pytest.mark.parametrize("mode", ["tensorwise", "weight-only"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_layer_over_an_input_that_needs_no_gradient_compiles_with_its_lora(monkeypatch, kind, mode):
    """As a block's over the text."""
    monkeypatch.setattr("tworeel.quant.scaled.matmul_mode", lambda device, dtype: mode)
    model = nn.Sequential(nn.Linear(64, 96)).to(torch.bfloat16)
    quantize_blocks(model, kind, ["0"])
    inject_lora(model, rank=4, alpha=4, targets=["0"])
    torch.compiler.reset()
    x = torch.randn(33, 64, dtype=torch.bfloat16)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")(x)
    assert compiled.requires_grad and torch.equal(compiled, model(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_a_recomputed_forward_gives_the_same_bits(kind, dtype):
    model = nn.Sequential(nn.Linear(64, 96), nn.GELU(), nn.Linear(96, 48)).to(dtype)
    quantize_blocks(model, kind, ["0", "2"])
    x = torch.randn(33, 64, dtype=dtype)
    plain = with_gradient(model, x)
    again = with_gradient(lambda x: checkpoint(model, x, use_reentrant=False), x)
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_the_weight_may_be_elsewhere_between_forward_and_recomputation(kind):
    model = nn.Sequential(nn.Linear(64, 96), nn.GELU(), nn.Linear(96, 48))
    quantize_blocks(model, kind, ["0", "2"])
    x = torch.randn(33, 64)
    expected = with_gradient(model, x)
    home = {parameter: parameter.data for parameter in model.parameters()}

    def streamed(x):
        y = checkpoint(model, x, use_reentrant=False)
        for parameter in home:
            parameter.data = torch.zeros_like(parameter.data)
        y.register_hook(lambda gradient: bring_back())
        return y

    def bring_back():
        for parameter, tensor in home.items():
            parameter.data = tensor.clone()

    ours = with_gradient(streamed, x)
    assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))


GRAPHS = [(kind, "aot_eager", dora) for kind in KINDS for dora in (False, True)]
# What inductor makes of DoRA has nothing to do with the kind of the frozen layer.
GRAPHS += [(kind, "inductor", i % 2 == 0) for i, kind in enumerate(KINDS)]


@pytest.mark.parametrize(("kind", "backend", "dora"), GRAPHS)
def test_a_layer_with_a_lora_compiles_to_one_graph_with_the_same_result(kind, backend, dora):
    model = nn.Sequential(nn.Linear(64, 96), nn.GELU(), nn.Linear(96, 48)).to(torch.bfloat16)
    quantize_blocks(model, kind, ["0", "2"])
    inject_lora(model, rank=4, alpha=4, targets=["0", "2"], dora=dora)
    for parameter in lora_parameters(model).values():
        parameter.data.normal_(mean=0.1, std=0.1)
    torch.compiler.reset()
    x = torch.randn(33, 64, dtype=torch.bfloat16)
    plain = with_gradient(model, x)
    trained = [parameter.grad for parameter in lora_parameters(model).values()]
    model.zero_grad()
    compiled = with_gradient(torch.compile(model, fullgraph=True, backend=backend), x)
    # Fused kernels round less often, and a rounding to 8 bits may then fall to the other side.
    tolerance = 0.0 if backend == "aot_eager" else 0.03
    pairs = [*zip(compiled, plain, strict=True)]
    pairs += [(p.grad, g) for p, g in zip(lora_parameters(model).values(), trained, strict=True)]
    assert all(error(ours, theirs) <= tolerance for ours, theirs in pairs)
