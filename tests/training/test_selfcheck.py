"""A LoRA that would train to nothing is refused, with the names of what is wrong (R19)."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.optim import SGD, AdamW, Optimizer

from tworeel.config.schema import TrainConfig
from tworeel.data.clips import Bucket
from tworeel.engine import Pipeline, split
from tworeel.lora.inject import base_weight, inject_lora, lora_layers
from tworeel.lora.state import lora_parameters
from tworeel.models.family import TrainingSample
from tworeel.training.loop import Trainer
from tworeel.training.micro_batches import MicroBatch
from tworeel.training.report import SilentRun
from tworeel.training.selfcheck import SelfCheck, SelfCheckError

CPU = torch.device("cpu")
MakeOptimizer = Callable[[nn.Module], Optimizer]


class Toy(nn.Module):
    """Two blocks of one linear layer each."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(6, 6)) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x).tanh()
        return x


def adamw(model: nn.Module) -> Optimizer:
    return AdamW(lora_parameters(model).values(), lr=1e-2)


def make_toy() -> Toy:
    torch.manual_seed(0)
    model = Toy()
    inject_lora(model, rank=2, alpha=2.0, targets=["0"])
    return model


def make_trainer(
    model: nn.Module,
    make_optimizer: MakeOptimizer = adamw,
    after_split: Callable[[nn.Module], None] = lambda model: None,
) -> Trainer:
    pipeline = Pipeline(
        split(model, [CPU, CPU], blocks=["blocks"]), forward=lambda m, b: m(**b.sample.inputs)
    )
    after_split(model)
    config = TrainConfig(learning_rate=1e-2, micro_batches=1)
    return Trainer(pipeline, make_optimizer(model), config, SilentRun())


def batch(step: int, weight: float = 1.0) -> MicroBatch:
    generator = torch.Generator().manual_seed(step)
    inputs = {"x": torch.randn(3, 6, generator=generator)}
    sample = TrainingSample(inputs=inputs, target=torch.randn(3, 6, generator=generator))
    return MicroBatch(
        clip="a.mp4", bucket=Bucket(frames=5, height=64, width=64), sigma=0.5, sample=sample, weight=weight
    )


def refused(trainer: Trainer) -> str:
    with pytest.raises(SelfCheckError) as caught:
        trainer.step(0, [batch(0)])
    return str(caught.value)


def names(model: nn.Module, role: str = "") -> list[str]:
    return [name for name in lora_parameters(model) if name.endswith(role)]


def test_a_healthy_run_passes_and_is_then_left_alone() -> None:
    trainer = make_trainer(make_toy())
    for step in range(3):
        trainer.step(step, [batch(step)])
    for layer in lora_layers(trainer.model).values():
        base_weight(layer).data.add_(1)
    trainer.step(3, [batch(3)])  # only the first two steps are checked


def test_a_lora_on_another_device_than_its_layer_is_refused_before_it_runs() -> None:
    def lose(model: nn.Module) -> None:
        b = lora_layers(model)["blocks.1.0"].lora_B["default"]
        b.weight = nn.Parameter(b.weight.detach().to("meta"))

    message = refused(make_trainer(make_toy(), after_split=lose))
    assert message == "self-check: blocks.1.0.lora_B is on meta, its layer on cpu"


@pytest.mark.parametrize("role", ["lora_A", "lora_B"])
def test_a_frozen_half_is_refused(role: str) -> None:
    model = make_toy()
    for name, parameter in lora_parameters(model).items():
        parameter.requires_grad_(not name.endswith(role))
    message = refused(make_trainer(model))
    assert all(f"self-check: {name} is frozen" in message for name in names(model, role))
    assert message.count("\n") + 1 == len(names(model, role))


def test_a_parameter_that_the_optimizer_lacks_is_refused() -> None:
    model = make_toy()
    forgotten = names(model)[0]
    message = refused(
        make_trainer(
            model, lambda m: SGD([p for n, p in lora_parameters(m).items() if n != forgotten], lr=1.0)
        )
    )
    assert message == f"self-check: {forgotten} is not among the optimizer's parameters"


def test_a_model_without_a_lora_is_refused() -> None:
    model = Toy().requires_grad_(False)
    message = refused(make_trainer(model, lambda m: SGD([nn.Parameter(torch.zeros(1))], lr=1.0)))
    assert message == "self-check: the model has no LoRA"


def test_a_parameter_without_a_gradient_is_refused_before_the_update() -> None:
    model = make_toy()
    layer = lora_layers(model)["blocks.0.0"]
    layer.forward = layer.get_base_layer().forward  # the LoRA stands beside the way
    message = refused(make_trainer(model))
    assert "self-check: blocks.0.0.lora_A got no gradient" in message
    assert "self-check: blocks.0.0.lora_B got no gradient" in message
    assert "blocks.1.0" not in message
    assert not any(p.any() for n, p in lora_parameters(model).items() if n.endswith("lora_B"))


def test_a_b_that_stays_zero_is_refused() -> None:
    model = make_toy()
    lora_layers(model)["blocks.1.0"].scaling["default"] = 0.0
    assert refused(make_trainer(model)) == (
        "self-check: blocks.1.0.lora_B is still zero after an update at rate 0.01"
    )


def test_an_optimizer_that_does_not_move_anything_is_refused() -> None:
    class Idle(SGD):
        def step(self, closure: object = None) -> None:  # type: ignore[override]
            return None

    model = make_toy()
    message = refused(make_trainer(model, lambda m: Idle(lora_parameters(m).values(), lr=1.0)))
    assert all(f"{name} is still zero" in message for name in names(model, "lora_B"))


def test_a_step_without_weight_or_rate_moves_nothing_and_is_no_fault() -> None:
    trainer = make_trainer(make_toy())
    trainer.step(0, [batch(0, weight=0.0)])  # the bell's weight at the highest noise level
    check = SelfCheck(trainer.model, lora_parameters(trainer.model), {}, trainer.optimizer)
    check.after_update(learning_rate=0.0, loss=1.0)
    with pytest.raises(SelfCheckError):
        check.after_update(learning_rate=1e-9, loss=1.0)


def test_a_frozen_weight_that_drifts_is_refused() -> None:
    class Clumsy(AdamW):
        def step(self, closure: object = None) -> None:  # type: ignore[override]
            super().step()
            base_weight(lora_layers(model)["blocks.1.0"]).data[0, 0] += 2**-10

    model = make_toy()
    message = refused(make_trainer(model, lambda m: Clumsy(lora_parameters(m).values(), lr=1e-2)))
    assert message == "self-check: the frozen weight blocks.1.0.base_layer.weight has changed"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("bit", [0, 7])
def test_one_flipped_bit_of_a_frozen_weight_is_seen(dtype: torch.dtype, bit: int) -> None:
    model = make_toy().to(dtype)
    check = SelfCheck(model, lora_parameters(model), {}, adamw(model))
    weight = base_weight(lora_layers(model)["blocks.0.0"])
    weight.data.view(torch.uint8)[2, 3] ^= 1 << bit
    with pytest.raises(SelfCheckError, match=r"frozen weight blocks\.0\.0\.base_layer\.weight has changed"):
        check.after_update(learning_rate=0.0, loss=1.0)


def test_a_frozen_scalar_is_checked_too() -> None:
    model = make_toy()
    model.scale = nn.Parameter(torch.tensor(2.0), requires_grad=False)
    check = SelfCheck(model, lora_parameters(model), {}, adamw(model))
    check.after_update(learning_rate=0.0, loss=1.0)
    model.scale.data.mul_(1.5)
    with pytest.raises(SelfCheckError, match="frozen weight scale has changed"):
        check.after_update(learning_rate=0.0, loss=1.0)


def test_of_many_problems_ten_are_listed_and_the_rest_counted() -> None:
    torch.manual_seed(0)
    model = nn.ModuleDict({"blocks": nn.ModuleList(nn.Linear(2, 2) for _ in range(15))})
    inject_lora(model, rank=1, alpha=1.0, targets=[str(k) for k in range(15)])
    check = SelfCheck(model, lora_parameters(model), {}, adamw(model))
    with pytest.raises(SelfCheckError) as caught:
        check.before_update()
    assert len(caught.value.problems) == 11
    assert caught.value.problems[-1] == "self-check: and 20 more"
