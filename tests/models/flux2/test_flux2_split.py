"""A split FLUX.2 trains as the whole one does, wherever it is cut: the same losses and LoRA gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

from tworeel.data.clips import Bucket
from tworeel.demo.tiny_flux2 import tiny_transformer
from tworeel.engine import Pipeline, fitter, split
from tworeel.engine.fitting import StageMemory
from tworeel.engine.footprints import Footprint
from tworeel.engine.probing import Probe
from tworeel.engine.residency import Residency
from tworeel.engine.schedule import Held
from tworeel.lora.inject import inject_lora
from tworeel.lora.state import lora_parameters
from tworeel.lora.targets import find_targets
from tworeel.models.family import Component, ModelSource, TrainingSample
from tworeel.models.flux2.conditioning import cached_shapes, make_sample
from tworeel.models.flux2.transformer import BLOCK_LISTS, LORA_PRESETS
from tworeel.models.flux2.variants import traits
from tworeel.training.micro_batches import MicroBatch, run_transformer, weighted_loss

CUTS = {
    "one stage": [],
    "inside the double blocks": [1],
    "between the kinds": [2],
    "inside the single blocks": [3],
    "in both kinds": [1, 4],
    "around the change of kinds": [1, 2, 3],
}
"""The blocks are two double and three single ones."""


def make_model(variant: str = "flux2-dev") -> nn.Module:
    """A transformer with a LoRA that is not zero."""
    model = tiny_transformer(variant)
    inject_lora(
        model, rank=2, alpha=2, targets=find_targets(model, LORA_PRESETS["all-linear"], BLOCK_LISTS), seed=0
    )
    for name, parameter in lora_parameters(model).items():
        if name.endswith("lora_B"):
            nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(parameter.numel()))
    return model


def make_sample_of(variant: str, seed: int, references: tuple[tuple[int, int], ...]) -> TrainingSample:
    generator = torch.Generator().manual_seed(seed)
    config = dict(tiny_transformer(variant).config)
    transformer = Component(files=(), layout="diffusers", config=config)
    source = ModelSource(traits=traits(variant), transformer=transformer)
    shapes = cached_shapes(source, 1, 64, 48 + 16 * seed, references)
    cached = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    cached["text"] = cached["text"][:40]  # as many words as keep the test quick
    noise = torch.randn(shapes["latents"], generator=generator)
    return make_sample(source.traits, cached, noise, 0.3 + 0.2 * seed, dtype=torch.float32)


def make_batches(variant: str = "flux2-dev") -> list[MicroBatch]:
    """Without, with one and with two reference images."""
    references = ((), ((32, 80),), ((32, 80), (64, 64)))
    samples = [make_sample_of(variant, seed, some) for seed, some in enumerate(references)]
    return [
        MicroBatch(
            clip=str(i), bucket=Bucket(frames=5, height=64, width=64), sigma=0.5, sample=s, weight=1 / 3
        )
        for i, s in enumerate(samples)
    ]


def gradients(model: nn.Module) -> dict[str, Tensor]:
    found = {name: p.grad for name, p in lora_parameters(model).items() if p.grad is not None}
    assert len(found) == len(lora_parameters(model))
    return found


@pytest.fixture(scope="module")
def plain() -> dict[str, tuple[list[Tensor], dict[str, Tensor]]]:
    """Losses and gradients of plain PyTorch, by variant."""
    results = {}
    for variant in ("flux2-dev", "flux2-klein-4b"):
        model, batches = make_model(variant), make_batches(variant)
        losses = [weighted_loss(run_transformer(model, batch), batch) for batch in batches]
        for loss in losses:
            loss.backward()
        results[variant] = ([loss.detach() for loss in losses], gradients(model))
    return results


@pytest.mark.parametrize("residency", ["keep", "selective", "recompute", "offload"])
@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("variant", ["flux2-dev", "flux2-klein-4b"])
def test_split_training_is_plain_training(plain, variant, cut, residency):
    model, at = make_model(variant), CUTS[cut]
    division = split(model, ["cpu"] * (len(at) + 1), at=at, blocks=list(BLOCK_LISTS), residency=residency)
    result = Pipeline(division, forward=run_transformer).step(make_batches(variant), weighted_loss)

    losses, expected = plain[variant]
    assert torch.equal(torch.stack(list(result.losses)), torch.stack(losses))
    assert all(torch.equal(grad, expected[name]) for name, grad in gradients(model).items())


@pytest.mark.parametrize("streamed", [(1, 2), (2, 3)])
def test_blocks_of_both_kinds_may_have_their_weights_streamed(plain, streamed):
    model = make_model()
    division = split(
        model,
        ["cpu"] * 2,
        at=[2],
        blocks=list(BLOCK_LISTS),
        residency="selective",
        streamed=streamed,
    )
    pipeline = Pipeline(division, forward=run_transformer)
    for _ in range(2):
        model.zero_grad()
        result = pipeline.step(make_batches(), weighted_loss)
        assert torch.equal(torch.stack(list(result.losses)), torch.stack(plain["flux2-dev"][0]))
    expected = plain["flux2-dev"][1]
    assert all(torch.equal(grad, expected[name]) for name, grad in gradients(model).items())


def test_even_shares_count_both_lists_of_blocks():
    division = split(make_model(), ["cpu"] * 4, blocks=list(BLOCK_LISTS))

    assert division.placement.boundaries[-1] == 5
    assert division.placement.block_names[1:3] == ["transformer_blocks.1", "single_transformer_blocks.0"]


@pytest.mark.parametrize("cut", [[1, 3], [2, 4], [1, 2]])
def test_no_operation_mixes_devices(cut):
    """Fake tensors on distinct devices tell what a single real device hides."""
    mode = FakeTensorMode()

    def forward(model: nn.Module, batch: MicroBatch) -> Tensor:
        with mode:  # thread-local: each carrying thread needs it
            return run_transformer(model, batch)

    pipeline = Pipeline(make_model(), ["cpu"] * 3, at=cut, forward=forward)
    placement = pipeline.split.placement
    object.__setattr__(placement, "devices", tuple(map(torch.device, ("cpu:1", "cpu:2", "cpu:3"))))
    with mode:
        for name, module in pipeline.split.model.named_modules():
            for leaf, parameter in list(module._parameters.items()):
                if parameter is not None:
                    device = placement.device_of(f"{name}.{leaf}")
                    fake = torch.empty(parameter.shape, dtype=parameter.dtype, device=device)
                    module._parameters[leaf] = nn.Parameter(fake, requires_grad=parameter.requires_grad)
        batch = make_batches()[2]
        for key, tensor in batch.sample.inputs.items():
            batch.sample.inputs[key] = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu:1")
    result = pipeline.step([batch], lambda output, _: output.square().mean())

    assert result.losses[0].device == torch.device("cpu:3")
    for name, grad in gradients(pipeline.split.model).items():
        assert grad.device == placement.device_of(name), name


class Recorder:
    """Takes the place of a probe: what would be measured, and on which stage."""

    def __init__(self) -> None:
        self.measured: set[tuple[int, str]] = set()

    def measure(self, stage: int, kind: str, *rest: object) -> None:
        self.measured.add((stage, kind))

    def begin_head(self, stage: int, *rest: object) -> object:
        assert stage == 1
        return rest[-1]


def test_each_kind_of_block_is_measured_on_each_of_its_stages():
    division = split(make_model(), ["cpu"] * 2, at=[1], blocks=list(BLOCK_LISTS))
    recorder = Recorder()
    with division.probing(recorder):
        run_transformer(division.model, make_batches()[0])

    double, single = BLOCK_LISTS
    assert recorder.measured == {(0, double), (1, double), (1, single)}


def test_what_a_stage_takes_is_put_together_from_its_kinds():
    division = split(
        make_model(), ["cpu"] * 2, at=[1], blocks=list(BLOCK_LISTS), streamed=[0, 1], residency="recompute"
    )
    double, single = BLOCK_LISTS
    sizes = {double: {Residency.KEEP: Footprint(100, 1)}, single: {Residency.KEEP: Footprint(10, 1)}}
    memory = StageMemory(available=0, num_blocks=4, may_keep=3, held=Held(1, 1, 1), num_kinds=2)
    probe = Probe([None, memory])
    probe.footprints = [{}, sizes]
    first, second = (fitter._of_stage(division, stage, probe) for stage in (0, 1))

    assert first.kept == [0]
    [streamed] = division.streamed_on(1)
    order = [streamed, *(position for position in (1, 2, 3, 4) if position != streamed)]
    kept = [100 if position == 1 else 10 for position in order]
    assert second.kept == [sum(kept[n:]) for n in range(5)]
