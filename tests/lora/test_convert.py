"""Conversion there and back restores the file."""

from __future__ import annotations

from itertools import permutations

import pytest
import torch
from lora_samples import random_lora
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tworeel.errors import UserError
from tworeel.lora.convert import convert_lora
from tworeel.lora.files import load_lora, save_lora
from tworeel.lora.formats import FORMS
from tworeel.lora.scaling import KEPT_CONFIG, same_bits

ALPHAS = {
    "missing": (None,),
    "the rank": (torch.tensor(4.0),),
    "half": (torch.tensor(2.0),),
    "no power of two": (torch.tensor(3.3),),
    "bf16": (torch.tensor(3.0, dtype=torch.bfloat16),),
    "one element": (torch.tensor([8.0]),),
    "integer": (torch.tensor(8),),
    "mixed": (None, torch.tensor(1.0), torch.tensor(4.0, dtype=torch.float16), torch.tensor(0.1)),
}


def content(path):
    with safe_open(path, "pt") as file:
        return load_file(path), file.metadata() or {}


def assert_same_file(left, right):
    (tensors, metadata), (others, other_metadata) = content(left), content(right)
    assert tensors.keys() == others.keys()
    assert all(same_bits(tensor, others[key]) for key, tensor in tensors.items())
    assert metadata == other_metadata


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("alphas", ALPHAS.values(), ids=ALPHAS.keys())
def test_there_and_back_restores_tensors_and_metadata(tmp_path, naming, alphas, dtype, dora):
    forms = [name for name, form in FORMS.items() if form.magnitude or not dora]
    for seed, (first, second) in enumerate(permutations(forms, 2)):
        lora = random_lora(
            seed,
            alphas=alphas,
            dtype=dtype,
            dora=dora,
            ranks=(4, 8),
            blocks=1,
            metadata={"note": "a", "format": "pt"},
        )
        one, two, three = (tmp_path / f"{seed}-{step}.safetensors" for step in range(3))
        save_lora(one, lora, first, naming)
        summary = convert_lora(one, two, second, naming)
        convert_lora(two, three, first, naming)
        assert_same_file(one, three)
        assert (summary.source_form, summary.target_form, summary.layers) == (first, second, 10)
        assert (summary.ranks, summary.dora) == ((4, 8), dora)


def test_a_walk_through_all_forms_comes_home(tmp_path, naming):
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        alphas = list(ALPHAS.values())[int(torch.randint(len(ALPHAS), (), generator=generator))]
        order = [list(FORMS)[index] for index in torch.randperm(len(FORMS), generator=generator)]
        start, walker = tmp_path / f"{seed}.safetensors", tmp_path / f"{seed}-walker.safetensors"
        save_lora(start, random_lora(seed, alphas=alphas, blocks=1), order[0], naming)
        walker.write_bytes(start.read_bytes())
        for form in [*order[1:], order[0]]:
            convert_lora(walker, walker, form, naming)
        assert_same_file(start, walker)


def test_a_conversion_keeps_the_scale_of_every_layer(tmp_path, naming):
    lora = random_lora(1, alphas=(None, torch.tensor(1.0), torch.tensor(3.3)), ranks=(4, 2))
    path = tmp_path / "lora.safetensors"
    save_lora(path, lora, "comfyui", naming)
    for form in FORMS:
        convert_lora(path, path, form, naming)
        read = load_lora(path, naming)
        for name, part in lora.modules.items():
            assert read.modules[name].scale == pytest.approx(part.scale, rel=1e-7)


def test_pefts_own_configuration_survives_under_a_name_that_diffusers_does_not_apply(tmp_path, naming):
    source, other, back = (tmp_path / f"{name}.safetensors" for name in ("source", "other", "back"))
    save_lora(source, random_lora(0), "diffusers", naming)
    config = '{"transformer.lora_alpha": 6, "transformer.r": 4, "transformer.peft_version": "0.1"}'
    save_file(load_file(source), source, metadata={"lora_adapter_metadata": config, "format": "pt"})
    for form in ("comfyui", "diffsynth", "kohya"):
        convert_lora(source, other, form, naming)
        assert content(other)[1][KEPT_CONFIG] == config
        assert "lora_adapter_metadata" not in content(other)[1]
        assert {part.scale for part in load_lora(other, naming).modules.values()} == {1.5}
        convert_lora(other, back, "diffusers", naming)
        assert_same_file(source, back)


def test_an_unknown_form_and_dora_without_a_place_are_refused_before_anything_is_written(tmp_path, naming):
    source, target = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    save_lora(source, random_lora(0, dora=True), "comfyui", naming)
    with pytest.raises(UserError, match="no LoRA form 'comfy'; allowed are comfyui, diffusers"):
        convert_lora(source, target, "comfy", naming)
    with pytest.raises(UserError, match="cannot hold DoRA"):
        convert_lora(source, target, "diffsynth", naming)
    assert not target.exists()
