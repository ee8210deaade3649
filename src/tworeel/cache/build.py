"""Build the cache: hash the files, find what is missing, and let every device encode its share of that."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from tworeel.cache.encoding import Job, Opening, encode_all
from tworeel.cache.keys import latent_key, text_key
from tworeel.cache.store import CacheStore
from tworeel.cache.text_workers import text_workers
from tworeel.data.clips import Clip
from tworeel.data.media import content_hash
from tworeel.data.pixels import load_clip, load_images
from tworeel.models.family import Family, ModelSource, TextOptions
from tworeel.workers import Observer, SilentObserver, run_each

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

    def latent_openings() -> list[Opening]:
        return [Opening(place, partial(family.open_latent_encoder, source, place, dtype)) for place in places]

    for title, jobs, openings in (
        ("Encoding clips", latent_jobs, latent_openings),
        (
            "Embedding captions",
            text_jobs,
            partial(_text_openings, family, source, places, dtype, options),
        ),
    ):
        encode_all(title, store, [job for job in jobs if job.key in missing], openings, watched)
    return index


def embed_captions(
    store: CacheStore,
    family: Family,
    source: ModelSource,
    captions: Sequence[str],
    *,
    devices: Sequence[torch.device | str],
    dtype: torch.dtype,
    text: TextOptions | None = None,
    observer: Observer | None = None,
) -> dict[str, dict[str, Tensor]]:
    """Return what the text encoder makes of captions that belong to no clip; kept in the cache as theirs are.

    Args:
        captions: may be empty, or come twice.
        devices, dtype, text, observer: as for `build_cache`.
    """
    watched = observer or SilentObserver()
    options = text or TextOptions()
    identity = _text_identity(family.text_identity(source), options)
    keys = {caption: text_key(caption, identity, dtype) for caption in captions}
    missing = _missing_keys(store, list(keys.values()), watched)
    jobs = [
        Job(key=key, subject=f"'{caption[:60]}'", size=len(caption), load=partial(_words, caption))
        for caption, key in keys.items()
        if key in missing
    ]
    places = [torch.device(device) for device in devices]
    openings = partial(_text_openings, family, source, places, dtype, options)
    encode_all("Embedding prompts", store, jobs, openings, watched)
    return {caption: store.read(key) for caption, key in keys.items()}


def _text_openings(
    family: Family,
    source: ModelSource,
    devices: Sequence[torch.device],
    dtype: torch.dtype,
    options: TextOptions,
) -> list[Opening]:
    workers = text_workers(family, source, devices, dtype, options)
    return [Opening(worker.device, worker.open, worker.how) for worker in workers]


def _text_identity(files: str, options: TextOptions) -> str:
    """A precision that was asked for is not served with what another one made."""
    return files if options.quantize == "auto" else f"{files} quantize={options.quantize}"


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
    paths = sorted({path for clip in clips for path in clip.files})
    hashes = run_each("Hashing", content_hash, paths, _hash_threads(), observer)
    identities = run_each(
        "Reading the encoders",
        lambda identify: identify(source),
        [family.latent_identity, family.text_identity],
        _hash_threads(),
        observer,
    )
    latents = identities[family.latent_identity]
    text = _text_identity(identities[family.text_identity], text_options)
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


def _latent_jobs(index: CacheIndex, clips: Sequence[Clip]) -> list[Job]:
    """One job for each different key, longest clips first, so that all devices end at about the same time."""
    return _longest_first(
        Job(
            key=index.latent_keys[clip.name],
            subject=str(clip.path),
            size=clip.bucket.frames * clip.bucket.height * clip.bucket.width,
            load=partial(_pixels, clip),
        )
        for clip in clips
    )


def _text_jobs(index: CacheIndex, clips: Sequence[Clip]) -> list[Job]:
    captions = {index.text_keys[clip.name]: (f"{clip.path} (caption)", clip.caption) for clip in clips}
    if index.empty_text:
        captions[index.empty_text] = ("the empty caption", "")
    return _longest_first(
        Job(key=key, subject=subject, size=len(caption), load=partial(_words, caption))
        for key, (subject, caption) in captions.items()
    )


def _pixels(clip: Clip) -> tuple[Tensor, dict[str, Tensor]]:
    return load_clip(clip), load_images(clip)


def _words(caption: str) -> tuple[str]:
    return (caption,)


def _longest_first(jobs: Iterable[Job]) -> list[Job]:
    return sorted({job.key: job for job in jobs}.values(), key=lambda job: job.size, reverse=True)


def _missing_keys(store: CacheStore, keys: Sequence[str], observer: Observer) -> set[str]:
    """Keys of entries that are absent or damaged; reads every entry that is there."""
    present = [key for key in keys if store.has(key)]
    intact = run_each("Checking the cache", store.is_intact, present, _hash_threads(), observer)
    return {key for key in keys if not intact.get(key, False)}


def _hash_threads() -> int:
    return min(MAX_HASH_THREADS, os.cpu_count() or 1)
