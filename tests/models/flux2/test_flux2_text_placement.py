"""Where FLUX.2's text encoders run, by what is free."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import torch

from tworeel.demo.tiny_flux2_encoders import TextKind
from tworeel.errors import UserError
from tworeel.models.family import Layout, ModelSource, TextOptions, TextWorker
from tworeel.models.flux2.text_networks import MISTRAL
from tworeel.models.flux2.text_placement import (
    WORKING,
    Sizes,
    _place_of,
    _shares,
    free_memory,
    text_sizes,
    text_workers,
)

GB = 10**9
CPU, ONE, TWO = (torch.device(name) for name in ("cpu", "cuda:0", "cuda:1"))
Source = Callable[[TextKind, Layout], ModelSource]

# Mistral-3's, in bf16.
LAYER = 2 * (2 * 5120 * 4096 + 2 * 5120 * 1024 + 3 * 5120 * 32768)
MISTRAL_SIZES = Sizes(2 * 131072 * 5120, (LAYER,) * MISTRAL.num_layers, 2)


@pytest.fixture
def place(flux2_source: Source, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[TextWorker]]:
    """A function (free GB by device, options) -> workers for a text encoder as large as Mistral-3."""
    monkeypatch.setattr("tworeel.models.flux2.text_placement.text_sizes", lambda *rest: MISTRAL_SIZES)

    def placed(free: Mapping[torch.device, float], **options: Any) -> list[TextWorker]:
        devices: Sequence[torch.device] = [device for device in free if device != CPU] or [CPU]
        return text_workers(
            flux2_source("mistral3", "diffusers"),
            devices,
            torch.bfloat16,
            TextOptions(**options),
            free=lambda device: int(free[device] * GB),
        )

    return placed


def hows(workers: Sequence[TextWorker]) -> list[tuple[str, str]]:
    return [(str(worker.device), worker.how) for worker in workers]


@pytest.mark.parametrize(
    ("free", "expected"),
    [
        ({ONE: 78, TWO: 78, CPU: 60}, [("cuda:0", ""), ("cuda:1", "")]),
        ({ONE: 46, TWO: 30, CPU: 60}, [("cuda:0", "")]),
        ({ONE: 23, TWO: 23, CPU: 60}, [("cuda:0", "over cuda:0, cuda:1")]),
        ({ONE: 23, CPU: 60}, [("cuda:0", "fp8")]),
        ({ONE: 15, TWO: 11, CPU: 60}, [("cuda:0", "fp8 over cuda:0, cuda:1")]),
        ({ONE: 11, CPU: 60}, [("cuda:0", "through cuda:0, weights from disk")]),
        ({ONE: 3, CPU: 60}, [("cpu", "on the CPU")]),
        ({CPU: 60}, [("cpu", "on the CPU")]),
        ({CPU: 20}, [("cpu", "on the CPU, weights from disk")]),
        ({ONE: 1, CPU: 20}, [("cpu", "on the CPU, weights from disk")]),
    ],
)
def test_the_first_way_that_has_room_is_taken(
    place: Callable[..., list[TextWorker]],
    free: Mapping[torch.device, float],
    expected: list[tuple[str, str]],
) -> None:
    assert hows(place(free)) == expected


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"placement": "cpu"}, [("cpu", "on the CPU")]),
        ({"placement": "spread"}, [("cuda:0", "over cuda:0, cuda:1")]),
        ({"placement": "each"}, [("cuda:0", "fp8"), ("cuda:1", "fp8")]),
        ({"quantize": "int8"}, [("cuda:0", "int8"), ("cuda:1", "int8")]),
        ({"quantize": "nf4", "placement": "spread"}, [("cuda:0", "nf4 over cuda:0")]),
        ({"quantize": None, "placement": "spread"}, [("cuda:0", "over cuda:0, cuda:1")]),
    ],
)
def test_what_the_user_asks_for_is_done(
    place: Callable[..., list[TextWorker]], options: dict[str, Any], expected: list[tuple[str, str]]
) -> None:
    assert hows(place({ONE: 23, TWO: 23, CPU: 60}, **options)) == expected


@pytest.mark.parametrize(
    ("free", "options", "words"),
    [
        (
            {ONE: 11, CPU: 60},
            {"placement": "each"},
            r"cache.text_placement = 'each': the text encoder takes 34\.3 GiB; free are cuda:0 10\.2 GiB",
        ),
        ({ONE: 11, CPU: 60}, {"quantize": "int8"}, r"cache.text_quantize = 'int8': .* takes 18\.8 GiB"),
        ({ONE: 11, TWO: 5, CPU: 60}, {"placement": "spread", "quantize": None}, "= 'spread'"),
    ],
)
def test_what_has_no_room_is_refused_with_the_numbers(
    place: Callable[..., list[TextWorker]],
    free: Mapping[torch.device, float],
    options: dict[str, Any],
    words: str,
) -> None:
    with pytest.raises(UserError, match=words):
        place(free, **options)


def test_a_device_that_stands_there_twice_needs_room_for_two(flux2_source: Source) -> None:
    source = flux2_source("qwen3", "diffusers")
    need = int(text_sizes(source, torch.float32).total(None)) + WORKING
    for room, expected in ((2 * need, 2), (2 * need - 2, 0)):
        workers = text_workers(
            source, [ONE, ONE], torch.float32, TextOptions(), free=lambda device, room=room: room
        )
        assert len([worker for worker in workers if worker.how == ""]) == expected


def test_layers_follow_each_other_over_the_devices_and_none_is_too_full() -> None:
    room = {ONE: 12 * GB, TWO: 30 * GB}
    places = _shares(MISTRAL_SIZES, room, None)
    assert places is not None and len(places) == MISTRAL.num_layers + 3
    order = [places[f"layers.{index}"] for index in range(MISTRAL.num_layers)]
    assert order == sorted(order, key=str) and set(order) == {ONE, TWO}
    sizes = {"embed_tokens": MISTRAL_SIZES.embedding} | {f"layers.{i}": LAYER for i in range(30)}
    for device, bytes_ in room.items():
        assert sum(sizes.get(name, 0) for name, place in places.items() if place == device) <= bytes_
    assert _place_of(places, "layers.29.mlp.up_proj.weight") == TWO
    assert _place_of(places, "layers.2.mlp.up_proj.weight") == ONE
    assert _place_of(places, "rotary_emb.inv_freq") == _place_of(places, "embed_tokens.weight") == ONE


@pytest.mark.parametrize("layout", ["diffusers", "comfyui"])
@pytest.mark.parametrize("kind", ["mistral3", "qwen3"])
def test_the_sizes_are_those_of_what_is_loaded(flux2_source: Source, kind: TextKind, layout: Layout) -> None:
    source = flux2_source(kind, layout)
    (worker,) = text_workers(source, [CPU], torch.float32, TextOptions())
    model = worker.open()._model  # type: ignore[attr-defined]
    loaded = sum(parameter.nbytes for parameter in model.parameters())
    assert text_sizes(source, torch.float32).total(None) == loaded


def test_the_cpu_has_some_memory_free() -> None:
    assert free_memory(CPU) > 0
