"""Strict video decoding with PyAV: a damaged file is an error, never a strange picture.

FFmpeg decodes damaged video by default and conceals what it cannot read. Here decoders stop at the first
error, frames marked corrupt are refused, and what came out is compared with what the container announces.
Compressed pictures carry no checksum, so damage that still decodes is not seen. Measured on 640x360 clips,
100 tries each: of single changed bytes, 84 to 91 are reported in H.264, 26 in HEVC, 20 in VP9; of 4 KiB of
zeros, 100, 98 and 40; of cut-off files, all.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import av
import numpy as np
from av.buffer import Buffer
from av.container import InputContainer
from av.stream import Disposition
from av.video.frame import VideoFrame
from av.video.stream import VideoStream

from tworeel.data.errors import MediaError
from tworeel.data.matroska import matroska_length

# Containers that may be opened, whatever the file is called: no playlists, which would open other files.
FORMATS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,gif"
STRICT = "explode+crccheck+bitstream+buffer"
# Twice 8K: a damaged header must not make the decoder allocate the whole memory.
MAX_PIXELS = 2 * 7680 * 4320
DURATION_SLACK = 0.1
GIF_END = b";"
# Codecs with packets that have no picture of their own.
HIDING_CODECS = ("mpeg4", "vp8")


@dataclass(frozen=True)
class VideoFacts:
    """What decoding a whole video found."""

    times: tuple[float, ...]
    """Seconds from the first frame, one a frame, never falling."""
    duration: float
    """Seconds, the last frame's own duration included."""
    width: int
    height: int
    """Pixels as displayed: rotated, and stretched to square pixels."""


@dataclass
class _Tally:
    """Counts kept while decoding, to compare with the container's own."""

    packets: int = 0
    shown_packets: int = 0
    frames: int = 0
    end: float = 0.0
    """Seconds at which the last packet of any stream ends."""


def probe_video(path: Path) -> VideoFacts:
    """Decode all of a video; raises `MediaError` for anything that is not intact."""
    times: list[float | None] = []
    size, last = (0, 0), 0.0
    with _opened(path) as (container, stream):
        rate = float(stream.average_rate or stream.guessed_rate or 0)
        for frame in _decode_all(path, container, stream):
            if not times:
                size = _display_size(frame, stream)
            times.append(frame.time)
            last = float((frame.duration or 0) * (frame.time_base or 0))
    relative = _relative_times(path, times, rate)
    last = last or _last_duration(relative, rate)
    return VideoFacts(times=relative, duration=relative[-1] + last, width=size[0], height=size[1])


def frames_at(path: Path, indices: set[int]) -> Iterator[tuple[int, np.ndarray]]:
    """Yield (index, uint8 RGB picture of shape (height, width, 3)) of the wanted frames, in order.

    Stops decoding after the last wanted frame. Raises `MediaError` if a frame is missing or damaged.
    """
    wanted = set(indices)
    with _opened(path) as (container, stream):
        for index, frame in enumerate(_decode_all(path, container, stream)):
            if index in wanted:
                wanted.remove(index)
                yield index, _to_rgb(frame, stream)
            if not wanted:
                return
    raise MediaError(path, f"has no frame {min(wanted)}: it changed since it was scanned")


@contextmanager
def _opened(path: Path) -> Iterator[tuple[InputContainer, VideoStream]]:
    """Open a file for strict decoding; FFmpeg's errors become `MediaError`."""
    options = {"err_detect": STRICT, "format_whitelist": FORMATS}
    try:
        with av.open(str(path), container_options=options, metadata_errors="replace") as container:
            yield container, _video_stream(path, container)
    except av.FFmpegError as error:
        raise MediaError(path, f"cannot be decoded: {error.strerror}") from error


def _video_stream(path: Path, container: InputContainer) -> VideoStream:
    pictures = [s for s in container.streams.video if not s.disposition & Disposition.attached_pic]
    if not pictures:
        found = ", ".join(sorted({s.type for s in container.streams})) or "no streams"
        raise MediaError(path, f"has no video stream (found: {found})")
    stream = pictures[0]
    context = stream.codec_context
    if context is None:
        raise MediaError(path, "its video is in a format that no decoder is here for")
    # One thread a file: files are read side by side, and slice threads hide errors from each other.
    context.thread_type, context.thread_count = "NONE", 1
    # "aggressive" makes the H.264 decoder report bits left over; others might refuse healthy files with it.
    strict = f"{STRICT}+aggressive" if context.name == "h264" else STRICT
    context.options = {"err_detect": strict, "max_pixels": str(MAX_PIXELS)}
    return stream


def _decode_all(path: Path, container: InputContainer, stream: VideoStream) -> Iterator[VideoFrame]:
    """Yield every frame; after the last one, check that nothing is missing."""
    tally, size = _Tally(), None
    for packet in container.demux():
        if packet.pts is not None and packet.time_base:
            end = (packet.pts + (packet.duration or 0)) * packet.time_base
            tally.end = max(tally.end, float(end))
        if packet.stream_index != stream.index:
            continue
        if packet.is_corrupt:
            raise MediaError(path, f"is damaged or cut off at frame {tally.frames}")
        if packet.size or packet.dts is not None:
            tally.packets += 1
            tally.shown_packets += not packet.is_discard
        for frame in stream.decode(packet):
            size = size or (frame.width, frame.height)
            _check_frame(path, frame, tally.frames, size)
            tally.frames += 1
            yield frame
    _check_complete(path, container, stream, tally)


def _check_frame(path: Path, frame: VideoFrame, index: int, size: tuple[int, int]) -> None:
    if frame.is_corrupt:
        raise MediaError(path, f"frame {index} is damaged")
    if (frame.width, frame.height) != size:
        now = f"{frame.width}x{frame.height}"
        raise MediaError(path, f"changes its size at frame {index}, from {size[0]}x{size[1]} to {now}")


def _check_complete(path: Path, container: InputContainer, stream: VideoStream, tally: _Tally) -> None:
    """Compare what was decoded with what the container announces."""
    if not tally.frames:
        raise MediaError(path, "has no frames")
    lost = tally.shown_packets - tally.frames
    if lost > 0 and stream.codec_context.name not in HIDING_CODECS:
        raise MediaError(path, f"{lost} of {tally.shown_packets} frames cannot be decoded")
    kind = container.format.name
    if "matroska" in kind:
        _check_matroska(path, container, stream, tally)
    elif kind == "gif":
        if not path.read_bytes().rstrip(b"\0").endswith(GIF_END):
            raise MediaError(path, "is cut off: the end mark is missing")
    elif tally.packets < stream.frames and _count_packets(path) < stream.frames:
        raise MediaError(path, f"is cut off: {tally.packets} of {stream.frames} frames are there")


def _check_matroska(path: Path, container: InputContainer, stream: VideoStream, tally: _Tally) -> None:
    """Matroska and WebM announce a duration, and the length of all that follows their header."""
    announced = (container.duration or 0) / av.time_base
    slack = max(DURATION_SLACK, 1.5 / float(stream.average_rate or 24))
    if tally.end < announced - slack:
        raise MediaError(path, f"is cut off: {tally.end:.2f} of {announced:.2f} seconds are there")
    missing = matroska_length(path) - path.stat().st_size
    if missing > 0:
        raise MediaError(path, f"is cut off: {missing} bytes are missing at its end")


def _count_packets(path: Path) -> int:
    """Count the video packets of a file as if it had no edit list, which may leave out some on purpose."""
    options = {"ignore_editlist": "1", "format_whitelist": FORMATS}
    with av.open(str(path), container_options=options, metadata_errors="replace") as container:
        stream = _video_stream(path, container)
        return sum(1 for packet in container.demux(stream) if packet.size and not packet.is_corrupt)


def _relative_times(path: Path, times: list[float | None], rate: float) -> tuple[float, ...]:
    """Seconds from the first frame; from the frame rate where the container has no timestamps."""
    known = [time for time in times if time is not None]
    if len(known) < len(times):
        if not rate:
            raise MediaError(path, "has neither timestamps nor a frame rate")
        return tuple(index / rate for index in range(len(times)))
    for index in range(1, len(known)):
        if known[index] < known[index - 1]:
            raise MediaError(path, f"its timestamps run backwards at frame {index}")
    return tuple(time - known[0] for time in known)


def _last_duration(times: tuple[float, ...], rate: float) -> float:
    """Seconds that the last frame is shown, where the container does not say."""
    if len(times) > 1 and times[-1] > 0:
        return times[-1] / (len(times) - 1)
    return 1 / rate if rate else 0.04


def _display_size(frame: VideoFrame, stream: VideoStream) -> tuple[int, int]:
    """Width and height after stretching to square pixels and rotating."""
    width, height = _square_width(frame, stream), frame.height
    return (height, width) if _orientation(frame)[0] else (width, height)


def _square_width(frame: VideoFrame, stream: VideoStream) -> int:
    """Width with square pixels; anamorphic video stores a narrower or wider picture than it shows."""
    aspect = stream.sample_aspect_ratio
    return max(1, round(frame.width * float(aspect))) if aspect else frame.width


def _to_rgb(frame: VideoFrame, stream: VideoStream) -> np.ndarray:
    transposed, mirror_x, mirror_y = _orientation(frame)
    picture = frame.to_ndarray(format="rgb24", width=_square_width(frame, stream), height=frame.height)
    if transposed:
        picture = picture.transpose(1, 0, 2)
    if mirror_x:
        picture = picture[:, ::-1]
    return picture[::-1] if mirror_y else picture


def _orientation(frame: VideoFrame) -> tuple[bool, bool, bool]:
    """(swap the axes, then mirror left-right, then mirror top-bottom) from the display matrix.

    The matrix maps a point as x' = a x + c y, y' = b x + d y, with y downwards; angles other than multiples
    of 90° are rounded to the nearest.
    """
    if "DISPLAYMATRIX" not in frame.side_data:
        return False, False, False
    side_data = cast(Mapping[str, Buffer], frame.side_data)  # what it is; PyAV's stubs say otherwise
    if "DISPLAYMATRIX" not in side_data:
        return False, False, False
    a, b, _, c, d = np.frombuffer(bytes(side_data["DISPLAYMATRIX"]), np.int32)[:5].tolist()
    if abs(a) >= abs(b):
        return False, a < 0, d < 0
    return True, c < 0, b < 0
