"""How a family's layers are called in LoRA files."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

from tworeel.models.family import Family


@dataclass(frozen=True, kw_only=True)
class Naming:
    """Maps between diffusers' names of layers and those in the authors' own code ("native")."""

    to_native: Callable[[str], str]
    from_native: Callable[[str], str]
    words: tuple[str, ...] = ()
    """Parts of native names that hold an underscore of their own (`self_attn`)."""
    own_words: tuple[str, ...] = ()
    """The same of diffusers' names."""
    native_parts: Callable[[str], tuple[str, ...]] | None = None
    """See `Family.native_parts`."""
    native_only: Callable[[str], bool] | None = None
    """See `Family.native_only`."""
    swapped: tuple[str, ...] = ()
    """See `Family.native_swapped`."""
    diffsynth_names: Literal["native", "diffusers"] = "native"
    family: str = ""
    """Its name, to be told."""

    @classmethod
    def of(cls, family: Family) -> Naming:
        """Take the naming from a family."""
        return cls(
            to_native=family.to_native,
            from_native=family.from_native,
            words=family.native_words,
            own_words=family.own_words,
            native_parts=family.native_parts,
            native_only=family.native_only,
            swapped=family.native_swapped,
            diffsynth_names=family.diffsynth_names,
            family=family.name,
        )

    def parts(self, native: str) -> tuple[str, ...]:
        """Return the layers whose rows a native layer holds, in its order; mostly one."""
        found = self.native_parts(native) if self.native_parts is not None else ()
        return found or (self.from_native(native),)

    def dotted(self, name: str) -> str:
        """Undo `name.replace(".", "_")` on a native name.

        >>> Naming(to_native=str, from_native=str, words=("self_attn",)).dotted("blocks_0_self_attn_q")
        'blocks.0.self_attn.q'
        """
        return _dotted(name, self.words)

    def own_dotted(self, name: str) -> str:
        """Undo it on a name of diffusers'."""
        return _dotted(name, self.own_words)

    def is_native(self, names: Iterable[str]) -> bool:
        """Tell whether these layers are spelled as in the authors' code rather than as in diffusers."""
        return not any(self.to_native(name) != name for name in names)

    def is_only_native(self, name: str) -> bool:
        """Tell whether a layer's name is one of the authors' code and none of diffusers'."""
        return self.to_native(name) == name != self.from_native(name)

    def label(self, native: str) -> str:
        """Call a native layer what messages call it: by its name in diffusers, if it is one layer there."""
        parts = self.parts(native)
        return parts[0] if len(parts) == 1 else native

    def without_own(self, names: Iterable[str]) -> list[str]:
        """Return the layers that have a native name alone."""
        only = self.native_only
        return [] if only is None else [name for name in names if only(self.to_native(name))]

    def unknown(self, names: Iterable[str]) -> list[str]:
        """Return the names that are neither native nor diffusers': layers of another model."""
        alike = [name for name in names if self.to_native(name) == name == self.from_native(name)]
        known = set(self.without_own(alike))
        return [name for name in alike if name not in known]


def _dotted(name: str, words: Iterable[str]) -> str:
    for word in sorted(words, key=len, reverse=True):
        name = re.sub(rf"(?<![^_]){word}(?![^_])", word.replace("_", "\0"), name)
    return name.replace("_", ".").replace("\0", "_")
