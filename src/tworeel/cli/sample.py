"""`tworeel sample`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

import typer

from tworeel.cli import options
from tworeel.cli.importing import importing
from tworeel.cli.watching import watching
from tworeel.errors import UserError
from tworeel.report.console import say


def sample(
    config: Annotated[
        Path | None,
        typer.Argument(help="Folder of a run, or a TOML file with a run's options.", metavar="RUN"),
    ] = None,
    model: options.Model = None,
    expert: options.Expert = None,
    lora: Annotated[
        Path | None,
        typer.Option(help="LoRA file, in any of the forms; the run's own by default.", metavar="FILE"),
    ] = None,
    expert_lora: Annotated[
        list[str] | None,
        typer.Option(
            help="LoRA of one expert of a Wan 2.2 A14B model: high=FILE or low=FILE. Repeat it for both.",
            metavar="EXPERT=FILE",
        ),
    ] = None,
    single_expert: Annotated[
        bool, typer.Option("--single-expert", help="Render with the one expert alone, all noise levels.")
    ] = False,
    prompt: Annotated[
        list[str] | None, typer.Option(help="What to render. Repeat it for more rows.", metavar="TEXT")
    ] = None,
    image: Annotated[
        Path | None, typer.Option(help="First frame, for models that start from an image.", metavar="FILE")
    ] = None,
    strength: Annotated[
        list[float] | None,
        typer.Option(
            help="How much of the LoRA; 0 is without. Repeat it for more columns; 0 and 1 by default."
        ),
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of the noise.")] = None,
    steps: Annotated[int | None, typer.Option(help="Denoising steps; 20 by default.")] = None,
    guidance: Annotated[float | None, typer.Option(help="Guidance scale.")] = None,
    size: Annotated[str | None, typer.Option(help="Width and height in pixels.", metavar="WxH")] = None,
    frames: Annotated[int | None, typer.Option(help="Frames; 1 gives an image.")] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Folder of the pictures; a new one in the run's folder by default.", metavar="FOLDER"
        ),
    ] = None,
    devices: options.Devices = None,
    settings: options.Settings = None,
) -> None:
    """Render prompts with and without the LoRA, side by side on one contact sheet.

    The same seed gives the same picture. The model is loaded as for training: on the same devices, in the
    same precision. Options here are stronger than the file's.

    tworeel sample output --prompt "a red ball rolls over a green hill"
    """
    run_config = options.read_config(
        config,
        settings,
        model__path=model,
        model__expert=expert,
        # Nothing is trained, so there need not be a dataset.
        data__sources=[{"path": "."}] if config is None else None,
        engine__devices=options.device_list(devices),
        sample__prompts=prompt or None,
        sample__image=image,
        sample__strengths=strength or None,
        sample__seed=seed,
        sample__steps=steps,
        sample__guidance=guidance,
        sample__size=_width_and_height(size),
        sample__frames=frames,
    )
    loras: dict[str | None, Path] = dict(map(_expert_and_file, expert_lora or ()))
    if lora is not None:
        loras[None] = lora
    folder = out or _new_folder(run_config.train.output / "samples")
    with watching() as observer:
        # After what needs none of them; a Ctrl-C is heard meanwhile
        with importing():
            from tworeel.training.sample import sample as render

        sheet = render(run_config, folder=folder, loras=loras, single_expert=single_expert, observer=observer)
    say(f"Contact sheet: {sheet.path}")
    say(f"  {len(sheet.takes)} {'picture' if len(sheet.takes) == 1 else 'pictures'} beside it")


def _width_and_height(text: str | None) -> list[int] | None:
    if text is None:
        return None
    numbers = re.fullmatch(r"(\d+)x(\d+)", text.lower())
    if numbers is None:
        raise UserError(f"--size {text}: must be width x height, for example 832x480")
    return [int(number) for number in numbers.groups()]


def _expert_and_file(text: str) -> tuple[str, Path]:
    expert, equals, file = text.partition("=")
    if not equals or not file:
        raise UserError(f"--expert-lora {text}: must be EXPERT=FILE, for example high=lora.safetensors")
    return expert, Path(file)


def _new_folder(parent: Path) -> Path:
    number = 1
    while (parent / f"sample-{number}").exists():
        number += 1
    return parent / f"sample-{number}"
