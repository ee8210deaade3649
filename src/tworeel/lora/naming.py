"""How a family's layers are called in LoRA files."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from tworeel.models.family import Family


@dataclass(frozen=True, kw_only=True)
class Naming:
    """Maps between diffusers' names of layers and those in the authors' own code ("native")."""

    to_native: Callable[[str], str]
    from_native: Callable[[str], str]
    words: tuple[str, ...] = ()
    """Parts of native names that hold an underscore of their own (`self_attn`)."""

    @classmethod
    def of(cls, family: Family) -> Naming:
        """Take the naming from a family."""
        return cls(to_native=family.to_native, from_native=family.from_native, words=family.native_words)

    def dotted(self, name: str) -> str:
        """Undo `name.replace(".", "_")` on a native name.

        >>> Naming(to_native=str, from_native=str, words=("self_attn",)).dotted("blocks_0_self_attn_q")
        'blocks.0.self_attn.q'
        """
        for word in sorted(self.words, key=len, reverse=True):
            name = re.sub(rf"(?<![^_]){word}(?![^_])", word.replace("_", "\0"), name)
        return name.replace("_", ".").replace("\0", "_")

    def is_native(self, names: Iterable[str]) -> bool:
        """Tell whether these layers are spelled as in the authors' code rather than as in diffusers."""
        return not any(self.to_native(name) != name for name in names)

    def unknown(self, names: Iterable[str]) -> list[str]:
        """Return the names that are neither native nor diffusers': layers of another model."""
        return [name for name in names if self.to_native(name) == name == self.from_native(name)]
