"""Stand-ins with the call shapes of trainers that cannot be installed beside the tests.

The model is called and built as FLUX.2's original code: modulations are listed behind the blocks and run
before them, and the result of the blocks goes back to where the modulation is.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

PAGE = Path(__file__).parents[2] / "docs" / "other-trainers.md"
WIDTH = 8


def example(needle: str) -> str:
    """The page's Python block that has these words, for two CPU devices."""
    blocks = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    (found,) = (block for block in blocks if needle in block)
    lines = [line for line in found.splitlines() if line.strip() and not line.startswith("#")]
    assert len(lines) <= 10, "the page promises at most ten lines"
    return found.replace('["cuda:0", "cuda:1"]', '["cpu", "cpu"]')


class Double(nn.Module):
    def __init__(self, checkpointing: bool) -> None:
        super().__init__()
        self.img_mlp, self.txt_mlp = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.checkpointing = checkpointing

    def forward(self, img: Tensor, txt: Tensor, mod: Tensor) -> tuple[Tensor, Tensor]:
        if self.checkpointing and self.training:
            return checkpoint(self._forward, img, txt, mod, use_reentrant=False)
        return self._forward(img, txt, mod)

    def _forward(self, img: Tensor, txt: Tensor, mod: Tensor) -> tuple[Tensor, Tensor]:
        img = img + mod * self.img_mlp(img).tanh() + txt.mean(1, keepdim=True)
        return img, txt + mod * self.txt_mlp(txt).tanh()


class Single(nn.Module):
    def __init__(self, checkpointing: bool) -> None:
        super().__init__()
        self.linear1 = nn.Linear(WIDTH, WIDTH)
        self.checkpointing = checkpointing

    def forward(self, x: Tensor, mod: Tensor) -> Tensor:
        if self.checkpointing and self.training:
            return checkpoint(self._forward, x, mod, use_reentrant=False)
        return self._forward(x, mod)

    def _forward(self, x: Tensor, mod: Tensor) -> Tensor:
        return x + mod * self.linear1(x).tanh()


class Flux2(nn.Module):
    """Checkpoints inside of its blocks, around them (`outside`), or not at all."""

    def __init__(self, checkpointing: str = "") -> None:
        super().__init__()
        torch.manual_seed(0)
        inside = checkpointing == "inside"
        self.img_in, self.txt_in = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.time_in = nn.Sequential(nn.Linear(1, WIDTH), nn.SiLU())
        self.double_blocks = nn.ModuleList(Double(inside) for _ in range(2))
        self.single_blocks = nn.ModuleList(Single(inside) for _ in range(4))
        self.double_stream_modulation_img = nn.Sequential(nn.Linear(WIDTH, WIDTH))
        self.single_stream_modulation = nn.Sequential(nn.Linear(WIDTH, WIDTH))
        self.final_layer = nn.Linear(WIDTH, WIDTH)
        self.checkpointing = checkpointing == "outside"

    def _run(self, block: nn.Module, *args: Tensor) -> Any:
        return checkpoint(block, *args, use_reentrant=False) if self.checkpointing else block(*args)

    def forward(self, x: Tensor, timesteps: Tensor, ctx: Tensor) -> Tensor:
        vec = self.time_in(timesteps[:, None])[:, None]
        double_mod = self.double_stream_modulation_img(vec)
        single_mod = self.single_stream_modulation(vec)
        img, txt = self.img_in(x), self.txt_in(ctx)
        for block in self.double_blocks:
            img, txt = self._run(block, img, txt, double_mod)
        img = torch.cat((txt, img), dim=1)
        for block in self.single_blocks:
            img = self._run(block, img, single_mod)
        img = img.to(vec.device)
        return self.final_layer(img[:, ctx.shape[1] :])


class Lora(nn.Module):
    """Runs in place of a layer that it does not contain."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.lora_down = nn.Linear(layer.in_features, 2, bias=False)
        self.lora_up = nn.Linear(2, layer.out_features, bias=False)
        self.register_buffer("alpha", torch.tensor(1.0))
        self.org_module = [layer]

    def apply_to(self) -> None:
        self.org_forward = self.org_module[0].forward
        self.org_module[0].forward = self.forward

    def forward(self, x: Tensor) -> Tensor:
        return self.org_forward(x) + self.lora_up(self.lora_down(x)) * self.alpha / 2


class Network(nn.Module):
    """LoRA for every linear layer of the blocks, or of the whole model."""

    def __init__(
        self,
        transformer: nn.Module,
        choose: Callable[[str], bool] = lambda name: "blocks" in name,
        kind: Callable[[nn.Linear], Lora] = Lora,
    ) -> None:
        super().__init__()
        torch.manual_seed(1)
        layers = {n: m for n, m in transformer.named_modules() if isinstance(m, nn.Linear) and choose(n)}
        self.loras = nn.ModuleList(kind(layer) for layer in layers.values())
        for lora in self.loras:
            lora.apply_to()


def batches(count: int) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(2)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    return [
        {"latents": randn(1, 5, WIDTH), "noise": randn(1, 5, WIDTH), "ctx": randn(1, 3, WIDTH)}
        for _ in range(count)
    ]


def assert_same(ours: list[Tensor], theirs: list[Tensor]) -> None:
    """fp32, relative to each tensor's norm."""
    assert len(ours) == len(theirs) > 0
    for a, b in zip(ours, theirs, strict=True):
        assert (a - b).norm() <= 1e-5 * b.norm()
