"""How the cache opens text encoders that are not one a device."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import pytest
import torch

from tworeel.cache import CacheStore, build_cache
from tworeel.data.clips import Clip
from tworeel.errors import UserError
from tworeel.models.family import Family, ModelSource, TextOptions, TextWorker
from tworeel.models.wan.family import WAN


class Titles:
    def __init__(self) -> None:
        self.seen: list[str] = []

    def start(self, title: str, total: int) -> None:
        self.seen.append(title)

    def advance(self) -> None: ...

    def poll(self) -> None: ...

    def finish(self) -> None: ...


def with_one_worker(calls: list[TextOptions]) -> Family:
    def place(
        source: ModelSource, devices: Sequence[torch.device], dtype: torch.dtype, options: TextOptions
    ) -> list[TextWorker]:
        calls.append(options)
        return [
            TextWorker(
                device=devices[0],
                open=partial(WAN.open_text_encoder, source, devices[0], dtype),
                how="over all of them",
            )
        ]

    return dataclasses.replace(WAN, text_workers=place)


def test_a_family_places_its_text_encoders_itself_once_something_is_missing(
    tmp_path: Path, source: ModelSource, clips: list[Clip]
) -> None:
    calls: list[TextOptions] = []
    titles = Titles()
    family, options = with_one_worker(calls), TextOptions(placement="spread")
    build = partial(build_cache, CacheStore(tmp_path), family, source, clips, dtype=torch.float32)
    index = build(devices=("cpu", "cpu"), text=options, observer=titles)
    assert calls == [options]
    assert "Embedding captions (over all of them)" in titles.seen
    expected = WAN.open_text_encoder(source, torch.device("cpu"), torch.float32).encode(clips[0].caption)
    assert torch.equal(index.load(clips[0])["text"], expected["text"])
    build(devices=("cpu",), text=options)
    assert calls == [options]


def test_a_precision_that_is_asked_for_has_entries_of_its_own(
    tmp_path: Path, source: ModelSource, clips: list[Clip]
) -> None:
    family = with_one_worker([])
    keys = [
        build_cache(
            CacheStore(tmp_path),
            family,
            source,
            clips[:1],
            devices=("cpu",),
            dtype=torch.float32,
            text=TextOptions(quantize=quantize),
        ).text_keys[clips[0].name]
        for quantize in ("auto", None, "fp8")
    ]
    assert len(set(keys)) == 3


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (TextOptions(placement="spread"), "cache.text_placement = 'spread'.*allowed are auto, each, cpu"),
        (TextOptions(quantize="int8"), "cache.text_quantize = 'int8'.*leave it out"),
    ],
)
def test_a_family_without_a_choice_refuses_what_it_cannot_do(
    tmp_path: Path, source: ModelSource, clips: list[Clip], options: TextOptions, words: str
) -> None:
    with pytest.raises(UserError, match=words):
        build_cache(
            CacheStore(tmp_path), WAN, source, clips, devices=("cpu",), dtype=torch.float32, text=options
        )
