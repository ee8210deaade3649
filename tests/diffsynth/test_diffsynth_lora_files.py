"""DiffSynth's LoRA files and ours: its own loader reads ours, and a conversion there and back is exact."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import WanVACETransformer3DModel
from safetensors.torch import load_file, save_file
from test_diffsynth_variants import made
from torch import Tensor, nn
from variants import VARIANTS

from tworeel.errors import UserError
from tworeel.lora.convert import convert_lora, family_of
from tworeel.lora.files import save_lora
from tworeel.lora.naming import Naming
from tworeel.lora.tensors import LoraFile, LoraTensors
from tworeel.models.registry import FAMILIES
from tworeel.models.wan.keys import from_native, to_native

pytestmark = pytest.mark.usefixtures("diffsynth_package")
NAMING = Naming.of(FAMILIES["wan"])


WITHOUT_NAMES = ("s2v", "wantodance", "wantodance_global", "longcat", "animate_2")
"""In diffusers."""


def written_by_diffsynth(path: Path, name: str = "t2v") -> dict[str, Tensor]:
    """The file that DiffSynth's module exports, with its prefix removed as its scripts do."""
    from diffsynth.diffusion.training_module import DiffusionTrainingModule

    module, toy = DiffusionTrainingModule(), made(name)
    module.base = toy.models[toy.lora_base]
    tensors = module.export_trainable_state_dict(module.state_dict(), remove_prefix="base.")
    save_file({key: value.contiguous() for key, value in tensors.items()}, path)
    return tensors


@pytest.mark.parametrize("name", VARIANTS)
def test_a_lora_of_diffsynth_comes_back_to_the_bit(tmp_path: Path, name: str) -> None:
    tensors = written_by_diffsynth(tmp_path / "theirs.safetensors", name)
    namings = {family: Naming.of(known) for family, known in FAMILIES.items()}
    naming = namings[family_of(tmp_path / "theirs.safetensors", namings)]
    for form in ("comfyui", "kohya") if name in WITHOUT_NAMES else ("comfyui", "kohya", "diffusers"):
        assert_comes_back(tmp_path, tensors, form, naming)


def assert_comes_back(folder: Path, tensors: dict[str, Tensor], form: str, naming: Naming) -> None:
    summary = convert_lora(folder / "theirs.safetensors", folder / "ours.safetensors", form, naming)
    assert summary.source_form == "diffsynth" and summary.ranks == (2,)
    convert_lora(folder / "ours.safetensors", folder / "back.safetensors", "diffsynth", naming)
    back = load_file(folder / "back.safetensors")
    assert back.keys() == tensors.keys()
    assert all(torch.equal(back[key], tensors[key]) for key in tensors)


@pytest.mark.parametrize("name", WITHOUT_NAMES)
def test_layers_that_diffusers_has_no_names_for_are_refused_in_its_form(tmp_path: Path, name: str) -> None:
    written_by_diffsynth(tmp_path / "theirs.safetensors", name)
    said = "the form 'diffusers' has no names for '.*; allowed are comfyui, diffsynth, kohya"
    with pytest.raises(UserError, match=said):
        convert_lora(tmp_path / "theirs.safetensors", tmp_path / "ours.safetensors", "diffusers", NAMING)
    assert not (tmp_path / "ours.safetensors").exists()


def test_vaces_layers_have_diffusers_names(tmp_path: Path) -> None:
    written_by_diffsynth(tmp_path / "theirs.safetensors", "vace_lora")
    convert_lora(tmp_path / "theirs.safetensors", tmp_path / "ours.safetensors", "diffusers", NAMING)
    with torch.device("meta"):
        model = WanVACETransformer3DModel(num_layers=3, vace_layers=[0, 1, 2])
    names = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    keys = load_file(tmp_path / "ours.safetensors")
    written = {key.removeprefix("transformer.").partition(".lora_")[0] for key in keys}
    assert len(written) == 30 and written < names
    assert all(from_native(to_native(name)) == name for name in names)


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
