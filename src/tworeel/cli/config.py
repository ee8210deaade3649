"""`tworeel config`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tworeel.config.template import commented_toml
from tworeel.errors import UserError
from tworeel.files import write_text_atomic
from tworeel.report.console import complain, say

if TYPE_CHECKING:
    from tworeel.models.family import Traits


def config(
    file: Annotated[
        Path | None,
        typer.Argument(help="File to write, for example run.toml; shown on the console if not given."),
    ] = None,
    model: Annotated[str | None, typer.Option(help="Model to put into it.")] = None,
    data: Annotated[Path | None, typer.Option(help="Dataset to put into it.")] = None,
    expert: Annotated[
        str | None, typer.Option(help="Expert of a Wan 2.2 A14B model.", metavar="high|low")
    ] = None,
) -> None:
    """Write a configuration file to edit.

    It has every option with its meaning and its default.
    """
    traits = _traits(model, expert) if model else None
    text = commented_toml(_absolute(model or "path/to/model"), _absolute(data or "path/to/clips"), traits)
    if file is None:
        sys.stdout.write(text)
        return
    if file.exists():
        raise UserError(f"{file}: exists already; remove it or choose another name")
    try:
        write_text_atomic(file, text)
    except OSError as error:
        raise UserError(f"{file}: cannot be written: {error.strerror}") from error
    say(f"Wrote {file}. Edit it, then: tworeel check {file}")


def _absolute(path: str | Path) -> str:
    """Make the path of something that is there independent of where the file will lie."""
    there = Path(path).expanduser()
    return str(there.absolute()) if there.exists() else str(path)


def _traits(model: str, expert: str | None) -> Traits | None:
    """Look at the model if it is on this computer; what is wrong with it does not stand in the way."""
    if not Path(model).expanduser().exists():
        return None
    from tworeel.models.family import ModelRequest
    from tworeel.models.locate import locate_model

    try:
        return locate_model(ModelRequest(path=_absolute(model), expert=expert))[1].traits
    except UserError as error:
        for problem in error.problems:
            complain("warning", problem)
        return None
