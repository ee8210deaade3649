"""`tworeel sample` from its configuration to the contact sheet."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from tworeel.cache.store import CacheStore
from tworeel.config.schema import RunConfig
from tworeel.engine import Split, attention_backend
from tworeel.engine.releasing import release_memory
from tworeel.errors import UserError
from tworeel.lora.attach import attach_lora
from tworeel.sampling.encoding import encode_request
from tworeel.sampling.files import Sheet, write_takes
from tworeel.sampling.rendering import Renderer, Take, takes_of
from tworeel.sampling.request import require_sampling
from tworeel.training.assembly import encoding_devices, load_transformer, split_model
from tworeel.training.choices import settled
from tworeel.training.loadable import torch_dtype
from tworeel.training.preflight import cache_folder, text_options
from tworeel.training.report import RunObserver, SilentRun
from tworeel.training.sample_job import SampleJob, Turn, sample_preflight
from tworeel.training.space import full_disk_as_user_error


def sample(
    config: RunConfig,
    *,
    folder: Path,
    loras: Mapping[str | None, Path] | None = None,
    single_expert: bool = False,
    observer: RunObserver | None = None,
) -> Sheet:
    """Check, encode, render with each transformer in its turn, decode and write.

    Text encoder, transformers and decoder are loaded one after the other, and none with another.

    Args:
        config: of the run; its section `sample` says what is rendered.
        folder: of the pictures.
        loras: LoRA files by expert, see `sample_preflight`.
        single_expert: render with the configuration's expert alone.
        observer: sees the progress, and may stop it by raising `Stopped`.

    Raises:
        UserError: everything that was found wrong, before a weight is read; or too little memory or disk.
        Stopped: a signal came.
    """
    watched = observer or SilentRun()
    config = settled(config)
    job = sample_preflight(config, loras or {}, folder, single_expert=single_expert)
    with _memory_told(), full_disk_as_user_error(folder, "the pictures", "those before it are whole"):
        pictures = encode_request(
            CacheStore(cache_folder(config)),
            job.family,
            job.source,
            job.request,
            devices=encoding_devices(config),
            dtype=torch_dtype(config.cache.dtype),
            text=text_options(config),
            observer=watched,
        )
        takes = takes_of(pictures, job.request.strengths)
        return _write(config, job, takes, _render(config, job, takes, watched), watched)


def _render(config: RunConfig, job: SampleJob, takes: Sequence[Take], observer: RunObserver) -> list[Tensor]:
    renderer = Renderer(
        require_sampling(job.family),
        job.source,
        [turn.transformer.config for turn in job.turns],
        device=job.turns[0].placement.devices[0],
        dtype=torch_dtype(config.model.dtype),
        seed=job.request.seed,
        poll=observer.poll,
    )
    latents: list[Tensor] = []
    for number, turn in enumerate(job.turns):
        expert = f" ({turn.source.traits.expert}-noise expert)" if turn.source.traits.expert else ""
        with (
            _loaded(config, turn, observer) as split,
            _phase(observer, f"Rendering{expert}", len(takes)),
        ):
            latents = renderer.render(takes, number, split, observer.advance)
        del split
        release_memory()
    return latents


@contextmanager
def _loaded(config: RunConfig, turn: Turn, observer: RunObserver) -> Iterator[Split]:
    """The transformer with its LoRA, on its devices; afterwards its memory can be given back."""
    load_transformer(config, turn, observer.poll)
    if turn.lora is not None:
        attach_lora(turn.transformer, turn.lora)
    division = split_model(config, turn, turn.transformer)
    try:
        with attention_backend(config.engine.attention, turn.placement.devices):
            yield division
    finally:
        division.remove()
        turn.transformer.to("meta")


def _write(
    config: RunConfig,
    job: SampleJob,
    takes: Sequence[Take],
    latents: Sequence[Tensor],
    observer: RunObserver,
) -> Sheet:
    device, dtype = encoding_devices(config)[0], torch_dtype(config.cache.dtype)
    decoder = require_sampling(job.family).open_decoder(job.source, device, dtype)

    def done() -> None:
        observer.advance()
        observer.poll()

    with _phase(observer, "Decoding", len(takes)):
        rate = job.source.traits.frame_rate
        return write_takes(job.folder, job.request.prompts, takes, latents, decoder, rate, done)


@contextmanager
def _phase(observer: RunObserver, title: str, total: int) -> Iterator[None]:
    observer.start(title, total)
    try:
        yield
    finally:
        observer.finish()


@contextmanager
def _memory_told() -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"out of memory: {str(error).splitlines()[0]} What needs less: engine.streamed_blocks, "
            "model.quantize = 'fp8', fewer sample.frames, a smaller sample.size, one more device"
        ) from error
