"""One case of `diffsynth_scripts.py`: the training script in this process, watched."""

from __future__ import annotations

import importlib
import importlib.util
import runpy
import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from diffsynth_cases import loaded
from diffsynth_networks import model_of
from diffsynth_watch import GradientWatch, StepClock, lora_as_loaded, seconds_a_file


def offer_stand_ins() -> None:
    """Let DiffSynth import where torchvision or librosa is missing, by the stand-ins of the tests."""
    if all(importlib.util.find_spec(name) is not None for name in ("torchvision", "librosa")):
        return
    sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "diffsynth"))
    importlib.import_module("conftest").offer_stand_ins()


def run_case(child: dict[str, Any]) -> dict[str, Any]:
    """Run the script as the case says; return seconds a sample, peaks, and what became of the LoRA."""
    offer_stand_ins()
    model, output = model_of(**child["model"]), Path(child["output"])
    for network in loaded(model, child["task"]):
        network.register(Path(child["folder"]))
    if not torch.cuda.is_available():
        # DiffSynth calls it for whatever device it computes on.
        setattr(torch.cpu, "empty_cache", lambda: None)  # noqa: B010
    _limit_memory(child["cap_gib"])
    clock, gradients = StepClock(child["micro_batches"]), GradientWatch()
    with ExitStack() as hooks:
        if child["way"] == "hooks":
            _hook(hooks)
        _run(child)
    peaks = [torch.cuda.max_memory_allocated(i) / 2**30 for i in range(torch.cuda.device_count())]
    if child["task"].endswith(":data_process"):
        files = list(output.rglob("*.pth"))
        return {"seconds": seconds_a_file(files), "peaks_gib": peaks, "cached": len(files)}
    return {
        "seconds": clock.seconds(),
        "peaks_gib": peaks,
        "lora_gradients": gradients.found(),
        "lora_file": lora_as_loaded(output, model.transformer),
    }


def _run(child: dict[str, Any]) -> None:
    if child["way"] == "tworeel":
        from tworeel.diffsynth.__main__ import main

        if main([child["script"], *child["args"]]):
            sys.exit(2)
        return
    sys.argv = [child["script"], *child["args"]]
    sys.path.insert(0, str(Path(child["script"]).resolve().parent))
    runpy.run_path(child["script"], run_name="__main__")


def _limit_memory(gib: float | None) -> None:
    for i in range(torch.cuda.device_count() if gib is not None else 0):
        share = gib * 2**30 / torch.cuda.get_device_properties(i).total_memory
        torch.cuda.set_per_process_memory_fraction(share, i)


def _hook(stack: ExitStack) -> None:
    """Let the script's own loop run over per-block device hooks, one micro-batch at a time."""
    from tworeel.benchmarks.naive import device_hooks
    from tworeel.diffsynth.adjusting import stay, without_checkpointing
    from tworeel.diffsynth.layouts import MODELS, layout_of
    from tworeel.diffsynth.package import replace_launcher
    from tworeel.diffsynth.settings import visible_devices
    from tworeel.diffsynth.splitting import StepModels, runs_first
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
            for name, one in models.items():
                stay(one, name, together, placement)
            model_fn = without_checkpointing(model.pipe.model_fn)
            model.pipe.model_fn = lambda **given: model_fn(**given).to(devices[0])
            launch(accelerator, dataset, model, *rest, **named)

        return launch_hooked

    replace_launcher(make)
