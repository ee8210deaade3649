"""The finished LoRA gives in diffusers the output that the trainer's own model has (R20)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import WanTransformer3DModel
from diffusers.pipelines.wan.pipeline_wan import WanPipeline
from diffusers.pipelines.wan.pipeline_wan_i2v import WanImageToVideoPipeline
from peft.tuners.lora.layer import Linear as LoraLinear
from tiny_runs import ITS_CLIPS, T2V, lora_of
from torch import Tensor, nn

from tworeel.config.schema import ModelConfig, RunConfig
from tworeel.lora.inject import lora_layers
from tworeel.lora.state import load_lora_state
from tworeel.training.assembly import cache_clips, load_model, make_micro_batches
from tworeel.training.checkpoint import CheckpointStore
from tworeel.training.preflight import preflight
from tworeel.training.report import SilentRun
from tworeel.training.run import train

MakeConfig = Callable[..., RunConfig]
MakeModel = Callable[..., ModelConfig]


def trained_model(config: RunConfig) -> tuple[nn.Module, dict[str, Any]]:
    """The model as the run had it after its last step, and inputs of a micro-batch."""
    job = preflight(config, SilentRun())
    batches = make_micro_batches(config, job, cache_clips(config, job, SilentRun()))
    model = load_model(config, job)
    checkpoint, _ = CheckpointStore(config.train.output / "checkpoints").newest_intact()
    assert checkpoint is not None and checkpoint.step == config.train.steps
    load_lora_state(model, checkpoint.tensors["lora"])
    return model, batches.of_step(100)[0].sample.inputs


def in_diffusers(folder: Path, subfolder: str, pipeline: type[Any], lora: Path) -> tuple[Any, int]:
    """Diffusers' own transformer with the LoRA, and how many tensors of it diffusers has taken."""
    transformer = WanTransformer3DModel.from_pretrained(folder, subfolder=subfolder).float()
    parts = dict.fromkeys(("tokenizer", "text_encoder", "vae", "scheduler"))
    pipe = pipeline(**parts, transformer=transformer)
    pipe.load_lora_weights(lora)
    layers = [module for module in transformer.modules() if isinstance(module, LoraLinear)]
    return transformer, 2 * len(layers)


@torch.no_grad()
def output(model: nn.Module, inputs: dict[str, Any]) -> Tensor:
    result: Tensor = model(**inputs, return_dict=False)[0]
    return result


@pytest.mark.parametrize(
    ("variant", "subfolder", "lora"),
    [
        (T2V, "transformer", {}),
        (T2V, "transformer", {"rslora": True, "alpha": 5.0}),
        ("wan2.1-i2v-14b", "transformer", {"targets": "all-linear-image"}),
        ("wan2.2-i2v-a14b", "transformer_2", {}),
        ("wan2.2-ti2v-5b", "transformer", {"targets": "attention"}),
    ],
)
def test_diffusers_gives_the_trainers_own_output(
    make_config: MakeConfig,
    make_model: MakeModel,
    variant: str,
    subfolder: str,
    lora: dict[str, Any],
) -> None:
    model_config = make_model(variant, "diffusers")
    if subfolder == "transformer_2":
        model_config = model_config.model_copy(update={"expert": "low"})
    # A rate at which the LoRA counts for far more than rounding
    config = make_config(model=model_config, data=ITS_CLIPS, lora=lora, train={"learning_rate": 2e-2})
    path = train(config).lora
    ours, inputs = trained_model(config)
    pipeline = WanImageToVideoPipeline if "i2v" in variant and "ti2v" not in variant else WanPipeline
    theirs, taken = in_diffusers(Path(model_config.path), subfolder, pipeline, path)

    weights = [name for name in lora_of(config) if not name.endswith("alpha")]
    assert taken == len(weights) == 2 * len(lora_layers(ours))
    expected, found = output(ours, inputs), output(theirs, inputs)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    theirs.disable_adapters()
    difference = (output(theirs, inputs) - expected).abs().max()
    assert difference > 1e-3, "the LoRA would not be missed"
