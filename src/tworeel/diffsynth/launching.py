"""What happens before a training script runs, and when it has loaded its models."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from tworeel.diffsynth.loop import train_in_micro_batches
from tworeel.diffsynth.package import check_package, mend_mistral, replace_launcher
from tworeel.diffsynth.settings import Settings, read_settings
from tworeel.diffsynth.splitting import split_pipeline
from tworeel.engine.split import Split
from tworeel.errors import UserError, collected, raise_if_any

_ON_CPU = "--initialize_model_on_cpu"
_OFFLOAD = "--enable_model_cpu_offload"


def prepare(args: Sequence[str], environment: Mapping[str, str]) -> list[str]:
    """Check all that can be checked, replace DiffSynth's launcher, and return the script's arguments.

    Raises:
        UserError: all that is wrong with the variables, the installation and the arguments.
    """
    problems: list[str] = []
    with collected(problems):
        check_package()
    with collected(problems):
        settings = read_settings(environment)
    task = _option(args, "--task", "sft")
    if task.startswith("direct_distill"):
        problems.append(f"--task {task}: it runs the transformer several times a step; allowed are sft tasks")
    if _OFFLOAD in args:
        problems.append(f"{_OFFLOAD}: the transformer is on several devices already; leave it out")
    raise_if_any(problems)
    mend_mistral()
    if task.endswith(":data_process"):
        return list(args)  # nothing is trained, so there is nothing to split
    replace_launcher(lambda launch: launcher(launch, settings))
    # Loaded to host memory, it is never whole on a card.
    return [*args, *([] if _ON_CPU in args else [_ON_CPU])]


@contextmanager
def shortage_in_words() -> Iterator[None]:
    """Say in a line what needs less, where training ends because a device has run out of memory.

    Raises:
        UserError: it has.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        first_line = str(error).partition("\n")[0]
        raise UserError(
            f"out of memory: {first_line} What needs less: "
            "DIFFSYNTH_DUAL_GPU_RESIDENCY=offload, DIFFSYNTH_DUAL_GPU_FP8=true, another "
            "DIFFSYNTH_DUAL_GPU_SPLIT_AT, smaller or shorter samples, one more device"
        ) from None


def _option(args: Sequence[str], name: str, default: str) -> str:
    for i, word in enumerate(args):
        if word.startswith(f"{name}="):
            return word.partition("=")[2]
        if word == name and i + 1 < len(args):
            return args[i + 1]
    return default


def launcher(launch: Callable[..., None], settings: Settings) -> Callable[..., None]:
    """What a script gets for DiffSynth's `launch_training_task`, which is `launch`."""

    @shortage_in_words()
    def launch_split(
        accelerator: Any, dataset: Any, model: Any, model_logger: Any, *rest: Any, **named: Any
    ) -> None:
        _check_accelerator(accelerator, settings)
        division, layout = split_pipeline(
            model.pipe,
            settings,
            checkpointing=getattr(model, "use_gradient_checkpointing", False),
            offload=getattr(model, "use_gradient_checkpointing_offload", False),
        )
        _bring_managed_layers(model.pipe, accelerator.device)
        accelerator.print(_in_words(division))
        overlaps = accelerator.gradient_accumulation_steps > 1 and not layout.one_at_a_time
        if overlaps and not rest and named.get("args") is not None:
            train_in_micro_batches(accelerator, dataset, model, model_logger, named["args"], division)
            return
        run_through(model, division)
        launch(accelerator, dataset, model, model_logger, *rest, **named)

    return launch_split


def _bring_managed_layers(pipe: Any, device: torch.device) -> None:
    """Let encoders in fp8, whose layers hold the device they were loaded to, compute on the first device.

    Layers that are read from disk for each use are left alone.
    """
    if not any(getattr(module, "offload_device", None) == "disk" for module in pipe.modules()):
        pipe.flush_vram_management_device(device)


def run_through(model: Any, division: Split) -> None:
    """Let a training module's forward, from the encoders to the loss, run along the stages."""
    forward = model.forward
    model.forward = lambda *args, **kwargs: division.model(lambda: forward(*args, **kwargs))


def _check_accelerator(accelerator: Any, settings: Settings) -> None:
    if accelerator.num_processes > 1:
        raise UserError(f"--num_processes {accelerator.num_processes}: one process drives all devices")
    first = settings.devices[0]
    here = accelerator.device
    if here.type != first.partition(":")[0] or (here.index or 0) != int(first.partition(":")[2] or 0):
        raise UserError(
            f"DIFFSYNTH_DUAL_GPU_DEVICES: accelerate computes on {here}, so {here} has to be the first device"
        )


def _in_words(division: Split) -> str:
    placement = division.placement
    parts = [
        f"blocks {blocks.start} to {blocks.stop - 1} on {placement.devices[stage]}"
        for stage in range(placement.num_stages)
        for blocks in (placement.blocks_of(stage),)
    ]
    return f"tworeel: {'; '.join(parts)}. {division.residency_in_words()}"
