"""The parts of a run, each made from the configuration and the job: cache, model, micro-batches."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import nn

from tworeel.cache.build import CacheIndex, build_cache
from tworeel.cache.store import CacheStore
from tworeel.config.schema import RunConfig
from tworeel.engine import Placement, Split, split
from tworeel.host_memory import HOST_LIMIT, available_memory
from tworeel.lora.inject import inject_lora
from tworeel.quant import block_linears, quantize_blocks
from tworeel.training.devices import resolve_devices
from tworeel.training.loadable import Loadable, of_options, torch_dtype, transformer_names
from tworeel.training.micro_batches import MicroBatches
from tworeel.training.order import Order
from tworeel.training.preflight import Job, cache_folder, noise_levels, text_options
from tworeel.training.report import RunObserver
from tworeel.training.space import full_disk_as_user_error
from tworeel.weights.loading import load_weights
from tworeel.weights.tensor_files import TensorFiles


def encoding_devices(config: RunConfig) -> list[torch.device]:
    """The devices that encode, each once."""
    own = config.cache.devices
    named = resolve_devices(own, "cache.devices") if own else resolve_devices(config.engine.devices)
    return list(dict.fromkeys(named))


def cache_clips(config: RunConfig, job: Job, observer: RunObserver) -> CacheIndex:
    """Encode what the cache does not hold yet; the encoders are gone when it returns.

    Raises:
        UserError: a clip cannot be encoded, or the disk is full.
    """
    folder = cache_folder(config)
    with full_disk_as_user_error(folder, "the cache", "what it holds already is intact"):
        return build_cache(
            CacheStore(folder),
            job.family,
            job.source,
            job.clips,
            devices=encoding_devices(config),
            dtype=torch_dtype(config.cache.dtype),
            empty_caption=config.train.caption_dropout > 0,
            text=text_options(config),
            observer=observer,
        )


def load_transformer(config: RunConfig, job: Loadable, poll: Callable[[], None] = lambda: None) -> None:
    """Load the transformer, each tensor straight to its stage's device, in the precision that is configured.

    Args:
        config: says the precisions.
        job: its transformer is filled.
        poll: called before each tensor; may raise to stop.
    """
    base = torch_dtype(config.model.dtype)
    keep = set(job.family.keep_fp32)
    waiting = tuple(f"{job.placement.block_names[i]}." for i in job.streamed)
    if config.model.quantize is not None:
        quantize_blocks(
            job.transformer, config.model.quantize, block_linears(job.transformer, job.family.block_lists)
        )

    def device_of(name: str) -> torch.device:
        poll()
        return torch.device("cpu") if name.startswith(waiting) else job.placement.device_of(name)

    load_weights(
        job.transformer,
        TensorFiles(*job.source.transformer.files),
        transformer_names(job.family, job.source),
        device_of=device_of,
        dtype_of=lambda name: torch.float32 if keep & set(name.split(".")) else base,
        # Weights that are going to wait in host memory, too, are quantized where that is fast.
        accepted_on=job.placement.device_of,
    )


def load_model(config: RunConfig, job: Job, poll: Callable[[], None] = lambda: None) -> nn.Module:
    """Load the transformer, each tensor straight to its stage's device, and put the LoRA into it.

    Args:
        config: of the run.
        job: of the same; its transformer is filled.
        poll: called before each tensor; may raise to stop.
    """
    load_transformer(config, job, poll)
    inject_lora(
        job.transformer,
        rank=config.lora.rank,
        alpha=config.lora.alpha or config.lora.rank,
        targets=job.targets,
        rslora=config.lora.rslora,
        dora=config.lora.dora,
        seed=config.train.seed,
    )
    return job.transformer


def keep_compiled(cache: Path) -> None:
    """Let what is compiled from now on be kept in a cache folder, for later runs.

    The system may clear torch's usual place, a temporary folder, at every start.
    """
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache.absolute() / "compiled"))


def host_limit(model: nn.Module, placement: Placement, streamed: Sequence[int]) -> int:
    """Bytes of host memory that may be pinned.

    Args:
        model: that is loaded.
        placement: of its blocks.
        streamed: positions of those that wait in host memory already, and are pinned there.
    """
    waiting = [model.get_submodule(placement.block_names[i]) for i in streamed]
    weights = sum(parameter.nbytes for block in waiting for parameter in block.parameters())
    return int(HOST_LIMIT * (available_memory() + weights))


def split_model(config: RunConfig, job: Loadable, model: nn.Module) -> Split:
    """Spread the loaded transformer over the devices, as the configuration wants its blocks run.

    Raises:
        UserError: there is too little host memory for the weights that are streamed.
    """
    devices, engine = job.placement.devices, config.engine
    compile = any(device.type != "cpu" for device in devices) if engine.compile is None else engine.compile
    keep_compiled(cache_folder(config))
    try:
        return split(
            model,
            devices,
            at=job.placement.boundaries[1:-1],
            blocks=job.family.block_lists,
            residency=engine.residency,
            compile=compile,
            cpp_wrapper=compile and job.cpp_wrapper,
            exact=engine.exact,
            streamed=job.streamed_counts,
            may_stream=engine.streamed_blocks is None,
            host_limit=host_limit(model, job.placement, job.streamed),
        )
    except ValueError as error:
        raise of_options(error) from None


def make_micro_batches(config: RunConfig, job: Job, index: CacheIndex) -> MicroBatches:
    """All steps' micro-batches, as the configuration wants them drawn."""
    return MicroBatches(
        family=job.family,
        traits=job.source.traits,
        clips=job.clips,
        index=index,
        order=Order(job.clips, [s.weight * s.repeats for s in config.data.sources], config.train.seed),
        levels=noise_levels(config.train, job.source.traits),
        config=config.train,
        dtype=torch_dtype(config.model.dtype),
    )
