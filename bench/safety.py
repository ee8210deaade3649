"""What safety costs: saving, verifying, hashing, scanning, and the wait before a command begins.

    python bench/safety.py                         a checkpoint of 300 MB, 24 clips; no GPU is used
    python bench/safety.py --tiny                  seconds

Prints a table; `--json` writes the figures to a file.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import measuring
import torch
from real_size import write_clips
from safetensors.torch import save_file

from tworeel.benchmarks import machine
from tworeel.config.schema import DataConfig, SourceConfig
from tworeel.data.media import content_hash
from tworeel.data.scan import scan
from tworeel.models.wan.variants import traits
from tworeel.training.checkpoint import CheckpointStore
from tworeel.weights.tensor_files import TensorFiles

MB = 10**6
FRAMES = 81


def seconds(work: Callable[[], object], rounds: int) -> float:
    """The median time of a call."""
    times = []
    for _ in range(rounds):
        begin = time.perf_counter()
        work()
        times.append(time.perf_counter() - begin)
    return statistics.median(times)


def measure_checkpoint(folder: Path, size: int, rounds: int) -> dict[str, float]:
    """How long training stands still for a checkpoint, and how long a resume verifies it.

    A third is the LoRA, the rest the optimizer's two moments, as in a run.
    """
    count = max(1, size // 3 // 4)
    values = torch.randn(count)
    tensors = {"lora": {"a": values}, "optimizer": {"exp_avg": values + 1, "exp_avg_sq": values + 2}}
    store = CheckpointStore(folder / "checkpoints")
    steps = iter(range(rounds))
    save = seconds(lambda: store.save(next(steps), tensors, {}), rounds)
    path = store.folder / f"step-{rounds - 1:08d}"
    return {"save": save, "verify": seconds(lambda: store.load(path), rounds)}


def measure_hashing(folder: Path, size: int, rounds: int) -> dict[str, float]:
    """A clip is hashed whole; of a weight file, samples say that it is the same one as before."""
    path = folder / "weights.safetensors"
    save_file({"weight": torch.randn(max(1, size // 4))}, path)
    return {
        "hash": seconds(lambda: content_hash(path), rounds),
        "fingerprint": seconds(lambda: TensorFiles(path).fingerprint(), rounds),
    }


def measure_scan(folder: Path, clips: int, width: int, height: int, rounds: int) -> dict[str, float]:
    """Every clip is decoded whole, so that a damaged one is found before training."""
    write_clips(folder / "clips", width=width, height=height, frames=FRAMES, count=clips)
    data = DataConfig(sources=(SourceConfig(path=folder / "clips"),), frames=(FRAMES,))
    facts = traits("wan2.2-t2v-a14b", "high")

    def look() -> None:
        found = scan(data, facts)
        assert len(found.clips) == clips, found.problems

    return {"scan": seconds(look, rounds)}


def measure_start(rounds: int) -> dict[str, float]:
    """`tworeel --help` in a new process."""
    command = [sys.executable, "-m", "tworeel", "--help"]
    return {"help": seconds(lambda: subprocess.run(command, check=True, capture_output=True), rounds)}


def rows(found: dict[str, float], arguments: argparse.Namespace) -> list[tuple[str, str, str]]:
    """Rows of the table: what, seconds, speed."""
    size, clips = arguments.megabytes, arguments.clips
    return [
        (f"save a checkpoint of {size} MB", f"{found['save']:.2f}", f"{size / found['save']:.0f} MB/s"),
        ("verify and read it", f"{found['verify']:.2f}", f"{size / found['verify']:.0f} MB/s"),
        (f"hash a file of {size} MB", f"{found['hash']:.2f}", f"{size / found['hash']:.0f} MB/s"),
        ("fingerprint a weight file", f"{found['fingerprint']:.3f}", "of any size"),
        (
            f"scan {clips} clips of {arguments.width}×{arguments.height}×{FRAMES}",
            f"{found['scan']:.2f}",
            f"{clips / found['scan']:.1f} clips/s",
        ),
        ("tworeel --help", f"{found['help']:.2f}", ""),
    ]


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure all of it in a folder that is removed afterwards."""
    size, rounds = arguments.megabytes * MB, arguments.rounds
    if arguments.folder is not None:
        Path(arguments.folder).mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        folder = Path(name)
        return {
            **measure_checkpoint(folder, size, rounds),
            **measure_hashing(folder, size, rounds),
            **measure_scan(folder, arguments.clips, arguments.width, arguments.height, rounds),
            **measure_start(rounds),
        }


def parse_arguments() -> argparse.Namespace:
    """Read the command line; `--tiny` sets what it does not."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, help="on the disk to measure; the temporary folder by default")
    parser.add_argument("--megabytes", type=int, help="of the checkpoint and the hashed file (300)")
    parser.add_argument("--clips", type=int, help="to scan (24)")
    parser.add_argument("--rounds", type=int, default=3, help="the medians of so many are told")
    parser.add_argument("--json", type=Path, help="file for the figures")
    parser.add_argument("--tiny", action="store_true", help="1 MB and two small clips")
    arguments = parser.parse_args()
    megabytes, clips, arguments.width, arguments.height = (
        (1, 2, 128, 80) if arguments.tiny else (300, 24, 832, 480)
    )
    arguments.megabytes = arguments.megabytes or megabytes
    arguments.clips = arguments.clips or clips
    return arguments


def main() -> None:
    """Run the benchmark."""
    arguments = parse_arguments()
    facts = machine.facts([torch.device("cpu")])
    measuring.print_machine(facts)
    found = measure(arguments)
    measuring.print_table("what safety costs", ("what", "seconds", "speed"), rows(found, arguments))
    if arguments.json:
        options = {key: str(value) for key, value in vars(arguments).items()}
        measuring.add_results(arguments.json, {"safety": {"machine": facts, "options": options, **found}})


if __name__ == "__main__":
    main()
