"""The families there are."""

from __future__ import annotations

from tworeel.models.family import Family
from tworeel.models.wan.family import WAN

FAMILIES: dict[str, Family] = {WAN.name: WAN}
