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

sys.path.insert(0, str(Path(__file__).parents[2] / "bench"))

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


FLUX2 = {
    "in_channels": 16,
    "num_layers": 2,
    "num_single_layers": 4,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": TEXT,
    "timestep_guidance_channels": 32,
    "axes_dims_rope": (4, 4, 4, 4),
}


def write_flux2(folder: Path) -> None:
    """Write a tiny FLUX.2 as `dit.safetensors`, and cached samples."""
    from diffsynth.models.flux2_dit import Flux2DiT

    torch.manual_seed(0)
    dit = Flux2DiT(**FLUX2)
    save_file(
        {key: value.contiguous() for key, value in dit.state_dict().items()}, folder / "dit.safetensors"
    )
    (folder / "cache" / "0").mkdir(parents=True)
    ids = torch.arange(6).float()[None, :, None].expand(1, 6, 4)
    for number in range(6):
        shared = {"input_latents": torch.randn(1, 6, 16), "image_ids": ids, "embedded_guidance": 1.0}
        shared |= {"use_gradient_checkpointing": True, "cfg_scale": 1}
        text = {"prompt_embeds": torch.randn(1, 5, TEXT), "text_ids": ids[:, :5]}
        torch.save((shared, text, {}), folder / "cache" / "0" / f"{number}.pth")


def write_with_encoders(folder: Path) -> None:
    """Write a tiny I2V transformer, T5 and VAE in DiffSynth's layouts, and clips with captions."""
    from diffsynth_networks import wan as networks_of_wan
    from diffsynth_samples import write_samples

    model = networks_of_wan(tiny=True, blocks=BLOCKS)
    for network in model.networks:
        network.write(folder)
    write_samples(folder / "samples", model)


def register(folder: Path) -> None:
    """Let DiffSynth recognize the tiny networks: it knows files by a hash of their keys and shapes."""
    if (folder / "vae.safetensors").is_file():
        from diffsynth_networks import wan as networks_of_wan

        for network in networks_of_wan(tiny=True, blocks=BLOCKS).networks:
            network.register(folder)
        return
    _register_transformer(folder)


def _register_transformer(folder: Path) -> None:
    from diffsynth.configs import MODEL_CONFIGS
    from diffsynth.core.loader import hash_model_file

    hashed = hash_model_file(str(folder / "dit.safetensors"))
    wan_entry = ("wan_video_dit", "diffsynth.models.wan_video_dit.WanModel", OPTIONS)
    flux2_entry = ("flux2_dit", "diffsynth.models.flux2_dit.Flux2DiT", FLUX2)
    name, kind, options = flux2_entry if folder.name.startswith("flux2") else wan_entry
    entry = {"model_hash": hashed, "model_name": name, "model_class": kind, "extra_kwargs": options}
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


def arguments_with_encoders(folder: Path, output: Path, *more: str) -> list[str]:
    """What a script is given to encode clips and captions as it trains."""
    files = [str(folder / f"{name}.safetensors") for name in ("dit", "text_encoder", "vae")]
    samples = {"dataset_base_path": folder / "samples"}
    samples |= {"dataset_metadata_path": folder / "samples" / "metadata.csv"}
    words = [word for key, value in samples.items() for word in (f"--{key}", str(value))]
    words += ["--task", "sft", "--model_paths", json.dumps(files), "--data_file_keys", "video"]
    words += ["--num_frames", "5", "--height", "32", "--width", "32", "--extra_inputs", "input_image"]
    return arguments(folder, output, *words, *more)


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
