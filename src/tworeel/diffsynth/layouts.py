"""Where DiffSynth's models have their blocks, and what runs between them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from tworeel.errors import UserError

MODELS = ("dit", "vace", "vap", "animate_adapter", "motion_controller")
"""Names in DiffSynth's pipelines of what runs at each step; the transformer is `dit`."""
_KINDS = ("WanModel", "WanS2VModel", "WanAnimate2Transformer", "LongCatVideoTransformer3DModel")
_HEADS = ("head", "head_global", "final_layer")


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How the models of one pipeline are to be spread."""

    lists: tuple[str, ...]
    """Lists of blocks, in the order of the forward."""
    before: int = 0
    """How many of these blocks come before the transformer's own."""
    beside: Mapping[str, str] = field(default_factory=dict)
    """Modules between blocks, and the block that each of them follows."""
    after: tuple[str, ...] = ()
    """Modules that run after the blocks; whatever else there is runs before them."""


def layout_of(models: Mapping[str, nn.Module]) -> Layout:
    """Find the blocks of the models of a pipeline, by the names that they have there.

    Raises:
        UserError: the transformer is one that cannot be split, with the reason.
    """
    dit = models["dit"]
    kind = type(dit).__name__
    if kind == "Flux2DiT":
        both = ("dit.transformer_blocks", "dit.single_transformer_blocks")
        return Layout(lists=both, after=("dit.norm_out", "dit.proj_out"))
    if kind not in _KINDS:
        raise UserError(f"{kind} is not known here: only the transformers of Wan and FLUX.2 can be split")
    vace = models.get("vace")
    own: tuple[str, ...] = ("dit.blocks",)
    lists = own if vace is None else ("vace.vace_blocks", *own)
    before = 0 if vace is None else len(_list(vace, "vace_blocks"))
    beside = {name: f"dit.blocks.{block}" for name, block in _between(models)}
    after = tuple(f"dit.{name}" for name in _HEADS if hasattr(dit, name))
    return Layout(lists=lists, before=before, beside=beside, after=after)


def _list(module: nn.Module, name: str) -> nn.ModuleList:
    found = module.get_submodule(name)
    assert isinstance(found, nn.ModuleList)
    return found


def _between(models: Mapping[str, nn.Module]) -> Iterator[tuple[str, int]]:
    """Yield each module that runs after a block, with the block's number."""
    dit: Any = models["dit"]
    injectors = {
        "audio_injector": ("injector", "injector_adain_layers"),
        "music_injector": ("injector", "injector_pre_norm_feat"),
    }
    for name, lists in injectors.items():
        injector: Any = getattr(dit, name, None)
        for block, i in injector.injected_block_id.items() if injector is not None else ():
            yield from ((f"dit.{name}.{one}.{i}", block) for one in lists if hasattr(injector, one))
    num_blocks = len(_list(dit, "blocks"))
    if "vap" in models:
        vap: Any = models["vap"]
        yield from ((f"vap.blocks.{i}", block) for block, i in vap.mot_layers_mapping.items())
    if "animate_adapter" in models:
        count = len(_list(models["animate_adapter"], "face_adapter.fuser_blocks"))
        fusers = range(min(count, -(-num_blocks // 5)))
        yield from ((f"animate_adapter.face_adapter.fuser_blocks.{i}", 5 * i) for i in fusers)
