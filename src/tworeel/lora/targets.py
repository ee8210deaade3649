"""Which layers a LoRA adapts."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase

from torch import nn

from tworeel.errors import UserError, did_you_mean, raise_if_any


def find_targets(model: nn.Module, patterns: Sequence[str], block_lists: Sequence[str] = ()) -> list[str]:
    """Return the names of the linear layers that the patterns choose, in the order of the model.

    Args:
        model: the transformer.
        patterns: endings of dotted names (`to_q`, `ffn.net.2`), or, with a `*`, patterns of whole names
            (`blocks.1?.attn1.*`).
        block_lists: if given, only layers inside these lists of blocks can be chosen.

    Raises:
        UserError: there is no pattern, or one that chooses no layer.
    """
    if not patterns:
        raise UserError("LoRA targets: none given; nothing would be trained")
    linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    inside = [name for name in linears if _is_inside(name, block_lists)]
    raise_if_any(_misses(patterns, linears, inside))
    return [name for name in inside if any(_matches(name, pattern) for pattern in patterns)]


def _is_inside(name: str, block_lists: Sequence[str]) -> bool:
    return not block_lists or any(name.startswith(f"{blocks}.") for blocks in block_lists)


def _matches(name: str, pattern: str) -> bool:
    if "*" in pattern:
        return fnmatchcase(name, pattern)
    return name == pattern or name.endswith(f".{pattern}")


def _misses(patterns: Sequence[str], linears: Sequence[str], inside: Sequence[str]) -> Iterable[str]:
    for pattern in patterns:
        if any(_matches(name, pattern) for name in inside):
            continue
        if any(_matches(name, pattern) for name in linears):
            yield f"LoRA target '{pattern}' matches only layers outside the blocks, which are not trained"
        else:
            endings = _endings(inside)
            hint = did_you_mean(pattern, endings)
            yield f"LoRA target '{pattern}' matches no linear layer{hint}; there are {', '.join(endings)}"


def _endings(names: Iterable[str]) -> list[str]:
    """Return the distinct names without the numbers of blocks, in order."""
    return list(dict.fromkeys(re.sub(r"^.*?\.\d+\.", "", name, count=1) for name in names))
