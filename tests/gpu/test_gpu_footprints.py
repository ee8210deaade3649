"""What a plan counts for a block, on tensors without data, is what the block takes on a GPU."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
import test_flux2_plans
import torch
from real_models import settings_of, source_of
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._pytree import tree_map_only

from tworeel import split
from tworeel.benchmarks import models
from tworeel.data.clips import Bucket
from tworeel.engine import place
from tworeel.engine.fitting import StageMemory
from tworeel.engine.probing import Probe, as_in_training
from tworeel.engine.residency import Residency
from tworeel.engine.schedule import Held
from tworeel.models.family import Family, ModelSource
from tworeel.models.flux2.family import FLUX2
from tworeel.models.wan.family import WAN
from tworeel.planning.traces import ModelTrace, TraceSettings
from tworeel.planning.tracing import trace_model
from tworeel.planning.watching import fused_norms

pytestmark = pytest.mark.gpu
CLIP = Bucket(frames=17, height=480, width=832)
VARIANTS = ("wan2.2-t2v-a14b", "wan2.1-i2v-14b", "wan2.2-ti2v-5b", "flux2-klein-9b")
Inputs = dict[str, Tensor]


def case_of(variant: str, *, compile: bool) -> tuple[Family, ModelSource, Bucket, TraceSettings]:
    """Two blocks of each kind at real size, and a clip or image for them."""
    is_wan = variant.startswith("wan")
    family, source = (WAN, source_of(variant)) if is_wan else (FLUX2, test_flux2_plans.source_of())
    settings = settings_of(variant) if is_wan else test_flux2_plans.settings_of()
    lengths = {"num_layers": 2} if is_wan else {"num_layers": 2, "num_single_layers": 2}
    transformer = replace(source.transformer, config={**source.transformer.config, **lengths})
    source = replace(source, transformer=transformer)
    return family, source, CLIP if is_wan else test_flux2_plans.SQUARE, replace(settings, compile=compile)


def made(
    family: Family, source: ModelSource, bucket: Bucket, device: torch.device
) -> tuple[nn.Module, Inputs]:
    """The model with random weights and a LoRA, and a micro-batch, both on the device."""
    model = family.build_transformer(source.transformer)
    placement = place(model, [device], blocks=family.block_lists)
    models.fill(model, family, placement, dtype=torch.bfloat16, rank=32)
    shapes = family.cached_shapes(source, bucket.frames, bucket.height, bucket.width)
    cached = {name: torch.randn(shape) for name, shape in shapes.items()}
    sample = family.make_sample(
        source.traits, cached, torch.randn(shapes["latents"]), 0.9, dtype=torch.bfloat16
    )
    # What is in no state dict, such as rotary tables, has stayed behind.
    return model.to(device), tree_map_only(Tensor, lambda tensor: tensor.to(device), sample.inputs)


def traced(variant: str, *, compile: bool) -> ModelTrace:
    return trace_model(*case_of(variant, compile=compile))


@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_block_keeps_and_works_with_what_its_trace_says(
    cuda: torch.device, variant: str, compile: bool
) -> None:
    family, source, bucket, _ = case_of(variant, compile=compile)
    model, inputs = made(family, source, bucket, cuda)
    division = split(model, [cuda], blocks=family.block_lists, residency="auto", compile=compile)
    probe = Probe([StageMemory(available=0, num_blocks=4, may_keep=4, held=Held(1, 1, 1))])
    with division.probing(probe):
        probe.end_head(0, cuda, model(**inputs, return_dict=False))
    trace = traced(variant, compile=compile)
    assert probe.memories[0] is not None
    assert 0.98 * probe.memories[0].head <= trace.head <= 1.1 * probe.memories[0].head
    expected = trace.blocks
    found = dict(zip(expected, probe.footprints[0].values(), strict=True))
    for name, block in expected.items():
        for residency in (Residency.KEEP, Residency.SELECTIVE):
            ours, theirs = block.footprints[residency], found[name][residency]
            assert ours.hidden == theirs.hidden
            assert ours.kept == pytest.approx(theirs.kept, rel=0.02), (name, residency)
            planned, taken = ours.kept + ours.working, theirs.kept + theirs.working
            # FLUX.2's single blocks are planned as torch 2.13 compiles them: 2.11's hold an eighth less.
            over = 1.16 if variant.startswith("flux2") else 1.06
            assert 0.98 * taken <= planned <= over * taken, (name, residency)


@pytest.mark.parametrize("variant", VARIANTS)
def test_an_eager_block_saves_on_a_gpu_what_it_saves_on_the_cpu(cuda: torch.device, variant: str) -> None:
    """By dtype and size in units of the hidden state; small tensors aside."""
    family, source, bucket, _ = case_of(variant, compile=False)
    bucket = replace(bucket, frames=1, height=128, width=128)
    ours, theirs = (
        saved_by(family, *made(family, source, bucket, torch.device(device))) for device in ("cpu", cuda)
    )
    assert ours == theirs


def saved_by(family: Family, model: nn.Module, inputs: Inputs) -> list[Counter[str]]:
    """What the last block of each kind saves for its backward, each storage once."""
    found = []
    for name in family.block_lists:
        block = model.get_submodule(name)[-1]  # type: ignore[index]
        calls: list[tuple[object, object, object]] = []
        hook = block.register_forward_hook(lambda _, *call, calls=calls: calls.append(call), with_kwargs=True)
        with torch.no_grad():
            model(**inputs, return_dict=False)
        hook.remove()
        ((args, kwargs, outputs),) = calls
        args, kwargs = as_in_training((args, kwargs), outputs)
        shared = {p.untyped_storage().data_ptr() for p in block.parameters()}
        hidden = max(leaf.numel() for leaf in (outputs if isinstance(outputs, tuple) else (outputs,)))
        saved: dict[int, str] = {}

        def pack(
            tensor: Tensor, saved: dict[int, str] = saved, shared: set[int] = shared, hidden: int = hidden
        ) -> Tensor:
            storage = tensor.untyped_storage()
            size = storage.nbytes() / tensor.element_size() / hidden
            if storage.data_ptr() not in shared and size > 0.1:
                saved[storage.data_ptr()] = f"{str(tensor.dtype).removeprefix('torch.')} {size:.2f}"
            return tensor

        with fused_norms(block), saved_tensors_hooks(pack, lambda tensor: tensor):
            kept = block(*args, **kwargs)
        del kept
        found.append(Counter(saved.values()))
    return found
