"""A whole tiny Wan on quantized weights: gradients, splitting, loading, self-check."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest
import torch
from accelerate import init_empty_weights
from diffusers import WanTransformer3DModel
from quantized_wan import SIZES, TARGETS, cosine, gradients, loss, make_batch, make_wan
from safetensors.torch import save_file
from torch import nn

from tworeel import Pipeline
from tworeel.errors import UserError
from tworeel.lora.files import load_lora, save_lora
from tworeel.lora.inject import inject_lora, lora_layers
from tworeel.lora.layers import dense_weight
from tworeel.lora.naming import Naming
from tworeel.lora.state import export_lora, lora_parameters, start_from
from tworeel.lora.targets import find_targets
from tworeel.models.wan.family import WAN
from tworeel.models.wan.transformer import BLOCK_LISTS
from tworeel.quant import KINDS, quantize_blocks
from tworeel.training.selfcheck import SelfCheck, SelfCheckError
from tworeel.weights.loading import check_weights, load_weights
from tworeel.weights.tensor_files import TensorFiles

pytest.importorskip("bitsandbytes")
CPU = torch.device("cpu")


def run(model: nn.Module, **options) -> dict[str, torch.Tensor]:
    batch = make_batch(**options)
    loss(model(**batch), batch).backward()
    return gradients(model)


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize(("kind", "least"), [("fp8", 0.99), ("int8", 0.999), ("nf4", 0.98)])
def test_gradients_of_the_lora_point_where_those_on_bf16_weights_do(kind, least, dora):
    reference = run(make_wan(None, dora=dora))
    ours = run(make_wan(kind, dora=dora))
    assert all(gradient.dtype == torch.float32 for gradient in ours.values())
    assert cosine(ours, reference) > least


@pytest.mark.parametrize("kind", KINDS)
def test_a_lora_on_quantized_weights_learns(kind):
    model, batch = make_wan(kind), make_batch()
    optimizer = torch.optim.AdamW(lora_parameters(model).values(), lr=0.01)
    losses = []
    for _ in range(12):
        optimizer.zero_grad()
        value = loss(model(**batch), batch)
        value.backward()
        optimizer.step()
        losses.append(value.item())
    assert losses[-1] < 0.95 * losses[0]


@pytest.mark.parametrize("residency", ["keep", "recompute"])
@pytest.mark.parametrize("kind", KINDS)
def test_split_and_recomputed_the_gradients_are_the_same_bits(kind, residency):
    batches = [make_batch(seed=seed) for seed in range(3)]
    theirs = make_wan(kind)
    for batch in batches:
        loss(theirs(**batch), batch).backward()
    ours = make_wan(kind)
    Pipeline(ours, ["cpu", "cpu"], residency=residency).step(batches, loss)
    expected = gradients(theirs)
    assert gradients(ours).keys() == expected.keys()
    assert all(torch.equal(gradient, expected[name]) for name, gradient in gradients(ours).items())


@pytest.mark.parametrize("kind", [None, *KINDS])
def test_a_dora_starts_with_the_lengths_of_the_rows_it_stands_on(kind):
    layers = lora_layers(make_wan(kind, torch.float32, dora=True))
    for layer in layers.values():
        lengths = dense_weight(layer.get_base_layer()).norm(dim=1)
        torch.testing.assert_close(layer.lora_magnitude_vector["default"].weight.data, lengths)


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_a_run_starts_from_a_file(tmp_path, kind, dora):
    naming = Naming.of(WAN)
    save_lora(tmp_path / "x.safetensors", export_lora(make_wan(kind)), "comfyui", naming, metadata={})
    model = make_wan(kind, dora=dora, seed=7)
    assert start_from(model, load_lora(tmp_path / "x.safetensors", naming), "x") == []
    expected = make_wan(kind, dora=dora)
    if not dora:
        batch = make_batch()
        torch.testing.assert_close(model(**batch).sample, expected(**batch).sample)


def empty(kind: str) -> nn.Module:
    with init_empty_weights(include_buffers=False):
        model = WanTransformer3DModel(**SIZES)
    quantize_blocks(model, kind, find_targets(model, TARGETS, BLOCK_LISTS))
    return model


def written(path: Path) -> tuple[nn.Module, TensorFiles]:
    torch.manual_seed(1)
    model = WanTransformer3DModel(**SIZES).to(torch.bfloat16)
    save_file(model.state_dict(), path)
    return model, TensorFiles(path)


@pytest.mark.parametrize("kind", KINDS)
def test_loading_quantizes_and_gives_the_model_that_quantizing_after_loading_gives(tmp_path, kind):
    real, files = written(tmp_path / "x.safetensors")
    names = find_targets(real, TARGETS, BLOCK_LISTS)
    sizes = {real.get_submodule(name).weight.shape for name in names}
    quantize_blocks(real, kind, names)
    model = empty(kind)
    load_weights(
        model, files, lambda key: key, device_of=lambda name: CPU, dtype_of=lambda name: torch.bfloat16
    )

    ours, theirs = tensors_of(model), tensors_of(real)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(bits(tensor), bits(theirs[name])) for name, tensor in ours.items())
    assert not any(parameter.requires_grad for parameter in model.parameters())
    weights = [model.get_submodule(name).weight for name in names]
    assert all(weight.element_size() == 1 for weight in weights)

    del real, theirs
    gc.collect()
    inside = {id(module.get_parameter("weight")) for module in model.modules() if type(module) is nn.Linear}
    dense = [
        found
        for found in gc.get_objects()
        if type(found) in (torch.Tensor, nn.Parameter)
        and found.dtype == torch.bfloat16
        and found.shape in sizes
        and id(found) not in inside
    ]
    assert not dense


def tensors_of(model: nn.Module) -> dict[str, torch.Tensor]:
    """All but the rotary tables, which the real model has cast to bf16."""
    named = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {name: tensor for name, tensor in named.items() if not name.startswith("rope.")}


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


@pytest.mark.parametrize("kind", KINDS)
def test_a_loaded_model_trains(tmp_path, kind):
    _, files = written(tmp_path / "x.safetensors")
    model = empty(kind)
    load_weights(
        model, files, lambda key: key, device_of=lambda name: CPU, dtype_of=lambda name: torch.bfloat16
    )
    inject_lora(model, rank=4, alpha=4, targets=TARGETS, block_lists=BLOCK_LISTS)
    batch = make_batch()
    loss(model(**batch), batch).backward()
    assert len(gradients(model)) == 2 * len(lora_layers(model)) == 60


@pytest.mark.parametrize("kind", KINDS)
def test_headers_are_checked_as_for_any_model(tmp_path, kind):
    tensors = written(tmp_path / "x.safetensors")[0].state_dict()
    del tensors["blocks.0.attn1.to_q.weight"]
    tensors["blocks.1.attn1.to_k.weight"] = torch.zeros(3, 3)
    tensors["blocks.2.attn1.to_v.weight"] = torch.zeros(64, 64, dtype=torch.int8)
    save_file(tensors, tmp_path / "y.safetensors")

    with pytest.raises(UserError) as caught:
        check_weights(empty(kind), TensorFiles(tmp_path / "y.safetensors"), lambda key: key)
    missing, misshaped, integers = caught.value.problems
    assert "1 tensors missing" in missing and "(3, 3)" in misshaped and "torch.int8" in integers


@pytest.mark.parametrize("kind", KINDS)
def test_the_self_check_sees_one_changed_bit_of_a_quantized_weight(kind):
    model = make_wan(kind)
    lora = lora_parameters(model)
    optimizer = torch.optim.SGD(lora.values(), lr=0.0)
    check = SelfCheck(model, lora, dict.fromkeys(lora, CPU), optimizer)
    check.after_update(1e-4, 1.0)
    weight = lora_layers(model)["blocks.1.attn1.to_q"].get_base_layer().weight
    weight.data.view(torch.uint8).reshape(-1)[5] ^= 1
    with pytest.raises(SelfCheckError, match=r"blocks\.1\.attn1\.to_q.*has changed"):
        check.after_update(1e-4, 1.0)
