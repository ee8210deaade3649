"""Does the run train at all? Looked at in its first two steps, where a LoRA that cannot learn shows itself.

What it guards against has cost others whole runs: adapters left on another device, all-zero B matrices at a
finite loss, frozen weights that drift.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from tworeel.errors import UserError

CHECKED_STEPS = 2


class SelfCheckError(UserError):
    """The run would not train what it should."""


class SelfCheck:
    """Checks the LoRA of one model: before it runs, and before and after the optimizer's step.

    Args:
        model: with the LoRA injected.
        lora: the trained parameters by name (`….lora_A`, `….lora_B`).
        devices: the device that each of them must be on, by the same names.
        optimizer: that trains them.
    """

    def __init__(
        self,
        model: nn.Module,
        lora: Mapping[str, nn.Parameter],
        devices: Mapping[str, torch.device],
        optimizer: Optimizer,
    ) -> None:
        self._frozen = {name: p for name, p in model.named_parameters() if not p.requires_grad}
        self._lora = lora
        self._devices = devices
        self._optimizer = optimizer
        self._sums = {name: _checksum(p) for name, p in self._frozen.items()}

    def before_step(self) -> None:
        """Every A and B is on its layer's device, is not frozen, and the optimizer has it.

        Raises:
            SelfCheckError: lists those that are wrong, also where there is nothing to train.
        """
        _raise(self._setup_problems())

    def before_update(self) -> None:
        """Every A and B has a finite gradient.

        Raises:
            SelfCheckError: lists those that do not.
        """
        _raise(self._gradient_problems())

    def after_update(self, learning_rate: float, loss: float) -> None:
        """Every B has left zero, and no frozen weight has changed.

        Args:
            learning_rate: of the update; at 0 nothing moves.
            loss: of the step; at 0 (bell weights are 0 at the highest noise level) nothing moves either.

        Raises:
            SelfCheckError: lists those that are wrong.
        """
        _raise(self._update_problems(learning_rate, loss))

    def _setup_problems(self) -> Iterator[str]:
        if not self._lora:
            yield "self-check: the model has no LoRA"
        trained = {id(p) for group in self._optimizer.param_groups for p in group["params"]}
        for name, parameter in self._lora.items():
            if parameter.device != self._devices[name]:
                yield f"self-check: {name} is on {parameter.device}, its layer on {self._devices[name]}"
            if not parameter.requires_grad:
                yield f"self-check: {name} is frozen"
            if id(parameter) not in trained:
                yield f"self-check: {name} is not among the optimizer's parameters"

    def _gradient_problems(self) -> Iterator[str]:
        for name, parameter in self._lora.items():
            if parameter.grad is None:
                yield f"self-check: {name} got no gradient"
            elif not torch.isfinite(parameter.grad).all():
                yield f"self-check: the gradient of {name} is not finite"

    def _update_problems(self, learning_rate: float, loss: float) -> Iterator[str]:
        if learning_rate > 0 and loss > 0:
            for name, parameter in self._lora.items():
                if name.endswith("lora_B") and not parameter.any():
                    yield f"self-check: {name} is still zero after an update at rate {learning_rate:g}"
        for name, parameter in self._frozen.items():
            # A streamed weight may have gone to the host since.
            if not torch.equal(_checksum(parameter).cpu(), self._sums[name].cpu()):
                yield f"self-check: the frozen weight {name} has changed"


def _raise(problems: Iterator[str]) -> None:
    found = list(problems)
    if found:
        more = [f"self-check: and {len(found) - 10} more"] if len(found) > 10 else []
        raise SelfCheckError(*found[:10], *more)


def _checksum(tensor: Tensor) -> Tensor:
    """The sum of the tensor's bytes as integers: exact, in any order, without a copy of the tensor."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).sum(dtype=torch.int64)
