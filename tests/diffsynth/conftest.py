"""These tests run DiffSynth's own code; without it they are skipped."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from importlib.metadata import distributions
from pathlib import Path

import pytest

_HERE = Path(__file__).parent
sys.path.insert(0, str(_HERE))


def offer_stand_ins() -> None:
    """Let DiffSynth import without librosa, and torchvision, which not every torch has a build of."""
    missing = [name for name in ("torchvision", "librosa") if importlib.util.find_spec(name) is None]
    # These ask once, and have to find that there is none: the stand-in is DiffSynth's alone.
    import diffusers.utils  # noqa: F401
    import peft  # noqa: F401
    from transformers.utils import is_torchvision_available

    is_torchvision_available()
    sys.path.insert(0, str(_HERE / "stand_ins"))
    for name in missing:
        importlib.import_module(name)
    sys.path.remove(str(_HERE / "stand_ins"))


# Not by its name as a module: this folder has the same.
INSTALLED = any(True for _ in distributions(name="diffsynth"))
if INSTALLED:
    offer_stand_ins()


@pytest.fixture(scope="session")
def diffsynth_package() -> None:
    if not INSTALLED:
        pytest.skip("DiffSynth is not installed: pip install --no-deps -r requirements-diffsynth.txt")


@pytest.fixture(autouse=True)
def _flex_attention_with_a_backward(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the CPU; on GPUs it is the real one."""
    if "diffsynth_package" in request.fixturenames and request.node.get_closest_marker("gpu") is None:
        request.getfixturevalue("diffsynth_package")
        import dense_attention

        dense_attention.install(monkeypatch)
