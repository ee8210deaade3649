"""DiffSynth's LoRA files and ours: its own loader reads ours, and a conversion there and back is exact."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_diffsynth_variants import made
from torch import Tensor

from tworeel.lora.convert import convert_lora
from tworeel.lora.files import save_lora
from tworeel.lora.naming import Naming
from tworeel.lora.tensors import LoraFile, LoraTensors
from tworeel.models.registry import FAMILIES

pytestmark = pytest.mark.usefixtures("diffsynth_package")
NAMING = Naming.of(FAMILIES["wan"])


def written_by_diffsynth(path: Path) -> dict[str, Tensor]:
    """The file that DiffSynth's module exports, with its prefix removed as its scripts do."""
    from diffsynth.diffusion.training_module import DiffusionTrainingModule

    module = DiffusionTrainingModule()
    module.dit = made("t2v").models["dit"]
    tensors = module.export_trainable_state_dict(module.state_dict(), remove_prefix="dit.")
    save_file({key: value.contiguous() for key, value in tensors.items()}, path)
    return tensors


@pytest.mark.parametrize("form", ["comfyui", "diffusers", "kohya"])
def test_a_lora_of_diffsynth_comes_back_to_the_bit(tmp_path: Path, form: str) -> None:
    tensors = written_by_diffsynth(tmp_path / "theirs.safetensors")
    summary = convert_lora(tmp_path / "theirs.safetensors", tmp_path / "ours.safetensors", form, NAMING)
    assert summary.source_form == "diffsynth" and summary.ranks == (2,)
    convert_lora(tmp_path / "ours.safetensors", tmp_path / "back.safetensors", "diffsynth", NAMING)
    back = load_file(tmp_path / "back.safetensors")
    assert back.keys() == tensors.keys()
    assert all(torch.equal(back[key], tensors[key]) for key in tensors)


@pytest.mark.parametrize("form", ["comfyui", "diffsynth"])
@pytest.mark.parametrize("alpha", [None, 1.0, 2.0, 4.0])
def test_diffsynths_loader_makes_of_our_lora_what_it_means(
    tmp_path: Path, form: str, alpha: float | None
) -> None:
    from diffsynth.utils.lora.general import GeneralLoRALoader

    theirs = made("t2v").models["dit"]
    written_by_diffsynth(tmp_path / "theirs.safetensors")
    down, up = torch.randn(2, 48), torch.randn(48, 2)
    part = LoraTensors(down=down, up=up, alpha=None if alpha is None else torch.tensor(alpha), magnitude=None)
    ours = LoraFile(modules={"blocks.3.attn1.to_q": part}, metadata={}, form=None)
    save_lora(tmp_path / "ours.safetensors", ours, form, NAMING)
    layer = theirs.blocks[3].self_attn.q.base_layer
    theirs.blocks[3].self_attn.q = layer
    before = layer.weight.clone()
    loaded = load_file(tmp_path / "ours.safetensors")
    GeneralLoRALoader(torch_dtype=torch.float32).fuse_lora_to_base_model(theirs, loaded)
    added = (2.0 if alpha is None else alpha) / 2 * up @ down
    torch.testing.assert_close(layer.weight - before, added, rtol=1e-5, atol=1e-5)
