"""The parts of a run, each made from the configuration and the plan: cache, model, micro-batches."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from tworeel.cache.build import CacheIndex, build_cache
from tworeel.cache.store import CacheStore
from tworeel.config.schema import RunConfig
from tworeel.lora.inject import inject_lora
from tworeel.training.devices import resolve_devices
from tworeel.training.micro_batches import MicroBatches
from tworeel.training.order import Order
from tworeel.training.preflight import Plan, cache_folder, noise_levels, torch_dtype, transformer_names
from tworeel.training.report import RunObserver
from tworeel.training.space import full_disk_as_user_error
from tworeel.weights.loading import load_weights
from tworeel.weights.tensor_files import TensorFiles


def cache_clips(config: RunConfig, plan: Plan, observer: RunObserver) -> CacheIndex:
    """Encode what the cache does not hold yet; the encoders are gone when it returns.

    Raises:
        UserError: a clip cannot be encoded, or the disk is full.
    """
    folder = cache_folder(config)
    with full_disk_as_user_error(folder, "the cache", "what it holds already is intact"):
        return build_cache(
            CacheStore(folder),
            plan.family,
            plan.source,
            plan.clips,
            devices=list(dict.fromkeys(resolve_devices(config.cache.devices or config.engine.devices))),
            dtype=torch_dtype(config.cache.dtype),
            empty_caption=config.train.caption_dropout > 0,
            observer=observer,
        )


def load_model(config: RunConfig, plan: Plan, poll: Callable[[], None] = lambda: None) -> nn.Module:
    """Load the transformer, each tensor straight to its stage's device, and put the LoRA into it.

    Args:
        config: of the run.
        plan: of the same; its transformer is filled.
        poll: called before each tensor; may raise to stop.
    """
    base = torch_dtype(config.model.dtype)
    keep = set(plan.family.keep_fp32)

    def device_of(name: str) -> torch.device:
        poll()
        return plan.placement.device_of(name)

    load_weights(
        plan.transformer,
        TensorFiles(*plan.source.transformer.files),
        transformer_names(plan.family, plan.source),
        device_of=device_of,
        dtype_of=lambda name: torch.float32 if keep & set(name.split(".")) else base,
    )
    inject_lora(
        plan.transformer,
        rank=config.lora.rank,
        alpha=config.lora.alpha or config.lora.rank,
        targets=plan.targets,
        rslora=config.lora.rslora,
        dora=config.lora.dora,
        seed=config.train.seed,
    )
    return plan.transformer


def make_micro_batches(config: RunConfig, plan: Plan, index: CacheIndex) -> MicroBatches:
    """All steps' micro-batches, as the configuration wants them drawn."""
    return MicroBatches(
        family=plan.family,
        traits=plan.source.traits,
        clips=plan.clips,
        index=index,
        order=Order(plan.clips, [s.weight * s.repeats for s in config.data.sources], config.train.seed),
        levels=noise_levels(config.train, plan.source.traits),
        config=config.train,
        dtype=torch_dtype(config.model.dtype),
    )
