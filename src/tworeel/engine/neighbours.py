"""Gets along with what other libraries do to a model that is split.

Adapters stand outside of the model and take over a layer's forward; trainers move the whole model to one
device; something has replaced a forward before the split could.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Container, Iterator
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

_DROPOUTS = ("dropout", "drop_prob", "rank_dropout", "module_dropout")
"""Attributes that modules keep probabilities in: attentions, dropped paths, LoRA outside of the model."""


def adapters_of(model: nn.Module) -> dict[nn.Module, str]:
    """Modules outside of `model` that run in place of one of its layers, and the layers' names.

    This is how the LoRA of musubi-tuner, ai-toolkit and OneTrainer is put in: `layer.forward = lora.forward`.
    """
    # Nothing tells that a forward was replaced, so it is looked for every time: without the names, at first.
    if not any(owner_of(layer.forward, (layer,)) for layer in _replaced(model)):
        return {}
    inside = set(model.modules())
    found: dict[nn.Module, str] = {}
    for name, layer in model.named_modules():
        if "forward" in layer.__dict__:
            adapter = owner_of(layer.forward, inside)
            while adapter is not None and adapter not in found:
                found[adapter] = name
                behind = (owner_of(value, inside) for value in vars(adapter).values())
                adapter = next((owner for owner in behind if owner not in (None, adapter)), None)
    return found


def _replaced(model: nn.Module) -> Iterator[nn.Module]:
    """The modules of a model whose forward is not their class's; a fraction of what `modules()` takes."""
    waiting, seen = [model], set()
    while waiting:
        module = waiting.pop()
        if "forward" in module.__dict__:
            yield module
        if module._modules and module not in seen:
            seen.add(module)
            waiting.extend(child for child in module._modules.values() if child is not None)


def owner_of(forward: Any, inside: Container[nn.Module]) -> nn.Module | None:
    """The module that a method belongs to, if it is none of those inside of the model."""
    owner = getattr(inspect.unwrap(forward), "__self__", None) if callable(forward) else None
    return owner if isinstance(owner, nn.Module) and owner not in inside else None


def place_adapters(model: nn.Module, device_of: Callable[[str], torch.device]) -> None:
    """Bring each adapter to the device of the layer that it stands for, if it is elsewhere.

    The parameters stay the objects that an optimizer knows.
    """
    for adapter, layer in adapters_of(model).items():
        device = device_of(layer)
        if any(tensor.device != device for tensor in _tensors_of(adapter)):
            adapter.to(device)


def _tensors_of(module: nn.Module) -> Iterator[Tensor]:
    """Parameters and buffers, those that are shared more than once: quicker than `parameters()`."""
    for part in module.modules():
        yield from (tensor for tensor in part._parameters.values() if tensor is not None)
        yield from (tensor for tensor in part._buffers.values() if tensor is not None)


def dropouts_of(parent: nn.Module) -> Iterator[tuple[str, float]]:
    """Names of the modules in one, itself too, that drop something while they train, and how likely."""
    for name, module in parent.named_modules():
        values = [vars(module).get(attribute) for attribute in _DROPOUTS]
        values.append(module.p if isinstance(module, nn.modules.dropout._DropoutNd) else None)
        if module.training:
            yield from ((name, value) for value in values if isinstance(value, float) and value > 0)


def refuse_replaced(name: str, module: nn.Module, *, is_block: bool) -> None:
    """Raise if a module does not run by its class's forward; an adapter may stand for one that is no block.

    Raises:
        ValueError: names the module and what has replaced its forward.
    """
    forward = module.__dict__.get("forward")
    owner = None if forward is None else owner_of(forward, (module,))
    if forward is None or (owner is not None and not is_block):
        return
    by = "another library's hooks" if owner is None else type(owner).__name__
    raise ValueError(
        f"{name}: the forward of {type(module).__name__} is replaced already, by {by}; split the model "
        "before, or switch off what does it (checkpointing, offloading or compilation of another library)"
    )


def refuse_copies(model: nn.Module) -> None:
    """Let `copy.deepcopy(model)` raise, until `model.__deepcopy__` is deleted.

    A copy's modules would run by the forwards of the modules that they were copied from, with their weights.
    """

    def refuse(_: nn.Module, memo: dict[int, Any]) -> nn.Module:
        raise RuntimeError("a model that is split cannot be copied: copy it before, or .remove() the split")

    model.__deepcopy__ = MethodType(refuse, model)  # type: ignore[assignment]


def keep_spread(model: nn.Module, homes: Callable[[], dict[int, torch.device]]) -> None:
    """Let `model.to("cuda")` bring each tensor to its own device, until `model._apply` is deleted.

    Trainers move what they train to their one device, some of them every step, and off it with `to("cpu")`.

    Args:
        model: the whole model.
        homes: device of each parameter, gradient and buffer, by `id`; others stay where they are.
    """

    def apply(self: nn.Module, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        home = homes()

        def convert(tensor: Tensor) -> Tensor:
            probe = fn(torch.empty(0, dtype=tensor.dtype, device=tensor.device))
            if probe.device == tensor.device or probe.device.type in ("cpu", "meta"):
                return fn(tensor)
            return tensor.to(home.get(id(tensor), tensor.device), probe.dtype)

        return type(self)._apply(self, convert, recurse)

    model._apply = MethodType(apply, model)  # type: ignore[method-assign]
