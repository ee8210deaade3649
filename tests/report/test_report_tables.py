from __future__ import annotations

import io
from pathlib import Path

from rich.console import Console

from tworeel.data.clips import Bucket, Clip
from tworeel.models.family import Component, ModelSource, Traits
from tworeel.report.tables import bucket_table, closing_lines, model_lines, step_tokens, tokens_of

TRAITS = Traits(
    family="wan",
    variant="wan2.2-t2v-a14b",
    expert="low",
    frame_rate=16,
    spatial_multiple=16,
    temporal_stride=4,
    tokens_per_pixel_area=256,
)


def clip(frames: int, source: int = 0) -> Clip:
    bucket = Bucket(frames, 480, 832)
    name = f"{source}/{frames}"
    return Clip(path=Path("a.mp4"), caption="", bucket=bucket, frame_indices=(), source=source, name=name)


def test_tokens_are_those_of_the_published_sizes() -> None:
    counts = {frames: tokens_of(Bucket(frames, 480, 832), TRAITS) for frames in (17, 49, 81)}
    assert counts == {17: 7_800, 49: 20_280, 81: 32_760}
    assert tokens_of(Bucket(81, 720, 1280), TRAITS) == 75_600


def test_a_step_costs_what_its_clips_are_drawn_for() -> None:
    clips = [clip(17), clip(49, source=1)]
    assert step_tokens(clips, [1.0, 1.0], TRAITS, 8) == (8 * (7_800 + 20_280) / 2, 8 * 20_280)
    assert step_tokens(clips, [3.0, 1.0], TRAITS, 1) == ((3 * 7_800 + 20_280) / 4, 20_280)


def test_the_table_has_a_row_for_each_bucket() -> None:
    console = Console(file=io.StringIO(), width=100)
    console.print(bucket_table([clip(17), clip(49), clip(17)], TRAITS))
    assert isinstance(console.file, io.StringIO)
    rows = [line.strip("│ ").split("│") for line in console.file.getvalue().splitlines() if "480" in line]
    assert [[cell.strip() for cell in row] for row in rows] == [
        ["17", "480", "832", "2", "7,800"],
        ["49", "480", "832", "1", "20,280"],
    ]


def test_the_model_is_named_with_its_files() -> None:
    files = tuple(Path(f"part-{k}.safetensors") for k in range(3))
    source = ModelSource(traits=TRAITS, transformer=Component(files=files, layout="diffusers"))
    assert model_lines(source) == [
        "Model: wan2.2-t2v-a14b, low-noise expert",
        "  transformer: part-0.safetensors and 2 more (diffusers layout)",
    ]


def test_the_closing_words_say_how_to_use_the_lora() -> None:
    text = "\n".join(closing_lines(Path("out put/lora.safetensors"), Path("out put/config.toml"), steps=500))
    assert "Your LoRA: out put" in text
    assert "models/loras" in text
    assert 'tworeel train "out put' in text and "--resume --steps 1000" in text
    assert "transformer_2" not in text


def test_the_low_noise_expert_goes_into_the_second_transformer_of_diffusers() -> None:
    text = "\n".join(closing_lines(Path("lora.safetensors"), Path("config.toml"), steps=5, expert="low"))
    assert 'pipe.load_lora_weights("lora.safetensors", load_into_transformer_2=True)' in text
    assert "the high-noise one is a run of its own" in text
