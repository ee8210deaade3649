"""FLUX.2's template models: a trained model beside the transformer makes keys and values for its blocks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_diffsynth_variants import Pipe, assert_alike, frozen, gradients_of, inputs_of, loss_of, pipe_of
from torch import Tensor, nn
from variants import HEADS

from tworeel.diffsynth.settings import Settings
from tworeel.diffsynth.splitting import split_pipeline
from tworeel.engine import Pipeline

pytestmark = pytest.mark.usefixtures("diffsynth_package")
TOKENS, WIDTH = 4, 16
"""That a template adds, and of a head."""


def template() -> nn.Module:
    """A model of DiffSynth's kind, which makes keys and values for blocks of both lists."""
    from diffsynth.diffusion.template import TemplateModel

    class Template(TemplateModel):
        def __init__(self) -> None:
            super().__init__()
            size = 2 * TOKENS * HEADS * WIDTH
            names = ("double_0", "double_1", "single_0", "single_3")
            self.blocks = nn.ModuleDict({name: nn.Linear(8, size) for name in names})

        def forward(self, picture: Tensor, **_: Any) -> dict[str, Any]:
            made = {
                name: layer(picture).view(2, 1, TOKENS, HEADS, WIDTH) for name, layer in self.blocks.items()
            }
            return {"kv_cache": {name: tuple(both) for name, both in made.items()}}

    return Template()


def toy_pipe(device: str) -> tuple[Pipe, Callable[[int], Tensor]]:
    """A pipeline on a device, and what computes a micro-batch's loss with it as DiffSynth's unit does."""
    from diffsynth.diffusion.training_module import GeneralUnit_TemplateForward

    toy = frozen("flux2_klein")
    for model in toy.models.values():
        model.to(device)
    pipe = pipe_of("flux2_klein", toy)
    pipe.template_model = template().to(device)
    unit = GeneralUnit_TemplateForward()

    def loss(number: int) -> Tensor:
        picture = torch.randn(1, 8, generator=torch.Generator().manual_seed(number)).to(device)
        made = unit.process(pipe, {"picture": picture})
        return loss_of(pipe.model_fn(**toy.models, **inputs_of(toy, number, device), **made))

    return pipe, loss


def assert_template_is_alike(devices: tuple[str, ...]) -> None:
    """Over `devices`, three micro-batches in flight, against DiffSynth's own on the first of them."""
    whole, their_loss = toy_pipe(devices[0])
    losses = torch.stack([their_loss(number) for number in range(3)])
    losses.sum().backward()
    pipe, our_loss = toy_pipe(devices[0])
    division, _ = split_pipeline(pipe, Settings(devices=devices), checkpointing=True, offload=False)
    pipeline = Pipeline(division, forward=lambda models, number: models(lambda: our_loss(number)))
    result = pipeline.step([0, 1, 2], lambda loss, _: loss)
    torch.testing.assert_close(torch.stack(result.losses).to(devices[0]), losses, rtol=1e-5, atol=0)
    assert_alike(*(gradients_of({"template_model": one.template_model}) for one in (pipe, whole)))


@pytest.mark.parametrize("stages", [2, 3])
def test_a_template_model_has_the_gradients_of_diffsynths_own(stages: int) -> None:
    assert_template_is_alike(("cpu",) * stages)
