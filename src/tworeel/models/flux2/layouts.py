"""Recognize a FLUX.2 model by looking at it, whichever way its files are laid out."""

from __future__ import annotations

from functools import partial

from tworeel.errors import UserError, raise_if_any
from tworeel.models.family import Component, ModelRequest, ModelSource
from tworeel.models.flux2 import hub
from tworeel.models.flux2.companions import damaged_vae, find_companions
from tworeel.models.flux2.folders import find_transformer, shapes_of
from tworeel.models.flux2.variants import traits, transformer_config, variant_name
from tworeel.models.hub import local_path
from tworeel.weights.tensor_files import TensorFiles


def locate(request: ModelRequest) -> ModelSource | None:
    """Find a FLUX.2 model's files; only headers and configs are read. None if nothing there says FLUX.

    `request.path` may be a hub id, a folder or a file inside it, in diffusers' layout, or one file with the
    authors' names, as they and ComfyUI give it (the encoders lie beside it or in ComfyUI's sibling folders).

    Raises:
        UserError: every problem found: a path that is neither there nor on the hub, a licence that was not
            accepted, a damaged file, an encoder that is missing, a FLUX model that is not supported.
    """
    path = local_path(request, partial(hub.choose, request))
    found = find_transformer(path) if path is not None else None
    if found is None:
        return None
    try:
        with TensorFiles(*found.files) as files:
            shapes = shapes_of(files, found.layout)
    except UserError as error:
        raise UserError(*error.problems, *damaged_vae(request, found.root)) from None
    variant = variant_name(shapes, is_base=found.is_base)
    problems = []
    if request.expert is not None:
        problems.append(f"model.expert = '{request.expert}': {variant} has no experts; leave it out")
    config = transformer_config(shapes, found.config)
    companions = find_companions(request, found.root, variant, config["joint_attention_dim"])
    raise_if_any([*problems, *companions.problems])
    return ModelSource(
        traits=traits(variant),
        transformer=Component(files=found.files, layout=found.layout, config=config),
        vae=companions.vae,
        text_encoder=companions.text_encoder,
        tokenizer=companions.tokenizer,
    )
