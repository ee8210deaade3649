"""Models of random weights, made on the devices that they stay on, and micro-batches for them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from tworeel.benchmarks.shapes import Case
from tworeel.benchmarks.widths import TEXT_TOKENS, Flux2Shape, ModelShape, WanShape
from tworeel.engine import Placement, place
from tworeel.errors import UserError
from tworeel.lora.inject import inject_lora
from tworeel.lora.state import lora_parameters
from tworeel.models.family import Component, Family, ModelSource, Traits
from tworeel.models.flux2 import conditioning
from tworeel.models.flux2 import variants as flux2_variants
from tworeel.models.registry import FAMILIES
from tworeel.models.wan import variants as wan_variants
from tworeel.quant import quantize_blocks

Quantization = Literal["fp8", "int8", "nf4"]
SCALE = 0.02
"""Standard deviation of the weights: activations stay far from bf16's limits over 40 blocks."""
TIMESTEP = 900.0


def config_of(shape: ModelShape) -> dict[str, Any]:
    """The arguments of the transformer's class."""
    return shape.config()


def family_of(shape: ModelShape) -> Family:
    """What the package knows of the model's kind."""
    return FAMILIES[shape.family]


def build(shape: ModelShape, blocks: int) -> nn.Module:
    """The transformer on the meta device."""
    return family_of(shape).build_transformer(_transformer(shape, blocks))


def source_of(shape: ModelShape, blocks: int | None = None) -> ModelSource:
    """The model as if it had been found on disk, with so many blocks; all by default."""
    return ModelSource(traits=_traits_of(shape), transformer=_transformer(shape, blocks))


def _transformer(shape: ModelShape, blocks: int | None) -> Component:
    return Component(files=(), layout="native", config=shape.config(blocks))


def _traits_of(shape: ModelShape) -> Traits:
    match shape:
        case WanShape():
            return wan_variants.traits(shape.variant, None)
        case Flux2Shape():
            return flux2_variants.traits(shape.variant)
    raise NotImplementedError(f"no traits of a {type(shape).__name__}")


def dtype_of(shape: ModelShape) -> torch.dtype:
    """Of weights that are not quantized, and of activations."""
    return torch.float32 if shape.tiny else torch.bfloat16


def place_model(
    model: nn.Module, family: Family, devices: Sequence[torch.device], at: Sequence[int] | None
) -> Placement:
    """Which block goes where.

    Raises:
        ValueError: as `tworeel.engine.place`.
    """
    return place(model, devices, at=at, blocks=family.block_lists)


def fill(
    model: nn.Module,
    family: Family,
    placement: Placement,
    *,
    dtype: torch.dtype,
    rank: int,
    quantize: Quantization | None = None,
    streamed: Sequence[int] = (),
) -> None:
    """Give the model its weights, each made on its device, and a LoRA on all linear layers of the blocks.

    What the family keeps in fp32 is fp32. A block is quantized as soon as it is made, so that no device ever
    holds the whole model unquantized. The LoRA's second matrix is not zero, as at the start of a training:
    then the first one would have no gradient to compare.

    Args:
        model: on the meta device.
        family: of the model.
        placement: which device holds what.
        dtype: of the weights.
        rank: of the LoRA.
        quantize: fp8, int8 or nf4.
        streamed: positions of the blocks that end in host memory.

    Raises:
        UserError: this machine cannot quantize so.
    """
    noise = Noise()
    keep = set(family.keep_fp32)
    blocks = tuple(unit.name for unit in placement.units if unit.is_block)

    def make(names: Iterable[str]) -> None:
        for name in names:
            precise = keep & set(name.split("."))
            _make(model, name, noise, placement.device_of(name), torch.float32 if precise else dtype)

    by_block = _by_block(model, blocks)
    waiting = {blocks[position] for position in streamed}
    make(by_block.pop(""))
    for block, names in by_block.items():
        make(names)
        if quantize is not None:
            _quantize(model, block, quantize)
        if block in waiting:
            model.get_submodule(block).to("cpu")
    targets = family.lora_presets["all-linear"]
    inject_lora(model, rank=rank, alpha=rank, targets=targets, block_lists=family.block_lists)
    for parameter in lora_parameters(model).values():
        parameter.data = noise.normal(tuple(parameter.shape), parameter.device, parameter.dtype)


class Noise:
    """Normal random values of `SCALE`: the same whenever they are drawn in the same order."""

    def __init__(self, seed: int = 0) -> None:
        self._seed = seed
        self._generators: dict[torch.device, torch.Generator] = {}

    def normal(self, shape: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> Tensor:
        """The device's next values."""
        if device not in self._generators:
            self._generators[device] = torch.Generator(device).manual_seed(self._seed)
        values = torch.empty(shape, dtype=dtype, device=device)
        return values.normal_(std=SCALE, generator=self._generators[device])


def make_batches(case: Case, dtype: torch.dtype, device: torch.device) -> list[dict[str, Any]]:
    """Random inputs of the transformer, for each micro-batch, on the first stage's device."""
    generator = torch.Generator().manual_seed(0)

    def inputs() -> dict[str, Any]:
        match case.model:
            case WanShape():
                return _wan_inputs(case.model, case.grid, dtype, generator)
            case Flux2Shape():
                return _flux2_inputs(case.model, case.grid, dtype, generator)
        raise NotImplementedError(f"no inputs for a {type(case.model).__name__}")

    return [
        {name: value if value is None else value.to(device) for name, value in inputs().items()}
        for _ in range(case.micro_batches)
    ]


def _wan_inputs(
    model: WanShape, grid: tuple[int, int, int], dtype: torch.dtype, generator: torch.Generator
) -> dict[str, Any]:
    """`hidden_states` (1, C, F, H, W), `timestep` (1,) and `encoder_hidden_states` (1, 512, text width)."""
    frames, height, width = grid
    latents = (1, model.channels, frames, model.patch * height, model.patch * width)
    return {
        "hidden_states": torch.randn(latents, generator=generator).to(dtype),
        "timestep": torch.full((1,), TIMESTEP),
        "encoder_hidden_states": torch.randn(1, TEXT_TOKENS, model.text_dim, generator=generator).to(dtype),
    }


def _flux2_inputs(
    model: Flux2Shape, grid: tuple[int, int, int], dtype: torch.dtype, generator: torch.Generator
) -> dict[str, Any]:
    """What training gives the transformer for an image of this size."""
    traits = _traits_of(model)
    latents, noise = torch.randn(2, model.channels, *grid, generator=generator)
    cached = {"latents": latents, "text": torch.randn(TEXT_TOKENS, model.text_dim, generator=generator)}
    return conditioning.make_sample(traits, cached, noise, TIMESTEP / 1000, dtype=dtype).inputs


def mean_square(output: Any) -> Tensor:
    """The loss: mean of the output's squares, in fp32."""
    loss: Tensor = output.sample.float().square().mean()
    return loss


def _by_block(model: nn.Module, blocks: Sequence[str]) -> dict[str, list[str]]:
    """Names of parameters by block; those of no block come first, under an empty name."""
    found: dict[str, list[str]] = defaultdict(list, {"": []})
    for name, _ in model.named_parameters():
        block = next((block for block in blocks if name.startswith(f"{block}.")), "")
        found[block].append(name)
    return found


def _make(model: nn.Module, name: str, noise: Noise, device: torch.device, dtype: torch.dtype) -> None:
    path, _, leaf = name.rpartition(".")
    shape = tuple(model.get_parameter(name).shape)
    if len(shape) == 1 and leaf == "weight":  # of a norm
        values = torch.ones(shape, device=device, dtype=dtype)
    else:
        values = noise.normal(shape, device, dtype)
    setattr(model.get_submodule(path), leaf, nn.Parameter(values, requires_grad=False))


def _quantize(model: nn.Module, block: str, kind: Quantization) -> None:
    modules = model.get_submodule(block).named_modules()
    names = [f"{block}.{name}" for name, module in modules if isinstance(module, nn.Linear)]
    try:
        quantize_blocks(model, kind, names)
    except ValueError as error:
        raise UserError(f"--precision {kind}: {error}") from None
