"""The run's configuration: every option, its type, its default and one sentence on it.

Unknown keys and wrong types are errors (`tworeel.config.loading` adds suggestions and collects them all).
The field docstrings are the reference in `docs/config.md` and the comments of `tworeel config`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
)

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Decay = Annotated[float, Field(ge=0.0, lt=1.0)]
FrameCount = Annotated[int, Field(ge=1, le=4093)]
Pixels = Annotated[int, Field(ge=16, le=16384)]
Precision = Literal["bfloat16", "float32", "float64"]


class Section(BaseModel):
    """A table of the TOML file: strict, immutable, no unknown keys."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, use_attribute_docstrings=True)


class ModelConfig(Section):
    """Which model, and files that belong to it but lie elsewhere."""

    path: str
    """Hub id, folder or single file of the model, in diffusers', Wan's own or ComfyUI's layout."""
    expert: Literal["high", "low"] | None = None
    """Which expert of a Wan 2.2 A14B model to train."""
    vae: str | None = None
    """VAE file or folder, if it is not beside the model."""
    text_encoder: str | None = None
    """Text encoder file or folder, if it is not beside the model."""
    tokenizer: str | None = None
    """Tokenizer folder, if it is not beside the model."""
    image_encoder: str | None = None
    """CLIP image encoder file or folder (Wan 2.1 I2V and FLF2V), if it is not beside the model."""
    dtype: Precision = "bfloat16"
    """Precision of the frozen weights and of the computation."""
    quantize: Literal["auto", "fp8", "int8", "nf4"] | None = None
    """Precision of the blocks' frozen linear layers: fp8 and int8 multiply in 8 bits too, nf4 only stores;
    `auto` takes fp8 or int8 where `model.dtype` does not fit the GPUs without streamed weights."""


class SourceConfig(Section):
    """One dataset: a folder with captions beside the clips, or a `.csv` or `.jsonl` file."""

    path: Path
    """Folder of videos and images with `.txt` captions, or a `.csv` / `.jsonl` with paths and captions."""
    weight: Annotated[float, Field(gt=0, le=1000)] = 1.0
    """How often each of its clips is drawn, relative to those of the other datasets; may be a fraction."""
    repeats: Annotated[int, Field(ge=1, le=10000)] = 1
    """How many times each of its clips counts in an epoch."""


class DataConfig(Section):
    """The clips and how they are cut and fitted."""

    sources: Annotated[tuple[SourceConfig, ...], Field(min_length=1)]
    """The datasets."""
    resolution: tuple[Pixels, Pixels] = (832, 480)
    """Width and height in pixels; buckets of other aspect ratios have about the same area."""
    frames: Annotated[tuple[FrameCount, ...], Field(min_length=1)] = (1, 17, 33, 49)
    """Lengths that clips are cut to, each 4k+1 frames; a clip takes the longest that it fills. Models of
    images take single frames, whatever stands here."""
    clip_rule: Literal["head", "uniform", "windows"] = "head"
    """Where a clip is cut: its head, frames spread uniformly over all of it, or several windows."""
    windows: PositiveInt = 4
    """The most windows that are cut from one clip with `clip_rule = "windows"`."""
    frame_rate: PositiveFloat | None = None
    """Frames a second that clips are resampled to; the model's own by default."""
    min_aspect: PositiveFloat = 0.5
    """Narrowest bucket, width over height."""
    max_aspect: PositiveFloat = 2.0
    """Widest bucket, width over height."""
    skip_broken: bool = False
    """Leave out broken files and list them, rather than stop."""


class CacheConfig(Section):
    """Where latents and text embeddings are kept."""

    folder: Path | None = None
    """Cache folder; `cache` beside the run's folder by default."""
    dtype: Precision = "bfloat16"
    """Precision that the encoders compute in."""
    devices: tuple[str, ...] | None = None
    """Devices that encode side by side; those of the run by default."""
    text_placement: Literal["auto", "each", "spread", "cpu"] = "auto"
    """Where captions are embedded: a text encoder on each device, one spread over all, or on the CPU."""
    text_quantize: Literal["auto", "fp8", "int8", "nf4"] | None = "auto"
    """Precision of a large text encoder's layers; `auto` takes fp8 where `cache.dtype` does not fit."""


class LoraConfig(Section):
    """The adapter."""

    rank: PositiveInt = 32
    """Rank of the update of each target."""
    alpha: PositiveFloat | None = None
    """Scale of the update: alpha / rank; the rank by default."""
    targets: tuple[str, ...] | str = "all-linear"
    """A preset of the family (`attention`, `all-linear`) or a list of patterns of module names."""
    rslora: bool = False
    """Scale by alpha / sqrt(rank) (rank-stabilized LoRA)."""
    dora: bool = False
    """Train magnitude and direction apart (DoRA)."""
    init_from: Path | None = None
    """Start from this LoRA file, in any of the known forms."""


class TrainConfig(Section):
    """The run."""

    output: Path = Path("output")
    """Folder of the run: checkpoints, metrics and the finished LoRA."""
    name: str = "lora"
    """File name of the finished LoRA, without its ending."""
    steps: PositiveInt = 1000
    """Optimizer steps."""
    micro_batches: PositiveInt = 8
    """Clips of one optimizer step; they follow each other through the stages."""
    learning_rate: PositiveFloat = 1e-4
    """Peak learning rate."""
    optimizer: Literal["adamw", "adamw8bit"] = "adamw"
    """AdamW (fused where the device has it), or with 8-bit state (needs the extra `eightbit`)."""
    betas: tuple[Decay, Decay] = (0.9, 0.999)
    """AdamW's decay rates of the moments."""
    weight_decay: NonNegativeFloat = 0.01
    """AdamW's weight decay."""
    lr_schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Course of the learning rate after the warm-up."""
    warmup_steps: NonNegativeInt = 0
    """Steps over which the learning rate rises linearly from 0."""
    max_grad_norm: PositiveFloat | None = 1.0
    """Gradients of all stages together are clipped to this norm."""
    caption_dropout: Fraction = 0.0
    """Share of the micro-batches that see an empty caption."""
    condition_on_image: bool = True
    """TI2V-5B: keep the first frame clean and out of the loss; FLUX.2: show reference images; false trains
    from text alone."""
    timestep_sampling: Literal["uniform", "bell", "logit_normal"] = "uniform"
    """Uniform over the shifted schedule, the same with bell-shaped loss weights, or logit-normal."""
    shift: PositiveFloat | None = None
    """Shift of the schedule; by default as the model's authors train (Wan: 5, FLUX.2: 2.23)."""
    seed: NonNegativeInt = 0
    """Seed of everything random."""
    save_every: PositiveInt = 100
    """Steps between checkpoints."""
    keep_checkpoints: Annotated[int, Field(ge=2)] = 2
    """Checkpoints that are kept."""
    export_every: PositiveInt | None = None
    """Steps between LoRA files on the way (`<name>-<step>.safetensors`); only the finished one by default."""
    tensorboard: bool = True
    """Write TensorBoard files beside `metrics.jsonl`."""


class EngineConfig(Section):
    """How the transformer is spread over the devices."""

    devices: Annotated[tuple[str, ...], Field(min_length=1)] | None = None
    """One device a stage, for example `["cuda:0", "cuda:1"]`; one may stand twice. All GPUs by default."""
    stages_per_device: PositiveInt | Literal["auto"] = 1
    """Parts of the model on each device; 2 shortens the idle time at both ends of a step and costs memory;
    `auto` takes 2 where the plan says that a step gets clearly shorter."""
    split_at: tuple[PositiveInt, ...] | None = None
    """First block of each stage after the first; on GPUs the plan's choice by default, else even shares."""
    residency: Literal["auto", "keep", "selective", "recompute", "offload", "offload-selective"] = "auto"
    """What each block leaves behind for its backward; `auto` keeps as much as the devices have room for."""
    compile: bool | None = None
    """Compile the blocks: less time and memory after the first step; by default on GPUs."""
    exact: bool = True
    """Let compiled blocks with bf16 weights round and sum where the model's own code does: the LoRA gets the
    gradients that it gets without compiling. `false` makes a step some 2 to 5 % shorter."""
    cpp_wrapper: bool | Literal["auto"] = "auto"
    """Launch compiled blocks from C++, for which the GPUs' threads need not take turns: takes a C++ compiler
    and a longer first step. `auto` does it on Linux, in runs of ten minutes and more that would wait for the
    host, as those on images do."""
    attention: Literal["auto", "cudnn", "flash", "efficient", "deterministic"] = "auto"
    """Attention kernel; `deterministic` makes two runs on GPUs equal to the bit."""
    slack: NonNegativeInt = 1
    """Micro-batches in flight beyond what 1F1B needs: absorbs jitter, costs one more clip's activations."""
    streamed_blocks: tuple[NonNegativeInt, ...] | None = None
    """Blocks of each stage whose weights wait in pinned host memory until they are used; with the residency
    `auto` as many as the plan needs by default."""


class SampleConfig(Section):
    """Previews: what `tworeel sample` renders, and `train` on the way if `every` is set."""

    prompts: tuple[str, ...] = ()
    """What is rendered, one row of the contact sheet each."""
    every: PositiveInt | None = None
    """Steps between previews during training; none by default."""
    strengths: Annotated[tuple[float, ...], Field(min_length=1)] | None = None
    """How much of the LoRA, one column each; by default 1 during training, 0 and 1 by `tworeel sample`."""
    negative_prompt: str = ""
    """What guidance leads away from."""
    image: Path | None = None
    """First frame, for models that start from an image; a reference image for FLUX.2."""
    last_image: Path | None = None
    """Last frame, for Wan 2.1 FLF2V."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """Seed of the noise; the same for each picture."""
    steps: PositiveInt = 20
    """Denoising steps."""
    guidance: PositiveFloat | None = None
    """Guidance scale; the family's by default. Above 1 each step takes two passes."""
    size: tuple[Pixels, Pixels] | None = None
    """Width and height in pixels; `data.resolution` by default."""
    frames: FrameCount | None = None
    """Frames, 4k+1; 1 gives an image. The family's by default."""


class RunConfig(Section):
    """All of a run."""

    model: ModelConfig
    data: DataConfig
    cache: CacheConfig = CacheConfig()
    lora: LoraConfig = LoraConfig()
    train: TrainConfig = TrainConfig()
    engine: EngineConfig = EngineConfig()
    sample: SampleConfig = SampleConfig()
