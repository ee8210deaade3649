"""The ways to run DiffSynth's scripts that are compared, and what each of them is given."""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass, field
from pathlib import Path

from diffsynth_networks import Model, Network
from diffsynth_samples import COUNT


@dataclass(frozen=True)
class Case:
    """One way to run the script."""

    overlaps: bool = True
    """Whether a step has all micro-batches; else one."""
    way: str = "tworeel"
    variables: dict[str, str] = field(default_factory=dict)
    fp8_models: bool = False
    task: str | None = None
    """Another one than is compared."""


SPLIT = {"DIFFSYNTH_DUAL_GPU": "true"}
DATA_PROCESS = "data process"
BASELINE = "per-block hooks"
CASES = {
    DATA_PROCESS: Case(variables=SPLIT, task="sft:data_process"),
    "one card, fp8": Case(way="plain", fp8_models=True),
    BASELINE: Case(way="hooks"),
    "split, one at a time": Case(variables=SPLIT, overlaps=False),
    "split, overlapping": Case(variables=SPLIT),
    "split, overlapping, fp8": Case(variables=SPLIT | {"DIFFSYNTH_DUAL_GPU_FP8": "true"}),
}


def cases_of(options: argparse.Namespace) -> list[str]:
    """The chosen cases, or all; only FLUX.2's cache is made by the script."""
    processed = options.model == "flux2" and options.task == "sft:train"
    chosen: list[str] = options.cases or list(CASES)
    return [name for name in chosen if name != DATA_PROCESS or processed]


def loaded(model: Model, task: str) -> tuple[Network, ...]:
    """The networks that a task needs."""
    if task.endswith(":train"):
        return (model.transformer,)
    return model.encoders if task.endswith(":data_process") else model.networks


def script_arguments(case: Case, model: Model, options: argparse.Namespace, output: Path) -> list[str]:
    """What the script is given."""
    task, count = case.task or options.task, options.micro_batches if case.overlaps else 1
    paths = [str(network.path(options.folder)) for network in loaded(model, task)]
    given = {
        "model_paths": json.dumps(paths),
        "tokenizer_path": str(options.folder / "tokenizer"),
        "task": task,
        "output_path": str(output),
        **_dataset(task, model, options),
    }
    if not task.endswith(":data_process"):
        given |= {
            "dataset_repeat": str(-(-count * options.steps // COUNT)),
            "lora_base_model": "dit",
            "lora_target_modules": model.targets,
            "lora_rank": str(options.rank),
            "gradient_accumulation_steps": str(count),
        }
    if case.fp8_models:
        given["fp8_models"] = ",".join(paths)
    words = [word for key, value in given.items() for word in (f"--{key}", value)]
    words += ["--use_gradient_checkpointing"]
    words += ["--use_gradient_checkpointing_offload"] if options.offload else []
    # DiffSynth's fp8 layers stay on the device that they are loaded to.
    return words if case.fp8_models else [*words, "--initialize_model_on_cpu"]


def _dataset(task: str, model: Model, options: argparse.Namespace) -> dict[str, str]:
    if task.endswith(":train"):
        return {"dataset_base_path": str(options.folder / "cache")}
    samples, (frames, height, width) = options.folder / "samples", model.size
    given = {"dataset_base_path": str(samples), "dataset_metadata_path": str(samples / "metadata.csv")}
    given |= {"height": str(height), "width": str(width)}
    if model.family == "flux2":
        return given | {"data_file_keys": "image"}
    # DiffSynth's own example for the high-noise expert has this boundary.
    given |= {"num_frames": str(frames), "max_timestep_boundary": "0.358"}
    return given | {"data_file_keys": "video", "extra_inputs": "input_image"}
