"""`tworeel convert`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tworeel.cli.importing import importing
from tworeel.errors import UserError, collected, did_you_mean, raise_if_any
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
    with importing():
        from tworeel.lora.convert import convert_lora, family_of
        from tworeel.lora.files import form_named
        from tworeel.lora.naming import Naming
        from tworeel.models.registry import FAMILIES

    problems: list[str] = []
    if family is not None and family not in FAMILIES:
        known = f"{did_you_mean(family, FAMILIES)}; allowed: {', '.join(FAMILIES)}"
        problems.append(f"--family {family}: unknown family{known}")
    with collected(problems):
        form_named(to)
    if target.suffix != ".safetensors":
        problems.append(f"{target}: must end in .safetensors, as LoRA files do")
    elif target.exists():
        problems.append(f"{target}: exists already; remove it or choose another name")
    raise_if_any(problems)
    try:
        namings = {name: Naming.of(known) for name, known in FAMILIES.items()}
        target.parent.mkdir(parents=True, exist_ok=True)
        summary = convert_lora(source, target, to, namings[family or family_of(source, namings)])
    except OSError as error:
        raise UserError(f"{target}: cannot be written: {error.strerror or error}") from error
    ranks = ", ".join(map(str, summary.ranks))
    say(f"{source} ({summary.source_form}) -> {target} ({summary.target_form})")
    say(f"{summary.layers} layers, rank {ranks}{', DoRA' if summary.dora else ''}")
