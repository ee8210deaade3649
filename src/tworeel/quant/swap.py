"""Put quantized layers in the place of a model's linear layers."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from tworeel.quant.frozen import FrozenLinear
from tworeel.quant.scaled import FrozenFp8Linear, FrozenInt8Linear

KINDS = ("fp8", "int8", "nf4")

_LORA = "lora_"


def quantize_blocks(model: nn.Module, kind: str, names: Iterable[str]) -> list[str]:
    """Swap linear layers of `model` in place for frozen ones that keep their weight in 8 or 4 bits.

    What is on the meta device stays there: the new layers quantize what `accept` brings them. Weights that
    are real are quantized now, on their device, one after the other. A LoRA's own layers are never swapped.
    Cast the model before, not after: `model.to(dtype)` would cast an fp8 weight too.

    Args:
        model: any module.
        kind: "fp8" and "int8" multiply in 8 bits where the device can; "nf4" only keeps the weight in 4.
        names: dotted names of linear layers.

    Returns:
        The names of the layers that were swapped.

    Raises:
        ValueError: a name is not that of a linear layer that can be quantized, the kind is not known, or it
            is nf4 and bitsandbytes is not installed. Nothing is swapped then.
    """
    frozen = _class_of(kind)
    own = [name for name in names if _LORA not in name]
    modules = dict(model.named_modules())
    wrong = [name for name in own if not _can_be_quantized(modules.get(name))]
    if wrong:
        raise ValueError(f"{type(model).__name__} has no linear layer to quantize named {', '.join(wrong)}")
    del modules
    for name in own:
        linear = model.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        model.set_submodule(name, frozen.like(linear))
    return own


def block_linears(model: nn.Module, block_lists: Iterable[str]) -> list[str]:
    """Return the names of the linear layers inside the model's lists of blocks: those that may be swapped."""
    lists = tuple(f"{name}." for name in block_lists)
    modules = model.named_modules()
    return [name for name, module in modules if isinstance(module, nn.Linear) and name.startswith(lists)]


def _can_be_quantized(module: nn.Module | None) -> bool:
    return isinstance(module, nn.Linear) and not isinstance(module, FrozenLinear)


def _class_of(kind: str) -> type[FrozenLinear]:
    match kind:
        case "fp8":
            return FrozenFp8Linear
        case "int8":
            return FrozenInt8Linear
        case "nf4":
            return _nf4()
    raise ValueError(f"quantization '{kind}' is not known; there are {', '.join(KINDS)}")


def _nf4() -> type[FrozenLinear]:
    try:
        from tworeel.quant.nf4 import FrozenNf4Linear
    except ImportError as error:
        raise ValueError("nf4 needs bitsandbytes: pip install 'tworeel[eightbit]'") from error
    return FrozenNf4Linear
