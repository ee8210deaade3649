"""Reads a whole dataset once and says what will be trained on and what is wrong, everything in one pass."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from tworeel.config.schema import DataConfig
from tworeel.data.buckets import (
    Size,
    bucket_problems,
    bucket_sizes,
    longest_length,
    nearest_size,
    usable_lengths,
)
from tworeel.data.clips import Bucket, Clip
from tworeel.data.errors import MediaError
from tworeel.data.media import MediaInfo, is_image, probe
from tworeel.data.metadata import Entry, Listing, read_source
from tworeel.data.references import Reference, fit_references, image_problems
from tworeel.data.windows import choose_windows, count_slots
from tworeel.errors import UserError, raise_if_any
from tworeel.models.family import Traits
from tworeel.workers import Observer, SilentObserver, run_each

MAX_WORKERS = 8


@dataclass(frozen=True, kw_only=True)
class ScannedFile:
    """One video or image that is used."""

    name: str
    path: Path
    source: int
    info: MediaInfo
    bucket: Bucket
    available: int
    """Frames after resampling to the model's frame rate."""
    clips: int
    """How many clips are cut from it."""
    spread: bool
    """True where the clip's frames are spread over all of the video."""

    @property
    def truncated(self) -> bool:
        """True where a part of the video is not used."""
        return not self.spread and self.clips * self.bucket.frames < self.available

    @property
    def enlarged(self) -> bool:
        """True where the bucket is larger than the picture."""
        return self.bucket.width > self.info.width or self.bucket.height > self.info.height


@dataclass(frozen=True, kw_only=True)
class Scan:
    """What a dataset holds."""

    clips: tuple[Clip, ...]
    files: tuple[ScannedFile, ...]
    problems: tuple[str, ...]
    """What must be put right before training."""
    skipped: tuple[str, ...]
    """Clips left out because of `data.skip_broken`, and why."""
    passed_over: tuple[Path, ...] = ()
    """Files of the datasets' folders that are neither clips nor their captions."""

    @property
    def truncated(self) -> tuple[ScannedFile, ...]:
        """Files of which a part is not used."""
        return tuple(file for file in self.files if file.truncated)

    @property
    def repeating(self) -> tuple[Clip, ...]:
        """Clips that show a frame more than once, as of a file with fewer frames a second than are taken."""
        return tuple(clip for clip in self.clips if len(set(clip.frame_indices)) < len(clip.frame_indices))

    def raise_problems(self) -> None:
        """Raise one `UserError` with all problems, if there are any."""
        raise_if_any(self.problems)


@dataclass(frozen=True)
class _Plan:
    """How clips are cut, worked out once."""

    data: DataConfig
    traits: Traits
    sizes: tuple[Size, ...]
    lengths: tuple[int, ...]

    @property
    def rate(self) -> float:
        return self.data.frame_rate or self.traits.frame_rate


@dataclass(frozen=True)
class _Task:
    entry: Entry
    source: int
    name: str


@dataclass(frozen=True)
class _Outcome:
    file: ScannedFile | None = None
    clips: tuple[Clip, ...] = ()
    broken: tuple[str, ...] = ()


def scan(data: DataConfig, traits: Traits, *, observer: Observer | None = None) -> Scan:
    """Read every file of the dataset strictly and cut it into clips.

    Problems are collected, not raised: see `Scan.raise_problems`. With `data.skip_broken` the problems of
    single clips are listed as skipped instead and the clips left out; none is replaced by another.

    Args:
        data: the configuration.
        traits: the model that the clips are for.
        observer: sees the progress, and may stop it.

    Raises:
        UserError: nothing is left to train on; lists every problem.
    """
    listings = [read_source(source.path) for source in data.sources]
    problems = bucket_problems(data, traits) + [p for listing in listings for p in listing.problems]
    broken = [line for listing in listings for line in listing.broken]
    outcomes = _read_all(list(_tasks(listings)), _plan(data, traits), observer or SilentObserver())
    broken += [line for outcome in outcomes for line in outcome.broken]
    clips = tuple(clip for outcome in outcomes for clip in outcome.clips)
    if not clips:
        raise UserError(*problems, *broken, "data.sources: nothing is left to train on")
    if not data.skip_broken:
        problems, broken = problems + broken, []
    files = tuple(outcome.file for outcome in outcomes if outcome.file)
    return Scan(
        clips=clips,
        files=files,
        problems=tuple(problems),
        skipped=tuple(broken),
        passed_over=tuple(path for listing in listings for path in listing.passed_over),
    )


def _plan(data: DataConfig, traits: Traits) -> _Plan:
    sizes = bucket_sizes(data.resolution, traits.spatial_multiple, data.min_aspect, data.max_aspect)
    return _Plan(data, traits, sizes, usable_lengths(data.frames, traits))


def _tasks(listings: list[Listing]) -> Iterator[_Task]:
    """Name every entry; a file that is listed again gets a number behind its name."""
    for source, listing in enumerate(listings):
        seen: Counter[str] = Counter()
        for entry in listing.entries:
            seen[entry.name] += 1
            again = f"~{seen[entry.name]}" if seen[entry.name] > 1 else ""
            yield _Task(entry, source, f"{source}/{entry.name}{again}")


def _read_all(tasks: list[_Task], plan: _Plan, observer: Observer) -> list[_Outcome]:
    """Read files side by side; outcomes are in the order of the tasks."""
    # Threads suffice: decoders release the interpreter lock.
    threads = min(MAX_WORKERS, os.cpu_count() or 1)
    order = range(len(tasks))
    outcomes = run_each("Scanning clips", lambda i: _read_task(tasks[i], plan), order, threads, observer)
    return [outcomes[i] for i in order]


def _read_task(task: _Task, plan: _Plan) -> _Outcome:
    images = {name: path for name, path in task.entry.images.items() if name in plan.traits.image_inputs}
    broken = [line for path in images.values() for line in image_problems(path)]
    references = fit_references(task.entry.references, plan.traits, broken)
    if plan.traits.images_only and not is_image(task.entry.path):
        broken.append(_not_an_image(task.entry.path, plan))
        return _Outcome(broken=tuple(broken))
    if plan.traits.needs_image and is_image(task.entry.path):
        broken.append(_an_image(task.entry.path, plan))
        return _Outcome(broken=tuple(broken))
    try:
        info = probe(task.entry.path)
    except MediaError as error:
        return _Outcome(broken=(*error.problems, *broken))
    available = 1 if info.is_image else count_slots(info.duration, plan.rate)
    length = 1 if info.is_image else longest_length(available, plan.lengths)
    if length is None and plan.lengths:
        broken.append(_too_short(task.entry.path, info, available, plan))
    if length is None or broken:
        return _Outcome(broken=tuple(broken))
    width, height = nearest_size(info.width, info.height, plan.sizes)
    bucket = Bucket(length, height, width, tuple((r.height, r.width) for r in references))
    return _cut(task, plan, info, available, bucket, images, references)


def _cut(
    task: _Task,
    plan: _Plan,
    info: MediaInfo,
    available: int,
    bucket: Bucket,
    images: Mapping[str, Path],
    references: tuple[Reference, ...],
) -> _Outcome:
    """Make the clips of one readable file."""
    rule = plan.data.clip_rule
    windows: tuple[tuple[int, ...], ...] = ((0,),)
    if not info.is_image:
        windows = choose_windows(info.times, info.duration, plan.rate, bucket.frames, rule, plan.data.windows)
    clips = tuple(
        Clip(
            path=task.entry.path,
            caption=task.entry.caption,
            bucket=bucket,
            frame_indices=indices,
            images=_images_of(images, number, len(windows)),
            references=references,
            source=task.source,
            name=f"{task.name}#{number}" if rule == "windows" else task.name,
        )
        for number, indices in enumerate(windows)
    )
    file = ScannedFile(
        name=task.name,
        path=task.entry.path,
        source=task.source,
        info=info,
        bucket=bucket,
        available=available,
        clips=len(clips),
        spread=rule == "uniform",
    )
    return _Outcome(file=file, clips=clips)


def _images_of(images: Mapping[str, Path], number: int, count: int) -> dict[str, Path]:
    """Condition images belong to a video's ends: windows in its middle take theirs from their own frames."""
    at = {"first_image": 0, "last_image": count - 1}
    return {name: path for name, path in images.items() if at.get(name, number) == number}


def _not_an_image(path: Path, plan: _Plan) -> str:
    return (
        f"{path}: a video, but {plan.traits.variant} is trained on images; leave it out, or save the frames "
        "of it that you want as images"
    )


def _an_image(path: Path, plan: _Plan) -> str:
    return (
        f"{path}: an image, but {plan.traits.variant} is trained on clips of several frames: it would be "
        "given all that it has to make; leave it out"
    )


def _too_short(path: Path, info: MediaInfo, available: int, plan: _Plan) -> str:
    allowed = ", ".join(str(length) for length in plan.lengths)
    return (
        f"{path}: too short: {info.frames} frames at {info.fps:.4g} a second are {available} at "
        f"{plan.rate:g} a second; allowed (data.frames): {allowed}"
    )
