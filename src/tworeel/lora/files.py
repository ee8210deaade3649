"""LoRA files on disk."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save

from tworeel.errors import UserError
from tworeel.files import write_bytes_atomic
from tworeel.lora.formats import FORMS, Form, from_tensors, to_tensors
from tworeel.lora.naming import Naming
from tworeel.lora.scaling import ADAPTER_CONFIG
from tworeel.lora.tensors import LoraFile, LoraTensors
from tworeel.weights.tensor_files import TensorFiles

_PEFT_CONFIG = "adapter_config.json"


def form_named(name: str) -> Form:
    """Return the form of this name.

    Raises:
        UserError: there is none.
    """
    if name not in FORMS:
        raise UserError(f"there is no LoRA form '{name}'; allowed are {', '.join(FORMS)}")
    return FORMS[name]


def save_lora(
    path: Path,
    lora: LoraFile,
    form: str,
    naming: Naming,
    *,
    metadata: Mapping[str, str] | None = None,
    dtype: torch.dtype | None = None,
) -> None:
    """Write a LoRA as a `.safetensors` file that is either whole or not there.

    Args:
        path: the file; an older one is replaced.
        lora: what to write.
        form: `comfyui`, `diffusers`, `diffsynth` or `kohya`.
        naming: how the family's layers are called.
        metadata: entries of the header besides those of `lora`.
        dtype: dtype of the weights (never of alpha); theirs by default.

    Raises:
        UserError: there is no such form, or it cannot hold the LoRA.
        OSError: the folder is missing or not writable, or the disk is full.
    """
    described = replace(lora, metadata={**lora.metadata, **(metadata or {})})
    tensors, header = to_tensors(cast(described, dtype) if dtype else described, form_named(form), naming)
    # Files of shared or strided tensors are refused by safetensors.
    owned = {key: tensor.detach().to("cpu", copy=True).contiguous() for key, tensor in tensors.items()}
    # In one piece, since safetensors' own writing reports a full disk as something else than an OSError.
    write_bytes_atomic(path, save(owned, metadata=header or None))


def cast(lora: LoraFile, dtype: torch.dtype) -> LoraFile:
    """Return the LoRA with its weights in another dtype; alpha stays."""
    return replace(lora, modules={name: _cast(part, dtype) for name, part in lora.modules.items()})


def _cast(part: LoraTensors, dtype: torch.dtype) -> LoraTensors:
    magnitude = None if part.magnitude is None else part.magnitude.to(dtype)
    return replace(part, down=part.down.to(dtype), up=part.up.to(dtype), magnitude=magnitude)


def load_lora(path: Path, naming: Naming) -> LoraFile:
    """Read a LoRA file in whatever form it has.

    Raises:
        UserError: the file is missing, cut off, not a `.safetensors` file, or not a LoRA of this family.
    """
    if path.suffix != ".safetensors":
        raise UserError(f"{path}: a LoRA must be a .safetensors file")
    with TensorFiles(path) as files:
        tensors = {name: files.read(name) for name in files.names}
        metadata = dict(files.metadata)
    config = path.with_name(_PEFT_CONFIG)
    if config.is_file() and all(key.startswith("base_model.model.") for key in tensors):
        # peft keeps alpha in a file of its own.
        metadata.setdefault(ADAPTER_CONFIG, config.read_text(encoding="utf-8"))
    try:
        return from_tensors(tensors, metadata, naming)
    except UserError as error:
        raise UserError(*(f"{path}: {problem}" for problem in error.problems)) from None


def describe_run(
    *,
    version: str,
    model: str,
    expert: str | None,
    rank: int,
    alpha: float,
    precision: str,
    steps: int,
    dataset: str,
) -> dict[str, str]:
    """Say in a LoRA file's metadata where it comes from; `ss_` keys are those that other tools show.

    Args:
        version: of Tworeel.
        model: variant of the base model, for example `wan2.2-t2v-a14b`.
        expert: `high`, `low` or None.
        rank: of the update.
        alpha: of the update, as configured.
        precision: of the base model during the training.
        steps: optimizer steps done.
        dataset: one line on the clips.
    """
    described = {
        "format": "pt",
        "tworeel.version": version,
        "tworeel.model": model,
        "tworeel.expert": expert or "",
        "tworeel.rank": str(rank),
        "tworeel.alpha": f"{alpha:g}",
        "tworeel.precision": precision,
        "tworeel.steps": str(steps),
        "tworeel.dataset": dataset,
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(rank),
        "ss_network_alpha": f"{alpha:g}",
        "ss_base_model_version": model,
        "ss_steps": str(steps),
    }
    return {key: value for key, value in described.items() if value}
