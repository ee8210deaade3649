"""Spread the transformer of a DiffSynth pipeline over devices, and keep it there."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from tworeel.diffsynth.adjusting import adjust
from tworeel.diffsynth.encoders import is_trained, keep_in_host_memory, text_encoders
from tworeel.diffsynth.layouts import MODELS, Layout, layout_of
from tworeel.diffsynth.settings import Settings
from tworeel.diffsynth.sharing import budgets, crowds_out, planned
from tworeel.engine.placement import Placement, place
from tworeel.engine.residency import Residency
from tworeel.engine.split import Split, split
from tworeel.errors import UserError, raise_if_any
from tworeel.planning.budgets import Budget
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
        quantize_blocks(together, "fp8", _frozen_linears(together, layout))
    residency = settings.residency or _residency(checkpointing, offload)
    _check_range(together, layout, settings)
    first = runs_first(together, layout)
    given = None if settings.split_at is None else [layout.before + n for n in settings.split_at]
    shares = place(
        together, settings.devices, at=given, blocks=layout.lists, beside=layout.beside, first=first
    )
    known = budgets(settings.devices)
    waiting = _waiting(pipe, together, shares, settings, known)
    if given is None and known is not None:
        given = list(planned(together, shares, layout, _beside(pipe, waiting), known))
    division = split(
        together,
        settings.devices,
        at=given,
        blocks=layout.lists,
        residency=residency,
        beside=layout.beside,
        first=first,
    )
    adjust(pipe, models, division)
    for encoder in waiting:
        keep_in_host_memory(encoder, torch.device(settings.devices[0]))
    return division, layout


def _waiting(
    pipe: Any,
    together: nn.Module,
    shares: Placement,
    settings: Settings,
    known: Sequence[Budget] | None,
) -> Sequence[nn.Module]:
    """The text encoders whose weights stay in host memory: all, or none."""
    texts = list(text_encoders(pipe))
    trained = any(map(is_trained, texts))
    if settings.text_encoder == "host" and trained:
        raise UserError("DIFFSYNTH_DUAL_GPU_TEXT_ENCODER=host: it is trained; allowed is device")
    if trained or settings.text_encoder == "device":
        return ()
    if settings.text_encoder == "host":
        return texts
    return texts if known and crowds_out(texts, together, shares, _beside(pipe, texts), known[0]) else ()


def _beside(pipe: Any, without: Sequence[nn.Module]) -> list[nn.Module]:
    """What goes to the first device whole, as text encoder and VAE do."""
    others = (child for name, child in pipe.named_children() if name not in MODELS)
    return [other for other in others if other not in without]


def runs_first(together: nn.Module, layout: Layout) -> list[str]:
    """What runs before the blocks, wherever it is registered: all that is named nowhere in the layout."""
    units = place(together, ["cpu"], blocks=layout.lists, beside=layout.beside).units
    others = (unit.name for unit in units if not unit.is_block and unit.beside is None)
    return [name for name in others if name not in layout.after]


def _frozen_linears(together: nn.Module, layout: Layout) -> list[str]:
    """Names of the linear layers of the blocks and beside them that are not trained.

    Raises:
        UserError: there is none.
    """
    names = block_linears(together, (*layout.lists, *layout.beside))
    trained = {name.rpartition(".")[0] for name, p in together.named_parameters() if p.requires_grad}
    frozen = [name for name in names if name not in trained]
    if not frozen:
        raise UserError("DIFFSYNTH_DUAL_GPU_FP8=true: all linear layers are trained; fp8 is for frozen ones")
    return frozen


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
