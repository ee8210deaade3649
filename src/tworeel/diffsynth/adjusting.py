"""What DiffSynth's models need to run on several devices, and several micro-batches of them at once."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from functools import cache, wraps
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask
from torch.utils._pytree import tree_map

from tworeel.engine.moving import lodgers
from tworeel.engine.neighbours import keep_spread
from tworeel.engine.placement import Placement
from tworeel.engine.split import Split
from tworeel.engine.strays import without_strays


def adjust(pipe: Any, models: Mapping[str, nn.Module], division: Split) -> None:
    """Adjust a pipeline whose models have been split.

    Args:
        pipe: the pipeline.
        models: what of it is split, by name.
        division: of all of them together.
    """
    for name, model in models.items():
        stay(model, name, division.model, division.placement)
    keep_music_apart(pipe.dit)
    if "animate_adapter" in models:
        let_write(pipe.dit.patch_embedding)
    if hasattr(pipe.dit, "block_masks"):
        prepare_arguments(division)
    pipe.model_fn = without_checkpointing(pipe.model_fn)
    pipe.load_models_to_device = MethodType(load_models_to_device, pipe)


def stay(model: Any, name: str, together: nn.Module, placement: Placement) -> None:
    """Keep a model's parts on their devices when its pipeline is moved to one.

    Args:
        model: one of several that are placed together.
        name: its name among them.
        together: all of them.
        placement: of all of them.
    """
    prefix = f"{name}."
    own = [unit for unit in placement.units if unit.name.startswith(prefix)]
    # What accelerate looks at, to leave the model where it is.
    model.hf_device_map = {unit.name.removeprefix(prefix): placement.devices[unit.stage] for unit in own}
    keep_spread(model, lambda: {id(one): device for one, device in lodgers(together, placement, ())})


def load_models_to_device(pipe: Any, names: Sequence[str]) -> None:
    """As DiffSynth's, for encoders that it reads from disk or casts, without emptying torch's cache.

    That must not meet the work of other devices, which goes on while a micro-batch is encoded.

    Args:
        pipe: the pipeline.
        names: of the models that are about to run; the others are put away first.
    """
    models = [(name, m) for name, m in pipe.named_children() if getattr(m, "vram_management_enabled", False)]
    for act in ("offload", "onload"):
        for model in (model for name, model in models if (name in names) == (act == "onload")):
            for module in [model] if hasattr(model, act) else model.modules():
                if hasattr(module, act):
                    getattr(module, act)()


class _OfThisThread:
    """An attribute of which each thread has its own."""

    def __init__(self) -> None:
        self._here = threading.local()

    def __get__(self, owner: Any, kind: type) -> Any:
        return self._here.value

    def __set__(self, owner: Any, value: Any) -> None:
        self._here.value = value


def keep_music_apart(dit: Any) -> None:
    """Let each micro-batch have its own music: WanToDance keeps it as an attribute of the transformer.

    Each micro-batch runs in a thread of its own.
    """
    if getattr(dit, "wantodance_enable_music_inject", False):
        kind = type(dit)
        dit.__class__ = type(kind.__name__, (kind,), {"merged_audio_emb": _OfThisThread()})


def let_write(module: nn.Module) -> None:
    """Let the model function write into what a module before the blocks returns, as Animate's does.

    Where the module is trained, a pipeline cuts the graph behind it, and autograd refuses to write there.
    """

    def copied(_: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
        return output.clone() if output.requires_grad and output.is_leaf else output

    module.register_forward_hook(copied)


def prepare_arguments(division: Split) -> None:
    """Let each block of Animate-2 get what the engine does not bring to its device as it should.

    The mask of flex attention, which all blocks share, is no tensor: there is one copy a device. The sizes of
    the grids are tensors in host memory that are read as numbers: on a device each reading would wait for it.
    """
    copy = cache(BlockMask.to)

    def for_device(device: torch.device) -> Callable[..., Any]:
        def prepare(given: Any) -> Any:
            if isinstance(given, BlockMask):
                return copy(given, device)
            is_size = isinstance(given, Tensor) and given.device.type == "cpu" and given.dtype == torch.int64
            return given.numpy() if is_size else given

        def prepare_all(_: nn.Module, *args_and_kwargs: Any) -> Any:
            with without_strays():  # the host may be a stage's device
                return tree_map(prepare, args_and_kwargs)

        return prepare_all

    placement = division.placement
    for name in placement.block_names:
        block = division.model.get_submodule(name)
        block.register_forward_pre_hook(for_device(placement.device_of(name)), with_kwargs=True)


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
