"""A text encoder whose weights stay in their files: for machines that can hold it nowhere.

Each module reads its weights before it runs and drops them behind it, through accelerate's hooks, so that
memory never holds more than one weight (and the fp32 copy that an 8-bit one is dequantized through). What the
system keeps of the files in its page cache does not have to be read from the disk again for the next caption.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from accelerate.hooks import attach_align_device_hook
from torch import Tensor, nn

from tworeel.weights.scaled_fp8 import Dequantized
from tworeel.weights.tensor_files import TensorFiles


class WeightsOnDisk(Mapping[str, Tensor]):
    """The tensors of a network by its parameters' names, read anew each time they are asked for."""

    def __init__(
        self, files: TensorFiles, keys: Mapping[str, str], device: torch.device, dtype: torch.dtype
    ) -> None:
        """Read nothing yet.

        Args:
            files: where the tensors are, possibly in `fp8_scaled` form.
            keys: the key in the files for each parameter.
            device: where they are read to.
            dtype: what they are rounded to.
        """
        self._source = Dequantized(files)
        self._keys = keys
        self._device = device
        self._dtype = dtype

    def __getitem__(self, name: str) -> Tensor:
        return self._source.read(self._keys[name], self._dtype, self._device)

    def __iter__(self) -> Iterator[str]:
        return iter(self._keys)

    def __len__(self) -> int:
        return len(self._keys)


def stream_from_disk(
    model: nn.Module, files: TensorFiles, keys: Mapping[str, str], device: torch.device, dtype: torch.dtype
) -> None:
    """Let a network on the meta device read its weights while it runs on `device`; arguments as above."""
    weights = WeightsOnDisk(files, keys, device, dtype)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)  # what is read takes the dtype of what it replaces
    attach_align_device_hook(model, execution_device=device, offload=True, weights_map=weights)
