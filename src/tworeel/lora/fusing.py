"""Layers that the authors' code keeps as one (query, key and value), and the LoRA of such a layer.

The parts of a fused layer have an A of their own each, the fused layer has one:

    A = [A_q; A_k; A_v]        B = | B_q         |        of rank r_q + r_k + r_v: exact, without a rounding
                                   |     B_k     |
                                   |         B_v |

Read back, such a B is taken apart again; any other one belongs to parts that share one A. Where that alone
would not restore what was written (a part is missing, ranks differ), a note in the metadata tells the ranks.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tworeel.errors import UserError, raise_if_any
from tworeel.lora.naming import Naming
from tworeel.lora.scaling import same_bits
from tworeel.lora.tensors import LoraTensors

FUSED_NOTE = "tworeel.fused_note"

Ranks = Sequence[int]
"""The rank of each part, 0 for one that is missing; empty where all share one A."""


@dataclass(frozen=True, kw_only=True, eq=False)
class FusedLayers:
    """A LoRA by native layers."""

    layers: Mapping[str, LoraTensors]
    note: str | None
    """What belongs into the metadata under `FUSED_NOTE`."""


def fuse(modules: Mapping[str, LoraTensors], naming: Naming) -> FusedLayers:
    """Join the layers that are one natively.

    Raises:
        UserError: parts of one layer have different scales or dtypes, or only some have DoRA's magnitude.
    """
    native = dict.fromkeys(naming.to_native(name) for name in modules)
    groups = {name: [modules.get(part) for part in naming.parts(name)] for name in native}
    raise_if_any(problem for name, group in groups.items() for problem in _obstacles(name, group))
    layers, ranks = {}, {}
    for name, group in groups.items():
        layers[name], wanted = _fused(group)
        if not _is_read_back(layers[name], group):
            ranks[name] = list(wanted)
        if naming.parts(name)[0] in naming.swapped:
            layers[name] = _swapped(layers[name])
    return FusedLayers(layers=layers, note=json.dumps(ranks, sort_keys=True) if ranks else None)


def missing_parts(modules: Iterable[str], naming: Naming) -> list[str]:
    """Return the layers that are one natively with some of these, but not among them.

    DoRA needs them all: the lengths of the rows of a part that is missing would not be known.
    """
    there = set(modules)
    native = dict.fromkeys(naming.to_native(name) for name in there)
    return sorted(part for name in native for part in naming.parts(name) if part not in there)


def _obstacles(name: str, group: Sequence[LoraTensors | None]) -> list[str]:
    found = [part for part in group if part is not None]
    lengths = [part is not None and part.magnitude is not None for part in group]
    problems = {
        "different scales (alpha / rank)": not all(_close(part.scale, found[0].scale) for part in found),
        "different dtypes": len({(part.up.dtype, part.down.dtype) for part in found}) > 1,
        "different shapes": len({(part.up.shape[0], part.down.shape[1]) for part in found}) > 1,
        "DoRA's magnitudes for some of them only": any(lengths) and not all(lengths),
    }
    what = "its parts are one layer in this form, but have"
    return [f"'{name}': {what} {problem}; allowed is diffusers" for problem, so in problems.items() if so]


def _close(left: float, right: float) -> bool:
    return math.isclose(left, right, rel_tol=1e-6)


def _fused(group: Sequence[LoraTensors | None]) -> tuple[LoraTensors, Ranks]:
    found = [part for part in group if part is not None]
    if len(group) == 1:
        return found[0], [found[0].rank]
    if len(found) == len(group) and _share_down(found):
        return replace(found[0], up=torch.cat([part.up for part in found]), magnitude=_magnitude(found)), []
    ranks = [0 if part is None else part.rank for part in group]
    size = found[0].up.shape[0]
    up = found[0].up.new_zeros(size * len(group), sum(ranks))
    for index, part in enumerate(group):
        if part is not None:
            first = sum(ranks[:index])
            up[index * size : (index + 1) * size, first : first + part.rank] = part.up
    down = torch.cat([part.down for part in found])
    return LoraTensors(down=down, up=up, alpha=_joint_alpha(found), magnitude=_magnitude(found)), ranks


def _share_down(parts: Sequence[LoraTensors]) -> bool:
    first = parts[0]
    return all(same_bits(part.down, first.down) and _same_alpha(part.alpha, first.alpha) for part in parts)


def _same_alpha(left: Tensor | None, right: Tensor | None) -> bool:
    return left is right or (left is not None and right is not None and same_bits(left, right))


def _joint_alpha(parts: Sequence[LoraTensors]) -> Tensor | None:
    """With equal scales the alphas add up as the ranks do."""
    if all(part.alpha is None for part in parts):
        return None
    return torch.tensor(sum(part.alpha_value for part in parts), dtype=torch.float32)


def _magnitude(parts: Sequence[LoraTensors]) -> Tensor | None:
    lengths = [part.magnitude for part in parts if part.magnitude is not None]
    return torch.cat(lengths) if lengths else None


def _is_read_back(layer: LoraTensors, group: Sequence[LoraTensors | None]) -> bool:
    """Tell whether a reader gets the same parts without a note; alpha has a note of its own."""
    read = _parts(layer, _likely_ranks(layer, len(group)), len(group))
    return all(_same(other, part) for other, part in zip(read, group, strict=True))


def _same(left: LoraTensors | None, right: LoraTensors | None) -> bool:
    if left is None or right is None:
        return left is right
    return same_bits(left.down, right.down) and same_bits(left.up, right.up)


def split(layers: Mapping[str, LoraTensors], naming: Naming, note: str | None) -> dict[str, LoraTensors]:
    """Undo `fuse`; layers that were never several parts are taken apart too.

    Raises:
        UserError: the note is damaged, or the rows of a fused layer cannot be divided.
    """
    noted = _read_note(note)
    raise_if_any(
        f"'{name}': its {layer.up.shape[0]} rows do not divide into {len(naming.parts(name))} layers"
        for name, layer in layers.items()
        if layer.up.shape[0] % len(naming.parts(name))
    )
    modules: dict[str, LoraTensors] = {}
    for name, layer in layers.items():
        parts = naming.parts(name)
        whole = _swapped(layer) if parts[0] in naming.swapped else layer
        ranks: Ranks | None = noted.get(name)
        if ranks is None or not _is_block_diagonal(whole.up, ranks, len(parts)):
            ranks = _likely_ranks(whole, len(parts))
        found = _parts(whole, ranks, len(parts))
        modules |= {part: tensors for part, tensors in zip(parts, found, strict=True) if tensors is not None}
    return modules


def _read_note(text: str | None) -> dict[str, list[int]]:
    try:
        noted = json.loads(text) if text is not None else {}
        return {name: [int(rank) for rank in ranks] for name, ranks in noted.items()}
    except (ValueError, TypeError, AttributeError):
        raise UserError(f"the metadata entry '{FUSED_NOTE}' is damaged") from None


def _likely_ranks(layer: LoraTensors, count: int) -> Ranks:
    """Return equal ranks where B has such blocks, else the sign of one shared A."""
    ranks = [layer.rank // count] * count
    return ranks if _is_block_diagonal(layer.up, ranks, count) else []


def _is_block_diagonal(up: Tensor, ranks: Ranks, count: int) -> bool:
    """Tell whether B, shape (out, rank), has nothing outside its parts' blocks; true of a shared A's too."""
    if not ranks:
        return True
    if len(ranks) != count or sum(ranks) != up.shape[1] or min(ranks) < 0:
        return False
    outside = up.detach().clone()
    for rows, columns in zip(outside.chunk(count), _columns(ranks), strict=True):
        rows[:, columns] = 0
    # A negative zero would not survive being left out.
    return not (outside.any() or outside.signbit().any())


def _columns(ranks: Ranks) -> list[slice]:
    ends = [sum(ranks[: index + 1]) for index in range(len(ranks))]
    return [slice(end - rank, end) for rank, end in zip(ranks, ends, strict=True)]


def _parts(layer: LoraTensors, ranks: Ranks, count: int) -> list[LoraTensors | None]:
    if count == 1:
        return [layer]
    ups = layer.up.chunk(count)
    lengths = [None] * count if layer.magnitude is None else layer.magnitude.chunk(count)
    if not ranks:
        pairs = zip(ups, lengths, strict=True)
        return [replace(layer, up=up, magnitude=magnitude) for up, magnitude in pairs]
    return [
        LoraTensors(
            down=layer.down[columns],
            up=up[:, columns].contiguous(),
            alpha=_share_of_alpha(layer, rank),
            magnitude=magnitude,
        )
        if rank
        else None
        for rank, columns, up, magnitude in zip(ranks, _columns(ranks), ups, lengths, strict=True)
    ]


def _share_of_alpha(layer: LoraTensors, rank: int) -> Tensor | None:
    if layer.alpha is None:
        return None
    return torch.tensor(layer.alpha_value * rank / layer.rank, dtype=torch.float32)


def _swapped(layer: LoraTensors) -> LoraTensors:
    """Swap the two halves of the layer's rows."""
    magnitude = layer.magnitude
    return replace(
        layer,
        up=torch.cat(layer.up.chunk(2)[::-1]),
        magnitude=None if magnitude is None else torch.cat(magnitude.chunk(2)[::-1]),
    )
