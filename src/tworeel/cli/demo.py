"""`tworeel demo`."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from tworeel.cli.importing import importing
from tworeel.errors import UserError


def demo(
    folder: Annotated[Path, typer.Argument(help="Folder that everything is written to.")] = Path(
        "demo-output"
    ),
    family: Annotated[
        str | None, typer.Option(metavar="NAME", help="Whose tiny model: wan (by default) or flux2.")
    ] = None,
) -> None:
    """Run everything with a tiny model: no GPU, no download.

    Writes a tiny checkpoint and a drawn dataset, and trains on them for a minute.
    """
    # Before torch is imported: so tiny a model is slowed by more threads than one a stage.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with importing():
        from tworeel.demo.kinds import DEMOS
        from tworeel.demo.run import run_demo

    name = family or next(iter(DEMOS))
    if name not in DEMOS:
        raise UserError(f"--family {name}: there is no such demo; allowed are {', '.join(DEMOS)}")
    run_demo(folder, _run_command, DEMOS[name])


def _run_command(arguments: Sequence[str]) -> None:
    from tworeel.cli.app import app  # not above: the app has this command

    app(list(arguments), standalone_mode=False)
