"""Where the forms keep alpha, so that every form has the right scale and every conversion can be undone.

- comfyui, kohya: a tensor beside the weights.
- diffusers: no such tensor is allowed; peft's configuration stands as JSON in the file's metadata.
- diffsynth: B is multiplied by alpha / rank where that can be undone without a rounding (a power of two,
  nothing underflows). Elsewhere B stays as it is beside an alpha tensor, which DiffSynth applies on loading
  ("deprecated but retained" in its loader; versions that ignore it would apply a wrong scale).

What a form cannot say (alpha's dtype and shape, that there was none, that B was multiplied) goes into the
metadata under `tworeel.alpha_note`, which is written only if something would be lost without it.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor

from tworeel.errors import UserError
from tworeel.lora.tensors import LoraTensors

AlphaPlace = Literal["tensor", "always", "header", "folded"]
"""`always`: a tensor even where there was none, for readers that insist on it."""

ALPHA_NOTE = "tworeel.alpha_note"
ADAPTER_CONFIG = "lora_adapter_metadata"
KEPT_CONFIG = "tworeel.lora_adapter_metadata"
"""diffusers applies its key in files of every form, on top of alpha tensors: elsewhere it needs this name."""

_PREFIX = "transformer."
_DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32)
}


def as_stored(part: LoraTensors, place: AlphaPlace) -> LoraTensors:
    """Return the tensors as a file holds them that keeps alpha in `place`."""
    if place == "header":
        return replace(part, alpha=None)
    if place == "always" and part.alpha is None:
        return replace(part, alpha=torch.tensor(float(part.rank)))
    return _folded(part) if place == "folded" else part


def _folded(part: LoraTensors) -> LoraTensors:
    if part.scale == 1.0:
        return replace(part, alpha=None)
    if math.frexp(part.scale)[0] != 0.5:  # not a power of two: B would be rounded
        return part
    up = part.up * part.scale
    return replace(part, up=up, alpha=None) if same_bits(up / part.scale, part.up) else part


def same_bits(left: Tensor, right: Tensor) -> bool:
    """Tell whether two tensors are the same to the bit (0.0 and -0.0 are not)."""
    if left.shape != right.shape or left.dtype != right.dtype:
        return False
    pair = [tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in (left, right)]
    return torch.equal(*pair)


def alpha_note(
    modules: Mapping[str, LoraTensors],
    stored: Mapping[str, LoraTensors],
    visible: Mapping[str, Tensor | None],
) -> str | None:
    """Describe what a reader of `stored` would not know of `modules`; None if it would know all.

    Args:
        modules: the original.
        stored: what the file holds.
        visible: alpha as the file shows it.
    """
    groups: dict[tuple[str, bool], list[str]] = {}
    for name, part in sorted(modules.items()):  # files have an order of their own
        folded = stored[name].up is not part.up
        if folded or _spec(visible[name]) != _spec(part.alpha):
            groups.setdefault((json.dumps(_spec(part.alpha)), folded), []).append(name)
    described = [
        {"alpha": json.loads(spec), "folded": folded, "modules": names if len(names) < len(modules) else None}
        for (spec, folded), names in sorted(groups.items())
    ]
    return json.dumps(described) if described else None


def _spec(alpha: Tensor | None) -> list[Any] | None:
    if alpha is None:
        return None
    return [float(alpha), str(alpha.dtype).removeprefix("torch."), list(alpha.shape)]


def apply_note(text: str, modules: Mapping[str, LoraTensors]) -> dict[str, LoraTensors]:
    """Restore what `alpha_note` described.

    Raises:
        UserError: the note is damaged.
    """
    restored = dict(modules)
    try:
        for group in json.loads(text):
            alpha = _alpha_of(group["alpha"])
            for name in group["modules"] or modules:
                restored[name] = _restored(restored[name], alpha, folded=group["folded"])
    except (ValueError, TypeError, KeyError, RuntimeError):
        raise UserError(f"the metadata entry '{ALPHA_NOTE}' is damaged") from None
    return restored


def _alpha_of(spec: list[Any] | None) -> Tensor | None:
    if spec is None:
        return None
    value, dtype, shape = spec
    return torch.tensor(value, dtype=_DTYPES[dtype]).reshape(shape)


def _restored(part: LoraTensors, alpha: Tensor | None, *, folded: bool) -> LoraTensors:
    known = replace(part, alpha=alpha)
    if folded:
        return replace(known, up=part.up / known.scale)
    # Another tool may have changed alpha and carried the metadata along: then the note is void.
    return known if _close(known.alpha_value, part.alpha_value) else part


def _close(left: float, right: float) -> bool:
    return math.isclose(left, right, rel_tol=1e-6)


def with_config(modules: Mapping[str, LoraTensors], text: str) -> dict[str, LoraTensors]:
    """Add to the parts that have no alpha what peft's configuration says of it.

    Args:
        modules: tensors by diffusers' names.
        text: the JSON of `lora_adapter_metadata`, or of peft's `adapter_config.json`.

    Raises:
        UserError: it is not JSON of that kind.
    """
    config = _parse_config(text)
    try:
        return {
            name: part
            if part.alpha is not None
            else replace(part, alpha=_config_alpha(config, name, part.rank))
            for name, part in modules.items()
        }
    except (TypeError, ValueError, AttributeError, re.error):
        raise UserError(f"the adapter's configuration ('{ADAPTER_CONFIG}') is damaged") from None


def _parse_config(text: str) -> dict[str, Any]:
    try:
        config = {key.removeprefix(_PREFIX): value for key, value in json.loads(text).items()}
    except (ValueError, AttributeError):
        raise UserError(f"the adapter's configuration ('{ADAPTER_CONFIG}') is not JSON") from None
    return config


def _config_alpha(config: Mapping[str, Any], name: str, rank: int) -> Tensor | None:
    if "lora_alpha" not in config:
        return None
    patterns = config.get("alpha_pattern") or {}
    # peft's own rule for its patterns.
    matches = (value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", name))
    alpha = float(next(matches, config["lora_alpha"]))
    return torch.tensor(alpha * math.sqrt(rank) if config.get("use_rslora") else alpha)


def config_for(modules: Mapping[str, LoraTensors], kept: str | None) -> str | None:
    """Write the JSON that diffusers needs for the right scale, as `kept` if that still says the same.

    Returns None if no part has an alpha: the scale is 1 then, for diffusers too.
    """
    if kept is not None and _says_alphas(kept, modules):
        return kept
    if all(part.alpha is None for part in modules.values()):
        return None
    ranks = {name: part.rank for name, part in modules.items()}
    alphas = {name: _number(part.alpha_value) for name, part in modules.items()}
    rank, alpha = _most_common(ranks), _most_common(alphas)
    config = {
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {f"^{name}": value for name, value in ranks.items() if value != rank},
        "alpha_pattern": {f"^{name}": value for name, value in alphas.items() if value != alpha},
        "target_modules": sorted(modules),
        "use_dora": any(part.magnitude is not None for part in modules.values()),
        "lora_bias": False,
    }
    return json.dumps({_PREFIX + key: value for key, value in config.items()}, indent=2, sort_keys=True)


def _says_alphas(config: str, modules: Mapping[str, LoraTensors]) -> bool:
    said = with_config({name: replace(part, alpha=None) for name, part in modules.items()}, config)
    return all(_close(said[name].alpha_value, part.alpha_value) for name, part in modules.items())


def _most_common(values: Mapping[str, Any]) -> Any:
    counts = Counter(values.values())
    return max(counts, key=lambda value: (counts[value], value))


def _number(value: float) -> int | float:
    return int(value) if value.is_integer() else value
