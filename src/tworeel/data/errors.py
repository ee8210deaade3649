"""The errors for a media file or a row of a table that cannot be used."""

from __future__ import annotations

from pathlib import Path

from tworeel.errors import UserError


class MediaError(UserError):
    """A video or an image that is missing, damaged or not what its name says; one line."""

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(f"{path}: {reason}")


class BrokenRow(Exception):
    """One clip of a dataset cannot be used; the message says why."""
