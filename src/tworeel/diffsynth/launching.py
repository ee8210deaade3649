"""What happens before a training script runs, and when it has loaded its models."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from tworeel.diffsynth.encoders import waiting_bytes
from tworeel.diffsynth.layouts import Layout
from tworeel.diffsynth.loop import train_in_micro_batches
from tworeel.diffsynth.package import check_package, mend_mistral, replace_launcher
from tworeel.diffsynth.settings import Settings, device_name, read_settings
from tworeel.diffsynth.splitting import split_pipeline
from tworeel.engine.split import Split
from tworeel.errors import UserError, collected, raise_if_any
from tworeel.units import gibibytes

_ON_CPU = "--initialize_model_on_cpu"
_FP16 = "--mixed_precision fp16: its scaled losses cannot overlap; allowed are no, bf16"


def prepare(args: Sequence[str], environment: Mapping[str, str]) -> tuple[list[str], SplitLauncher | None]:
    """Check all that can be checked, and replace DiffSynth's launcher.

    Returns:
        The script's arguments, and what it gets for a launcher; None for a task that trains nothing.

    Raises:
        UserError: all that is wrong with the variables, the installation and the arguments.
    """
    options = _options(args)
    problems: list[str] = []
    with collected(problems):
        check_package()
    if options.task.endswith(":data_process"):
        raise_if_any(problems)
        mend_mistral()
        return list(args), None
    with collected(problems):
        settings = read_settings(environment)
    problems += _refused(options)
    fp16 = environment.get("ACCELERATE_MIXED_PRECISION", "").lower() == "fp16"
    if fp16 and options.gradient_accumulation_steps > 1:
        problems.append(_FP16)
    raise_if_any(problems)
    mend_mistral()
    split_launcher = SplitLauncher(settings)
    replace_launcher(split_launcher.in_place_of)
    # Loaded to host memory, it is never whole on a card.
    return [*args, *([] if _ON_CPU in args else [_ON_CPU])], split_launcher


def _options(args: Sequence[str]) -> argparse.Namespace:
    """Those of the script's options that must be known before it runs, read as it will read them."""
    parser = argparse.ArgumentParser(add_help=False, exit_on_error=False)
    parser.add_argument("--task", default="sft")
    parser.add_argument("--gradient_accumulation_steps", type=int, default=1)
    parser.add_argument("--enable_model_cpu_offload", action="store_true")
    parser.add_argument("--enable_lora_hot_loading", action="store_true")
    try:
        return parser.parse_known_args(args)[0]
    except argparse.ArgumentError as error:
        raise UserError(str(error)) from None


def _refused(options: Any) -> Iterator[str]:
    if options.task.startswith("direct_distill"):
        yield f"--task {options.task}: it runs the transformer several times a step; allowed are sft tasks"
    if options.enable_model_cpu_offload:
        yield "--enable_model_cpu_offload: the transformer is on several devices already; leave it out"
    if getattr(options, "enable_lora_hot_loading", False):
        yield (
            "--enable_lora_hot_loading: DiffSynth puts the transformer's layers into ones of its own, which "
            "are of one device; train image-to-LoRA models without DIFFSYNTH_DUAL_GPU"
        )


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
            "DIFFSYNTH_DUAL_GPU_RESIDENCY=offload, DIFFSYNTH_DUAL_GPU_TEXT_ENCODER=host, "
            "DIFFSYNTH_DUAL_GPU_FP8=true, another DIFFSYNTH_DUAL_GPU_SPLIT_AT, "
            "smaller or shorter samples, one more device"
        ) from None


class SplitLauncher:
    """What a script gets for DiffSynth's `launch_training_task`.

    Attributes:
        called: whether the script has called it.

    Args:
        settings: how the transformer is split.
    """

    def __init__(self, settings: Settings) -> None:
        self.called = False
        self._settings = settings

    def in_place_of(self, launch: Callable[..., None]) -> SplitLauncher:
        """Stand for DiffSynth's own function from now on."""
        self._launch = launch
        return self

    @shortage_in_words()
    def __call__(
        self, accelerator: Any, dataset: Any, model: Any, model_logger: Any, *rest: Any, **named: Any
    ) -> None:
        self.called = True
        args = named.get("args")
        refused = () if args is None else _refused(args)
        raise_if_any([*_obstacles(accelerator, self._settings), *refused])
        division, layout = split_pipeline(
            model.pipe,
            self._settings,
            checkpointing=getattr(model, "use_gradient_checkpointing", False),
            offload=getattr(model, "use_gradient_checkpointing_offload", False),
        )
        _bring_managed_layers(model.pipe, accelerator.device)
        accelerator.print(in_words(division, layout, waiting_bytes(model.pipe)))
        if accelerator.gradient_accumulation_steps > 1 and not rest and args is not None:
            train_in_micro_batches(accelerator, dataset, model, model_logger, args, division)
            return
        run_through(model, division)
        self._launch(accelerator, dataset, model, model_logger, *rest, **named)


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


def _obstacles(accelerator: Any, settings: Settings) -> Iterator[str]:
    """What of accelerate's state a split does not go with, however it came about."""
    if accelerator.distributed_type.value != "NO":
        kind, count = accelerator.distributed_type.value, accelerator.num_processes
        yield (
            f"accelerate is set to {kind} with {count} processes, but one process drives all devices; start "
            "it with python -m tworeel.diffsynth, or with accelerate launch --num_processes 1"
        )
    if accelerator.scaler is not None and accelerator.gradient_accumulation_steps > 1:
        yield _FP16
    here = device_name(accelerator.device)
    if here != settings.devices[0]:
        yield f"DIFFSYNTH_DUAL_GPU_DEVICES: accelerate computes on {here}, so that has to be the first device"


def in_words(division: Split, layout: Layout, waiting: int = 0) -> str:
    """Which blocks are where, by the numbers of `DIFFSYNTH_DUAL_GPU_SPLIT_AT`, and what they leave behind.

    Args:
        division: of the models.
        layout: of the same.
        waiting: bytes of the text encoder's weights that are in host memory.
    """
    placement = division.placement
    parts = [
        f"{_blocks_in_words(placement.blocks_of(stage), layout.before)} on {device}"
        for stage, device in enumerate(placement.devices)
    ]
    text = f". The text encoder's weights, {gibibytes(waiting)}, wait in host memory" if waiting else ""
    return f"tworeel: {'; '.join(parts)}. {division.residency_in_words()}{text}"


def _blocks_in_words(positions: range, before: int) -> str:
    """Blocks of all lists; the first `before` are VACE's, which have numbers of their own."""
    vace = range(positions.start, min(positions.stop, before))
    own = range(max(positions.start, before) - before, positions.stop - before)
    parts = (("VACE's blocks", vace), ("blocks", own))
    return ", ".join(f"{what} {numbers[0]} to {numbers[-1]}" for what, numbers in parts if numbers)
