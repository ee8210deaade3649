"""Spread the transformer of a DiffSynth pipeline over devices, and keep it there."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from typing import Any

from torch import nn

from tworeel.diffsynth.layouts import MODELS, Layout, layout_of
from tworeel.diffsynth.settings import Settings
from tworeel.diffsynth.sharing import budgets, planned
from tworeel.engine.placement import Placement, place
from tworeel.engine.residency import Residency
from tworeel.engine.split import Split, split
from tworeel.errors import UserError, raise_if_any
from tworeel.quant.swap import block_linears, quantize_blocks


class StepModels(nn.ModuleDict):
    """What runs at each step, as one module whose forward is whatever function uses it.

    DiffSynth's model functions walk the transformer's blocks themselves: what the engine has to meet is the
    function, not the transformer's forward.
    """

    def forward(self, function: Callable[[], Any]) -> Any:
        return function()


def split_pipeline(
    pipe: Any, settings: Settings, *, checkpointing: bool, offload: bool
) -> tuple[Split, Layout]:
    """Split what a pipeline runs at each step.

    Args:
        pipe: a pipeline of DiffSynth; its models are on the CPU, with their LoRA.
        settings: the devices, where to split, and what the blocks leave behind.
        checkpointing, offload: what the script's options say of gradient checkpointing, which the engine
            does in the place of DiffSynth.

    Raises:
        UserError: the models cannot be split, or not there.
    """
    found = {name: getattr(pipe, name, None) for name in MODELS}
    models = {name: model for name, model in found.items() if isinstance(model, nn.Module)}
    if "dit" not in models:
        raise UserError("no transformer was loaded: name its files in --model_paths")
    raise_if_any(_bound_to_one_device(models))
    layout = layout_of(models)
    together = StepModels(models)
    if settings.fp8:
        quantize_blocks(together, "fp8", block_linears(together, (*layout.lists, *layout.beside)))
    residency = settings.residency or _residency(checkpointing, offload)
    _check_range(together, layout, settings)
    first = runs_first(together, layout)
    division = split(
        together,
        settings.devices,
        at=_boundaries(together, layout, settings, first, pipe),
        blocks=layout.lists,
        residency=residency,
        beside=layout.beside,
        first=first,
    )
    for model in models.values():
        stay(model, division.placement)
    pipe.model_fn = without_checkpointing(pipe.model_fn)
    return division, layout


def _boundaries(
    together: nn.Module, layout: Layout, settings: Settings, first: Sequence[str], pipe: Any
) -> Sequence[int] | None:
    """First block of each stage after the first, over all lists; None where nothing tells devices apart."""
    if settings.split_at is not None:
        return [layout.before + number for number in settings.split_at]
    known = budgets(settings.devices)
    if known is None:
        return None
    even = place(together, settings.devices, blocks=layout.lists, beside=layout.beside, first=first)
    others = [child for name, child in pipe.named_children() if name not in MODELS]
    return planned(together, even, layout, others, known)


def runs_first(together: nn.Module, layout: Layout) -> list[str]:
    """What runs before the blocks, wherever it is registered: all that is named nowhere in the layout."""
    units = place(together, ["cpu"], blocks=layout.lists, beside=layout.beside).units
    others = (unit.name for unit in units if not unit.is_block and unit.beside is None)
    return [name for name in others if name not in layout.after]


def _residency(checkpointing: bool, offload: bool) -> Residency:
    if offload:
        return Residency.OFFLOAD
    return Residency.RECOMPUTE if checkpointing else Residency.KEEP


def _bound_to_one_device(models: Mapping[str, nn.Module]) -> list[str]:
    problems = []
    for name, model in models.items():
        if getattr(model, "vram_management_enabled", False):
            problems.append(
                f"--fp8_models, --offload_models: DiffSynth binds the layers of '{name}' to one device; "
                "leave its files out there, and set DIFFSYNTH_DUAL_GPU_FP8=true for fp8"
            )
        if getattr(model, "quantize_config", None) is not None:
            problems.append(f"--quant_options: '{name}' cannot be quantized by DiffSynth and split")
    return problems


def _check_range(together: nn.Module, layout: Layout, settings: Settings) -> None:
    sizes = [len(list(together.get_submodule(name).children())) for name in layout.lists]
    count = sum(sizes) - layout.before
    wrong = [number for number in settings.split_at or () if not 0 < number < count]
    if wrong:
        given = ",".join(map(str, settings.split_at or ()))
        raise UserError(
            f"DIFFSYNTH_DUAL_GPU_SPLIT_AT={given}: the transformer has {count} blocks, "
            f"allowed are 1 to {count - 1}"
        )
    if count < len(settings.devices):
        raise UserError(f"{len(settings.devices)} devices for {count} blocks: at most one device a block")


def stay(model: Any, placement: Placement) -> None:
    """Keep a split model's parts where they are when the whole pipeline is moved to a device.

    `hf_device_map` is what accelerate looks at; `_apply` is what a parent's `.to()` calls.
    """
    model.hf_device_map = {unit.name: placement.devices[unit.stage] for unit in placement.units}

    def keep(_function: Callable[..., Any], recurse: bool = True) -> Any:
        return model

    model._apply = keep


def without_checkpointing(model_fn: Callable[..., Any]) -> Callable[..., Any]:
    """A pipeline's `model_fn` with DiffSynth's gradient checkpointing off: the engine does it.

    DiffSynth's stores and restores the random state around each block, which micro-batches that overlap
    share; and for S2V it computes wrong gradients (its block number is bound late).
    """

    @wraps(model_fn)
    def unchecked(*args: Any, **kwargs: Any) -> Any:
        kwargs |= {"use_gradient_checkpointing": False, "use_gradient_checkpointing_offload": False}
        return model_fn(*args, **kwargs)

    return unchecked
