"""Everything that can be known to be wrong before a weight is read: all of it is said at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from tworeel.cache.text_workers import text_option_problems
from tworeel.config.schema import RunConfig, TrainConfig
from tworeel.data.clips import Clip
from tworeel.data.metadata import is_read_whole, read_source
from tworeel.data.scan import Scan, scan
from tworeel.engine import Placement
from tworeel.errors import UserError, collected, raise_if_any
from tworeel.lora.files import load_lora
from tworeel.lora.fusing import missing_parts
from tworeel.lora.naming import Naming
from tworeel.lora.state import start_problems
from tworeel.lora.targets import find_targets
from tworeel.lora.tensors import LoraFile
from tworeel.models.family import Family, ModelRequest, ModelSource, TextOptions, Traits
from tworeel.models.locate import locate_model
from tworeel.sampling.request import SampleRequest, make_request
from tworeel.training.devices import resolve_devices
from tworeel.training.loadable import (
    Loadable,
    check_transformer,
    place_blocks,
    require_launcher,
    require_quantization,
)
from tworeel.training.objective import NoiseLevels
from tworeel.training.optimizer import require_optimizer
from tworeel.training.run_folder import RunFolder, make_writable, require_no_file, require_writable
from tworeel.training.space import RESULTS, require_space, space_of_results
from tworeel.workers import Observer


@dataclass(frozen=True, kw_only=True)
class Job(Loadable):
    """What a run will work on; nothing but headers, configs and the clips themselves has been read."""

    scan: Scan
    targets: tuple[str, ...]
    """Names of the linear layers that the LoRA adapts."""
    init_from: LoraFile | None
    previews: SampleRequest | None = None
    """What is rendered on the way."""

    @property
    def clips(self) -> tuple[Clip, ...]:
        return self.scan.clips

    @property
    def naming(self) -> Naming:
        """How the family's layers are called in LoRA files."""
        return Naming.of(self.family)


def model_request(config: RunConfig) -> ModelRequest:
    """What the configuration says of the model."""
    return ModelRequest(**config.model.model_dump(exclude={"dtype", "quantize"}))


def cache_folder(config: RunConfig) -> Path:
    """Where latents and text embeddings are kept."""
    return config.cache.folder or config.train.output.parent / "cache"


def text_options(config: RunConfig) -> TextOptions:
    """How the configuration wants captions embedded."""
    return TextOptions(placement=config.cache.text_placement, quantize=config.cache.text_quantize)


def lora_targets(family: Family, config: RunConfig) -> tuple[str, ...]:
    """The patterns of the LoRA's targets: those given, or the family's preset of that name.

    Raises:
        UserError: there is no preset of that name.
    """
    targets = config.lora.targets
    if not isinstance(targets, str):
        return targets
    if targets not in family.lora_presets:
        presets = ", ".join(family.lora_presets)
        raise UserError(f"lora.targets = '{targets}': no preset of {family.name}; allowed are {presets}")
    return family.lora_presets[targets]


def noise_levels(config: TrainConfig, traits: Traits) -> NoiseLevels:
    """How noise levels are drawn for this model."""
    return NoiseLevels(
        sampling=config.timestep_sampling,
        shift=config.shift or traits.training_shift,
        usual_shift=traits.training_shift,
        sigma_range=traits.sigma_range,
    )


@dataclass(frozen=True, kw_only=True)
class Survey:
    """What was found, and everything that is wrong with it; only without problems there is a job."""

    problems: tuple[str, ...]
    source: ModelSource | None = None
    scan: Scan | None = None
    job: Job | None = None


def preflight(config: RunConfig, observer: Observer, known: Sequence[str] = ()) -> Job:
    """Look at everything that a run needs, make the cache's folder, and make a job.

    Args:
        config: of the run.
        observer: sees the progress, and may stop it.
        known: problems that were found before; they are listed with the others.

    Raises:
        UserError: lists every problem of the model, the devices, the LoRA, the data and the cache's folder.
    """
    found = survey(config, observer)
    problems = [*known, *found.problems]
    with collected(problems):
        make_writable(cache_folder(config), "the cache")
    raise_if_any(dict.fromkeys(problems))  # a file in the cache's place was found already
    assert found.job is not None, "neither a job nor a problem"
    return found.job


def survey(config: RunConfig, observer: Observer, devices: Sequence[torch.device] | None = None) -> Survey:
    """Look at everything that a run needs, and find out all that is wrong with it. Nothing is written.

    Args:
        config: of the run.
        observer: sees the progress, and may stop it.
        devices: stand for the configuration's, and need not be there, nor packages that only a run needs;
            none of them where it is not known which.
    """
    problems: list[str] = []
    if devices is None:
        problems += _problems_of_installation(config)
    require = require_writable if devices is None else require_no_file
    for folder, what in ((config.train.output, "a run"), (cache_folder(config), "the cache")):
        with collected(problems):
            require(folder, what)
    problems += _problems_of_place(config)
    with collected(problems):
        RunFolder(config.train.output).lora(config.train.name)
    with collected(problems):
        if devices is None and config.cache.devices:
            resolve_devices(config.cache.devices, "cache.devices")
    with collected(problems):
        found = locate_model(model_request(config))
        return _survey_model(config, *found, problems, observer, devices)
    problems += _problems_without_model(config, devices)
    return Survey(problems=tuple(problems))


def _problems_of_place(config: RunConfig) -> list[str]:
    """A run's own pictures and previews are no clips."""
    output = config.train.output.resolve()
    return [
        f"train.output = '{config.train.output}': lies in the dataset's folder {source.path}, where a run's "
        "pictures would be taken for clips; choose another --output"
        for source in config.data.sources
        if is_read_whole(source.path) and output.is_relative_to(source.path.resolve())
    ]


def _problems_of_installation(config: RunConfig) -> list[str]:
    """Which packages and compilers the run lacks."""
    problems: list[str] = []
    with collected(problems):
        require_optimizer(config.train)
    with collected(problems):
        require_quantization(config)
    with collected(problems):
        require_launcher(config)
    return problems


def _survey_model(
    config: RunConfig,
    family: Family,
    source: ModelSource,
    problems: list[str],
    observer: Observer,
    devices: Sequence[torch.device] | None,
) -> Survey:
    placed: tuple[Placement, tuple[int, ...]] | None = None
    found: Scan | None = None
    init_from: LoraFile | None = None
    previews: SampleRequest | None = None
    transformer = family.build_transformer(source.transformer)
    with collected(problems):
        check_transformer(family, source, transformer)
    with collected(problems):
        if config.sample.every is not None:
            previews = make_request(config, family, source.traits, strengths=(1.0,))
    with collected(problems):
        init_from = load_lora(config.lora.init_from, Naming.of(family)) if config.lora.init_from else None
    with collected(problems):
        targets = find_targets(transformer, lora_targets(family, config), family.block_lists)
        problems += _form_problems(config, family, targets)
        raise_if_any(_rank_problems(config.lora.rank, transformer, targets))
        if devices is None:
            lora, keep = _lora_bytes(config, transformer, targets), config.train.keep_checkpoints
            needed = space_of_results(lora, keep, RunFolder(config.train.output).checkpoints)
            require_space(config.train.output, needed, RESULTS)
        if init_from is not None:
            raise_if_any(_start_problems(init_from, config, transformer, targets))
    problems += text_option_problems(family, text_options(config))
    with collected(problems):
        if devices is None or devices:
            placed = place_blocks(transformer, config, family, devices)
    with collected(problems):
        found = scan(config.data, source.traits, observer=observer)
        problems += found.problems
    with collected(problems):
        noise_levels(config.train, source.traits).require_some()
    if problems or found is None or placed is None:
        return Survey(problems=tuple(problems), source=source, scan=found)
    placement, streamed = placed
    job = Job(
        family=family,
        source=source,
        scan=found,
        transformer=transformer,
        placement=placement,
        streamed=streamed,
        targets=tuple(targets),
        init_from=init_from,
        previews=previews,
    )
    return Survey(problems=(), source=source, scan=found, job=job)


def _problems_without_model(config: RunConfig, devices: Sequence[torch.device] | None) -> list[str]:
    """What is wrong with the devices and the datasets' files: that much needs no model."""
    problems: list[str] = []
    with collected(problems):
        if devices is None:
            resolve_devices(config.engine.devices)
    for source in config.data.sources:
        with collected(problems):
            listing = read_source(source.path)
            problems += [*listing.problems, *([] if config.data.skip_broken else listing.broken)]
    return problems


def _form_problems(config: RunConfig, family: Family, targets: Sequence[str]) -> list[str]:
    """Say which targets the finished LoRA's file could not hold: better now than after the training."""
    parts = missing_parts(targets, Naming.of(family)) if config.lora.dora else []
    return [f"lora.targets: with lora.dora = true, '{part}' must be among them too" for part in parts]


def _rank_problems(rank: int, transformer: nn.Module, targets: Sequence[str]) -> list[str]:
    weights = (transformer.get_submodule(name).get_parameter("weight") for name in targets)
    most = max(min(weight.shape) for weight in weights)
    return [f"lora.rank = {rank}: at most {most}, the rank of the model's own layers"] if rank > most else []


def _lora_bytes(config: RunConfig, transformer: nn.Module, targets: Sequence[str]) -> int:
    """In fp32: two matrices a layer, of which one side each is the rank."""
    weights = (transformer.get_submodule(name).get_parameter("weight") for name in targets)
    return 4 * config.lora.rank * sum(sum(weight.shape) for weight in weights)


def _start_problems(
    lora: LoraFile, config: RunConfig, transformer: nn.Module, targets: Sequence[str]
) -> list[str]:
    shapes = {name: transformer.get_submodule(name).get_parameter("weight").shape for name in targets}
    sizes = {name: (inputs, outputs) for name, (outputs, inputs) in shapes.items()}
    source = str(config.lora.init_from)
    return start_problems(lora, sizes, source, rank=config.lora.rank, dora=config.lora.dora)
