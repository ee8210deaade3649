from __future__ import annotations

import dataclasses
import gc
import pickle
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tworeel.cache import CacheIndex, CacheStore, build_cache
from tworeel.cache.build import embed_captions
from tworeel.data.clips import Bucket, Clip
from tworeel.errors import UserError
from tworeel.models.family import Component, Family, LatentEncoder, ModelSource
from tworeel.models.wan.family import WAN

CHILD = Path(__file__).with_name("build_in_process.py")


class Openings:
    """Wan, with a note of every encoder that was opened."""

    def __init__(self) -> None:
        self.latent: list[weakref.ref[Any]] = []
        self.text: list[weakref.ref[Any]] = []
        self.alive_at_text: list[object] = []
        self.family = dataclasses.replace(
            WAN, open_latent_encoder=self._open_latent, open_text_encoder=self._open_text
        )

    def _open_latent(self, *arguments: Any) -> Any:
        encoder = WAN.open_latent_encoder(*arguments)
        self.latent.append(weakref.ref(encoder))
        return encoder

    def _open_text(self, *arguments: Any) -> Any:
        self.alive_at_text += [ref() for ref in self.latent if ref() is not None]
        encoder = WAN.open_text_encoder(*arguments)
        self.text.append(weakref.ref(encoder))
        return encoder


class Titles:
    def __init__(self) -> None:
        self.seen: dict[str, list[int]] = {}

    def start(self, title: str, total: int) -> None:
        self._counts = self.seen.setdefault(title, [total, 0])

    def advance(self) -> None:
        self._counts[1] += 1

    def poll(self) -> None: ...

    def finish(self) -> None: ...


class BreakingEncoder:
    """The real encoder, with an error put in for one clip."""

    def __init__(self, encoder: LatentEncoder, frames: int, broken: Callable[[Tensor], Tensor]) -> None:
        self._encoder, self._frames, self._broken = encoder, frames, broken

    def encode(self, clip: Tensor, images: Mapping[str, Tensor]) -> dict[str, Tensor]:
        encoded = self._encoder.encode(clip, images)
        if clip.shape[1] == self._frames:
            encoded["latents"] = self._broken(encoded["latents"])
        return encoded


@pytest.fixture(autouse=True)
def _no_thread_is_left() -> Iterator[None]:
    before = threading.active_count()
    yield
    assert threading.active_count() == before


def build(
    folder: Path,
    source: ModelSource,
    clips: list[Clip],
    family: Family = WAN,
    devices: tuple[str, ...] = ("cpu",),
    **options: Any,
) -> CacheIndex:
    return build_cache(
        CacheStore(folder), family, source, clips, devices=devices, dtype=torch.float32, **options
    )


def entries(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*.*")}


def stamps(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*.*")}


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Callable[[ModelSource, list[Clip]], Path]:
    """A function (source, clips) -> the folder of a cache that was built undisturbed, with empty caption."""
    folder = tmp_path_factory.mktemp("undisturbed")

    def folder_of(source: ModelSource, clips: list[Clip]) -> Path:
        if not entries(folder):
            build(folder, source, clips, empty_caption=True)
        return folder

    return folder_of


def test_the_cache_holds_what_the_encoders_return(
    tmp_path: Path, source: ModelSource, clips: list[Clip]
) -> None:
    index = build(tmp_path, source, clips, empty_caption=True)
    text_encoder = WAN.open_text_encoder(source, torch.device("cpu"), torch.float32)
    for clip in clips:
        cached, dropped = index.load(clip), index.load(clip, drop_caption=True)
        assert cached["latents"].shape == (16, (clip.bucket.frames + 3) // 4, 4, 6)
        assert torch.equal(cached["text"], text_encoder.encode(clip.caption)["text"])
        assert torch.equal(dropped["text"], text_encoder.encode("")["text"])
        assert torch.equal(dropped["latents"], cached["latents"])


def test_encoders_are_gone_afterwards_and_never_together_in_memory(
    tmp_path: Path, source: ModelSource, clips: list[Clip]
) -> None:
    openings = Openings()
    build(tmp_path, source, clips, openings.family, ("cpu", "cpu"))
    assert (len(openings.latent), len(openings.text)) == (2, 2)
    assert openings.alive_at_text == []
    assert [ref() for ref in (*openings.latent, *openings.text) if ref() is not None] == []


def test_a_second_build_opens_no_encoder_and_writes_nothing(
    tmp_path: Path, source: ModelSource, clips: list[Clip]
) -> None:
    first = build(tmp_path, source, clips)
    before, openings, titles = stamps(tmp_path), Openings(), Titles()
    second = build(tmp_path, source, clips, openings.family, observer=titles)
    assert openings.latent == openings.text == []
    assert stamps(tmp_path) == before
    assert (second.latent_keys, second.text_keys) == (first.latent_keys, first.text_keys)
    assert titles.seen == {"Hashing": [5, 5], "Reading the encoders": [2, 2], "Checking the cache": [10, 10]}


def test_the_observer_sees_each_phase_and_item(
    tmp_path: Path, source: ModelSource, clips: list[Clip]
) -> None:
    titles = Titles()
    build(tmp_path, source, clips, observer=titles, empty_caption=True)
    assert titles.seen["Encoding clips"] == [5, 5]
    assert titles.seen["Embedding captions"] == [6, 6]


def test_two_devices_make_the_same_bytes_as_one(
    tmp_path: Path, source: ModelSource, clips: list[Clip], built: Callable[..., Path]
) -> None:
    build(tmp_path, source, clips, devices=("cpu", "cpu"), empty_caption=True)
    assert entries(tmp_path) == entries(built(source, clips))


def test_a_damaged_entry_is_rebuilt_alone_and_bit_by_bit(
    tmp_path: Path, source: ModelSource, clips: list[Clip]
) -> None:
    index, openings = build(tmp_path, source, clips), Openings()
    good, before = entries(tmp_path), stamps(tmp_path)
    damaged = index.store.path_of(index.latent_keys[clips[2].name])
    content = bytearray(damaged.read_bytes())
    content[-10] ^= 1
    damaged.write_bytes(content)
    build(tmp_path, source, clips, openings.family)
    assert entries(tmp_path) == good
    assert {path for path, stamp in stamps(tmp_path).items() if stamp != before[path]} == {damaged}
    assert (len(openings.latent), openings.text) == (1, [])


def test_a_killed_build_goes_on_and_ends_in_the_same_bytes(
    tmp_path: Path, source: ModelSource, clips: list[Clip], built: Callable[..., Path]
) -> None:
    folder = tmp_path / "cache"
    child = start_child(tmp_path, folder, source, clips, 3)
    assert child.stdout.readline() == "starts\n"
    assert child.stdout.readline() == "hangs\n"
    child.kill()
    child.communicate()
    assert len(entries(folder)) == 3
    before = stamps(folder)
    build(folder, source, clips, empty_caption=True)
    assert entries(folder) == entries(built(source, clips))
    assert {path: stamps(folder)[path] for path in before} == before


def test_two_processes_may_build_one_cache_at_a_time(
    tmp_path: Path, source: ModelSource, clips: list[Clip], built: Callable[..., Path]
) -> None:
    folder = tmp_path / "cache"
    child = start_child(tmp_path, folder, source, clips, 100)
    child.stdout.readline()  # its imports are over
    build(folder, source, clips, empty_caption=True)
    child.communicate(timeout=60)
    assert child.returncode == 0
    assert entries(folder) == entries(built(source, clips))


def start_child(
    tmp_path: Path, folder: Path, source: ModelSource, clips: list[Clip], written: int
) -> subprocess.Popen[str]:
    pickled = tmp_path / "source.pickle"
    pickled.write_bytes(pickle.dumps((source, clips)))
    command = [sys.executable, str(CHILD), str(pickled), str(folder), str(written)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def test_an_observer_that_stops_keeps_what_is_done(
    tmp_path: Path, source: ModelSource, clips: list[Clip]
) -> None:
    class StopAtSecondClip(Titles):
        def advance(self) -> None:
            super().advance()
            if self.seen.get("Encoding clips", [0, 0])[1] == 2:
                raise KeyboardInterrupt

    openings = Openings()
    with pytest.raises(KeyboardInterrupt):
        build(tmp_path, source, clips, openings.family, observer=StopAtSecondClip())
    assert len(entries(tmp_path)) >= 2
    assert openings.text == []
    before = stamps(tmp_path)
    build(tmp_path, source, clips)
    assert len(entries(tmp_path)) == 10
    assert {path: stamps(tmp_path)[path] for path in before} == before


def _other_size(clip: Clip) -> Clip:
    return dataclasses.replace(clip, bucket=Bucket(clip.bucket.frames, 48, 32))


def _other_caption(clip: Clip) -> Clip:
    return dataclasses.replace(clip, caption="something else")


@pytest.mark.parametrize(
    ("change", "new"),
    [(_other_size, {"latents": 1, "text": 0}), (_other_caption, {"latents": 0, "text": 1})],
)
def test_a_changed_clip_makes_new_entries_for_what_changed_alone(
    tmp_path: Path,
    source: ModelSource,
    clips: list[Clip],
    change: Callable[[Clip], Clip],
    new: dict[str, int],
) -> None:
    build(tmp_path, source, clips)
    before = entries(tmp_path)
    index = build(tmp_path, source, [*clips[:-1], change(clips[-1])])
    added = entries(tmp_path).keys() - before.keys()
    assert {kind: sum(name.startswith(kind) for name in added) for kind in new} == new
    assert index.load(clips[-1]).keys() == {"latents", "text"}


def test_another_vae_makes_new_latents_and_keeps_the_text(
    tmp_path: Path, source: ModelSource, clips: list[Clip], tiny_vae: Callable[..., Component]
) -> None:
    build(tmp_path, source, clips)
    before = entries(tmp_path)
    index = build(tmp_path, dataclasses.replace(source, vae=tiny_vae("native", z=48)), clips)
    added = entries(tmp_path).keys() - before.keys()
    assert sorted(name.split("/")[0] for name in added) == ["latents"] * 5
    assert index.load(clips[0])["latents"].shape[0] == 48


def test_clips_with_the_same_content_or_caption_share_entries(
    tmp_path: Path, source: ModelSource, clips: list[Clip]
) -> None:
    twin = dataclasses.replace(clips[0], name="1/twin.mp4")
    index = build(tmp_path, source, [clips[0], twin, clips[0]])
    assert len(entries(tmp_path)) == 2
    assert torch.equal(index.load(twin)["latents"], index.load(clips[0])["latents"])


def test_a_clip_that_cannot_be_decoded_is_named_and_the_others_stay(
    tmp_path: Path, source: ModelSource, clips: list[Clip]
) -> None:
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(clips[0].path.read_bytes()[:600])
    # A single frame makes it the last of the jobs
    last = dataclasses.replace(
        clips[0], path=broken, name="0/broken.mp4", bucket=Bucket(1, 16, 16), frame_indices=(0,)
    )
    folder = tmp_path / "cache"
    with pytest.raises(UserError, match=r"broken\.mp4: ") as caught:
        build(folder, source, [last, *clips], devices=("cpu", "cpu"))
    assert len(caught.value.problems) == 1
    kept = entries(folder)
    assert len(kept) >= 1 and all(name.startswith("latents/") for name in kept)
    build(folder, source, clips)
    assert kept.items() <= entries(folder).items()


def test_a_missing_clip_is_named(tmp_path: Path, source: ModelSource, clips: list[Clip]) -> None:
    gone = dataclasses.replace(clips[0], path=tmp_path / "gone.mp4")
    with pytest.raises(UserError, match=r"gone\.mp4"):
        build(tmp_path, source, [gone])


def breaking(clip: Clip, broken: Callable[[Tensor], Tensor]) -> Family:
    def opened(*arguments: Any) -> LatentEncoder:
        return BreakingEncoder(WAN.open_latent_encoder(*arguments), clip.bucket.frames, broken)

    return dataclasses.replace(WAN, open_latent_encoder=opened)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_latents_with_nan_or_inf_are_refused(
    tmp_path: Path, source: ModelSource, clips: list[Clip], value: float
) -> None:
    def broken(latents: Tensor) -> Tensor:
        latents.view(-1)[7] = value
        return latents

    with pytest.raises(UserError, match=r"image\.png: .*NaN or Inf .*'latents'"):
        build(tmp_path, source, clips, breaking(clips[-1], broken))
    assert len(entries(tmp_path)) == 4
    good = build(tmp_path, source, clips)
    assert torch.isfinite(good.load(clips[-1])["latents"]).all()


def test_an_error_inside_an_encoder_says_for_which_clip(
    tmp_path: Path, source: ModelSource, clips: list[Clip]
) -> None:
    def broken(latents: Tensor) -> Tensor:
        raise RuntimeError("out of something")

    with pytest.raises(RuntimeError, match="out of something") as caught:
        build(tmp_path, source, clips, breaking(clips[-1], broken), ("cpu", "cpu"))
    assert [note for note in caught.value.__notes__ if str(clips[-1].path) in note]


def test_memory_is_given_back_after_an_error_too(
    tmp_path: Path, source: ModelSource, clips: list[Clip]
) -> None:
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(b"no video")
    openings = Openings()
    with pytest.raises(UserError):
        build(tmp_path, source, [dataclasses.replace(clips[0], path=broken)], openings.family)
    gc.collect()
    assert [ref() for ref in openings.latent if ref() is not None] == []


def test_captions_that_belong_to_no_clip_are_embedded_once(
    tmp_path: Path, source: ModelSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, places = CacheStore(tmp_path), {"devices": ["cpu"], "dtype": torch.float32}
    asked = ("a red ball", "", "a red ball")
    found = embed_captions(store, WAN, source, asked, **places)
    encoder = WAN.open_text_encoder(source, torch.device("cpu"), torch.float32)
    assert set(found) == {"a red ball", ""}
    assert all(torch.equal(found[text]["text"], encoder.encode(text)["text"]) for text in found)

    def open_again(*_: object) -> None:
        raise AssertionError("it is in the cache")

    family = dataclasses.replace(WAN, open_text_encoder=open_again)
    again = embed_captions(store, family, source, asked, **places)
    assert all(torch.equal(again[text]["text"], found[text]["text"]) for text in found)
    assert embed_captions(store, family, source, (), **places) == {}
