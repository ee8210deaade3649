"""One reader and one writer for LoRA files of all forms.

The reader takes every spelling it meets: with or without `diffusion_model.`, `transformer.` and the like,
`lora_A` or `lora_down`, with an adapter's name (`.default.`) or without.

What others make of Wan's files (diffusers 0.42.1, ComfyUI 0.3.77):
- diffusers loads `comfyui` and `diffusers` with any layers of the blocks, layers outside the blocks from
  `diffusers` alone, `kohya` only if it covers all layers of all blocks, `diffsynth` not at all.
- DoRA: diffusers takes it from `diffusers` alone. ComfyUI divides `dora_scale` by the row lengths of W, peft
  and LyCORIS by those of W + sBA: there a row comes out longer or shorter by the ratio of the two.

Where the authors' code fuses query, key and value (FLUX.2, diffusers 0.42.1, ComfyUI of 2026):
- diffusers loads `diffusers` and `kohya` with any layers of the blocks, `comfyui` only without alpha (else it
  raises), `diffsynth` not at all (it changes nothing). DoRA from `diffusers` alone.
- ComfyUI knows the keys of all four, but not the alpha in the header of `diffusers`; its first versions for
  FLUX.2 know only `comfyui` and `kohya`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor

from tworeel.errors import UserError, raise_if_any
from tworeel.lora.forms import FORMS, Form, FormName
from tworeel.lora.fusing import FUSED_NOTE, fuse, split
from tworeel.lora.naming import Naming
from tworeel.lora.scaling import (
    ADAPTER_CONFIG,
    ALPHA_NOTE,
    KEPT_CONFIG,
    alpha_note,
    apply_note,
    as_stored,
    config_for,
    with_config,
)
from tworeel.lora.tensors import LoraFile, LoraTensors

_KOHYA = FORMS["kohya"].prefix
_JOINED = ("lora_transformer_", "lycoris_")
"""OneTrainer's and LyCORIS' prefixes: diffusers' names follow, with underscores. Read, not written."""
_PREFIXES = ("base_model.model.", "model.diffusion_model.", "diffusion_model.", "transformer.", "model.")
_KEY = re.compile(
    r"(?P<stem>.+?)\."
    r"(?:(?P<down>lora_A|lora_down)|(?P<up>lora_B|lora_up)"
    r"|(?P<magnitude>dora_scale|lora_magnitude_vector)|(?P<alpha>alpha))"
    r"(?:\.(?!weight$|bias$)\w+)?(?:\.weight)?"
)
_EXAMPLE = "diffusion_model.blocks.0.self_attn.q.lora_A.weight"
_LISTED = 5


def to_tensors(lora: LoraFile, form: Form, naming: Naming) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Spell a LoRA in a form: tensors by key, and the file's metadata.

    Raises:
        UserError: the LoRA has DoRA magnitudes and the form has no place for them, or layers that it has no
            names for, or layers that are one in this form have different scales.
    """
    if form.magnitude is None and any(part.magnitude is not None for part in lora.modules.values()):
        able = ", ".join(other.name for other in FORMS.values() if other.magnitude)
        raise UserError(f"the form '{form.name}' cannot hold DoRA's magnitudes; allowed are {able}")
    if not form.is_native(naming) and (nameless := naming.without_own(lora.modules)):
        able = ", ".join(other.name for other in FORMS.values() if other.is_native(naming))
        raise UserError(f"the form '{form.name}' has no names for {_some(nameless)}; allowed are {able}")
    stored = {name: as_stored(part, form.alpha) for name, part in lora.modules.items()}
    layers, shown, note = stored, stored, None
    if form.is_native(naming):
        fused = fuse(stored, naming)
        layers, note = dict(fused.layers), fused.note
        shown = split(layers, naming, note)
    tensors: dict[str, Tensor] = {}
    for name, part in layers.items():
        tensors.update(_keyed(part, form, form.spelled(name)))
    notes = {FUSED_NOTE: note} if note is not None else {}
    return tensors, _metadata(lora, form, stored, shown) | notes


def _keyed(part: LoraTensors, form: Form, stem: str) -> Iterator[tuple[str, Tensor]]:
    yield stem + form.down, part.down
    yield stem + form.up, part.up
    if part.alpha is not None:
        yield stem + ".alpha", part.alpha
    if part.magnitude is not None and form.magnitude is not None:
        shape = (-1, 1) if form.magnitude_dims == 2 else (-1,)
        yield stem + form.magnitude, part.magnitude.reshape(shape)


def _metadata(
    lora: LoraFile, form: Form, stored: Mapping[str, LoraTensors], shown: Mapping[str, LoraTensors]
) -> dict[str, str]:
    """Describe what the tensors alone do not say.

    Args:
        stored: what the file holds, by diffusers' layers.
        shown: what a reader makes of it.
    """
    metadata = dict(lora.metadata)
    seen = shown
    if form.alpha == "header":
        config = config_for(lora.modules, metadata.pop(KEPT_CONFIG, None))
        if config is not None:
            metadata[ADAPTER_CONFIG] = config
            seen = with_config(stored, config)
    note = alpha_note(lora.modules, stored, {name: part.alpha for name, part in seen.items()})
    if note is not None:
        metadata[ALPHA_NOTE] = note
    return metadata


def num_strangers(keys: Iterable[str], naming: Naming) -> int:
    """Count a LoRA's layers that are none of a family's."""
    matches = (_KEY.fullmatch(key) for key in keys)
    return len(naming.unknown({_bare(match["stem"], naming) for match in matches if match}))


def from_tensors(tensors: Mapping[str, Tensor], metadata: Mapping[str, str], naming: Naming) -> LoraFile:
    """Recognize the form of a LoRA by its keys and read it.

    Raises:
        UserError: the keys are not those of a LoRA of this family, parts are missing or shapes do not fit.
    """
    parts, problems = _sorted(tensors, naming)
    raise_if_any(problems)
    strangers = naming.unknown(parts)
    if strangers:
        of = f"of {naming.family}" if naming.family else "of the model"
        raise UserError(f"a LoRA of another model: these are no layers {of}: {_some(strangers)}")
    native = naming.is_native(parts)
    raise_if_any(_mixture(parts, naming, native=native))
    labels = {name: naming.label(name) if native else name for name in parts}
    raise_if_any(problem for name, found in parts.items() for problem in _misfits(labels[name], found))
    layers = {name: _assembled(found) for name, found in parts.items()}
    known = dict(metadata)
    note = known.pop(FUSED_NOTE, None)
    modules = split(layers, naming, note) if native else layers
    return _interpreted(modules, known, _recognized(tensors, naming, native=native))


def _mixture(names: Iterable[str], naming: Naming, *, native: bool) -> Iterator[str]:
    strangers = [] if native else [name for name in names if naming.is_only_native(name)]
    if strangers:
        yield f"layers are spelled in two ways; these as in the authors' code: {_some(strangers)}"


def _sorted(tensors: Mapping[str, Tensor], naming: Naming) -> tuple[dict[str, dict[str, Tensor]], list[str]]:
    """Group the tensors by layer (dotted, without prefix) and role; list what is no part of a LoRA."""
    parts: dict[str, dict[str, Tensor]] = {}
    unknown, twice = [], []
    for key, tensor in tensors.items():
        match = _KEY.fullmatch(key)
        if match is None:
            unknown.append(key)
            continue
        role = next(role for role in ("down", "up", "magnitude", "alpha") if match[role])
        found = parts.setdefault(_bare(match["stem"], naming), {})
        twice += [key] if role in found else []
        found[role] = tensor
    if not parts:
        return parts, [f"not a LoRA: it has no keys like '{_EXAMPLE}'; found are {_some(unknown)}"]
    problems = [f"keys that are no part of a LoRA of linear layers: {_some(unknown)}"] if unknown else []
    problems += [f"keys that say the same twice: {_some(twice)}"] if twice else []
    return parts, problems


def _bare(stem: str, naming: Naming) -> str:
    if stem.startswith(_KOHYA):
        return naming.dotted(stem.removeprefix(_KOHYA))
    joined = next((prefix for prefix in _JOINED if stem.startswith(prefix)), None)
    if joined is not None:
        return naming.own_dotted(stem.removeprefix(joined))
    while prefix := next((prefix for prefix in _PREFIXES if stem.startswith(prefix)), ""):
        stem = stem.removeprefix(prefix)
    return stem


def _some(keys: list[str]) -> str:
    more = f" and {len(keys) - _LISTED} more" if len(keys) > _LISTED else ""
    return ", ".join(f"'{key}'" for key in keys[:_LISTED]) + more if keys else "none"


def _misfits(name: str, found: Mapping[str, Tensor]) -> Iterator[str]:
    missing = [role for role in ("down", "up") if role not in found]
    if missing:
        words = {"down": "A (lora_down)", "up": "B (lora_up)"}
        yield f"{name}: {' and '.join(words[role] for role in missing)} missing"
        return
    down, up = found["down"], found["up"]
    if down.ndim != 2 or up.ndim != 2 or down.shape[0] != up.shape[1] or down.shape[0] == 0:
        yield f"{name}: A {tuple(down.shape)} and B {tuple(up.shape)} do not fit a linear layer"
        return
    alpha, magnitude = found.get("alpha"), found.get("magnitude")
    if alpha is not None and (alpha.numel() != 1 or not torch.isfinite(alpha).all() or float(alpha) <= 0):
        yield f"{name}: alpha must be one number above 0, found {alpha.tolist()}"
    if magnitude is not None and tuple(magnitude.shape) not in {(up.shape[0],), (up.shape[0], 1)}:
        yield f"{name}: DoRA's magnitude has shape {tuple(magnitude.shape)}, needed is ({up.shape[0]}, 1)"


def _assembled(found: Mapping[str, Tensor]) -> LoraTensors:
    magnitude = found.get("magnitude")
    return LoraTensors(
        down=found["down"],
        up=found["up"],
        alpha=found.get("alpha"),
        magnitude=None if magnitude is None else magnitude.reshape(-1),
    )


def _recognized(tensors: Mapping[str, Tensor], naming: Naming, *, native: bool) -> FormName:
    keys = list(tensors)
    if any(key.startswith(_KOHYA) for key in keys):
        return "kohya"
    bare = not any(key.startswith((*_PREFIXES, *_JOINED)) for key in keys)
    if native:
        return "diffsynth" if bare else "comfyui"
    # Where DiffSynth has diffusers' names too, only the adapter's name tells its files.
    of_diffsynth = bare and naming.diffsynth_names == "diffusers" and any(".default." in key for key in keys)
    return "diffsynth" if of_diffsynth else "diffusers"


def _interpreted(modules: dict[str, LoraTensors], metadata: dict[str, str], form: FormName) -> LoraFile:
    """Take from the metadata what it says of alpha; keep there what another form could not say."""
    note = metadata.pop(ALPHA_NOTE, None)
    config = metadata.pop(ADAPTER_CONFIG, None) if form == "diffusers" else None
    if config is not None:
        modules = with_config(modules, config)
    if note is not None:
        modules = apply_note(note, modules)
    if config is not None and config != config_for(modules, None):
        metadata[KEPT_CONFIG] = config
    return LoraFile(modules=modules, metadata=metadata, form=form)
