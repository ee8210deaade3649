"""DiffSynth's own training script: one card in fp8, per-block device hooks, and ours, in one table.

Each case is the unmodified script in a process of its own, with a transformer of random weights (Wan 2.2
I2V-A14B's high-noise expert in its own layout) and cached latents and text, as `--task sft:train` takes them:

    python bench/diffsynth_scripts.py --script examples/wanvideo/model_training/train.py --json diffsynth.json

Needs 30 GiB of disk and of host memory, and DiffSynth. `--tiny` runs it on the CPU.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffsynth_child import SIZES, register, run_case
from safetensors.torch import save_file

from tworeel.demo.tiny_encoders import write_tokenizer

_MARK = "RESULT "


@dataclass(frozen=True)
class Case:
    """One way to run the script."""

    overlaps: bool = True
    """Whether a step has all micro-batches; else one."""
    way: str = "tworeel"
    variables: dict[str, str] = field(default_factory=dict)
    fp8_models: bool = False


SPLIT = {"DIFFSYNTH_DUAL_GPU": "true"}
CASES = {
    "one card, fp8": Case(way="plain", fp8_models=True),
    "per-block hooks": Case(way="hooks"),
    "split, one at a time": Case(variables=SPLIT, overlaps=False),
    "split, overlapping": Case(variables=SPLIT),
    "split, overlapping, fp8": Case(variables=SPLIT | {"DIFFSYNTH_DUAL_GPU_FP8": "true"}),
}
BASELINE = "per-block hooks"


def write(folder: Path, size: str) -> None:
    """Write the transformer, a tokenizer and cached samples, unless they are there."""
    if (folder / "written").is_file():
        return
    from diffsynth.models.wan_video_dit import WanModel

    shape = SIZES[size]
    torch.manual_seed(0)
    with torch.device("meta"):
        keys = WanModel(**shape.model).state_dict()
    tensors = {key: torch.empty(t.shape, dtype=torch.bfloat16).normal_(std=0.02) for key, t in keys.items()}
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "dit.safetensors")
    del tensors
    write_tokenizer(folder, "diffusers")
    cache = folder / "cache" / "0"
    cache.mkdir(parents=True, exist_ok=True)
    for number in range(4):
        video = torch.randn(1, 16, *shape.latents, dtype=torch.bfloat16)
        shared: dict[str, Any] = {
            "input_latents": video,
            "y": torch.randn(1, 20, *shape.latents, dtype=torch.bfloat16),
        }
        shared |= {"use_gradient_checkpointing": True, "cfg_scale": 1, "max_timestep_boundary": 0.9}
        text = torch.randn(1, shape.text_tokens, shape.model["text_dim"], dtype=torch.bfloat16)
        torch.save((shared, {"context": text}, {}), cache / f"{number}.pth")
    (folder / "written").touch()


def script_arguments(case: Case, options: argparse.Namespace, output: Path) -> list[str]:
    """What the script is given."""
    dit, count = str(options.folder / "dit.safetensors"), options.micro_batches if case.overlaps else 1
    given = {
        "dataset_base_path": str(options.folder / "cache"),
        "dataset_repeat": str(-(-count * options.steps // 4)),
        "model_paths": json.dumps([dit]),
        "tokenizer_path": str(options.folder / "tokenizer"),
        "task": "sft:train",
        "lora_base_model": "dit",
        "lora_target_modules": "q,k,v,o,ffn.0,ffn.2",
        "lora_rank": str(options.rank),
        "gradient_accumulation_steps": str(count),
        "output_path": str(output),
    }
    words = [word for key, value in given.items() for word in (f"--{key}", value)]
    words += ["--use_gradient_checkpointing", "--initialize_model_on_cpu"]
    words += ["--use_gradient_checkpointing_offload"] if options.offload else []
    if case.fp8_models:
        words.remove(
            "--initialize_model_on_cpu"
        )  # DiffSynth's fp8 layers stay on the device they are loaded to
        words += ["--fp8_models", dit]
    return words


def measure(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Run one case in a process of its own."""
    case = CASES[name]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("DIFFSYNTH_DUAL")}
    environment |= case.variables
    if options.tiny:
        environment |= {"DIFFSYNTH_DUAL_GPU_DEVICES": "cpu,cpu", "ACCELERATE_USE_CPU": "true"}
    output = options.folder / "output" / name.replace(", ", "-").replace(" ", "-")
    child = {"way": case.way, "size": options.size, "folder": str(options.folder)}
    child |= {
        "script": str(options.script),
        "cap_gib": options.cap_gib,
        "args": script_arguments(case, options, output),
    }
    child |= {"micro_batches": options.micro_batches if case.overlaps else 1}
    command = [sys.executable, __file__, "--child", json.dumps(child)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    lines = [line for line in done.stdout.splitlines() if line.startswith(_MARK)]
    if done.returncode or not lines:
        return {"case": name, "error": (done.stderr.strip().splitlines() or ["no result"])[-1]}
    return {"case": name, **json.loads(lines[-1].removeprefix(_MARK))}


def table(results: list[dict[str, Any]]) -> str:
    """Seconds a clip, peaks, and how many times as fast as the baseline."""
    seconds = {result["case"]: result.get("seconds") for result in results}
    base = seconds.get(BASELINE)
    lines = ["| case | seconds a clip | peaks, GiB | times the hooks |", "|---|---|---|---|"]
    for result in results:
        if "error" in result:
            lines.append(f"| {result['case']} | {result['error']} | | |")
            continue
        peaks = " / ".join(f"{peak:.1f}" for peak in result["peaks_gib"]) or "none measured"
        ratio = f"{base / result['seconds']:.2f}" if base else ""
        lines.append(f"| {result['case']} | {result['seconds']:.3f} | {peaks} | {ratio} |")
    return "\n".join(lines)


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--script", type=Path, help="DiffSynth's training script for Wan")
    parser.add_argument("--folder", type=Path, default=Path("bench-diffsynth"))
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--micro-batches", type=int, default=8)
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--cap-gib", type=float, help="memory that each device may use")
    parser.add_argument("--offload", action="store_true", help="gradient checkpoints wait in host memory")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.size = "tiny" if options.tiny else "a14b"
    if options.child is None and (options.script is None or not options.script.is_file()):
        parser.error("--script: name DiffSynth's examples/wanvideo/model_training/train.py")
    return options


def main() -> None:
    options = parsed()
    if options.child is not None:
        print(_MARK + json.dumps(run_case(json.loads(options.child))))  # noqa: T201
        return
    if options.tiny:
        options.steps, options.micro_batches, options.rank = 3, 2, 2
        register(options.folder, "tiny", stand_ins_only=True)
    write(options.folder, options.size)
    results = [measure(name, options) for name in options.cases]
    cards = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] or ["CPU"]
    print(f"DiffSynth's training script on {', '.join(cards)}, torch {torch.__version__}\n")  # noqa: T201
    print(table(results))  # noqa: T201
    if options.json is not None:
        options.json.write_text(json.dumps({"cards": cards, "results": results}, indent=2), encoding="utf-8")


if __name__ == "__main__":
    main()
