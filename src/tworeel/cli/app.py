"""The program `tworeel`: its commands, and what becomes of errors and signals."""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer

from tworeel import __version__
from tworeel.cli.bench import bench
from tworeel.cli.cache import cache
from tworeel.cli.check import check
from tworeel.cli.config import config
from tworeel.cli.convert import convert
from tworeel.cli.demo import demo
from tworeel.cli.plan import plan
from tworeel.cli.sample import sample
from tworeel.cli.train import train
from tworeel.errors import UserError
from tworeel.report.console import complain, say, set_up_console
from tworeel.signals import Stopped

USER_ERROR = 2

app = typer.Typer(
    name="tworeel",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for command in (train, check, plan, cache, sample, convert, demo, bench, config):
    app.command()(command)


def _show_version(wanted: bool) -> None:
    if wanted:
        say(f"tworeel {__version__}")
        raise typer.Exit


@app.callback()
def tworeel(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit."),
    ] = False,
) -> None:
    """Train LoRAs for Wan (video) and FLUX.2 (images) over two or more GPUs in one process.

    Three steps:

    1. Put clips and captions into a folder: cat.mp4 with cat.txt beside it.

    2. tworeel check --model MODEL --data FOLDER, which says what is wrong and what will be trained on.

    3. tworeel train --model MODEL --data FOLDER, which leaves the LoRA in output/lora.safetensors.

    No model at hand? tworeel demo runs everything with a tiny one, on any computer.
    """


def main() -> None:
    """Run the program and exit: 0 done, 2 a mistake of the user's, 130 or 143 stopped by a signal."""
    set_up_console()
    if sys.platform == "linux":
        # Several streams allocate on a device: without this, what one has freed does not serve another size.
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    try:
        app()
    except UserError as error:
        for problem in error.problems:
            complain("error", problem)
        sys.exit(USER_ERROR)
    except PermissionError as error:
        complain("error", f"{error.filename}: {error.strerror}" if error.filename else str(error))
        sys.exit(USER_ERROR)
    except Stopped as stopped:
        sys.exit(stopped.exit_code)
