"""What `planning.py` plans and runs: models by their configuration, clips, limits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from tworeel.benchmarks import models
from tworeel.benchmarks.widths import FLUX2_DEV, TINY, TINY_FLUX2, WAN_5B, WAN_14B, ModelShape
from tworeel.data.clips import Bucket
from tworeel.models.family import ModelSource

_WITH_IMAGE = {"in_channels": 36, "image_dim": 1280, "added_kv_proj_dim": 5120}
MODELS: dict[str, tuple[ModelShape, dict[str, Any]]] = {
    "t2v-a14b": (replace(WAN_14B, variant="wan2.2-t2v-a14b"), {}),
    "i2v-14b": (replace(WAN_14B, variant="wan2.1-i2v-14b"), _WITH_IMAGE),
    "ti2v-5b": (WAN_5B, {}),
    "flux2-dev": (FLUX2_DEV, {}),
    "tiny": (TINY, {}),
    "tiny-flux2": (TINY_FLUX2, {}),
}
"""Widths, and what the configuration has beside them."""
SIZES = {
    "480p": (480, 832),
    "720p": (704, 1280),
    "720x1280": (720, 1280),
    "512x512": (512, 512),
    "1024x1024": (1024, 1024),
    "tiny": (64, 64),
}


@dataclass(frozen=True, kw_only=True)
class Case:
    """One configuration that is planned and run."""

    model: str
    size: str
    frames: int
    quantize: str | None = None
    stages: int = 2
    residency: str = "auto"
    caps: tuple[float, ...] = ()
    """GiB that each device may use; all by default, one number for all of them."""
    compile: bool = True
    micro_batches: int = 3
    at: tuple[int, ...] | None = None
    rank: int = 32
    blocks: int | None = None
    """All by default."""
    steps: int = 3
    """The first one compiles and decides what blocks leave behind, in the second each thread still makes
    plans for its kernels; the others are timed."""

    @property
    def name(self) -> str:
        """In one line."""
        kind, stages = self.quantize or "bf16", f"{self.stages} stage{'s' if self.stages > 1 else ''}"
        words = [self.model, self.size, f"{self.frames} frames", kind, stages]
        words += [self.residency] if self.residency != "auto" else []
        words += ["+".join(f"{cap:g}" for cap in self.caps) + " GiB"] if self.caps else []
        words += [] if self.compile else ["eager"]
        words += [f"split at {','.join(map(str, self.at))}"] if self.at else []
        words += [f"{self.blocks} blocks"] if self.blocks else []
        return " ".join(words)

    @property
    def bucket(self) -> Bucket:
        """Of its clips."""
        height, width = SIZES[self.size]
        return Bucket(frames=self.frames, height=height, width=width)

    @property
    def num_blocks(self) -> int:
        """Blocks that are run."""
        return self.blocks or MODELS[self.model][0].blocks

    @property
    def source(self) -> ModelSource:
        """The model as if it had been found on disk."""
        shape, more = MODELS[self.model]
        found = models.source_of(shape, self.blocks)
        transformer = replace(found.transformer, config={**found.transformer.config, **more})
        return replace(found, transformer=transformer)


_T2V = Case(model="t2v-a14b", size="480p", frames=49)
_EAGER = replace(_T2V, compile=False)
_I2V = Case(model="i2v-14b", size="480p", frames=49, compile=False, micro_batches=2)
_TI2V = Case(model="ti2v-5b", size="720p", frames=49, compile=False)
_FLUX2 = Case(model="flux2-dev", size="512x512", frames=1, rank=16, quantize="fp8")
CASES = (
    # Those of one shape and precision in a row: they share what was compiled and traced.
    _T2V,
    replace(_T2V, caps=(22.5,)),
    replace(_T2V, residency="recompute"),
    replace(_T2V, residency="selective"),
    replace(_T2V, residency="offload-selective"),
    replace(_T2V, quantize="fp8"),
    replace(_T2V, quantize="fp8", caps=(16,)),
    replace(_EAGER, quantize="int8"),
    replace(_EAGER, residency="recompute"),
    replace(_EAGER, frames=17),
    replace(_T2V, frames=1),
    replace(_EAGER, size="720p", frames=17),
    replace(_EAGER, frames=81, residency="recompute", micro_batches=2),
    _I2V,
    replace(_I2V, frames=17, caps=(22.5,), micro_batches=3),
    _TI2V,
    replace(_TI2V, frames=81, stages=1),
    replace(_TI2V, frames=17, stages=1, caps=(22.5,), compile=True),
    replace(_EAGER, frames=81, caps=(22.5,), micro_batches=2),
    replace(_EAGER, caps=(15,), micro_batches=2),
    replace(_T2V, size="720x1280", frames=81, quantize="fp8", caps=(30,), micro_batches=2),
    replace(_T2V, stages=4),
    replace(_FLUX2, caps=(22.5,)),
    _FLUX2,
    replace(_FLUX2, size="1024x1024", caps=(22.5,)),
    replace(_FLUX2, size="1024x1024", caps=(30,)),
    replace(_FLUX2, size="1024x1024", quantize=None),
)
_EDGE = replace(_T2V, frames=1, micro_batches=2, compile=False)
_EDGE_5B = replace(_TI2V, frames=1, micro_batches=2)
EDGES = (
    replace(_EDGE_5B, caps=(12,)),
    replace(_EDGE, caps=(16,)),
    replace(_EDGE, caps=(22.5,)),
    replace(_EDGE, caps=(22.5,), quantize="fp8"),
    replace(_EDGE, caps=(30,)),
    replace(_EDGE, model="i2v-14b", caps=(22.5,)),
    replace(_EDGE, caps=(22.5, 15)),
    replace(_EDGE, caps=(30, 22.5)),
    replace(_EDGE_5B, caps=(15, 11)),
    replace(_EDGE, caps=(15, 11), quantize="fp8"),
)
"""Their frames are found: the longest clip that is accepted."""
SPLITS = (
    # Not compiled: each boundary would be compiled anew.
    replace(_EAGER, frames=17, caps=(22.5, 15)),
    replace(_EAGER, frames=17, caps=(30, 22.5)),
    replace(_TI2V, caps=(15, 11)),
)
_TINY = Case(model="tiny", size="tiny", frames=5, micro_batches=2, compile=False)
PHASES = {"cases": CASES, "edges": EDGES, "splits": SPLITS}
TINY_PHASES = {
    "cases": (_TINY, replace(_TINY, model="tiny-flux2", frames=1)),
    "edges": (replace(_TINY, frames=1, caps=(0.33,)),),
    "splits": (_TINY,),
}


def chosen(cases: Sequence[Case], wanted: Sequence[str]) -> list[tuple[int, Case]]:
    """The cases that are asked for, with their numbers from 1 on; all where none is.

    Args:
        cases: of a phase.
        wanted: numbers, or parts of names.
    """
    numbered = list(enumerate(cases, 1))
    return [
        (number, case)
        for number, case in numbered
        if not wanted or any(_is_meant(word, number, case) for word in wanted)
    ]


def _is_meant(word: str, number: int, case: Case) -> bool:
    return int(word) == number if word.isdigit() else word in case.name
