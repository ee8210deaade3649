"""Where a text encoder runs that may be larger than any device: the first of these ways that has room.

1. whole on each device, 2. spread over all of them, 3. and 4. the same with its layers in 8 bits, 5. through
one device with the weights read from disk as they are needed, 6. on the CPU, 7. on the CPU with the weights
read from disk. Mistral-3 takes 34.7 GB in the first two, 18.0 GB in the next two, about 3 GB in 5 and 7.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from tworeel.engine.fitting import SPARE, total_and_free
from tworeel.errors import UserError
from tworeel.host_memory import available_memory
from tworeel.models.family import ModelSource, TextOptions, TextWorker
from tworeel.models.flux2.text import known_network, open_spread, open_streamed, open_text_encoder, text_parts
from tworeel.models.flux2.text_networks import LAYERS, parameter_name
from tworeel.units import GIB, gibibytes
from tworeel.weights.tensor_files import TensorFiles

WORKING = 2 * GIB
"""Bytes beside the weights: hidden states, one layer's activations, one weight while it is rounded."""
STREAMING = 2 * WORKING
"""Bytes that streaming takes: the largest weight is the table of tokens."""
HOST_SHARE = 0.8
"""Of the host memory that is available, how much an encoder may take."""

_CPU = torch.device("cpu")
_BYTES = {"fp8": 1.0, "int8": 1.0, "nf4": 0.52}
_CHILD = re.compile(rf"{LAYERS}\.\d+|\w+")

Free = Callable[[torch.device], int]
Places = Mapping[str, torch.device]


@dataclass(frozen=True)
class Sizes:
    """Bytes of the network's parts, in the precision that it computes in."""

    embedding: int
    layers: tuple[int, ...]
    width: int
    """Bytes of one number."""

    def of_layers(self, quantize: str | None) -> tuple[float, ...]:
        """Return the bytes of each layer."""
        share = 1.0 if quantize is None else _BYTES[quantize] / self.width
        return tuple(size * share for size in self.layers)

    def total(self, quantize: str | None) -> float:
        """Return the bytes of the network."""
        return self.embedding + sum(self.of_layers(quantize))


def free_memory(device: torch.device) -> int:
    """Return the bytes that an encoder may take on a device."""
    if device.type == "cpu":
        return int(HOST_SHARE * available_memory())
    total, free = total_and_free(device)
    return int(free - SPARE * total)


def text_workers(
    source: ModelSource,
    devices: Sequence[torch.device],
    dtype: torch.dtype,
    options: TextOptions,
    free: Free = free_memory,
) -> list[TextWorker]:
    """Place text encoders by what is free now; see `Family.text_workers`.

    Raises:
        UserError: what the options ask for has no room, or needs a library that is not there.
    """
    _require_library(options)
    sizes = text_sizes(source, dtype)
    wanted = [_CPU] if options.placement == "cpu" else list(devices)
    room = {device: free(device) - WORKING for device in dict.fromkeys(wanted)}
    for quantize in _kinds(options, wanted):
        found = _whole(source, dtype, options, wanted, room, sizes, quantize)
        if found:
            return found
        places = _shares(sizes, room, quantize) if options.placement in ("auto", "spread") else None
        if places:
            return [_spread(source, dtype, places, quantize)]
    return [_without_room(source, dtype, options, sizes, free, wanted)]


def _kinds(options: TextOptions, devices: Sequence[torch.device]) -> list[str | None]:
    """Return the precisions to try, best first."""
    if options.quantize != "auto":
        return [options.quantize]
    on_accelerators = any(device.type != "cpu" for device in devices)
    return [None, "fp8"] if on_accelerators else [None]


def _whole(
    source: ModelSource,
    dtype: torch.dtype,
    options: TextOptions,
    devices: Sequence[torch.device],
    room: Mapping[torch.device, int],
    sizes: Sizes,
    quantize: str | None,
) -> list[TextWorker]:
    """One encoder on each device that has room; a device that stands there twice needs room for two."""
    if options.placement == "spread":
        return []
    need = sizes.total(quantize) + WORKING
    fitting = [d for d in devices if devices.count(d) * need <= room[d] + WORKING]
    return [
        TextWorker(
            device=device,
            open=partial(open_spread, source, partial(_same, device), dtype, quantize),
            how="on the CPU" if device.type == "cpu" else quantize or "",
        )
        for device in fitting
    ]


def _same(device: torch.device, name: str) -> torch.device:
    return device


def _shares(sizes: Sizes, room: Mapping[torch.device, int], quantize: str | None) -> Places | None:
    """Fill one device after the other, in the order of the layers; None if not all of them have room."""
    left = {device: float(bytes_) for device, bytes_ in room.items() if device.type != "cpu"}
    waiting = iter(left)
    device = next(waiting, None)
    places: dict[str, torch.device] = {}
    for name, size in _children(sizes, quantize):
        while device is not None and size > left[device]:
            device = next(waiting, None)
        if device is None:
            return None
        left[device] -= size
        places[name] = device
    return places


def _children(sizes: Sizes, quantize: str | None) -> Iterator[tuple[str, float]]:
    yield "embed_tokens", sizes.embedding
    yield "rotary_emb", 0
    for index, size in enumerate(sizes.of_layers(quantize)):
        yield f"{LAYERS}.{index}", size
    yield "norm", 0


def _spread(source: ModelSource, dtype: torch.dtype, places: Places, quantize: str | None) -> TextWorker:
    used = ", ".join(map(str, dict.fromkeys(places.values())))
    return TextWorker(
        device=places["embed_tokens"],
        open=partial(open_spread, source, partial(_place_of, places), dtype, quantize),
        how=f"{quantize + ' ' if quantize else ''}over {used}",
    )


def _place_of(places: Places, name: str) -> torch.device:
    child = _CHILD.match(name)
    assert child, f"no part of the network: {name}"
    return places[child[0]]


def _without_room(
    source: ModelSource,
    dtype: torch.dtype,
    options: TextOptions,
    sizes: Sizes,
    free: Free,
    devices: Sequence[torch.device],
) -> TextWorker:
    """Where no device has room: read the weights as they are needed, or go to the CPU."""
    if options.placement in ("each", "spread") or options.quantize not in (None, "auto"):
        raise UserError(_no_room(options, sizes, free, devices))
    accelerators = [device for device in devices if device.type != "cpu" and free(device) >= STREAMING]
    if accelerators:
        best = max(accelerators, key=free)
        how = f"through {best}, weights from disk"
        return TextWorker(device=best, open=partial(open_streamed, source, best, dtype), how=how)
    if sizes.total(None) + WORKING <= free(_CPU):
        return TextWorker(device=_CPU, open=partial(open_text_encoder, source, _CPU, dtype), how="on the CPU")
    how = "on the CPU, weights from disk"
    return TextWorker(device=_CPU, open=partial(open_streamed, source, _CPU, dtype), how=how)


def _no_room(options: TextOptions, sizes: Sizes, free: Free, devices: Sequence[torch.device]) -> str:
    quantize = None if options.quantize == "auto" else options.quantize
    there = ", ".join(f"{device} {gibibytes(free(device))}" for device in dict.fromkeys(devices))
    asked = f"cache.text_placement = '{options.placement}'"
    if quantize is not None:
        asked += f", cache.text_quantize = '{quantize}'"
    return (
        f"{asked}: the text encoder takes {gibibytes(sizes.total(quantize) + WORKING)}; free are {there}. "
        "With cache.text_placement = 'auto' and cache.text_quantize = 'auto' it runs on any machine"
    )


def _require_library(options: TextOptions) -> None:
    if options.quantize == "nf4" and importlib.util.find_spec("bitsandbytes") is None:
        raise UserError("cache.text_quantize = 'nf4': needs bitsandbytes: pip install 'tworeel[eightbit]'")


def text_sizes(source: ModelSource, dtype: torch.dtype) -> Sizes:
    """Add up the weights that are used, from the headers.

    Raises:
        UserError: a file is damaged or holds another network.
    """
    component, _ = text_parts(source)
    with TensorFiles(*component.files) as files:
        network = known_network(component, files)
        numbers: dict[str, int] = {}
        for key, info in files.names.items():
            child = _CHILD.match(parameter_name(key, network) or "")
            if child:
                numbers[child[0]] = numbers.get(child[0], 0) + torch.Size(info.shape).numel()
    layers = (numbers.get(f"{LAYERS}.{index}", 0) for index in range(network.num_layers))
    width = dtype.itemsize
    return Sizes(numbers["embed_tokens"] * width, tuple(count * width for count in layers), width)
