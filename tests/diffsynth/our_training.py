"""A micro-batch of `same_case`, trained by what a run of Tworeel does, over two stages."""

from __future__ import annotations

import torch
from same_case import RANK, Case, Trained, noise_of, schedule, source_of
from torch import nn

from tworeel.config.schema import RunConfig
from tworeel.data.clips import Bucket
from tworeel.engine import Pipeline
from tworeel.lora.files import load_lora
from tworeel.lora.inject import inject_lora
from tworeel.lora.state import lora_parameters, start_from
from tworeel.models.family import ModelSource
from tworeel.models.registry import FAMILIES
from tworeel.training.assembly import load_transformer, split_model
from tworeel.training.loadable import Loadable, check_transformer, place_blocks
from tworeel.training.micro_batches import MicroBatch, run_transformer, weighted_loss
from tworeel.training.objective import NoiseLevels
from tworeel.training.preflight import noise_levels


def trained_by_tworeel(case: Case, sampling: str = "bell") -> Trained:
    """From the files to the gradients; starts from the LoRA file that DiffSynth's training wrote."""
    source, config = source_of(case), _config(case, sampling)
    job = _loadable(config, source)
    load_transformer(config, job)
    lora = load_lora(case.lora, case.naming)
    inject_lora(job.transformer, rank=RANK, alpha=RANK, targets=list(lora.modules))
    assert not start_from(job.transformer, lora, str(case.lora))
    pipeline = Pipeline(split_model(config, job, job.transformer), forward=run_transformer)
    result = pipeline.step([_micro_batch(case, config, source)], weighted_loss)
    return Trained(float(result.losses[0]), _gradients(job.transformer))


def _gradients(transformer: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.grad for name, p in lora_parameters(transformer).items() if p.grad is not None}


def _config(case: Case, sampling: str) -> RunConfig:
    return RunConfig.model_validate(
        {
            "model": {"path": str(case.folder), "expert": case.expert, "dtype": "float32"},
            "data": {"sources": ({"path": case.folder},)},
            "train": {"timestep_sampling": sampling},
            "engine": {"devices": ("cpu", "cpu"), "residency": "recompute"},
        }
    )


def _loadable(config: RunConfig, source: ModelSource) -> Loadable:
    family = FAMILIES[source.traits.family]
    transformer = family.build_transformer(source.transformer)
    check_transformer(family, source, transformer)
    placement, streamed = place_blocks(transformer, config, family)
    return Loadable(
        family=family, source=source, transformer=transformer, placement=placement, streamed=streamed
    )


def _micro_batch(case: Case, config: RunConfig, source: ModelSource) -> MicroBatch:
    usual, sigmas = noise_levels(config.train, source.traits), schedule(case).sigmas
    # The range in which this noise level of DiffSynth's schedule is alone.
    low, high = (float(sigmas[case.index] + sigmas[case.index + step]) / 2 for step in (1, -1))
    levels = NoiseLevels(sampling=usual.sampling, shift=usual.shift, sigma_range=(low, high))
    sigma, weight = levels.draw(torch.Generator())
    sample = FAMILIES[source.traits.family].make_sample(
        source.traits,
        case.cached,
        noise_of(case),
        sigma,
        dtype=torch.float32,
        condition_on_image="first_latent" in case.cached or case.kind.family == "flux2",
    )
    return MicroBatch(
        clip="clip", bucket=Bucket(frames=5, height=64, width=64), sigma=sigma, sample=sample, weight=weight
    )
