"""`tworeel demo`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tworeel.cli.watching import watching


def demo(
    folder: Annotated[Path, typer.Argument(help="Folder that everything is written to.")] = Path(
        "demo-output"
    ),
) -> None:
    """Run everything with a tiny model: no GPU, no download.

    Writes a tiny checkpoint and drawn clips, and trains on them for a minute.
    """
    from tworeel.demo.run import run_demo

    with watching() as observer:
        run_demo(folder, observer=observer)
