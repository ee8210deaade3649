"""Build the cache: hash the files, find what is missing, and let every device encode its share of that."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import islice
from types import TracebackType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tworeel.cache.keys import latent_key, text_key
from tworeel.cache.store import CacheStore
from tworeel.data.clips import Clip
from tworeel.data.media import content_hash
from tworeel.data.pixels import load_clip, load_images
from tworeel.errors import UserError
from tworeel.models.family import (
    BatchTextEncoder,
    Family,
    LatentEncoder,
    ModelSource,
    TextEncoder,
    TextOptions,
    TextWorker,
)
from tworeel.workers import (
    Observer,
    SharedJobs,
    SilentObserver,
    Worker,
    run_ahead,
    run_each,
    run_workers,
)

CLIPS_AHEAD = 2  # decoded clips that wait for each encoder
MAX_HASH_THREADS = 8


@dataclass(frozen=True, kw_only=True)
class CacheIndex:
    """Where the cache holds each clip's tensors."""

    store: CacheStore
    latent_keys: Mapping[str, str]
    """Key of the latents by `Clip.name`."""
    text_keys: Mapping[str, str]
    """Key of the caption's embedding by `Clip.name`."""
    empty_text: str | None = None
    """Key of the empty caption's embedding, if it was asked for."""

    def load(self, clip: Clip, *, drop_caption: bool = False) -> dict[str, Tensor]:
        """Return the clip's cached tensors, on the CPU; with `drop_caption` the text is the empty caption's.

        Raises:
            BadEntry: An entry was damaged or removed since the cache was built.
        """
        assert not drop_caption or self.empty_text, "the cache was built without the empty caption"
        text = self.empty_text if drop_caption and self.empty_text else self.text_keys[clip.name]
        return {**self.store.read(self.latent_keys[clip.name]), **self.store.read(text)}


class _Opening(NamedTuple):
    """An encoder that is not opened yet."""

    device: torch.device
    open: Callable[[], LatentEncoder | TextEncoder]
    how: str = ""


@dataclass(frozen=True, kw_only=True)
class _Job:
    """One entry to make."""

    key: str
    subject: str
    """What messages call it."""
    size: int
    load: Callable[[], tuple[Any, ...]]
    """Gets the arguments of the encoder's `encode`."""


def build_cache(
    store: CacheStore,
    family: Family,
    source: ModelSource,
    clips: Sequence[Clip],
    *,
    devices: Sequence[torch.device | str],
    dtype: torch.dtype,
    empty_caption: bool = False,
    text: TextOptions | None = None,
    observer: Observer | None = None,
) -> CacheIndex:
    """Encode the clips and captions that the cache does not hold yet, on all devices side by side.

    Every entry stands on the disk as soon as it is made: after a crash the next call makes the rest. Encoders
    are opened only if something is missing, first for latents, then for text, and are gone when it returns.

    Args:
        devices: each opens encoders of its own, also if one stands there twice.
        dtype: precision that the encoders compute in.
        empty_caption: embed the empty caption too, for caption dropout.
        text: where the text encoder runs, and in which precision; what fits by default.
        observer: sees the progress, and may stop it.

    Raises:
        UserError: A clip cannot be decoded, or an encoder returned NaN or Inf; the line names the clip.
    """
    watched = observer or SilentObserver()
    options = text or TextOptions()
    store.sweep()
    index = _index(store, family, source, clips, dtype, empty_caption, options, watched)
    latent_jobs, text_jobs = _latent_jobs(index, clips), _text_jobs(index, clips)
    missing = _missing_keys(store, [job.key for job in (*latent_jobs, *text_jobs)], watched)
    places = [torch.device(device) for device in devices]

    def latent_openings() -> list[_Opening]:
        return [
            _Opening(place, partial(family.open_latent_encoder, source, place, dtype)) for place in places
        ]

    def text_openings() -> list[_Opening]:
        workers = _text_workers(family, source, places, dtype, options)
        return [_Opening(worker.device, worker.open, worker.how) for worker in workers]

    for title, jobs, openings in (
        ("Encoding clips", latent_jobs, latent_openings),
        ("Embedding captions", text_jobs, text_openings),
    ):
        _encode_all(title, store, [job for job in jobs if job.key in missing], openings, watched)
    return index


def _text_workers(
    family: Family,
    source: ModelSource,
    devices: Sequence[torch.device],
    dtype: torch.dtype,
    options: TextOptions,
) -> Sequence[TextWorker]:
    """Say which text encoders embed the captions: the family's choice, or one on each device."""
    if family.text_workers is not None:
        return family.text_workers(source, devices, dtype, options)
    if options.placement == "spread":
        raise UserError(
            "cache.text_placement = 'spread': this model's text encoder runs whole on each device; "
            "allowed are auto, each, cpu"
        )
    if options.quantize not in (None, "auto"):
        raise UserError(
            f"cache.text_quantize = '{options.quantize}': this model's text encoder is not quantized; "
            "leave it out"
        )
    places = [torch.device("cpu")] if options.placement == "cpu" else devices
    return [
        TextWorker(device=place, open=partial(family.open_text_encoder, source, place, dtype))
        for place in places
    ]


def _index(
    store: CacheStore,
    family: Family,
    source: ModelSource,
    clips: Sequence[Clip],
    dtype: torch.dtype,
    empty_caption: bool,
    text_options: TextOptions,
    observer: Observer,
) -> CacheIndex:
    paths = sorted({path for clip in clips for path in (clip.path, *clip.images.values())})
    hashes = run_each("Hashing", content_hash, paths, _hash_threads(), observer)
    identities = run_each(
        "Reading the encoders",
        lambda identify: identify(source),
        [family.latent_identity, family.text_identity],
        _hash_threads(),
        observer,
    )
    latents, text = identities[family.latent_identity], identities[family.text_identity]
    if text_options.quantize != "auto":
        # A precision that was asked for is not served with what another one made.
        text += f" quantize={text_options.quantize}"
    return CacheIndex(
        store=store,
        latent_keys=_by_name((clip, latent_key(clip, hashes, latents, dtype)) for clip in clips),
        text_keys=_by_name((clip, text_key(clip.caption, text, dtype)) for clip in clips),
        empty_text=text_key("", text, dtype) if empty_caption else None,
    )


def _by_name(keys: Iterable[tuple[Clip, str]]) -> dict[str, str]:
    found: dict[str, str] = {}
    for clip, key in keys:
        assert found.setdefault(clip.name, key) == key, f"two clips are called {clip.name}"
    return found


def _latent_jobs(index: CacheIndex, clips: Sequence[Clip]) -> list[_Job]:
    """One job for each different key, longest clips first, so that all devices end at about the same time."""
    return _longest_first(
        _Job(
            key=index.latent_keys[clip.name],
            subject=str(clip.path),
            size=clip.bucket.frames * clip.bucket.height * clip.bucket.width,
            load=partial(_pixels, clip),
        )
        for clip in clips
    )


def _text_jobs(index: CacheIndex, clips: Sequence[Clip]) -> list[_Job]:
    captions = {index.text_keys[clip.name]: (f"{clip.path} (caption)", clip.caption) for clip in clips}
    if index.empty_text:
        captions[index.empty_text] = ("the empty caption", "")
    return _longest_first(
        _Job(key=key, subject=subject, size=len(caption), load=partial(_words, caption))
        for key, (subject, caption) in captions.items()
    )


def _pixels(clip: Clip) -> tuple[Tensor, dict[str, Tensor]]:
    return load_clip(clip), load_images(clip)


def _words(caption: str) -> tuple[str]:
    return (caption,)


def _longest_first(jobs: Iterable[_Job]) -> list[_Job]:
    return sorted({job.key: job for job in jobs}.values(), key=lambda job: job.size, reverse=True)


def _missing_keys(store: CacheStore, keys: Sequence[str], observer: Observer) -> set[str]:
    """Keys of entries that are absent or damaged; reads every entry that is there."""
    present = [key for key in keys if store.has(key)]
    intact = run_each("Checking the cache", store.is_intact, present, _hash_threads(), observer)
    return {key for key in keys if not intact.get(key, False)}


def _encode_all(
    title: str,
    store: CacheStore,
    jobs: Sequence[_Job],
    openings: Callable[[], Sequence[_Opening]],
    observer: Observer,
) -> None:
    """Make the entries, then give back the encoders' memory: the next ones may need all of it."""
    if not jobs:
        return
    chosen = openings()[: len(jobs)]
    how = ", ".join(dict.fromkeys(opening.how for opening in chosen if opening.how))
    try:
        workers = [_encoding_worker(store, opening) for opening in chosen]
        run_workers(f"{title} ({how})" if how else title, jobs, workers, observer)
    finally:
        gc.collect()
        if torch.accelerator.is_available():
            torch.accelerator.empty_cache()


def _encoding_worker(store: CacheStore, opening: _Opening) -> Worker[_Job, str]:
    def work(jobs: SharedJobs[_Job]) -> Iterator[str]:
        with _current(opening.device), closing(run_ahead(_load, jobs, CLIPS_AHEAD)) as ready:
            for job, tensors in _encoded(opening.open(), ready):
                with _Naming(job.subject):
                    store.write(job.key, tensors, subject=job.subject)
                yield job.key

    return work


def _encoded(
    encoder: LatentEncoder | TextEncoder, ready: Iterator[tuple[_Job, tuple[Any, ...]]]
) -> Iterator[tuple[_Job, dict[str, Tensor]]]:
    size = encoder.batch_size if isinstance(encoder, BatchTextEncoder) else 1
    while batch := list(islice(ready, size)):
        jobs, arguments = zip(*batch, strict=True)
        with _Naming(", ".join(job.subject for job in jobs)):
            if isinstance(encoder, BatchTextEncoder):
                encoded = encoder.encode_batch([caption for (caption,) in arguments])
            else:
                encoded = [encoder.encode(*arguments[0])]
        yield from zip(jobs, encoded, strict=True)


def _load(job: _Job) -> tuple[Any, ...]:
    with _Naming(job.subject):
        return job.load()


def _current(device: torch.device) -> AbstractContextManager[Any]:
    """Make `device` the current one of this thread: kernels that ask for the current device run there."""
    if device.type == "cpu" or device.index is None:
        return nullcontext()
    return torch.accelerator.device_index(device.index)


class _Naming(AbstractContextManager[None]):
    """Adds the clip to an error that comes out of a library."""

    def __init__(self, subject: str) -> None:
        self.subject = subject

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is not None:
            error.add_note(f"while encoding {self.subject}")


def _hash_threads() -> int:
    return min(MAX_HASH_THREADS, os.cpu_count() or 1)
