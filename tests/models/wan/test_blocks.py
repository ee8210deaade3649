"""Wan's blocks by our forward: output and gradients of diffusers' own, to the bit."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from diffusers import WanTransformer3DModel
from diffusers.models.transformers.transformer_wan import (
    WanAttention,
    WanAttnProcessor,
    WanTransformerBlock,
)
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from tworeel.engine import compiling, split
from tworeel.engine.lean import upstream_forwards
from tworeel.lora.inject import inject_lora
from tworeel.lora.state import lora_parameters
from tworeel.models.family import Component
from tworeel.models.wan import blocks
from tworeel.models.wan.transformer import BLOCK_LISTS, LORA_PRESETS, build_transformer
from tworeel.planning.watching import fused_norms

CONFIG = {
    "num_attention_heads": 2,
    "attention_head_dim": 24,
    "in_channels": 4,
    "out_channels": 4,
    "ffn_dim": 80,
    "freq_dim": 32,
    "text_dim": 16,
    "num_layers": 2,
    "rope_max_seq_len": 64,
}
KINDS: dict[str, dict[str, Any]] = {
    "t2v": {},
    "i2v-clip": {"image_dim": 20, "added_kv_proj_dim": 48},
    "ti2v": {},
    "without a norm before the text": {"cross_attn_norm": False},
}
TOKENS = 60


def make(kind: str, dtype: torch.dtype) -> nn.Module:
    """The family's model with a LoRA; the same weights whenever it is called."""
    torch.manual_seed(0)
    config = {**CONFIG, **KINDS[kind]}
    model = build_transformer(Component(files=(), layout="diffusers", config=config))
    model.load_state_dict(WanTransformer3DModel(**config).state_dict(), assign=True)
    inject_lora(model, rank=3, alpha=3, targets=LORA_PRESETS["all-linear"], block_lists=BLOCK_LISTS)
    for parameter in lora_parameters(model).values():
        nn.init.normal_(parameter, std=0.1)
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad and "scale_shift_table" not in name:
            parameter.data = parameter.data.to(dtype)
    return model


def make_inputs(kind: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """Two clips of different noise levels; for TI2V, of each token."""
    generator = torch.Generator().manual_seed(0)
    text = 519 if kind == "i2v-clip" else 7
    inputs = {
        "hidden_states": torch.randn(2, 4, 5, 8, 6, generator=generator).to(dtype),
        "timestep": torch.tensor([300.0, 10.0]),
        "encoder_hidden_states": torch.randn(2, text, 16, generator=generator).to(dtype),
    }
    if kind == "ti2v":
        inputs["timestep"] = 1000 * torch.rand(2, TOKENS, generator=generator)
    if kind == "i2v-clip":
        inputs["encoder_hidden_states"] = inputs["encoder_hidden_states"][:, :512]
        inputs["encoder_hidden_states_image"] = torch.randn(2, 7, 20, generator=generator).to(dtype)
    return inputs


def run(model: nn.Module, inputs: dict[str, Tensor]) -> list[Tensor]:
    """The output, and the gradient of each LoRA tensor."""
    model.zero_grad(set_to_none=True)
    (output,) = model(**inputs, return_dict=False)
    output.float().square().mean().backward()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert all(parameter.grad is not None for parameter in trained)
    return [output.detach(), *(parameter.grad for parameter in trained if parameter.grad is not None)]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each function of tokens is called; small hidden states are worth it, too."""
    monkeypatch.setattr(blocks, "SMALLEST", 0)
    counts = Counter[str]()

    def counting(name: str, function: Callable[..., Tensor], *args: Any) -> Tensor:
        counts[name] += 1
        return function(*args)

    for name in ("normed", "modulated", "gated", "rotated"):
        monkeypatch.setattr(blocks, name, partial(counting, name, getattr(blocks, name)))
    return counts


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("kind", KINDS)
def test_our_forward_gives_the_bits_of_diffusers(calls: Counter[str], kind: str, dtype: torch.dtype) -> None:
    model, inputs = make(kind, dtype), make_inputs(kind, dtype)
    with upstream_forwards(model):
        expected = run(model, inputs)
    assert not calls, "diffusers' own"
    found = run(model, inputs)
    assert all(map(torch.equal, found, expected)) and len(found) == len(expected) > 20
    norms = 2 if KINDS[kind].get("cross_attn_norm", True) else 0
    assert calls == Counter(modulated=4, gated=4, rotated=4, normed=norms), "in two blocks"


def test_a_block_saves_no_hidden_state_in_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "SMALLEST", 0)
    model, inputs = make("t2v", torch.bfloat16), make_inputs("t2v", torch.bfloat16)
    hidden = torch.randn(2, TOKENS, 48, dtype=torch.bfloat16, requires_grad=True)
    text, temb = torch.randn(2, 7, 48, dtype=torch.bfloat16), torch.randn(2, 6, 48)
    rotary = model.rope(inputs["hidden_states"])
    block = model.get_submodule("blocks.0")

    def large_in_fp32() -> int:
        saved: list[Tensor] = []
        hooks = saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor)
        with fused_norms(block), hooks:
            block(hidden, text, temb, rotary)
        return sum(t.dtype == torch.float32 and t.numel() == hidden.numel() for t in saved)

    assert large_in_fp32() == 0
    with upstream_forwards(model):
        assert large_in_fp32() == 3, "one a norm"


def test_without_gradients_the_output_is_the_same(calls: Counter[str]) -> None:
    model, inputs = make("ti2v", torch.bfloat16), make_inputs("ti2v", torch.bfloat16)
    with torch.no_grad():
        (found,) = model(**inputs, return_dict=False)
        assert calls["modulated"] == 4
        with upstream_forwards(model):
            (expected,) = model(**inputs, return_dict=False)
    assert torch.equal(found, expected)


def test_compiled_blocks_are_diffusers_own(calls: Counter[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiling, "BACKEND", "aot_eager")
    model, inputs = make("t2v", torch.float32), make_inputs("t2v", torch.float32)
    division = split(model, ["cpu"], blocks=BLOCK_LISTS, compile=True)
    compiled = run(model, inputs)
    assert not calls and division.compiler is not None and not division.compiler.failed
    division.remove()
    torch.testing.assert_close(compiled, run(model, inputs))


@pytest.mark.parametrize("name", ["scale_shift_table", "norm2.weight"])
def test_what_is_trained_beside_linear_layers_gets_its_gradient(calls: Counter[str], name: str) -> None:
    model, inputs = make("t2v", torch.float32), make_inputs("t2v", torch.float32)
    trained = model.get_parameter(f"blocks.1.{name}").requires_grad_()
    run(model, inputs)
    assert trained.grad is not None and trained.grad.abs().sum() > 0
    assert calls["modulated"] == 2, "the other block's"


def test_a_norm_that_someone_listens_to_runs(calls: Counter[str]) -> None:
    model, heard = make("t2v", torch.float32), list[int]()
    model.get_submodule("blocks.1.norm3").register_forward_hook(lambda *_: heard.append(1))
    run(model, make_inputs("t2v", torch.float32))
    assert heard and calls["modulated"] == 2, "the other block's"


def test_small_hidden_states_are_not_worth_it(calls: Counter[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "SMALLEST", 2 * TOKENS * 48 + 1)
    run(make("t2v", torch.float32), make_inputs("t2v", torch.float32))
    assert not calls


def test_other_processors_and_dtypes_run_as_they_are(calls: Counter[str]) -> None:
    model = make("t2v", torch.float64).double()
    run(model, make_inputs("t2v", torch.float64))
    assert not calls
    model = make("t2v", torch.float32)
    for block in model.get_submodule("blocks"):
        block.attn1.set_processor(type("Own", (WanAttnProcessor,), {})())
    run(model, make_inputs("t2v", torch.float32))
    assert calls["modulated"] == 4 and not calls["rotated"]


def test_only_diffusers_own_blocks_are_changed() -> None:
    other = type("Other", (WanTransformerBlock,), {})(48, 80, 2)
    model = nn.ModuleList([WanTransformerBlock(48, 80, 2), other])
    blocks.use_lean_blocks(model)
    assert [type(block) for block in model] == [blocks.LeanBlock, type(other)]
    assert isinstance(model[0].attn1, blocks.LeanSelfAttention)
    assert type(model[0].attn2) is type(other.attn1) is WanAttention
