"""Names in the CLIP file of Wan's authors, and the same parameters in transformers' `CLIPVisionModel`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from tworeel.weights.tensor_files import RowRange, TensorFiles, TensorInfo

PREFIX = "visual."
FUSED = "attn.to_qkv"
SPLIT = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
TOP = {
    "cls_embedding": "embeddings.class_embedding",
    "pos_embedding": "embeddings.position_embedding.weight",
    "patch_embedding.weight": "embeddings.patch_embedding.weight",
    "pre_norm.weight": "pre_layrnorm.weight",
    "pre_norm.bias": "pre_layrnorm.bias",
    "post_norm.weight": "post_layernorm.weight",
    "post_norm.bias": "post_layernorm.bias",
}
LAYER = {
    "norm1": "layer_norm1",
    "attn.proj": "self_attn.out_proj",
    "norm2": "layer_norm2",
    "mlp.0": "mlp.fc1",
    "mlp.2": "mlp.fc2",
}
_CPU = torch.device("cpu")
_UNSQUEEZED = ("cls_embedding", "pos_embedding")  # have leading axes of length 1 in the authors' file


@dataclass(frozen=True)
class _Piece:
    """Where a parameter lies: a key, and which third of it if query, key and value are fused."""

    key: str
    third: int | None = None


class OpenClipFiles(TensorFiles):
    """Wan's own CLIP file, seen under the names and shapes of `CLIPVisionModel`."""

    def __init__(self, *paths: Path | str) -> None:
        super().__init__(*paths)
        self._pieces = {name: piece for key in self.names for name, piece in _pieces(key)}
        self.names = {name: _info(self.names[piece.key], piece) for name, piece in self._pieces.items()}

    def read(self, name: str, device: torch.device = _CPU, rows: Sequence[RowRange] | None = None) -> Tensor:
        """Read one parameter, or ranges of its rows, to a device, into memory of its own."""
        piece = self._pieces[name]
        whole = super().read(piece.key, device)
        part = whole if piece.third is None else whole.chunk(3)[piece.third].clone()
        shaped = part.reshape(self.names[name].shape)
        return shaped if rows is None else torch.cat([shaped[first:end] for first, end in rows])


def is_open_clip(names: Iterable[str]) -> bool:
    """Tell whether a file has the names of Wan's own CLIP file."""
    return any(name.startswith(PREFIX) for name in names)


def plain_parameter_name(key: str) -> str | None:
    """Map a key of a file with transformers' names; None for the projection, which Wan does not use."""
    if key.startswith("visual_projection.") or key.endswith("position_ids"):
        return None
    return key.removeprefix("vision_model.")


def _pieces(key: str) -> Iterator[tuple[str, _Piece]]:
    name = key.removeprefix(PREFIX)
    if not key.startswith(PREFIX) or name == "head":
        return  # the text half, the temperature, the projection
    if not name.startswith("transformer."):
        yield TOP.get(name, name), _Piece(key)
        return
    _, index, rest = name.split(".", 2)
    module, _, leaf = rest.rpartition(".")
    if module == FUSED:
        for third, part in enumerate(SPLIT):
            yield f"encoder.layers.{index}.{part}.{leaf}", _Piece(key, third)
    else:
        yield f"encoder.layers.{index}.{LAYER.get(module, module)}.{leaf}", _Piece(key)


def _info(whole: TensorInfo, piece: _Piece) -> TensorInfo:
    shape = whole.shape
    if piece.third is not None:
        shape = (shape[0] // 3, *shape[1:])
    elif piece.key.removeprefix(PREFIX) in _UNSQUEEZED:
        shape = tuple(size for size in shape if size != 1)
    return TensorInfo(shape, whole.dtype)
