"""The file of figures that a command is asked for with `--json`."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tworeel.errors import UserError


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write figures.

    Raises:
        UserError: the file cannot be written.
    """
    from tworeel.files import write_text_atomic

    try:
        write_text_atomic(path, json.dumps(content, indent=1, default=str) + "\n")
    except OSError as error:
        raise UserError(f"--json {path}: cannot be written: {error.strerror}") from None


def output_problems(json_file: Path | None, timeline: Path | None = None) -> Iterator[str]:
    """What keeps the figures from being written, in one line each; folders are made on the way."""
    for option, path, folder in (
        ("--timeline", timeline, timeline),
        ("--json", json_file, json_file and json_file.parent),
    ):
        if path is None or folder is None:
            continue
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):
                pass
            if path == json_file and path.is_dir():
                yield f"{option} {path}: is a folder; must be the name of a file"
        except OSError as error:
            yield f"{option} {path}: cannot be written: {error.strerror}"
