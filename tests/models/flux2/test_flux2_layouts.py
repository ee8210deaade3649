"""A model is found whichever of its files or folders the user points at, or every problem is named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers import FluxTransformer2DModel
from huggingface_hub.errors import GatedRepoError
from safetensors.torch import load_file, save_file

from tworeel.demo.checkpoint import write_checkpoint
from tworeel.demo.flux2_checkpoint import write_flux2_checkpoint
from tworeel.demo.tiny_flux2 import write_transformer, write_vae
from tworeel.demo.tiny_flux2_encoders import TextKind, write_flux2_text_encoder, write_flux2_tokenizer
from tworeel.errors import UserError
from tworeel.models.family import Layout, ModelRequest, ModelSource
from tworeel.models.flux2 import hub as flux2_hub
from tworeel.models.flux2.layouts import locate
from tworeel.models.flux2.variants import traits, variant_name
from tworeel.models.hub import fetch
from tworeel.models.locate import locate_model

VARIANTS = ("flux2-dev", "flux2-klein-4b", "flux2-klein-base-4b")


def write_text(folder: Path, variant: str, layout: Layout) -> None:
    kind: TextKind = "mistral3" if variant == "flux2-dev" else "qwen3"
    write_flux2_text_encoder(folder, layout, kind)
    write_flux2_tokenizer(folder, kind)


def write(folder: Path, variant: str = "flux2-klein-4b", layout: Layout = "diffusers", **options) -> Path:
    return write_flux2_checkpoint(folder, variant=variant, layout=layout, **options)


def find(path: Path | str, **request: str | None) -> ModelSource:
    source = locate(ModelRequest(path=str(path), **request))
    assert source is not None
    return source


def problems(path: Path | str, **request: str | None) -> tuple[str, ...]:
    with pytest.raises(UserError) as caught:
        locate(ModelRequest(path=str(path), **request))
    return caught.value.problems


@pytest.mark.parametrize("layout", ["diffusers", "native", "comfyui"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_is_found_in_every_layout(tmp_path, variant, layout):
    source = find(write(tmp_path, variant, layout))

    assert (source.traits.family, source.traits.variant) == ("flux2", variant)
    assert source.transformer.layout == ("diffusers" if layout == "diffusers" else "comfyui")
    assert source.vae is not None
    assert source.text_encoder is not None
    assert source.tokenizer == tmp_path / "tokenizer"


def test_the_registry_knows_flux2_and_still_knows_wan(tmp_path):
    wan = write_checkpoint(tmp_path / "wan", variant="wan2.1-t2v-1.3b", layout="native", num_layers=1)

    for path, name in ((write(tmp_path / "flux"), "flux2"), (wan, "wan")):
        family, source = locate_model(ModelRequest(path=str(path)))
        assert family.name == source.traits.family == name


def test_klein_is_told_by_its_width_and_the_lack_of_a_guidance_embedding():
    narrow, wide = ({"x_embedder.weight": (width, 128)} for width in (3072, 4096))
    guidance = {"time_guidance_embed.guidance_embedder.linear_1.weight": (6144, 256)}

    assert variant_name(narrow, is_base=False) == "flux2-klein-4b"
    assert variant_name(wide, is_base=True) == "flux2-klein-base-9b"
    assert variant_name(wide | guidance, is_base=False) == "flux2-dev"


@pytest.mark.parametrize("place", ["", "model_index.json", "transformer", "transformer/config.json"])
def test_any_part_of_diffusers_layout_may_be_given(tmp_path, place):
    write(tmp_path, "flux2-klein-base-4b")

    assert find(tmp_path / place).traits.variant == "flux2-klein-base-4b"


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
@pytest.mark.parametrize("fp8", [False, True])
def test_comfyuis_folders_are_searched(tmp_path, prefix, fp8):
    models = tmp_path / "models"
    path = write_transformer(
        models / "diffusion_models", layout="comfyui", prefix=prefix, fp8_scaled=fp8, variant="flux2-dev"
    )
    vae = write_vae(models / "vae", "comfyui")
    write_text(models / "text_encoders", "flux2-dev", "comfyui")

    for given in (path, tmp_path):
        source = find(given, tokenizer=str(models / "text_encoders" / "tokenizer"))
        assert source.vae is not None
        assert source.vae.files == (vae,)
        assert source.transformer.files == (path,)


def test_a_vae_of_flux1_with_the_same_name_is_passed_over(tmp_path):
    path = write(tmp_path, layout="comfyui")
    tensors = load_file(tmp_path / "flux2-vae.safetensors")
    save_file({k: v for k, v in tensors.items() if not k.startswith("bn.")}, tmp_path / "ae.safetensors")

    assert find(path).vae.files == (tmp_path / "flux2-vae.safetensors",)
    [problem] = problems(path, vae=str(tmp_path / "ae.safetensors"))
    assert problem == f"model.vae = '{tmp_path / 'ae.safetensors'}': holds no VAE of FLUX.2"


def test_what_is_missing_is_named_all_at_once(tmp_path):
    path = write_transformer(tmp_path / "deep" / "down", layout="native", variant="flux2-dev")

    vae, text, tokenizer, expert = sorted(problems(path, expert="low"), key=lambda p: "expert" in p)
    assert "the VAE of FLUX.2 is missing (for example flux2-vae.safetensors, or vae/)" in vae
    assert "set model.text_encoder" in text
    assert "mistral_3_small_flux2_bf16.safetensors" in text
    assert "the tokenizer is missing (tokenizer/tokenizer.json); set model.tokenizer" in tokenizer
    assert expert == "model.expert = 'low': flux2-dev has no experts; leave it out"


def test_a_flux1_file_is_one_clear_problem(tmp_path):
    model = FluxTransformer2DModel(
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        pooled_projection_dim=16,
        axes_dims_rope=(4, 4, 8),
    )
    model.save_pretrained(tmp_path / "transformer")
    save_file({"double_blocks.0.img_mod.lin.weight": torch.zeros(2, 2)}, tmp_path / "flux1-dev.safetensors")

    for path in (tmp_path / "transformer", tmp_path / "flux1-dev.safetensors", tmp_path):
        [problem] = problems(path)
        assert "a FLUX.1 model, which is not supported; supported are FLUX.2-dev and FLUX.2-klein" in problem


@pytest.mark.parametrize("name", ["FluxPipeline", "Flux2KleinKVPipeline"])
def test_a_pipeline_of_another_kind_is_one_clear_problem(tmp_path, name):
    write(tmp_path)
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": name}))

    [problem] = problems(tmp_path)
    assert problem.startswith(f"{tmp_path}: a {name}, which is not supported yet; supported are FLUX.2-dev")


def test_several_transformers_in_one_folder_are_listed(tmp_path):
    write_transformer(tmp_path, layout="comfyui", variant="flux2-dev")
    write_transformer(tmp_path, layout="comfyui", variant="flux2-klein-4b")

    [problem] = problems(tmp_path)
    assert "several transformers fit (flux-2-klein-4b.safetensors, flux2_dev.safetensors)" in problem


def test_a_file_of_something_else_is_not_recognized(tmp_path):
    save_file({"a": torch.zeros(2)}, tmp_path / "x.safetensors")

    assert locate(ModelRequest(path=str(tmp_path / "x.safetensors"))) is None
    with pytest.raises(UserError, match="not a model of a known family \\(wan, flux2\\)"):
        locate_model(ModelRequest(path=str(tmp_path / "x.safetensors")))


def test_a_gguf_file_is_refused_with_what_is_read_instead(tmp_path):
    path = tmp_path / "flux2-dev-Q4_K_M.gguf"
    path.write_bytes(b"GGUF" + bytes(64))
    with pytest.raises(UserError, match=r"Q4_K_M\.gguf': GGUF files are not read; allowed: \.safetensors"):
        locate_model(ModelRequest(path=str(path)))


def test_a_missing_shard_is_named(tmp_path):
    path = write(tmp_path)
    shard = sorted((path / "transformer").glob("*.safetensors"))[0]
    shard.unlink()

    assert any(str(shard) in problem for problem in problems(path))


def test_the_hub_leaves_out_the_authors_copy_and_what_lies_elsewhere():
    names = [
        "README.md",
        "ae.safetensors",
        "flux2-dev.safetensors",
        "model_index.json",
        "scheduler/scheduler_config.json",
        "text_encoder/model-00001-of-00002.safetensors",
        "tokenizer/tokenizer.json",
        "tokenizer/chat_template.jinja",
        "transformer/diffusion_pytorch_model.safetensors",
        "vae/config.json",
    ]
    request = ModelRequest(path="black-forest-labs/FLUX.2-dev", text_encoder="elsewhere")

    assert flux2_hub.needed_files(names, request) == [
        "model_index.json",
        "tokenizer/tokenizer.json",
        "tokenizer/chat_template.jinja",
        "transformer/diffusion_pytorch_model.safetensors",
        "vae/config.json",
    ]


def test_a_licence_that_was_not_accepted_is_one_clear_problem(monkeypatch):
    def refuse(self, repository: str) -> list[str]:
        raise GatedRepoError.__new__(GatedRepoError)

    monkeypatch.setattr("tworeel.models.hub.HfApi.list_repo_files", refuse)
    with pytest.raises(UserError) as caught:
        fetch("black-forest-labs/FLUX.2-dev", lambda names: names)
    [problem] = caught.value.problems
    assert problem.startswith("model.path = 'black-forest-labs/FLUX.2-dev': its authors ask for its licence")
    assert "https://huggingface.co/black-forest-labs/FLUX.2-dev" in problem
    assert problem.endswith("set HF_TOKEN to a token of that account, or run `hf auth login`")


def test_traits_say_what_data_and_training_must_know():
    found = traits("flux2-dev")

    assert found.images_only
    assert (found.spatial_multiple, found.temporal_stride, found.reference_images) == (16, 1, 10)
    assert round(found.training_shift, 4) == 2.2255


def test_damage_of_the_vae_is_named_beside_that_of_the_transformer(tmp_path):
    path = write(tmp_path)
    source = find(path)
    for component in (source.transformer, source.vae):
        file = component.files[0]
        file.write_bytes(file.read_bytes()[:-100])
    found = problems(path)
    assert len(found) == 2
    assert str(source.transformer.files[0]) in found[0] and str(source.vae.files[0]) in found[1]
