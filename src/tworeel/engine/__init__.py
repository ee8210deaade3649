"""Split a model's blocks over devices and keep all of them busy. Knows torch and nothing else."""

from tworeel.engine.attention import attention_backend
from tworeel.engine.inference import at_rest, infer, random_state_kept
from tworeel.engine.pipeline import Pipeline, StepResult
from tworeel.engine.placement import Placement, place
from tworeel.engine.residency import Residency
from tworeel.engine.split import Split, split

__all__ = [
    "Pipeline",
    "Placement",
    "Residency",
    "Split",
    "StepResult",
    "at_rest",
    "attention_backend",
    "infer",
    "place",
    "random_state_kept",
    "split",
]
