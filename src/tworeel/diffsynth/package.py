"""The installed DiffSynth: which versions are tested, and what of it is replaced."""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from tworeel.errors import UserError

TESTED = ((2, 1, 12), (2, 1, 12))
"""First and last version of DiffSynth that the tests ran with."""


def check_package() -> None:
    """Raise unless a DiffSynth is installed that the tests ran with.

    Raises:
        UserError: none is, or another version.
    """
    first, last = (".".join(map(str, one)) for one in TESTED)
    tested = first if first == last else f"{first} to {last}"
    try:
        found = version("diffsynth")
    except PackageNotFoundError:
        raise UserError(f"DiffSynth is not installed: pip install diffsynth=={last}") from None
    numbers = tuple(int(number) for number in re.findall(r"\d+", found)[:3])
    if not TESTED[0] <= numbers <= TESTED[1]:
        raise UserError(
            f"DiffSynth {found} is installed, this was tested with {tested}: "
            f"pip install diffsynth=={last}, or unset DIFFSYNTH_DUAL_GPU"
        )


def replace_launcher(make: Callable[[Callable[..., None]], Callable[..., None]]) -> None:
    """Let scripts that do `from diffsynth.diffusion import *` get our `launch_training_task`.

    Tested with `TESTED`. It gets the whole training module
    before it is moved to a device, which no option and no hook of DiffSynth's gives.

    Args:
        make: takes DiffSynth's own function, returns that which the script gets.
    """
    diffusion: Any = importlib.import_module("diffsynth.diffusion")
    diffusion.launch_training_task = make(diffusion.launch_training_task)


def mend_mistral() -> None:
    """Let FLUX.2's captions be encoded with transformers 5, which Tworeel needs (tested with `TESTED`).

    DiffSynth's Mistral-3 hands all arguments on by their places in transformers 4; with 5 that raises.
    Without its forward it has transformers' own, which takes the same names.
    """
    encoder: Any = importlib.import_module("diffsynth.models.flux2_text_encoder").Flux2TextEncoder
    takes = inspect.signature(super(encoder, encoder).forward).parameters
    if "forward" in vars(encoder) and "output_attentions" not in takes:
        del encoder.forward
