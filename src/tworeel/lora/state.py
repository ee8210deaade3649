"""The values of a LoRA in a model: for the optimizer, for checkpoints, for files."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import torch
from peft.tuners.lora.layer import Linear as LoraLinear
from torch import Tensor, nn

from tworeel.errors import raise_if_any
from tworeel.lora.inject import ADAPTER, layer_sizes, lora_layers
from tworeel.lora.layers import dense_weight, row_norms
from tworeel.lora.tensors import LoraFile, LoraTensors


def lora_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return what is trained, by name (`blocks.0.attn1.to_q.lora_A`), in the order of the model."""
    return {
        f"{name}.{role}": parameter
        for name, layer in lora_layers(model).items()
        for role, parameter in _roles(layer).items()
    }


def _roles(layer: LoraLinear) -> dict[str, nn.Parameter]:
    modules = {"lora_A": layer.lora_A[ADAPTER], "lora_B": layer.lora_B[ADAPTER]}
    if layer.use_dora[ADAPTER]:
        modules["magnitude"] = layer.lora_magnitude_vector[ADAPTER]
    return {role: module.get_parameter("weight") for role, module in modules.items()}


def lora_state(model: nn.Module) -> dict[str, Tensor]:
    """Copy the LoRA's values to the CPU, by the names of `lora_parameters`."""
    return {name: _copied(parameter) for name, parameter in lora_parameters(model).items()}


def _copied(parameter: Tensor) -> Tensor:
    return parameter.detach().to("cpu", copy=True)


def load_lora_state(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Put values that `lora_state` returned back into the model.

    Raises:
        UserError: names, shapes or dtypes are not those of the model's LoRA.
    """
    parameters = lora_parameters(model)
    raise_if_any(_differences(parameters, tensors))
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(tensors[name])


def _differences(parameters: Mapping[str, nn.Parameter], tensors: Mapping[str, Tensor]) -> Iterable[str]:
    for name in tensors.keys() - parameters.keys():
        yield f"LoRA state: '{name}' is not part of this run's LoRA"
    for name, parameter in parameters.items():
        found = tensors.get(name)
        if found is None:
            yield f"LoRA state: '{name}' is missing"
        elif (found.shape, found.dtype) != (parameter.shape, parameter.dtype):
            yield f"LoRA state: '{name}' is {_kind(found)}, this run needs {_kind(parameter)}"


def _kind(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"


def export_lora(model: nn.Module) -> LoraFile:
    """Copy the LoRA out of the model, for `save_lora`.

    Files know no rsLoRA: its alpha / sqrt(rank) becomes the alpha that gives the same scale over the rank.
    """
    return LoraFile(modules={name: _exported(layer) for name, layer in lora_layers(model).items()})


def without_needless_alpha(lora: LoraFile) -> LoraFile:
    """Leave out each alpha that says what its absence says: a scale of 1."""
    modules = {
        name: replace(part, alpha=None) if part.scale == 1.0 else part for name, part in lora.modules.items()
    }
    return replace(lora, modules=modules)


def _exported(layer: LoraLinear) -> LoraTensors:
    roles = {role: _copied(parameter) for role, parameter in _roles(layer).items()}
    return LoraTensors(
        down=roles["lora_A"],
        up=roles["lora_B"],
        alpha=torch.tensor(layer.scaling[ADAPTER] * layer.r[ADAPTER], dtype=torch.float32),
        magnitude=roles.get("magnitude"),
    )


def start_from(model: nn.Module, lora: LoraFile, source: str) -> list[str]:
    """Start the model's LoRA from a file's: the model's output is then that of the file's LoRA.

    The file's scale is folded into B under the run's own; a DoRA run takes its row lengths from a plain LoRA.

    Args:
        model: the transformer, with the LoRA injected.
        lora: what the file holds.
        source: the file's name, for messages.

    Returns:
        The adapted layers that the file says nothing of; they start as new ones do.

    Raises:
        UserError: the file has other ranks or layers than the run, DoRA where the run has none, or values
            that are not finite.
    """
    layers = lora_layers(model)
    first = next(iter(layers.values()))
    sizes = {name: layer_sizes(layer) for name, layer in layers.items()}
    raise_if_any(start_problems(lora, sizes, source, rank=first.r[ADAPTER], dora=first.use_dora[ADAPTER]))
    with torch.no_grad():
        for name, part in lora.modules.items():
            _start(layers[name], part)
    return [name for name in layers if name not in lora.modules]


def start_problems(
    lora: LoraFile, sizes: Mapping[str, tuple[int, int]], source: str, *, rank: int, dora: bool
) -> list[str]:
    """Say why a run cannot start from a LoRA, one line a problem; known before the model is loaded.

    Args:
        lora: what the file holds.
        sizes: inputs and outputs of each layer that the run adapts.
        source: the file's name, for messages.
        rank: of the run's LoRA.
        dora: whether the run trains DoRA.
    """
    modules = lora.modules
    problems = [] if modules else ["holds no LoRA"]
    foreign = [name for name in modules if name not in sizes]
    if foreign:
        problems.append(
            f"{len(foreign)} of its layers are not among the run's targets, the first is '{foreign[0]}'"
        )
    own = {name: part for name, part in modules.items() if name in sizes}
    for other in sorted({part.rank for part in own.values()} - {rank}):
        names = [name for name, part in own.items() if part.rank == other]
        problems.append(f"{_layers(names)} has rank {other}, the run has lora.rank = {rank}")
    if not dora and (names := [name for name, part in own.items() if part.magnitude is not None]):
        problems.append(f"{_layers(names)} has DoRA's magnitude, the run has lora.dora = false")
    for name, part in own.items():
        problems += layer_problems(name, part, sizes[name])
    return [f"{source}: {problem}" for problem in problems]


def _layers(names: Sequence[str]) -> str:
    more = f", as {len(names) - 1} more," if len(names) > 1 else ""
    return f"'{names[0]}'{more}"


def layer_problems(name: str, part: LoraTensors, needed: tuple[int, int]) -> Iterable[str]:
    """Say what keeps a file's layer from any use.

    Args:
        name: of the layer.
        part: what the file has for it.
        needed: inputs and outputs of the model's layer.
    """
    sizes = (part.down.shape[1], part.up.shape[0])
    if sizes != needed:
        yield f"'{name}' has inputs and outputs {sizes}, the model's layer {needed}"
    if not all(torch.isfinite(tensor).all() for tensor in (part.down, part.up)):
        yield f"'{name}' holds values that are not finite"


def _start(layer: LoraLinear, part: LoraTensors) -> None:
    roles = _roles(layer)
    scaling = layer.scaling[ADAPTER]
    down, up = roles["lora_A"], roles["lora_B"]
    down.copy_(part.down)
    up.copy_(part.up.to(up.dtype) * (part.scale / scaling))
    if "magnitude" in roles:
        lengths = row_norms(dense_weight(layer.get_base_layer()), down, up, scaling)
        roles["magnitude"].copy_(lengths if part.magnitude is None else part.magnitude)
