"""`tworeel train`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tworeel.cli import options
from tworeel.cli.importing import importing
from tworeel.cli.watching import watching
from tworeel.report.console import say
from tworeel.signals import Stopped

if TYPE_CHECKING:
    from tworeel.config import RunConfig
    from tworeel.training.report import Result


def train(
    config: options.ConfigFile = None,
    model: options.Model = None,
    data: options.Data = None,
    expert: options.Expert = None,
    output: options.Output = None,
    devices: options.Devices = None,
    steps: options.Steps = None,
    rank: options.Rank = None,
    settings: options.Settings = None,
    resume: Annotated[
        bool,
        typer.Option(
            help="Go on from the newest checkpoint in the output folder. "
            "Without it, a folder that holds checkpoints is refused."
        ),
    ] = False,
    resume_from: Annotated[
        Path | None, typer.Option(help="Go on from this checkpoint's folder; later ones are set aside.")
    ] = None,
    skip_broken: options.SkipBroken = None,
    anyway: Annotated[
        bool,
        typer.Option(
            "--anyway",
            help="Train although the plan does not fit the GPUs; it may run out of memory. "
            "Without it, such a run stops before anything is encoded or loaded.",
        ),
    ] = False,
    cards: options.Cards = None,
) -> None:
    """Train a LoRA.

    Checks everything, plans what fits the GPUs, encodes what is not cached yet, trains and writes the LoRA.
    Give a TOML file, or only --model and --data; options here are stronger than the file.
    """
    run_config = options.read_config(
        config,
        settings,
        model__path=model,
        model__expert=expert,
        data__sources=options.datasets(data),
        data__skip_broken=skip_broken,
        engine__devices=options.device_list(devices),
        lora__rank=rank,
        train__output=output,
        train__steps=steps,
    )
    _show_result(_run(run_config, resume_from or resume, anyway, cards))


def _run(config: RunConfig, resume: bool | Path, anyway: bool, cards: Path | None) -> Result:
    """Train; when a signal stops it, say how to go on."""
    try:
        with watching() as observer:
            # After what needs none of them; a Ctrl-C is heard meanwhile
            with importing():
                from tworeel.training.run import train as train_lora

            return train_lora(config, resume=resume, anyway=anyway, cards=cards, observer=observer)
    except Stopped:
        from tworeel.report.tables import resume_command
        from tworeel.training.run_folder import RunFolder

        folder = RunFolder(config.train.output)
        if folder.checkpoints.exists():
            given = [*(["--anyway"] if anyway else []), *(["--cards", str(cards)] if cards else [])]
            say(f"Stopped. Go on with: {resume_command(folder.config, *given)}")
        else:
            say("Stopped before the first step. The same command starts again; what is cached stays.")
        raise


def _show_result(result: Result) -> None:
    from tworeel.report.plots import plot_loss
    from tworeel.report.tables import closing_lines
    from tworeel.training.metrics import read_metrics
    from tworeel.training.run_folder import RunFolder

    folder, plot = RunFolder(result.folder), result.folder / "loss.png"
    plot_loss(read_metrics(folder.metrics), plot)
    for line in closing_lines(result.lora, folder.config, steps=result.steps, expert=result.expert):
        say(line)
    say(f"  loss curve: {plot}")
