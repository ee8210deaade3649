"""Encoders at work: each in a thread of its own, with jobs from one list, gone when all are done."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import dataclass
from itertools import islice
from types import TracebackType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tworeel.cache.store import CacheStore
from tworeel.engine.releasing import release_memory
from tworeel.models.family import BatchTextEncoder, LatentEncoder, TextEncoder
from tworeel.workers import Observer, SharedJobs, Worker, run_ahead, run_workers

CLIPS_AHEAD = 2  # decoded clips that wait for each encoder


class Opening(NamedTuple):
    """An encoder that is not opened yet."""

    device: torch.device
    open: Callable[[], LatentEncoder | TextEncoder]
    how: str = ""
    """For people; see `TextWorker.how`."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """One entry to make."""

    key: str
    subject: str
    """What messages call it."""
    size: int
    load: Callable[[], tuple[Any, ...]]
    """Gets the arguments of the encoder's `encode`."""


def encode_all(
    title: str,
    store: CacheStore,
    jobs: Sequence[Job],
    openings: Callable[[], Sequence[Opening]],
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
        release_memory()


def _encoding_worker(store: CacheStore, opening: Opening) -> Worker[Job, str]:
    def work(jobs: SharedJobs[Job]) -> Iterator[str]:
        with _current(opening.device), closing(run_ahead(_load, jobs, CLIPS_AHEAD)) as ready:
            for job, tensors in _encoded(opening.open(), ready):
                with _Naming(job.subject):
                    store.write(job.key, tensors, subject=job.subject)
                yield job.key

    return work


def _encoded(
    encoder: LatentEncoder | TextEncoder, ready: Iterator[tuple[Job, tuple[Any, ...]]]
) -> Iterator[tuple[Job, dict[str, Tensor]]]:
    size = encoder.batch_size if isinstance(encoder, BatchTextEncoder) else 1
    while batch := list(islice(ready, size)):
        jobs, arguments = zip(*batch, strict=True)
        with _Naming(", ".join(job.subject for job in jobs)):
            if isinstance(encoder, BatchTextEncoder):
                encoded = encoder.encode_batch([caption for (caption,) in arguments])
            else:
                encoded = [encoder.encode(*arguments[0])]
        yield from zip(jobs, encoded, strict=True)


def _load(job: Job) -> tuple[Any, ...]:
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
