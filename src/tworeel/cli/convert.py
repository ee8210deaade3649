"""`tworeel convert`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tworeel.errors import UserError, did_you_mean
from tworeel.report.console import say


def convert(
    source: Annotated[Path, typer.Argument(help="LoRA file in any of the forms.")],
    target: Annotated[Path, typer.Argument(help="File to write; it must not exist yet.")],
    to: Annotated[
        str, typer.Option(help="Form to write: comfyui, diffusers, diffsynth or kohya.")
    ] = "comfyui",
    family: Annotated[
        str | None, typer.Option(help="Family of the model that the LoRA is for; its keys tell by default.")
    ] = None,
) -> None:
    """Rewrite a LoRA file for another program.

    The form of the source is recognized; converting back restores every value to the bit.
    """
    from tworeel.lora.convert import convert_lora, family_of
    from tworeel.lora.files import form_named
    from tworeel.lora.naming import Naming
    from tworeel.models.registry import FAMILIES

    if family is not None and family not in FAMILIES:
        known = f"{did_you_mean(family, FAMILIES)}; allowed: {', '.join(FAMILIES)}"
        raise UserError(f"--family {family}: unknown family{known}")
    form_named(to)
    if target.suffix != ".safetensors":
        raise UserError(f"{target}: must end in .safetensors, as LoRA files do")
    if target.exists():
        raise UserError(f"{target}: exists already; remove it or choose another name")
    try:
        namings = {name: Naming.of(known) for name, known in FAMILIES.items()}
        summary = convert_lora(source, target, to, namings[family or family_of(source, namings)])
    except OSError as error:
        raise UserError(f"{target}: cannot be written: {error.strerror or error}") from error
    ranks = ", ".join(map(str, summary.ranks))
    say(f"{source} ({summary.source_form}) -> {target} ({summary.target_form})")
    say(f"{summary.layers} layers, rank {ranks}{', DoRA' if summary.dora else ''}")
