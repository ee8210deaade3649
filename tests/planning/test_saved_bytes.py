"""What a plan counts of a compiled block that keeps everything, against what the engine's block does save."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from real_models import settings_of, source_of
from torch import Tensor, nn
from torch._functorch.aot_autograd import make_boxed_func
from torch._inductor.compile_fx import compile_fx
from torch.utils._pytree import tree_leaves

from tworeel.data.clips import Bucket
from tworeel.engine import compiling
from tworeel.engine.compiling import BlockCompiler
from tworeel.engine.probing import as_in_training
from tworeel.engine.residency import Residency, plain_call
from tworeel.lora.inject import inject_lora
from tworeel.models.family import ModelSource
from tworeel.models.wan.family import WAN
from tworeel.planning.traces import TraceSettings
from tworeel.planning.tracing import trace_model
from tworeel.quant import block_linears, quantize_blocks
from tworeel.quant.matmul import assumed_mode

CLIP = Bucket(frames=5, height=128, width=192)
RANK = 8


def tiny_source() -> ModelSource:
    full = source_of("wan2.2-t2v-a14b")
    small = {"num_attention_heads": 4, "attention_head_dim": 32, "ffn_dim": 512, "num_layers": 2}
    return replace(full, transformer=replace(full.transformer, config={**full.transformer.config, **small}))


def make_model(source: ModelSource, settings: TraceSettings) -> nn.Module:
    """With random weights, as `settings` has it."""
    model = WAN.build_transformer(source.transformer).to_empty(device="cpu").to(settings.dtype)
    for tensor in (*model.parameters(), *model.buffers()):
        nn.init.normal_(tensor.data, std=0.02)
    linears = block_linears(model, WAN.block_lists)
    if settings.quantize is not None:
        quantize_blocks(model, settings.quantize, linears)
    # Those of a whole model are more blocks'.
    targets = [name for name in settings.targets if name in linears]
    inject_lora(model, rank=RANK, alpha=RANK, targets=targets, block_lists=WAN.block_lists)
    return model


def block_call(model: nn.Module, source: ModelSource, dtype: torch.dtype) -> tuple[nn.Module, Any, Any]:
    """The last block, and what it is called with in training."""
    shapes = WAN.cached_shapes(source, CLIP.frames, CLIP.height, CLIP.width, CLIP.references)
    cached = {name: torch.randn(shape) for name, shape in shapes.items()}
    sample = WAN.make_sample(
        source.traits, cached, torch.randn(shapes["latents"]), 0.5, dtype=dtype, condition_on_image=True
    )
    block = list(model.get_submodule("blocks").children())[-1]
    calls: list[Any] = []
    hook = block.register_forward_hook(
        lambda _, args, kwargs, output: calls.append(((args, kwargs), output)), with_kwargs=True
    )
    with torch.no_grad():
        model(**sample.inputs, return_dict=False)
    hook.remove()
    args, kwargs = as_in_training(*calls[-1])
    return block, args, kwargs


def saved_by(block: nn.Module, args: Any, kwargs: Any) -> list[Tensor]:
    """All that the block's compiled forward leaves behind of its own, and what it returns."""
    saved: list[Tensor] = []
    compiler = BlockCompiler()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        output = compiler(plain_call(type(block)), block, *args, **kwargs)
    assert not compiler.failed
    given = [*tensors((args, kwargs)), *block.parameters(), *block.buffers()]
    there = {memory_of(tensor) for tensor in given}
    own = {memory_of(tensor): tensor for tensor in (*saved, output)}
    return [tensor for memory, tensor in own.items() if memory not in there]


def tensors(tree: Any) -> Iterator[Tensor]:
    return (leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor))


def memory_of(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


@pytest.fixture
def divided_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Inductor divides forward from backward, which tells what is saved, but makes no kernels."""

    def backend(graph: Any, inputs: Any, **options: Any) -> Any:
        def as_it_is(module: Any, *_: Any, **__: Any) -> Any:
            return make_boxed_func(module.forward)

        return compile_fx(graph, inputs, inner_compile=as_it_is, **options)

    monkeypatch.setattr(compiling, "lookup_backend", lambda _name: backend)


@pytest.mark.slow
@pytest.mark.usefixtures("divided_only")
@pytest.mark.parametrize(
    ("kind", "mode"),
    [("fp8", "weight-only"), ("nf4", "rowwise"), ("int8", "tensorwise")],
)
def test_a_compiled_block_saves_what_is_planned(kind: str, mode: Any) -> None:
    if kind == "nf4":
        pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    source = tiny_source()
    settings = settings_of("wan2.2-t2v-a14b", quantize=kind, mode=mode, rank=RANK)
    (traced,) = trace_model(WAN, source, CLIP, settings).blocks.values()
    with assumed_mode(mode):
        block, args, kwargs = block_call(make_model(source, settings), source, settings.dtype)
        saved = saved_by(block, args, kwargs)
    taken = sum(tensor.untyped_storage().nbytes() for tensor in saved)
    assert taken == pytest.approx(traced.footprints[Residency.KEEP].kept, rel=0.02)
