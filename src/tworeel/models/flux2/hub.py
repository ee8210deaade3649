"""FLUX.2 models by hub id: which of their files are needed."""

from __future__ import annotations

from collections.abc import Sequence

from tworeel.models.family import ModelRequest
from tworeel.models.flux2.variants import refuse_pipeline
from tworeel.models.hub import read_config, under

_INDEX = "model_index.json"


def choose(request: ModelRequest, names: Sequence[str]) -> list[str] | None:
    """Choose what training needs of a repository on the hub; None if it is no FLUX model.

    Raises:
        UserError: it is a FLUX model of a kind that is not supported.
    """
    if _INDEX not in names:
        return None
    class_name = str(read_config(request.path, _INDEX).get("_class_name", ""))
    if not class_name.startswith("Flux"):
        return None
    refuse_pipeline(request.path, class_name)
    return needed_files(names, request)


def needed_files(names: Sequence[str], request: ModelRequest) -> list[str]:
    """Leave out what the request has elsewhere, and the authors' own copy of the same weights."""
    networks = ("vae", "text_encoder", "tokenizer")
    not_given = [option for option in networks if getattr(request, option) is None]
    return [_INDEX, *under(names, ["transformer", *not_given])]
