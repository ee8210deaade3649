"""These tests run DiffSynth's own code; without it they are skipped."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

_HERE = Path(__file__).parent
sys.path.insert(0, str(_HERE))


def offer_torchvision() -> None:
    """Let DiffSynth import without torchvision, of which there is not a build for every torch."""
    if importlib.util.find_spec("torchvision") is not None:
        return
    # These ask once, and have to find that there is none: the stand-in is DiffSynth's alone.
    import diffusers.utils  # noqa: F401
    import peft  # noqa: F401
    from transformers.utils import is_torchvision_available

    is_torchvision_available()
    sys.path.insert(0, str(_HERE / "stand_ins"))
    import torchvision  # noqa: F401

    sys.path.remove(str(_HERE / "stand_ins"))


INSTALLED = importlib.util.find_spec("diffsynth") is not None
if INSTALLED:
    offer_torchvision()


@pytest.fixture
def diffsynth_package() -> None:
    if not INSTALLED:
        pytest.skip("DiffSynth is not installed: pip install --no-deps -r requirements-diffsynth.txt")
