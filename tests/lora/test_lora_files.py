"""LoRA files, read by us and by diffusers."""

from __future__ import annotations

import json
import os

import pytest
import torch
from diffusers import WanPipeline
from diffusers.utils import logging
from lora_samples import BLOCK_ENDINGS, random_lora
from peft.tuners.lora.layer import Linear as LoraLinear
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tworeel.errors import UserError
from tworeel.lora.files import describe_run, load_lora, save_lora
from tworeel.lora.state import export_lora


@pytest.fixture
def diffusers_log(caplog):
    """What diffusers logs, warnings and above."""
    logging.enable_propagation()
    yield caplog
    logging.disable_propagation()


def pipeline_of(model):
    return WanPipeline(tokenizer=None, text_encoder=None, vae=None, scheduler=None, transformer=model)


def assert_diffusers_agrees(path, trained, base, inputs, log):
    before = base(**inputs).sample
    pipeline_of(base).load_lora_weights(path)
    adapted = [module for module in base.modules() if isinstance(module, LoraLinear)]
    assert len(adapted) == sum(isinstance(module, LoraLinear) for module in trained.modules())
    after, expected = base(**inputs).sample, trained(**inputs).sample
    torch.testing.assert_close(after, expected, rtol=0, atol=1e-5)
    assert (after - before).abs().max() > 1e-2
    assert not [record for record in log.records if "key" in record.getMessage()]


WHOLE = {"plain": {}, "alpha": {"alpha": 7.0}, "rslora": {"alpha": 7.0, "rslora": True}}
PART = {"part": {"targets": ("blocks.1.attn1.to_k", "attn2.to_out.0"), "alpha": 3.0}}
# diffusers reads kohya's form only if it covers all ten layers of all blocks.
LOADABLE = [
    pytest.param(form, options, id=f"{form}-{name}")
    for form in ("comfyui", "diffusers", "kohya")
    for name, options in (WHOLE if form == "kohya" else WHOLE | PART).items()
]


@pytest.mark.parametrize(("form", "options"), LOADABLE)
def test_diffusers_loads_the_file_and_equals_the_trainer(
    tmp_path, naming, make_trained, make_wan, inputs, diffusers_log, form, options
):
    trained = make_trained(**options)
    path = tmp_path / "lora.safetensors"
    save_lora(path, export_lora(trained), form, naming, metadata={"format": "pt", "tworeel.rank": "4"})
    assert_diffusers_agrees(path, trained, make_wan(), inputs, diffusers_log)


@pytest.mark.parametrize("form", ["comfyui", "diffusers", "kohya"])
def test_diffusers_loads_the_image_layers_too(
    tmp_path, naming, make_trained, make_wan, inputs, diffusers_log, form
):
    config = {"image_dim": 32, "added_kv_proj_dim": 256}
    text, image = torch.linspace(-1, 1, 512 * 32).view(1, 512, 32), torch.linspace(-1, 1, 96).view(1, 3, 32)
    inputs = inputs | {"encoder_hidden_states": text, "encoder_hidden_states_image": image}
    trained = make_trained(config=config, alpha=7.0, targets=(*BLOCK_ENDINGS, "add_k_proj", "add_v_proj"))
    path = tmp_path / "lora.safetensors"
    save_lora(path, export_lora(trained), form, naming)
    assert_diffusers_agrees(path, trained, make_wan(**config), inputs, diffusers_log)


def test_diffusers_loads_dora_in_its_own_form(
    tmp_path, naming, make_trained, make_wan, inputs, diffusers_log
):
    trained = make_trained(dora=True, alpha=7.0)
    path = tmp_path / "lora.safetensors"
    save_lora(path, export_lora(trained), "diffusers", naming)
    assert_diffusers_agrees(path, trained, make_wan(), inputs, diffusers_log)


def test_diffusers_honours_ranks_and_alphas_that_differ_by_layer(tmp_path, naming, make_wan, inputs):
    lora = random_lora(0, ranks=(4, 2, 8), alphas=(torch.tensor(2.0), torch.tensor(3.0), None))
    outputs = []
    for form in ("diffusers", "comfyui"):
        path, model = tmp_path / f"{form}.safetensors", make_wan()
        save_lora(path, lora, form, naming)
        pipeline_of(model).load_lora_weights(path)
        outputs.append(model(**inputs).sample)
        for name, part in lora.modules.items():
            layer = model.get_submodule(name)
            update = layer.get_delta_weight("default_0")
            torch.testing.assert_close(update, part.scale * part.up @ part.down)
    torch.testing.assert_close(*outputs)


def test_what_we_write_we_read(tmp_path, naming, make_trained):
    exported = export_lora(make_trained(alpha=7.0, dora=True))
    for form in ("comfyui", "diffusers", "kohya"):
        path = tmp_path / f"{form}.safetensors"
        save_lora(path, exported, form, naming)
        read = load_lora(path, naming)
        assert read.form == form
        assert list(read.modules) == sorted(exported.modules, key=list(read.modules).index)
        for name, part in exported.modules.items():
            found = read.modules[name]
            assert torch.equal(found.down, part.down) and torch.equal(found.up, part.up)
            assert torch.equal(found.magnitude, part.magnitude) and found.scale == part.scale


def test_weights_are_fp32_unless_asked_otherwise_and_alpha_stays(tmp_path, naming, make_trained):
    path = tmp_path / "lora.safetensors"
    exported = export_lora(make_trained(alpha=7.0))
    save_lora(path, exported, "comfyui", naming)
    assert {tensor.dtype for tensor in load_file(path).values()} == {torch.float32}
    save_lora(path, exported, "comfyui", naming, dtype=torch.bfloat16)
    for key, tensor in load_file(path).items():
        assert tensor.dtype == (torch.float32 if key.endswith(".alpha") else torch.bfloat16)


def test_the_header_says_where_the_lora_comes_from(tmp_path, naming):
    path = tmp_path / "lora.safetensors"
    described = describe_run(
        version="0.1.0",
        model="wan2.2-t2v-a14b",
        expert="high",
        rank=4,
        alpha=4.0,
        precision="bfloat16",
        steps=100,
        dataset="12 clips",
    )
    save_lora(path, random_lora(0), "comfyui", naming, metadata=described)
    with safe_open(path, "pt") as file:
        header = file.metadata()
    assert header == described
    assert header["tworeel.expert"] == "high" and header["ss_network_dim"] == "4" and header["format"] == "pt"


def test_a_failed_save_leaves_the_old_file_and_no_other(tmp_path, naming):
    path = tmp_path / "lora.safetensors"
    save_lora(path, random_lora(0), "comfyui", naming)
    before = path.read_bytes()
    with pytest.raises(UserError):
        save_lora(path, random_lora(1, dora=True), "diffsynth", naming)
    with pytest.raises(OSError, match="missing"):
        save_lora(tmp_path / "missing" / "lora.safetensors", random_lora(0), "comfyui", naming)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["lora.safetensors"]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:-100]), "cut off"),
        (lambda path: path.write_bytes(b"<html>not found</html>" * 10), "not a safetensors file"),
        (lambda path: path.unlink(), "no such file"),
        (lambda path: save_file({"weight": torch.zeros(2)}, path), "not a LoRA.*'weight'"),
        (
            lambda path: save_file(load_file(path) | {"step": torch.zeros(1)}, path),
            "no part of a LoRA.*'step'",
        ),
    ],
)
def test_a_file_that_is_no_lora_is_refused_by_its_name(tmp_path, naming, damage, message):
    path = tmp_path / "lora.safetensors"
    save_lora(path, random_lora(0), "comfyui", naming)
    damage(path)
    with pytest.raises(UserError, match=message) as caught:
        load_lora(path, naming)
    assert all(problem.startswith(str(path)) for problem in caught.value.problems)


def test_other_kinds_of_files_are_refused(tmp_path, naming):
    with pytest.raises(UserError, match=r"must be a \.safetensors file"):
        load_lora(tmp_path / "lora.pt", naming)


def test_pefts_folders_keep_alpha_in_their_own_file(tmp_path, naming):
    path = tmp_path / "adapter_model.safetensors"
    save_lora(path, random_lora(0), "diffusers", naming)
    tensors = {
        key.replace("transformer.", "base_model.model."): value for key, value in load_file(path).items()
    }
    save_file(tensors, path)
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": 4, "lora_alpha": 2}), encoding="utf-8")
    assert {part.scale for part in load_lora(path, naming).modules.values()} == {0.5}
