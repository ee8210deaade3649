"""Recognize a Wan model by looking at it, whichever way its files are laid out."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from tworeel.errors import UserError, raise_if_any
from tworeel.models.family import Component, ModelRequest, ModelSource
from tworeel.models.hub import local_path
from tworeel.models.wan import hub
from tworeel.models.wan.companions import damaged_companions, find_companions
from tworeel.models.wan.folders import Candidate, Found, find_transformers, says_2_1, shapes_of
from tworeel.models.wan.variants import (
    EXPERTS,
    SMALL_WIDTH,
    Shapes,
    is_wan,
    takes_expert,
    traits,
    transformer_config,
    unsupported_kind,
    variant_name,
)
from tworeel.weights.tensor_files import TensorFiles


def locate(request: ModelRequest) -> ModelSource | None:
    """Find a Wan model's files; only headers and configs are read. None if nothing there says Wan.

    `request.path` may be a hub id, a folder or a file inside it, in diffusers' layout, Wan's own or ComfyUI's
    (a transformer file; the encoders lie beside it or in ComfyUI's sibling folders). What the request says of
    the encoders wins over what lies near.

    Raises:
        UserError: every problem found: a path that is neither there nor on the hub, a damaged file, an expert
            that is missing, unknown or not asked for, an encoder that is missing, a kind of Wan model that is
            not supported yet.
    """
    path = local_path(request, partial(hub.choose, request))
    found = find_transformers(path) if path is not None else None
    if found is None:
        return None
    chosen, problems = _choose(found, request.expert)
    # Without a choice any candidate tells the variant, and so what else is missing.
    candidate = chosen or found.candidates[0]
    try:
        with TensorFiles(*candidate.files) as files:
            shapes = shapes_of(files, candidate.layout)
    except UserError as error:
        damage = dict.fromkeys((*error.problems, *damaged_companions(request, found.root)))
        raise UserError(*damage) from None
    if not is_wan(shapes):
        return None
    _refuse_unsupported(candidate, shapes)
    variant, expert = _variant_and_expert(candidate, shapes, request.expert)
    if chosen is not None:
        problems += _expert_problems(candidate, variant, expert, request.expert)
    companions = find_companions(request, found.root, variant)
    raise_if_any([*problems, *companions.problems])
    config = transformer_config(shapes, candidate.config)
    return ModelSource(
        traits=traits(variant, expert),
        transformer=Component(files=candidate.files, layout=candidate.layout, config=config),
        vae=companions.vae,
        text_encoder=companions.text_encoder,
        tokenizer=companions.tokenizer,
        image_encoder=companions.image_encoder,
    )


def _choose(found: Found, wanted: str | None) -> tuple[Candidate | None, list[str]]:
    """Choose the transformer to train; None and the problem if the request does not say which."""
    if wanted is not None and found.pointed is not None and wanted != found.pointed:
        files = found.candidates[0].files[0]
        return None, [
            f"model.expert = '{wanted}', but model.path points at the {found.pointed} one ({files})"
        ]
    expert = wanted or found.pointed
    with_expert = [candidate for candidate in found.candidates if candidate.expert is not None]
    fitting = [candidate for candidate in found.candidates if expert in (None, candidate.expert)]
    if expert is not None and not with_expert:
        fitting = list(found.candidates)  # names say nothing: the request does
    if len(fitting) == 1:
        return fitting[0], []
    return None, [_no_choice(fitting, with_expert, expert)]


def _no_choice(fitting: Sequence[Candidate], with_expert: Sequence[Candidate], expert: str | None) -> str:
    if not fitting:
        there = ", ".join(f"{candidate.expert} ({candidate.files[0]})" for candidate in with_expert)
        return f"model.expert = '{expert}': that expert is missing; there is {there}"
    if {candidate.expert for candidate in fitting} == set(EXPERTS) and len(fitting) == len(EXPERTS):
        return "model.expert: this model has two experts; set it to 'high' or 'low'"
    names = ", ".join(candidate.files[0].name for candidate in fitting)
    return f"model.path: several transformers fit ({names}); give the path of one file"


def _refuse_unsupported(candidate: Candidate, shapes: Shapes) -> None:
    kind = unsupported_kind(shapes)
    if kind is not None:
        raise UserError(
            f"{candidate.files[0]}: a Wan {kind} model, which is not supported yet; "
            "supported are T2V, I2V and FLF2V of Wan 2.1 and T2V, I2V and TI2V of Wan 2.2"
        )


def _variant_and_expert(candidate: Candidate, shapes: Shapes, wanted: str | None) -> tuple[str, str | None]:
    """Tell the variant. The files' own evidence of experts counts; a request's only where it can be true."""
    may_have_experts = (
        candidate.layout != "diffusers"
        and not says_2_1(candidate.files[0])
        and shapes["patch_embedding.weight"][0] > SMALL_WIDTH
    )
    expert = candidate.expert or (wanted if may_have_experts else None)
    variant = variant_name(shapes, has_experts=expert is not None)
    if not takes_expert(variant):
        return variant, None
    return variant, candidate.expert or wanted


def _expert_problems(candidate: Candidate, variant: str, expert: str | None, wanted: str | None) -> list[str]:
    if takes_expert(variant) and expert is None:
        name = candidate.files[0]
        return [f"model.expert: {name} is one of two experts; set it to 'high' or 'low', whichever it is"]
    if wanted is not None and not takes_expert(variant):
        return [f"model.expert = '{wanted}': {variant} has no experts; leave it out"]
    return []
