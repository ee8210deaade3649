"""Modules whose tensors have no data and lie on CPU devices that this machine need not have."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode


def _its_own(_name: str, tensor: Tensor) -> torch.dtype:
    return tensor.dtype


def make_fake(
    module: nn.Module,
    device_of: Callable[[str], torch.device],
    mode: FakeTensorMode,
    dtype_of: Callable[[str, Tensor], torch.dtype] = _its_own,
) -> None:
    """Put a fake tensor in the place of each parameter and buffer: moved afterwards it cannot be.

    Args:
        module: changed in place.
        device_of: a tensor's name -> where it lies.
        mode: of the fake tensors.
        dtype_of: a tensor's name and the tensor -> its dtype.
    """
    with mode:
        for path, part in module.named_modules():
            for table in (part._parameters, part._buffers):
                for leaf, tensor in table.items():
                    if tensor is None:
                        continue
                    name = f"{path}.{leaf}".lstrip(".")
                    made = torch.empty(tensor.shape, dtype=dtype_of(name, tensor), device=device_of(name))
                    is_parameter = isinstance(tensor, nn.Parameter)
                    table[leaf] = nn.Parameter(made, tensor.requires_grad) if is_parameter else made
