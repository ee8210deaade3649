"""How the cache opens text encoders that are not one a device."""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tworeel.cache import CacheStore, build_cache
from tworeel.data.clips import Clip
from tworeel.demo.tiny_flux2_encoders import write_flux2_text_encoder, write_flux2_tokenizer
from tworeel.errors import UserError
from tworeel.models.family import Component, Family, ModelSource, TextOptions, TextWorker
from tworeel.models.flux2 import text, text_placement
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


class Batches:
    """Wan's text encoder, with a note of the captions that came at a time."""

    batch_size = 4

    def __init__(self, source: ModelSource, seen: list[int]) -> None:
        self._encoder = WAN.open_text_encoder(source, torch.device("cpu"), torch.float32)
        self._seen = seen

    def encode(self, caption: str) -> dict[str, Tensor]:
        return self._encoder.encode(caption)

    def encode_batch(self, captions: Sequence[str]) -> list[dict[str, Tensor]]:
        self._seen.append(len(captions))
        return [self.encode(caption) for caption in captions]


def test_captions_come_in_batches_where_the_encoder_wants_them_so(
    tmp_path: Path, source: ModelSource, clips: list[Clip]
) -> None:
    seen: list[int] = []
    family = dataclasses.replace(WAN, open_text_encoder=lambda source, *rest: Batches(source, seen))
    index = build_cache(CacheStore(tmp_path), family, source, clips, devices=("cpu",), dtype=torch.float32)
    assert seen == [4, 1]
    encoder = WAN.open_text_encoder(source, torch.device("cpu"), torch.float32)
    for clip in clips:
        assert torch.equal(index.load(clip)["text"], encoder.encode(clip.caption)["text"])


def test_a_batch_that_fails_names_its_clips_and_keeps_what_is_written(
    tmp_path: Path, source: ModelSource, clips: list[Clip]
) -> None:
    class Failing(Batches):
        def encode_batch(self, captions: Sequence[str]) -> list[dict[str, Tensor]]:
            encoded = super().encode_batch(captions)
            if len(captions) == 1:
                raise RuntimeError("no more")
            return encoded

    family = dataclasses.replace(WAN, open_text_encoder=lambda source, *rest: Failing(source, []))
    with pytest.raises(RuntimeError, match="no more") as caught:
        build_cache(CacheStore(tmp_path), family, source, clips, devices=("cpu",), dtype=torch.float32)
    assert "caption" in caught.value.__notes__[0]
    assert len(list((tmp_path / "text").rglob("*.safetensors"))) == 4


@pytest.mark.parametrize("way", ["whole", "streamed"])
def test_captions_of_a_large_text_encoder_are_embedded_once_and_it_is_gone_afterwards(
    tmp_path: Path, source: ModelSource, clips: list[Clip], monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    path = write_flux2_text_encoder(tmp_path / "model", "comfyui", "qwen3")
    large = dataclasses.replace(
        source,
        text_encoder=Component(files=(path,), layout="comfyui"),
        tokenizer=write_flux2_tokenizer(tmp_path / "model", "qwen3"),
    )
    opened: list[weakref.ref[Any]] = []
    titles = Titles()

    def place(*arguments: Any) -> list[TextWorker]:
        free = 10**12 if way == "whole" else 0
        (worker,) = text_placement.text_workers(*arguments, free=lambda device: free)
        return [dataclasses.replace(worker, open=lambda: noted(worker.open()))]

    def noted(encoder: Any) -> Any:
        opened.append(weakref.ref(encoder._model))
        return encoder

    family = dataclasses.replace(WAN, text_identity=text.text_identity, text_workers=place)
    build = partial(build_cache, CacheStore(tmp_path / "cache"), family, large, clips, dtype=torch.float32)
    index = build(devices=("cpu",), empty_caption=True, observer=titles)
    assert ("weights from disk" in titles.seen[-1]) == (way == "streamed")
    assert [model() for model in opened] == [None]
    expected = text.open_text_encoder(large, torch.device("cpu"), torch.float32)
    for clip in clips:
        embedded = index.load(clip)["text"]
        assert embedded.shape == (512, 96)
        torch.testing.assert_close(embedded, expected.encode(clip.caption)["text"], rtol=1e-3, atol=1e-3)
    build(devices=("cpu",), empty_caption=True)
    assert len(opened) == 1
