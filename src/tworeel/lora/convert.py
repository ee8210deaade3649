"""Rewrite a LoRA file in another form; converting back restores every tensor to the bit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from tworeel.lora.files import form_named, load_lora, save_lora
from tworeel.lora.formats import num_strangers
from tworeel.lora.naming import Naming
from tworeel.weights.tensor_files import TensorFiles


@dataclass(frozen=True, kw_only=True)
class Summary:
    """What a conversion found."""

    source_form: str
    target_form: str
    layers: int
    ranks: tuple[int, ...]
    """The ranks that occur, ascending."""
    alphas: tuple[float, ...]
    """The alphas that occur, ascending; the rank where the file has none."""
    dora: bool


def family_of(source: Path, namings: Mapping[str, Naming]) -> str:
    """Tell by its keys which family a LoRA file is for; if for none, the nearest one.

    Args:
        source: the file.
        namings: by family.

    Raises:
        UserError: the file cannot be read.
    """
    with TensorFiles(source) as files:
        return min(namings, key=lambda family: num_strangers(files.names, namings[family]))


def convert_lora(source: Path, target: Path, to: str, naming: Naming) -> Summary:
    """Read a LoRA file in whatever form it has and write it in the form `to`.

    No value and no dtype changes, except that `diffsynth` multiplies B by a power of two where alpha is not
    the rank. Metadata is carried along. Spellings that no form of ours uses (`lora_down` under
    `diffusion_model.`) come back in the form's own spelling.

    Raises:
        UserError: the source is not a LoRA of this family, or the form cannot hold it (DoRA in `diffsynth`).
        OSError: the target cannot be written.
    """
    form = form_named(to)
    lora = load_lora(source, naming)
    save_lora(target, lora, form.name, naming)
    assert lora.form is not None, "a file without a form"
    parts = lora.modules.values()
    return Summary(
        source_form=lora.form,
        target_form=form.name,
        layers=len(lora.modules),
        ranks=tuple(sorted({part.rank for part in parts})),
        alphas=tuple(sorted({part.alpha_value for part in parts})),
        dora=any(part.magnitude is not None for part in parts),
    )
