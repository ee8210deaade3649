"""Whether each tensor is on the device of the module that uses it, without two devices: the second is `meta`.

Its tensors have no values. Every operation is watched: torch mixes the two where it would not mix two GPUs.
"""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from test_diffsynth_variants import inputs_of, made, pipe_of
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from variants import VARIANTS

from tworeel.diffsynth.settings import Settings
from tworeel.diffsynth.splitting import split_pipeline
from tworeel.engine.placement import Placement
from tworeel.engine.streams import Arrival

pytestmark = pytest.mark.usefixtures("diffsynth_package")
COPIES = {torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default}


class OneDevice(TorchDispatchMode):
    """Fails where an operation gets tensors of two devices; single numbers may come from the host."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor) and leaf.dim()]
        devices = {tensor.device.type for tensor in tensors}
        assert len(devices) < 2 or func in COPIES, f"{func} of {[tuple(t.shape) for t in tensors]}"
        return func(*args, **(kwargs or {}))


@pytest.fixture(autouse=True)
def _weights_may_lose_their_values(monkeypatch: pytest.MonkeyPatch) -> None:
    def move(model: nn.Module, placement: Placement, _streamed: Any) -> None:
        for name, parameter in list(model.named_parameters()):
            owner, _, last = name.rpartition(".")
            moved = parameter.detach().to(placement.device_of(name))
            model.get_submodule(owner)._parameters[last] = nn.Parameter(
                moved, requires_grad=parameter.requires_grad
            )

    monkeypatch.setattr(sys.modules["tworeel.engine.split"], "move", move)
    # Without streams: there is no accelerator.
    plain = lambda tensor, device, _, late: Arrival(tensor.to(device))  # noqa: E731
    monkeypatch.setattr("tworeel.engine.passage.start_copy", plain)
    monkeypatch.setattr("tworeel.engine.passage.mark", lambda _: None)


def test_the_watch_sees_an_operation_on_two_devices() -> None:
    with pytest.raises(AssertionError, match="add"), OneDevice():
        torch.ones(2) + torch.ones(2, device="meta")


@pytest.mark.parametrize("name", VARIANTS)
def test_no_operation_of_a_variant_mixes_devices(name: str) -> None:
    toy = made(name)
    pipe = pipe_of(name, toy)
    settings = Settings(devices=("cpu", "meta"))
    division, _ = split_pipeline(pipe, settings, checkpointing=True, offload=False)
    given = inputs_of(toy)

    def loss() -> Tensor:
        output = pipe.model_fn(**toy.models, **given)
        return nn.functional.mse_loss(output.float(), torch.zeros(output.shape))

    with OneDevice():
        assert division.model(loss).device.type == "meta"
