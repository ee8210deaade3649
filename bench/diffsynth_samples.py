"""What DiffSynth's scripts are trained on in the comparison: drawn clips, images, and a drawn cache."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffsynth_networks import Model
from PIL import Image

COUNT = 4


def write_samples(folder: Path, model: Model) -> None:
    """Write GIFs (imageio reads these without ffmpeg) or images, and `metadata.csv`."""
    folder.mkdir(parents=True, exist_ok=True)
    frames, height, width = model.size
    column, ending = ("video", "gif") if frames > 1 else ("image", "png")
    lines = []
    for number in range(COUNT):
        drawn = np.random.default_rng(number).integers(0, 255, (height, width, 3), dtype=np.uint8)
        pictures = [Image.fromarray(np.roll(drawn, 4 * k, axis=1)) for k in range(frames)]
        more = {"save_all": True, "append_images": pictures[1:], "duration": 60} if frames > 1 else {}
        pictures[0].save(folder / f"{number}.{ending}", **more)
        lines.append({column: f"{number}.{ending}", "prompt": f"noise {number} moves slowly to the right"})
    with (folder / "metadata.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=(column, "prompt"))
        writer.writeheader()
        writer.writerows(lines)


def write_wan_cache(folder: Path, model: Model) -> None:
    """Write what `sft:data_process` would make of clips for an I2V model, with random values."""
    folder.mkdir(parents=True, exist_ok=True)
    frames, height, width = model.size
    latents = ((frames - 1) // 4 + 1, height // 8, width // 8)
    for number in range(COUNT):
        shared: dict[str, Any] = {
            "input_latents": torch.randn(1, 16, *latents, dtype=torch.bfloat16),
            "y": torch.randn(1, 20, *latents, dtype=torch.bfloat16),
        }
        shared |= {"use_gradient_checkpointing": True, "cfg_scale": 1, "max_timestep_boundary": 0.9}
        text = torch.randn(1, *model.text, dtype=torch.bfloat16)
        torch.save((shared, {"context": text}, {}), folder / f"{number}.pth")
