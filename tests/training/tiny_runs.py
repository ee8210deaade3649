"""Whole runs at toy size on the CPU: real files, real encoders, a real transformer of four narrow blocks."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from tworeel.config.schema import ModelConfig, RunConfig, SourceConfig
from tworeel.demo.checkpoint import write_checkpoint
from tworeel.models.family import Layout
from tworeel.training.metrics import read_metrics
from tworeel.training.report import SilentRun, StepReport

T2V = "wan2.1-t2v-1.3b"
SIZES = {"num_layers": 4, "dim": 128, "ffn_dim": 128}


class Watcher(SilentRun):
    """Remembers what a run said."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.steps: list[StepReport] = []

    def say(self, line: str) -> None:
        self.lines.append(line)

    def step(self, report: StepReport) -> None:
        self.steps.append(report)


def tiny_model(folder: Path, variant: str = T2V, layout: Layout = "native", **options: Any) -> ModelConfig:
    """Write a tiny checkpoint; return what a configuration says of it."""
    path = write_checkpoint(folder, variant=variant, layout=layout, **(SIZES | options))
    return ModelConfig(path=str(path), expert="high" if "a14b" in variant else None, dtype="float32")


ITS_CLIPS = {"skip_broken": True}
"""For a model that is always given an image: it is not trained on images."""


def tiny_config(model: ModelConfig, clips: Path, output: Path, **sections: Mapping[str, Any]) -> RunConfig:
    """A run of four steps of two micro-batches; the cache lies beside `clips`.

    Args:
        model: as `tiny_model` returned it.
        clips: folder of the dataset.
        output: folder of the run.
        sections: options by section (`train={"steps": 2}`) that differ from these.
    """
    small: dict[str, dict[str, Any]] = {
        "data": {"sources": (SourceConfig(path=clips),), "resolution": (64, 64), "frames": (1, 5)},
        "cache": {"folder": clips.parent / "cache", "dtype": "float32"},
        "lora": {"rank": 2},
        "train": {
            "output": output,
            "steps": 4,
            "micro_batches": 2,
            "save_every": 2,
            "learning_rate": 1e-3,
            "tensorboard": False,
        },
        "engine": {"devices": ("cpu", "cpu")},
        "sample": {},
    }
    options = {name: section | dict(sections.get(name, {})) for name, section in small.items()}
    return RunConfig.model_validate({"model": model, **options})


def lora_of(config: RunConfig) -> dict[str, Tensor]:
    """The tensors of the finished LoRA."""
    return load_file(config.train.output / f"{config.train.name}.safetensors")


def losses_of(config: RunConfig) -> list[tuple[int, float, float]]:
    """Step, loss and gradient norm of every line of the metrics."""
    lines = read_metrics(config.train.output / "metrics.jsonl")
    return [(line["step"], line["loss"], line["grad_norm"]) for line in lines]


def digest_of(config: RunConfig) -> str:
    """A hash of all that a run has computed: LoRA, newest checkpoint, losses."""
    newest = max((config.train.output / "checkpoints").glob("step-*"))
    parts = [
        hashlib.sha256((newest / f"{group}.safetensors").read_bytes()).hexdigest()
        for group in ("lora", "optimizer")
    ]
    lora = {
        name: hashlib.sha256(tensor.numpy().tobytes()).hexdigest() for name, tensor in lora_of(config).items()
    }
    return json.dumps([newest.name, parts, sorted(lora.items()), losses_of(config)])
