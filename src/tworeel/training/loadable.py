"""A transformer before it is loaded: what it needs, and where its blocks will be."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeVar

import torch
from torch import nn

from tworeel.config.schema import RunConfig
from tworeel.engine.compiling import require_cpp_compiler
from tworeel.engine.placement import Placement, place
from tworeel.engine.streamed_blocks import streamed_positions
from tworeel.errors import UserError
from tworeel.models.family import Family, ModelSource
from tworeel.training.choices import stages_per_device
from tworeel.training.devices import resolve_devices
from tworeel.weights.loading import check_weights
from tworeel.weights.rows import NameOf
from tworeel.weights.tensor_files import TensorFiles


@dataclass(frozen=True, kw_only=True)
class Loadable:
    """A transformer before it is loaded, and where it will be."""

    family: Family
    source: ModelSource
    transformer: nn.Module
    """On the meta device."""
    placement: Placement
    streamed: tuple[int, ...]
    """Positions of the blocks whose weights wait in host memory."""
    cpp_wrapper: bool = False
    """Whether compiled blocks are launched from C++."""

    @property
    def streamed_counts(self) -> tuple[int, ...] | None:
        """How many of each stage's blocks they are; None where there are none."""
        blocks = [self.placement.blocks_of(stage) for stage in range(self.placement.num_stages)]
        return tuple(len({*one} & {*self.streamed}) for one in blocks) if self.streamed else None


J = TypeVar("J", bound=Loadable)


def torch_dtype(name: str) -> torch.dtype:
    """`bfloat16` -> `torch.bfloat16`."""
    dtype = getattr(torch, name)
    assert isinstance(dtype, torch.dtype)
    return dtype


def transformer_names(family: Family, source: ModelSource) -> NameOf:
    """Key in the transformer's files -> parameter name, or the rows of it that several parameters have."""
    return partial(family.parameter_name, source.transformer.layout)


def check_transformer(family: Family, source: ModelSource, transformer: nn.Module) -> None:
    """Raise `UserError` unless the files fill the transformer; only headers are read."""
    check_weights(transformer, TensorFiles(*source.transformer.files), transformer_names(family, source))


def require_quantization(config: RunConfig) -> None:
    """Raise `UserError` if the quantization needs a package that is not here."""
    if config.model.quantize == "nf4" and importlib.util.find_spec("bitsandbytes") is None:
        raise UserError(
            "model.quantize = 'nf4': needs bitsandbytes; pip install 'tworeel[eightbit]' brings it"
        )


def require_launcher(config: RunConfig) -> None:
    """Raise `UserError` if blocks are to be launched from C++ on this machine and no compiler is here."""
    engine = config.engine
    compiles = torch.accelerator.is_available() if engine.compile is None else engine.compile
    if engine.cpp_wrapper is True and compiles:
        try:
            require_cpp_compiler()
        except ValueError as error:
            raise UserError(f"engine.cpp_wrapper = true: {error}") from None


def place_blocks(
    transformer: nn.Module,
    config: RunConfig,
    family: Family,
    devices: Sequence[torch.device] | None = None,
    *,
    planned: bool = True,
) -> tuple[Placement, tuple[int, ...]]:
    """Which block is where, and the positions of those whose weights wait in host memory.

    On GPUs boundaries that are not set are even shares until they are decided: counts that only other
    boundaries have the blocks for leave nothing in host memory until then.

    Args:
        transformer: on the meta device.
        config: of the run.
        family: of the model.
        devices: stand for the configuration's.
        planned: boundaries that are not set will be decided yet.

    Raises:
        UserError: there is no such device, or the options do not fit the blocks.
    """
    found = tuple(devices or resolve_devices(config.engine.devices)) * stages_per_device(config)
    try:
        placement = place(transformer, found, at=config.engine.split_at, blocks=family.block_lists)
    except ValueError as error:
        raise of_options(error) from None
    counts = config.engine.streamed_blocks
    undecided = config.engine.split_at is None and not any(device.type == "cpu" for device in found)
    if planned and undecided and exceed_shares(placement, counts):
        _require_blocks(placement, counts or ())
        return placement, ()
    try:
        return placement, tuple(streamed_positions(placement, counts))
    except ValueError as error:
        raise of_options(error) from None


def of_options(error: ValueError) -> UserError:
    """What the engine says of its arguments, said of the options."""
    name, _, rest = str(error).partition("=")
    option = {"streamed": "streamed_blocks", "at": "split_at"}.get(name)
    return UserError(f"engine.{option} = {rest}" if option else f"engine: {error}")


def exceed_shares(placement: Placement, counts: Sequence[int] | None) -> bool:
    """Whether a stage has fewer blocks than are to be streamed, so that only other boundaries would do."""
    if counts is None or len(counts) != placement.num_stages:
        return False
    return any(count > len(placement.blocks_of(stage)) for stage, count in enumerate(counts))


def _require_blocks(placement: Placement, counts: Sequence[int]) -> None:
    """Raise `UserError` if no boundaries have blocks for these counts."""
    total = placement.boundaries[-1]
    if sum(max(1, count) for count in counts) > total:
        found = f"the model has {total} blocks, and each stage at least one"
        raise UserError(f"engine.streamed_blocks = {list(counts)}: {found}")


def place_again(job: J, devices: Sequence[torch.device], at: Sequence[int], streamed: Sequence[int]) -> J:
    """The job with its blocks elsewhere.

    Args:
        job: with its blocks placed somehow.
        devices: one a stage.
        at: first block of each stage but the first.
        streamed: blocks of each stage whose weights wait in host memory.
    """
    placement = place(job.transformer, devices, at=at, blocks=job.family.block_lists)
    return replace(job, placement=placement, streamed=tuple(streamed_positions(placement, streamed)))
