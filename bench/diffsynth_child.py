"""One case of `diffsynth_scripts.py`: the training script in this process, timed from its logger."""

from __future__ import annotations

import importlib
import runpy
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

_COMMON = {"in_dim": 36, "out_dim": 16, "eps": 1e-6, "patch_size": (1, 2, 2), "has_image_input": False}
_COMMON |= {"require_clip_embedding": False}


@dataclass(frozen=True)
class Size:
    """Of the transformer and of a clip."""

    model: dict[str, Any]
    latents: tuple[int, int, int]
    """Frames, height, width."""
    text_tokens: int


SIZES = {
    "a14b": Size(
        _COMMON
        | {
            "dim": 5120,
            "ffn_dim": 13824,
            "text_dim": 4096,
            "freq_dim": 256,
            "num_heads": 40,
            "num_layers": 40,
        },
        latents=(13, 60, 104),
        text_tokens=512,
    ),
    "tiny": Size(
        _COMMON | {"dim": 48, "ffn_dim": 64, "text_dim": 32, "freq_dim": 32, "num_heads": 2, "num_layers": 4},
        latents=(2, 4, 4),
        text_tokens=5,
    ),
}


def register(folder: Path, size: str, *, stand_ins_only: bool = False) -> None:
    """Let DiffSynth import on a machine for tests, and recognize a transformer of another size."""
    if size == "tiny":
        sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "diffsynth"))
        importlib.import_module("conftest").offer_stand_ins()
    if stand_ins_only:
        return
    from diffsynth.configs import MODEL_CONFIGS
    from diffsynth.core.loader import hash_model_file

    entry = {"model_name": "wan_video_dit", "model_class": "diffsynth.models.wan_video_dit.WanModel"}
    hashed = hash_model_file(str(folder / "dit.safetensors"))
    if all(known["model_hash"] != hashed for known in MODEL_CONFIGS):
        MODEL_CONFIGS.append({"model_hash": hashed, **entry, "extra_kwargs": SIZES[size].model})


def run_case(child: dict[str, Any]) -> dict[str, Any]:
    """Run the script as the case says and return seconds a clip and peaks."""
    register(Path(child["folder"]), child["size"])
    if child["cap_gib"] is not None:
        for i in range(torch.cuda.device_count()):
            share = child["cap_gib"] * 2**30 / torch.cuda.get_device_properties(i).total_memory
            torch.cuda.set_per_process_memory_fraction(share, i)
    clock = _timed_logger(child["micro_batches"])
    with ExitStack() as hooks:
        if child["way"] == "hooks":
            _hook(hooks)
        if child["way"] == "tworeel":
            from tworeel.diffsynth.__main__ import main

            if main([child["script"], *child["args"]]):
                sys.exit(2)
        else:
            sys.argv = [child["script"], *child["args"]]
            runpy.run_path(child["script"], run_name="__main__")
    seconds = [later - earlier for earlier, later in pairwise(clock[1:])]
    peaks = [torch.cuda.max_memory_allocated(i) / 2**30 for i in range(torch.cuda.device_count())]
    return {"seconds": statistics.median(seconds) / child["micro_batches"], "peaks_gib": peaks}


def _timed_logger(micro_batches: int) -> list[float]:
    """Note when each optimizer step has ended, in the list that is returned; the first warms up."""
    diffusion: Any = importlib.import_module("diffsynth.diffusion")
    clock = [time.perf_counter()]

    class TimedLogger(diffusion.ModelLogger):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            super().on_step_end(*args, **kwargs)
            if self.num_steps % micro_batches == 0:
                for i in range(torch.cuda.device_count()):
                    torch.cuda.synchronize(i)
                clock.append(time.perf_counter())

    diffusion.ModelLogger = TimedLogger
    return clock


def _hook(stack: ExitStack) -> None:
    """Let the script's own loop run over per-block device hooks, one micro-batch at a time."""
    from tworeel.benchmarks.naive import device_hooks
    from tworeel.diffsynth.layouts import MODELS, layout_of
    from tworeel.diffsynth.package import replace_launcher
    from tworeel.diffsynth.settings import visible_devices
    from tworeel.diffsynth.splitting import StepModels, runs_first, stay, without_checkpointing
    from tworeel.engine import place

    def make(launch: Callable[..., None]) -> Callable[..., None]:
        def launch_hooked(accelerator: Any, dataset: Any, model: Any, *rest: Any, **named: Any) -> None:
            found = {name: getattr(model.pipe, name, None) for name in MODELS}
            models = {name: one for name, one in found.items() if one is not None}
            layout = layout_of(models)
            together, devices = StepModels(models), visible_devices() or ["cpu", "cpu"]
            first = runs_first(together, layout)
            placement = place(together, devices, blocks=layout.lists, beside=layout.beside, first=first)
            for name, tensor in [*together.named_parameters(), *together.named_buffers()]:
                tensor.data = tensor.data.to(placement.device_of(name))
            stack.enter_context(device_hooks(together, placement))
            for one in models.values():
                stay(one, placement)
            model_fn = without_checkpointing(model.pipe.model_fn)
            model.pipe.model_fn = lambda **given: model_fn(**given).to(devices[0])
            launch(accelerator, dataset, model, *rest, **named)

        return launch_hooked

    replace_launcher(make)
