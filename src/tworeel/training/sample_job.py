"""Everything that can be known to be wrong with `tworeel sample` before a weight is read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from tworeel.config.schema import RunConfig
from tworeel.errors import UserError, collected, raise_if_any
from tworeel.lora.attach import attach_problems
from tworeel.lora.files import load_lora
from tworeel.lora.naming import Naming
from tworeel.lora.tensors import LoraFile
from tworeel.models.family import Family, ModelSource
from tworeel.models.locate import locate_model
from tworeel.sampling.files import SHEET
from tworeel.sampling.request import SampleRequest, make_request, require_sampling
from tworeel.training.by_weights import placed_by_weights
from tworeel.training.loadable import Loadable, check_transformer, place_blocks, require_quantization
from tworeel.training.preflight import cache_folder, model_request
from tworeel.training.run_folder import RunFolder, make_writable, require_no_file

STRENGTHS = (0.0, 1.0)
"""Without and with the LoRA."""


@dataclass(frozen=True, kw_only=True)
class Turn(Loadable):
    """A transformer, and the LoRA that it gets."""

    lora: LoraFile | None


@dataclass(frozen=True, kw_only=True)
class SampleJob:
    """What will be rendered, and with which transformers."""

    turns: tuple[Turn, ...]
    """The experts in the order of their turns; one where the model has none."""
    request: SampleRequest
    folder: Path

    @property
    def family(self) -> Family:
        return self.turns[0].family

    @property
    def source(self) -> ModelSource:
        """Of the first transformer; the encoders are the same for each."""
        return self.turns[0].source


def sample_preflight(
    config: RunConfig, loras: Mapping[str | None, Path], folder: Path, *, single_expert: bool = False
) -> SampleJob:
    """Look at everything that a rendering needs, and make its folder.

    Args:
        config: of the run.
        loras: LoRA files by expert; that of None is for the expert of the configuration. Without any, the
            run's own is taken.
        folder: that is written to.
        single_expert: render with the configuration's expert alone.

    Raises:
        UserError: lists every problem of the model, the devices, the LoRAs, the request and the folder.
    """
    problems: list[str] = []
    turns: list[Turn] = []
    request: SampleRequest | None = None
    needed = {folder: "the contact sheet", cache_folder(config): "the cache"}
    for place, what in needed.items():
        with collected(problems):
            require_no_file(place, what)
    if (folder / SHEET).exists():
        problems.append(f"{folder}: holds a contact sheet already; choose another folder")
    with collected(problems):
        require_quantization(config)
    with collected(problems):
        family, source = locate_model(model_request(config))
        with collected(problems):
            request = make_request(config, family, source.traits, STRENGTHS)
        with collected(problems):
            sources = _sources(config, family, source, single_expert=single_expert)
            paths = _lora_paths(config, sources, loras)
            for expert, expert_source in sources.items():
                turns += _turn(config, family, expert_source, paths.get(expert), problems)
    raise_if_any(dict.fromkeys(problems))
    assert request is not None, "neither a request nor a problem"
    _require_lora(config, turns, request)
    for place, what in needed.items():
        make_writable(place, what)
    placed = tuple(placed_by_weights(turn, config) for turn in turns)
    return SampleJob(turns=placed, request=request, folder=folder)


def _sources(
    config: RunConfig, family: Family, source: ModelSource, *, single_expert: bool
) -> dict[str | None, ModelSource]:
    """The model's transformers by expert, in the order of their turns."""
    experts = require_sampling(family).experts(source.traits)
    if single_expert or not experts:
        return {source.traits.expert: source}
    found: dict[str | None, ModelSource] = {}
    for expert in experts:
        if expert == source.traits.expert:
            found[expert] = source
            continue
        try:
            found[expert] = locate_model(replace(model_request(config), expert=expert))[1]
        except UserError as error:
            hint = "give the folder with both experts, or render with --single-expert"
            raise UserError(*error.problems, f"model.path = '{config.model.path}': {hint}") from None
    return found


def _lora_paths(
    config: RunConfig, sources: Mapping[str | None, ModelSource], given: Mapping[str | None, Path]
) -> dict[str | None, Path]:
    """LoRA files by expert; those of the command line, or else the run's own."""
    trained = config.model.expert if config.model.expert in sources else next(iter(sources))
    if not given:
        own = RunFolder(config.train.output).lora(config.train.name)
        return {trained: own} if own.is_file() else {}
    named = {trained if expert is None else expert: path for expert, path in given.items()}
    known = ", ".join(str(expert) for expert in sources if expert) or "none"
    raise_if_any(
        f"--expert-lora {expert}={path}: no such expert is rendered with; there are: {known}"
        for expert, path in named.items()
        if expert not in sources
    )
    return named


def _turn(
    config: RunConfig, family: Family, source: ModelSource, path: Path | None, problems: list[str]
) -> list[Turn]:
    """One transformer, or none and its problems."""
    before = len(problems)
    lora: LoraFile | None = None
    transformer = family.build_transformer(source.transformer)
    with collected(problems):
        check_transformer(family, source, transformer)
    with collected(problems):
        if path is not None:
            lora = load_lora(path, Naming.of(family))
            raise_if_any([*attach_problems(lora, transformer, str(path)), *_foreign(lora, path, source)])
    with collected(problems):
        placement, streamed = place_blocks(transformer, config, family)
    if len(problems) > before:
        return []
    return [
        Turn(
            family=family,
            source=source,
            transformer=transformer,
            placement=placement,
            streamed=streamed,
            lora=lora,
        )
    ]


def _foreign(lora: LoraFile, path: Path, source: ModelSource) -> list[str]:
    """A LoRA fits either expert; its metadata knows better."""
    trained = lora.metadata.get("tworeel.expert")
    if trained in (None, source.traits.expert):
        return []
    hint = f"give it as --expert-lora {trained}={path}"
    return [f"{path}: was trained on the {trained}-noise expert, not on '{source.traits.expert}'; {hint}"]


def _require_lora(config: RunConfig, turns: list[Turn], request: SampleRequest) -> None:
    if any(request.strengths) and all(turn.lora is None for turn in turns):
        own = RunFolder(config.train.output).lora(config.train.name)
        raise UserError(f"{own}: there is no LoRA yet; give one with --lora, or render with --strength 0")
