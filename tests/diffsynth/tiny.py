"""A tiny checkpoint and cached samples that DiffSynth's training scripts load, and a way to run these."""

from __future__ import annotations

import json
import os
import runpy
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from variants import FFN, HEADS, TEXT, D, wan

BLOCKS = 6
OPTIONS = {
    "dim": D,
    "in_dim": 16,
    "ffn_dim": FFN,
    "out_dim": 16,
    "text_dim": TEXT,
    "freq_dim": 32,
    "eps": 1e-6,
    "patch_size": (1, 2, 2),
    "num_heads": HEADS,
    "num_layers": BLOCKS,
    "has_image_input": False,
}


def write(folder: Path) -> None:
    """Write `dit.safetensors`, and `cache/0/*.pth` as `sft:data_process` does."""
    torch.manual_seed(0)
    dit = wan()
    save_file(
        {key: value.contiguous() for key, value in dit.state_dict().items()}, folder / "dit.safetensors"
    )
    (folder / "cache" / "0").mkdir(parents=True)
    for number in range(6):
        shared = {"input_latents": torch.randn(1, 16, 2, 4, 4), "max_timestep_boundary": 1.0}
        shared |= {"min_timestep_boundary": 0.0, "use_gradient_checkpointing": True, "cfg_scale": 1}
        sample = (shared, {"context": torch.randn(1, 5, TEXT)}, {})
        torch.save(sample, folder / "cache" / "0" / f"{number}.pth")


def register(folder: Path) -> None:
    """Let DiffSynth recognize the tiny transformer: it knows files by a hash of their keys and shapes."""
    from diffsynth.configs import MODEL_CONFIGS
    from diffsynth.core.loader import hash_model_file

    entry = {
        "model_hash": hash_model_file(str(folder / "dit.safetensors")),
        "model_name": "wan_video_dit",
        "model_class": "diffsynth.models.wan_video_dit.WanModel",
        "extra_kwargs": OPTIONS,
    }
    if entry not in MODEL_CONFIGS:
        MODEL_CONFIGS.append(entry)


def arguments(folder: Path, output: Path, *more: str) -> list[str]:
    given = {
        "dataset_base_path": str(folder / "cache"),
        "model_paths": json.dumps([str(folder / "dit.safetensors")]),
        "tokenizer_path": str(folder / "tokenizer"),
        "task": "sft:train",
        "lora_base_model": "dit",
        "lora_target_modules": "q,k,v,o,ffn.0,ffn.2",
        "lora_rank": "2",
        "learning_rate": "1e-2",
        "num_epochs": "2",
        "output_path": str(output),
    }
    words = [word for key, value in given.items() for word in (f"--{key}", value)]
    return [*words, "--enable_csv_log", "--use_gradient_checkpointing", *more]


def main() -> None:
    """`tiny.py (plain|tworeel) FOLDER SCRIPT ARGS...`, in a process of its own."""
    from conftest import offer_stand_ins

    way, folder, script, *args = sys.argv[1:]
    offer_stand_ins()
    register(Path(folder))
    torch.manual_seed(0)
    if way == "tworeel":
        from tworeel.diffsynth.__main__ import main as run

        code = run([script, *args])
        rooms = sorted(name for name in sys.modules if name.startswith("tworeel."))
        sys.stdout.write(f"rooms: {' '.join(rooms)}\n")
        sys.exit(code)
    sys.argv = [script, *args]
    runpy.run_path(script, run_name="__main__")


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
