"""Tworeel trains LoRAs for diffusion transformers that do not fit one GPU, over two or more of them.

`split` and `Pipeline` work with any model that has lists of blocks:

    import tworeel

    tworeel.split(model, ["cuda:0", "cuda:1"])
    pipeline = tworeel.Pipeline(model, residency="recompute")
    pipeline.step(micro_batches, loss)
"""

from __future__ import annotations

from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tworeel.engine import Pipeline, Split, StepResult, split

__all__ = ["Pipeline", "Split", "StepResult", "__version__", "split"]
__version__ = version("tworeel")


def __getattr__(name: str) -> Any:
    """Load the engine, and torch with it, when it is first asked for: `tworeel --help` need not wait."""
    if name not in __all__:
        raise AttributeError(f"module 'tworeel' has no attribute '{name}'")
    from tworeel import engine

    return getattr(engine, name)
