"""Find out which family a model belongs to, by looking at its files."""

from __future__ import annotations

from pathlib import Path

from tworeel.errors import UserError
from tworeel.models.family import Family, ModelRequest, ModelSource
from tworeel.models.registry import FAMILIES


def locate_model(request: ModelRequest) -> tuple[Family, ModelSource]:
    """Ask each family for the model; the first that recognizes it has it.

    Raises:
        UserError: no family recognizes it, or the family that does lists what is wrong with it.
    """
    for family in FAMILIES.values():
        source = family.locate(request)
        if source is not None:
            return family, source
    if Path(request.path).suffix.lower() == ".gguf":
        raise UserError(
            f"model.path = '{request.path}': GGUF files are not read; allowed: .safetensors of the model, in "
            "bf16 or fp8, which are quantized while they are loaded (model.quantize)"
        )
    known = ", ".join(FAMILIES)
    raise UserError(f"model.path = '{request.path}': not a model of a known family ({known})")
