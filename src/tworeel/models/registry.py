"""The families there are."""

from __future__ import annotations

from tworeel.models.family import Family
from tworeel.models.flux2.family import FLUX2
from tworeel.models.wan.family import WAN

FAMILIES: dict[str, Family] = {family.name: family for family in (WAN, FLUX2)}
