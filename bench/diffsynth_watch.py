"""What a case of `diffsynth_scripts.py` looks at while DiffSynth's script runs, and afterwards."""

from __future__ import annotations

import importlib
import io
import re
import statistics
import time
from collections import defaultdict
from collections.abc import Iterable
from contextlib import redirect_stdout
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from diffsynth_networks import Network
from safetensors.torch import load_file
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_pre_hook


class StepClock:
    """Notes when each optimizer step has ended, from the script's own logger."""

    def __init__(self, micro_batches: int) -> None:
        self._micro_batches = micro_batches
        self._ends: list[float] = []
        diffusion: Any = importlib.import_module("diffsynth.diffusion")
        clock = self

        class TimedLogger(diffusion.ModelLogger):
            def on_step_end(self, *args: Any, **kwargs: Any) -> None:
                super().on_step_end(*args, **kwargs)
                if self.num_steps % micro_batches == 0:
                    clock._note()

        diffusion.ModelLogger = TimedLogger

    def seconds(self) -> float:
        """Median of the seconds a sample; the first step warms up."""
        return _between(self._ends) / self._micro_batches

    def _note(self) -> None:
        for i in range(torch.cuda.device_count()):
            torch.cuda.synchronize(i)
        self._ends.append(time.perf_counter())


def seconds_a_file(files: Iterable[Path]) -> float:
    """Median of the seconds from one written file to the next."""
    return _between(sorted(file.stat().st_mtime for file in files))


def _between(times: list[float]) -> float:
    return statistics.median(later - earlier for earlier, later in pairwise(times))


class GradientWatch:
    """Keeps the largest norm of each gradient over all optimizer steps, by device.

    A single step may have none: the scripts weigh the loss of Wan's noisiest 1 % of timesteps with 0.
    """

    def __init__(self) -> None:
        self._norms: dict[str, Tensor] = {}
        register_optimizer_step_pre_hook(self._look)

    def found(self) -> dict[str, dict[str, float]]:
        """Of each device: how many trained tensors it has, how many with a gradient, and its norm."""
        return {
            device: {
                "tensors": len(norms),
                "not_zero": int((norms > 0).sum()),
                "norm": float(norms.norm()),
            }
            for device, norms in self._norms.items()
        }

    def _look(self, optimizer: torch.optim.Optimizer, *_rest: Any) -> None:
        by_device: dict[str, list[Tensor]] = defaultdict(list)
        for group in optimizer.param_groups:
            for p in group["params"]:
                by_device[str(p.device)].append(torch.zeros(1, device=p.device) if p.grad is None else p.grad)
        # Not read here: that would make the host wait for the devices.
        for device, gradients in by_device.items():
            norms = torch.stack(torch._foreach_norm(gradients)).float()
            self._norms[device] = torch.maximum(norms, self._norms.get(device, norms))


def lora_as_loaded(output: Path, transformer: Network) -> dict[str, int]:
    """Let DiffSynth's own loader put the saved LoRA into the transformer, and count.

    On meta, which checks names and shapes without the transformer's memory.
    """
    from diffsynth.utils.lora.general import GeneralLoRALoader

    newest = max(output.glob("*.safetensors"), key=lambda path: path.stat().st_mtime)
    tensors = load_file(newest)
    with redirect_stdout(io.StringIO()) as said:
        loader = GeneralLoRALoader(device="meta", torch_dtype=torch.bfloat16)
        loader.fuse_lora_to_base_model(transformer.on_meta().to(torch.bfloat16), tensors)
    found = re.search(r"(\d+) tensors are fused", said.getvalue())
    assert found is not None, said.getvalue()
    return {"keys": len(tensors), "layers": int(found[1])}
