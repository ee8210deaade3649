"""Tables and closing words."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from pathlib import Path

from rich.table import Table

from tworeel.data.buckets import tokens
from tworeel.data.clips import Bucket, Clip
from tworeel.models.family import Component, ModelSource, Traits


def tokens_of(bucket: Bucket, traits: Traits) -> int:
    """Tokens that the transformer sees of one clip and its reference images."""
    return tokens(bucket, traits)


def step_tokens(
    clips: Sequence[Clip], weights: Sequence[float], traits: Traits, micro_batches: int
) -> tuple[float, int]:
    """Return what one optimizer step costs in tokens: on average, and at most.

    Args:
        clips: of all datasets.
        weights: how often a clip of each dataset is drawn, by `Clip.source`.
        traits: of the model.
        micro_batches: clips of one step.
    """
    counts = [tokens_of(clip.bucket, traits) for clip in clips]
    shares = [weights[clip.source] for clip in clips]
    mean = sum(count * share for count, share in zip(counts, shares, strict=True)) / sum(shares)
    return micro_batches * mean, micro_batches * max(counts)


def bucket_table(clips: Sequence[Clip], traits: Traits) -> Table:
    """List the buckets: frames, height and width in pixels, clips, and the most tokens of one clip."""
    table = Table(title="Buckets")
    for column in ("frames", "height", "width", "clips", "tokens a clip"):
        table.add_column(column, justify="right")
    # Reference images have many sizes: they would make a bucket of nearly every clip.
    of_size = itertools.groupby(
        sorted(clip.bucket for clip in clips), key=lambda b: (b.frames, b.height, b.width)
    )
    for size, group in of_size:
        counts = [tokens_of(bucket, traits) for bucket in group]
        table.add_row(*(f"{number:,}" for number in (*size, len(counts), max(counts))))
    return table


def model_lines(source: ModelSource) -> list[str]:
    """Say what was found: variant, expert, and the files of each network."""
    traits = source.traits
    expert = f", {traits.expert}-noise expert" if traits.expert else ""
    networks = {
        "transformer": source.transformer,
        "VAE": source.vae,
        "text encoder": source.text_encoder,
        "image encoder": source.image_encoder,
    }
    lines = [_network_line(name, network) for name, network in networks.items() if network]
    tokenizer = [f"  tokenizer: {source.tokenizer}"] if source.tokenizer else []
    return [f"Model: {traits.variant}{expert}", *lines, *tokenizer]


def _network_line(name: str, network: Component) -> str:
    first, *others = network.files
    more = f" and {len(others)} more" if others else ""
    return f"  {name}: {first}{more} ({network.layout} layout)"


def closing_lines(lora: Path, config: Path, *, steps: int, expert: str | None = None) -> list[str]:
    """Say where the LoRA is and how it is used.

    Args:
        lora: the finished file.
        config: the resolved configuration that the run can be resumed with.
        steps: how many were trained.
        expert: of a model with two; the low-noise one is diffusers' `transformer_2`.
    """
    # JSON's quoting is Python's too, also for the backslashes of Windows
    second = ", load_into_transformer_2=True" if expert == "low" else ""
    lines = [
        f"Your LoRA: {lora}",
        "  ComfyUI: copy it to models/loras",
        f"  diffusers: pipe.load_lora_weights({json.dumps(str(lora), ensure_ascii=False)}{second})",
        f"  more steps: {resume_command(config)} --steps {2 * steps}",
    ]
    if expert:
        other = {"low": "high", "high": "low"}[expert]
        lines.append(f"  this is the {expert}-noise expert's; the {other}-noise one is a run of its own")
    return lines


def resume_command(config: Path, *options: str) -> str:
    """The command that goes on with a run, with these options."""
    words = map(str, ("tworeel", "train", config, "--resume", *options))
    return " ".join(f'"{word}"' if " " in word else word for word in words)
