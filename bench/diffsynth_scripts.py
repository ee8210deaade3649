"""DiffSynth's own training script: one card in fp8, per-block device hooks, and ours, in one table.

Each case is the unmodified script in a process of its own, with random weights in DiffSynth's own layout:
Wan 2.2 I2V-A14B's high-noise expert, or FLUX.2-dev. `sft:train` trains on cached samples: Wan's are drawn,
FLUX.2's are made first, by the script's `sft:data_process`. `sft` encodes on the fly, text encoder and VAE in
the run:

    python bench/diffsynth_scripts.py --script examples/wanvideo/model_training/train.py
    python bench/diffsynth_scripts.py --script examples/wanvideo/model_training/train.py --task sft
    python bench/diffsynth_scripts.py --script examples/flux2/model_training/train.py --model flux2

Needs DiffSynth, and disk and host memory of 30 GiB (Wan), 45 GiB (Wan, `sft`) or 100 GiB (FLUX.2). Results
are written after each case. `--tiny` runs it on the CPU.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffsynth_cases import BASELINE, CASES, DATA_PROCESS, cases_of, loaded, script_arguments
from diffsynth_child import offer_stand_ins, run_case
from diffsynth_networks import model_of
from diffsynth_samples import write_samples, write_wan_cache

from tworeel.demo.tiny_encoders import write_tokenizer
from tworeel.demo.tiny_flux2_encoders import write_flux2_tokenizer

_MARK = "RESULT "
_SHOWN = 8
"""Lines of a failed case's output."""


def write(options: argparse.Namespace) -> None:
    """Write what the cases need: networks, tokenizer and samples, unless they are there."""
    folder, model = options.folder, model_of(**options.described)
    folder.mkdir(parents=True, exist_ok=True)
    tasks = {CASES[name].task or options.task for name in cases_of(options)}
    for network in model.networks:
        if any(network in loaded(model, task) for task in tasks):
            network.write(folder)
    if model.family == "wan":
        write_tokenizer(folder, "diffusers")
    else:
        write_flux2_tokenizer(folder, "mistral3")
    if tasks != {"sft:train"}:
        write_samples(folder / "samples", model)
    elif model.family == "wan":
        write_wan_cache(folder / "cache", model)


def measure(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Run one case in a process of its own."""
    case = CASES[name]
    output = options.folder / "output" / name.replace(", ", "-").replace(" ", "-")
    if name == DATA_PROCESS:
        output = options.folder / "cache"
    child = {
        "way": case.way,
        "task": case.task or options.task,
        "model": options.described,
        "folder": str(options.folder),
        "output": str(output),
        "script": str(options.script),
        "cap_gib": None if name == DATA_PROCESS else options.cap_gib,
        "micro_batches": options.micro_batches if case.overlaps else 1,
        "args": script_arguments(case, model_of(**options.described), options, output),
    }
    environment = _environment(case.variables, options)
    if name == DATA_PROCESS and options.encode_on_cpu:
        environment["ACCELERATE_USE_CPU"] = "true"
    command = [sys.executable, __file__, "--child", json.dumps(child)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    lines = [line for line in done.stdout.splitlines() if line.startswith(_MARK)]
    if done.returncode or not lines:
        said = done.stderr.strip().splitlines()[-_SHOWN:]
        return {"case": name, "error": "\n".join([f"exit code {done.returncode}", *said])}
    return {"case": name, **json.loads(lines[-1].removeprefix(_MARK))}


def _environment(variables: dict[str, str], options: argparse.Namespace) -> dict[str, str]:
    inherited = {key: value for key, value in os.environ.items() if not key.startswith("DIFFSYNTH_DUAL")}
    if options.tiny:
        inherited |= {"DIFFSYNTH_DUAL_GPU_DEVICES": "cpu,cpu", "ACCELERATE_USE_CPU": "true"}
    return inherited | variables


def table(results: Sequence[dict[str, Any]]) -> str:
    """Seconds a sample, how many times as fast as the baseline, peaks, and what became of the LoRA."""
    seconds = {result["case"]: result.get("seconds") for result in results}
    base = seconds.get(BASELINE)
    columns = ("case", "seconds a sample", "times the hooks", "peaks, GiB", "LoRA tensors with a gradient")
    lines = [f"| {' | '.join(columns)} | loads in DiffSynth |", "|---|---|---|---|---|---|"]
    for result in results:
        if "error" in result:
            lines.append(f"| {result['case']} | failed | | | | |")
            continue
        trains = "lora_file" in result
        peaks = " / ".join(f"{peak:.1f}" for peak in result["peaks_gib"]) or "none measured"
        ratio = f"{base / result['seconds']:.2f}" if base and trains else ""
        gradients, loads = (_gradients(result), _loads(result)) if trains else ("", "")
        lines.append(
            f"| {result['case']} | {result['seconds']:.3f} | {ratio} | {peaks} | {gradients} | {loads} |"
        )
    return "\n".join(lines)


def _gradients(result: dict[str, Any]) -> str:
    found = result["lora_gradients"].items()
    return ", ".join(f"{one['not_zero']} of {one['tensors']} on {device}" for device, one in found)


def _loads(result: dict[str, Any]) -> str:
    return f"{result['lora_file']['layers']} layers of {result['lora_file']['keys']} tensors"


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--script", type=Path, help="DiffSynth's training script for the model")
    parser.add_argument("--model", choices=("wan", "flux2"), default="wan")
    parser.add_argument("--task", choices=("sft:train", "sft"), default="sft:train")
    parser.add_argument("--folder", type=Path, default=Path("bench-diffsynth"), help="one for each model")
    parser.add_argument("--cases", nargs="+", help="some of them, by the names in the table")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--micro-batches", type=int, default=8)
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--blocks", type=int, help="shorten the transformer to so many blocks")
    parser.add_argument("--text-layers", type=int, default=30, help="of Mistral-3; 30 are read")
    parser.add_argument("--encode-on-cpu", action="store_true", help="keep encoders away from the cards")
    parser.add_argument("--cap-gib", type=float, help="memory that each device may use in training")
    parser.add_argument("--offload", action="store_true", help="gradient checkpoints wait in host memory")
    parser.add_argument("--json", type=Path, help="results.json in the folder by default")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child is None and (options.script is None or not options.script.is_file()):
        parser.error("--script: name DiffSynth's train.py, of examples/wanvideo or examples/flux2")
    if options.tiny:
        options.steps, options.micro_batches, options.rank = 3, 2, 2
    options.described = {
        "name": options.model,
        "tiny": options.tiny,
        "blocks": options.blocks,
        "text_layers": options.text_layers,
    }
    options.json = options.json or options.folder / "results.json"
    return options


def main() -> None:
    options = parsed()
    if options.child is not None:
        print(_MARK + json.dumps(run_case(json.loads(options.child))))  # noqa: T201
        return
    offer_stand_ins()
    if unknown := set(options.cases or ()) - set(CASES):
        sys.exit(f"--cases: there is no {', '.join(sorted(unknown))}; allowed are {', '.join(CASES)}")
    write(options)
    cards = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] or ["CPU"]
    print(f"DiffSynth's training script on {', '.join(cards)}, torch {torch.__version__}")  # noqa: T201
    results: list[dict[str, Any]] = []
    for name in cases_of(options):
        results.append(measure(name, options))
        print(f"{name}: {results[-1].get('error') or results[-1]}", flush=True)  # noqa: T201
        found = {"cards": cards, "task": options.task, "model": options.described, "results": results}
        options.json.write_text(json.dumps(found, indent=2), encoding="utf-8")
    print(f"\n{table(results)}")  # noqa: T201


if __name__ == "__main__":
    main()
