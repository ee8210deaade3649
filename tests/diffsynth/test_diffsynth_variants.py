"""DiffSynth's own model functions, unsplit with its checkpointing and split: one loss, the same gradients."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only
from variants import VARIANTS, Toy, model_function

from tworeel.diffsynth.settings import Settings
from tworeel.diffsynth.splitting import split_pipeline
from tworeel.engine import Pipeline
from tworeel.engine.passage import Passage
from tworeel.planning.budgets import budget_of_card
from tworeel.planning.cards import known_cards, parse_cards

pytestmark = pytest.mark.usefixtures("diffsynth_package")
WRONG_WITH_ITS_CHECKPOINTING = {"s2v"}
"""See test_defects.py: without it, DiffSynth is right."""
TRAINED_WHOLE = {"animate": "animate_adapter", "video_as_prompt": "vap", "speed_control": "motion_controller"}
"""What DiffSynth's examples train without a LoRA, where it is not the model that a LoRA is put into."""
MAY_HAVE_NO_GRADIENT = ("dit.cond_encoder.", "vap.blocks.2.")
"""S2V's is of poses, which the clip has none of; of Video-as-Prompt's last block keys and values are used."""


def frozen(name: str) -> Toy:
    """A variant with random weights."""
    torch.manual_seed(0)
    toy = VARIANTS[name]()
    for model in toy.models.values():
        model.eval().requires_grad_(False)
        for parameter in model.parameters():
            if not parameter.any():
                parameter.data.normal_(std=0.05)  # zeros at the start would hide what comes before them
    return toy


def trained_whole(name: str, model: str | None = None) -> Toy:
    """A variant with a model that is trained without a LoRA."""
    toy = frozen(name)
    toy.models[model or TRAINED_WHOLE.get(name, toy.lora_base)].requires_grad_()
    return toy


def made(name: str) -> Toy:
    """A variant with a LoRA as DiffSynth injects it, whose B is not zero."""
    from diffsynth.diffusion.training_module import DiffusionTrainingModule

    toy = frozen(name)
    base = toy.models[toy.lora_base]
    DiffusionTrainingModule().add_lora_to_model(base, list(toy.targets), lora_rank=2)
    for key, parameter in base.named_parameters():
        if "lora_B" in key:
            parameter.data.normal_(std=0.1)
    return toy


def inputs_of(toy: Toy, number: int = 0, device: str = "cpu") -> dict[str, Any]:
    """The inputs of a micro-batch; each has latents of its own, and music."""
    copied = copy.deepcopy(toy.inputs)
    copied["latents"] = copied["latents"] + number
    if "music_feature" in copied:
        copied["music_feature"] = copied["music_feature"] + number
    return tree_map_only(Tensor, lambda tensor: tensor.to(device), copied)


def loss_of(output: Tensor) -> Tensor:
    torch.manual_seed(1)
    return nn.functional.mse_loss(output.float(), torch.randn(output.shape).to(output.device))


def gradients_of(models: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    named = ((f"{name}.{key}", p) for name, model in models.items() for key, p in model.named_parameters())
    return {key: p.grad.cpu() for key, p in named if p.requires_grad and p.grad is not None}


def unsplit(
    name: str, micro_batches: int = 1, device: str = "cpu", build: Callable[[str], Toy] = made
) -> tuple[list[float], dict[str, Tensor]]:
    toy, function, losses = build(name), model_function(name), []
    for model in toy.models.values():
        model.to(device)
    for number in range(micro_batches):
        output = function(
            **toy.models,
            **inputs_of(toy, number, device),
            use_gradient_checkpointing=name not in WRONG_WITH_ITS_CHECKPOINTING,
        )
        loss = loss_of(output)
        loss.backward()
        losses.append(loss.item())
    return losses, gradients_of(toy.models)


class Pipe(nn.Module):
    """What DiffSynth's pipelines are: a module of models, and what is run with them at each step."""

    def __init__(self, model_fn: Callable[..., Any], models: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.model_fn = model_fn
        for name, model in models.items():
            self.add_module(name, model)


def pipe_of(name: str, toy: Toy) -> Pipe:
    return Pipe(model_function(name), toy.models)


def assert_alike(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys() and len(theirs) > 2
    # WanToDance's music has one key a frame: the gradients of its queries and keys are rounding alone.
    rounding = torch.finfo(torch.float32).eps * max(gradient.abs().max() for gradient in theirs.values())
    for key, gradient in theirs.items():
        scale = gradient.abs().max()
        may_be_zero = key.startswith(MAY_HAVE_NO_GRADIENT)
        assert scale > 0 or may_be_zero, f"{key} has no gradient, which shows nothing"
        assert (ours[key] - gradient).abs().max() <= 1e-5 * scale + rounding, key


def assert_split_is_alike(name: str, devices: tuple[str, ...]) -> None:
    """Over `devices`, one micro-batch, against DiffSynth's own on the first of them."""
    losses, theirs = unsplit(name, device=devices[0])
    toy = made(name)
    pipe = pipe_of(name, toy)
    division, _ = split_pipeline(pipe, Settings(devices=devices), checkpointing=True, offload=False)
    given = inputs_of(toy, device=devices[0])
    loss = division.model(
        lambda: loss_of(pipe.model_fn(**toy.models, **given, use_gradient_checkpointing=True))
    )
    loss.backward()
    assert loss.item() == pytest.approx(losses[0], rel=1e-5)
    assert_alike(gradients_of(toy.models), theirs)


def assert_overlapping_is_alike(
    name: str, devices: tuple[str, ...], build: Callable[[str], Toy] = made
) -> None:
    """Over `devices`, three micro-batches in flight, against DiffSynth's own one after the other."""
    losses, theirs = unsplit(name, micro_batches=3, device=devices[0], build=build)
    toy = build(name)
    pipe = pipe_of(name, toy)
    division, _ = split_pipeline(pipe, Settings(devices=devices), checkpointing=True, offload=False)
    pipeline = Pipeline(
        division, forward=lambda models, given: models(lambda: loss_of(pipe.model_fn(**toy.models, **given)))
    )
    batches = [inputs_of(toy, number, devices[0]) for number in range(3)]
    result = pipeline.step(batches, lambda loss, _: loss)
    assert [loss.item() for loss in result.losses] == pytest.approx(losses, rel=1e-5)
    assert_alike(gradients_of(toy.models), theirs)


@pytest.fixture(autouse=True)
def _modules_run_in_the_order_of_their_stages(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that does not would keep a stage from being busy with another micro-batch."""
    arrive = Passage.arrive

    def checked(self: Passage, stage: int, inputs: Any, *, block: bool) -> Any:
        assert stage >= self.stage, "the forward went back to an earlier stage"
        return arrive(self, stage, inputs, block=block)

    monkeypatch.setattr(Passage, "arrive", checked)


@pytest.mark.parametrize("stages", [2, 3])
@pytest.mark.parametrize("name", VARIANTS)
def test_a_split_variant_has_the_loss_and_gradients_of_diffsynths_own(name: str, stages: int) -> None:
    assert_split_is_alike(name, ("cpu",) * stages)


@pytest.mark.parametrize("stages", [2, 3])
@pytest.mark.parametrize("name", VARIANTS)
def test_micro_batches_that_overlap_have_the_losses_and_gradients_of_one_after_the_other(
    name: str, stages: int
) -> None:
    assert_overlapping_is_alike(name, ("cpu",) * stages)


@pytest.mark.parametrize("name", VARIANTS)
def test_a_model_that_is_trained_whole_has_the_gradients_of_diffsynths_own(name: str) -> None:
    assert_overlapping_is_alike(name, ("cpu", "cpu"), build=trained_whole)


def test_animates_transformer_is_trained_whole_too_though_its_embedding_is_written_into() -> None:
    assert_overlapping_is_alike("animate", ("cpu", "cpu"), build=partial(trained_whole, model="dit"))


@pytest.mark.parametrize("name", VARIANTS)
def test_on_gpus_a_variant_is_shared_out_by_what_they_have(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = [budget_of_card(card, i) for i, card in enumerate(parse_cards("2x RTX 4090", known_cards()))]
    monkeypatch.setattr("tworeel.diffsynth.splitting.budgets", lambda devices: known)
    pipe = pipe_of(name, made(name))
    division, _ = split_pipeline(pipe, Settings(devices=("cpu", "cpu")), checkpointing=True, offload=False)
    first, last = (len(division.placement.blocks_of(stage)) for stage in (0, 1))
    assert first > 0 and last > 0
