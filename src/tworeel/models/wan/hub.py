"""Wan models by hub id: which of their files are needed."""

from __future__ import annotations

import re
from collections.abc import Sequence

from tworeel.errors import UserError
from tworeel.models.family import ModelRequest
from tworeel.models.hub import read_config, under

_PIPELINES = ("WanPipeline", "WanImageToVideoPipeline", "WanVideoToVideoPipeline")
_MODEL_TYPES = ("t2v", "i2v", "flf2v", "ti2v")
_EXPERT_FOLDERS = {"high": "high_noise_model", "low": "low_noise_model"}
_DIFFUSERS_FOLDERS = {"high": "transformer", "low": "transformer_2"}
_NATIVE_ROOT = re.compile(
    r"config\.json|diffusion_pytorch_model.*|models_t5_.*\.pth|models_clip_.*\.pth|.*VAE\.pth"
)


def choose(request: ModelRequest, names: Sequence[str]) -> list[str] | None:
    """Choose what training this expert needs of a repository on the hub; None if it is no Wan model.

    Raises:
        UserError: the expert is missing or wrong, or the kind is not supported.
    """
    needed = needed_files(names, request)
    return needed if needed is not None and _is_supported(request.path, names) else None


def needed_files(names: Sequence[str], request: ModelRequest) -> list[str] | None:
    """Choose from a repository's files what one expert and its encoders need; None if no layout is known.

    Raises:
        UserError: the repository has two experts and none was chosen, or has none and one was.
    """
    if "model_index.json" in names:
        return _diffusers_files(names, request)
    if any(name.startswith("models_t5_") for name in names):
        return _native_files(names, request)
    return None


def _diffusers_files(names: Sequence[str], request: ModelRequest) -> list[str]:
    has_experts = any(name.startswith("transformer_2/") for name in names)
    expert = _checked_expert(request, has_experts)
    networks = ("vae", "text_encoder", "tokenizer", "image_encoder")
    not_given = [option for option in networks if getattr(request, option) is None]
    folders = [_DIFFUSERS_FOLDERS[expert or "high"], *not_given]
    return ["model_index.json", *under(names, folders)]


def _native_files(names: Sequence[str], request: ModelRequest) -> list[str]:
    has_experts = any(name.startswith("high_noise_model/") for name in names)
    expert = _checked_expert(request, has_experts)
    folders = ["google/umt5-xxl"] if not request.tokenizer else []
    folders += [_EXPERT_FOLDERS[expert]] if expert else []
    given = {"models_t5_": request.text_encoder, "models_clip_": request.image_encoder, "Wan": request.vae}
    left_out = tuple(start for start, option in given.items() if option)
    root = [name for name in names if _NATIVE_ROOT.fullmatch(name) and not name.startswith(left_out)]
    return [*root, *under(names, folders)]


def _checked_expert(request: ModelRequest, has_experts: bool) -> str | None:
    if has_experts and request.expert is None:
        raise UserError(f"model.expert: {request.path} has two experts; set it to 'high' or 'low'")
    if not has_experts and request.expert is not None:
        raise UserError(f"model.expert = '{request.expert}': {request.path} has no experts; leave it out")
    return request.expert


def _is_supported(repository: str, names: Sequence[str]) -> bool:
    """Look at the small files first, rather than after a download of many gigabytes.

    Raises:
        UserError: it is a Wan model of a kind that is not supported yet.
    """
    describing = ("model_index.json", "high_noise_model/config.json", "config.json")
    name = next((name for name in describing if name in names), None)
    if name is None:
        return True
    config = read_config(repository, name)
    class_name = str(config.get("_class_name", ""))
    is_pipeline = name == "model_index.json"
    kind = class_name if is_pipeline else str(config.get("model_type", ""))
    supported = _PIPELINES if is_pipeline else _MODEL_TYPES
    if kind not in supported and class_name.startswith("Wan"):
        raise UserError(f"{repository}: '{kind}' is not supported yet; supported are {', '.join(supported)}")
    return kind in supported
