"""FLUX.2's text encoder is found, or one line says what is missing."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tworeel.demo.tiny_flux2_encoders import (
    COMFYUI_FILES,
    WIDTH,
    TextKind,
    write_flux2_text_encoder,
    write_flux2_tokenizer,
)
from tworeel.models.family import Layout, ModelRequest
from tworeel.models.flux2.text_files import FoundText, find_text_encoder
from tworeel.models.flux2.text_networks import MISTRAL, QWEN, TextNetwork

NETWORKS: dict[TextKind, TextNetwork] = {"mistral3": MISTRAL, "qwen3": QWEN}


def find(root: Path, kind: TextKind = "qwen3", width: int = WIDTH, **given: str | Path) -> FoundText:
    request = ModelRequest(path=str(root), **{name: str(path) for name, path in given.items()})
    return find_text_encoder(request, root, NETWORKS[kind], 3 * width)


@pytest.mark.parametrize("layout", ["diffusers", "comfyui"])
@pytest.mark.parametrize("kind", ["mistral3", "qwen3"])
def test_text_encoder_and_tokenizer_are_found_in_the_models_folder(
    tmp_path: Path, kind: TextKind, layout: Layout
) -> None:
    path = write_flux2_text_encoder(tmp_path, layout, kind)
    tokenizer = write_flux2_tokenizer(tmp_path, kind)
    found = find(tmp_path, kind)
    assert found.problems == ()
    assert found.tokenizer == tokenizer
    assert found.component is not None and found.component.layout == layout
    assert path in (found.component.files[0], found.component.files[0].parent)
    assert bool(found.component.config) == (layout == "diffusers")


def test_comfyuis_folders_beside_the_transformers_are_searched(tmp_path: Path) -> None:
    root = tmp_path / "models" / "diffusion_models" / "flux2"
    root.mkdir(parents=True)
    path = write_flux2_text_encoder(tmp_path / "models" / "text_encoders", "comfyui", "qwen3")
    tokenizer = write_flux2_tokenizer(tmp_path / "elsewhere", "qwen3")
    found = find(root, tokenizer=tokenizer)
    assert found.problems == () and found.component is not None
    assert found.component.files == (path,)


def test_of_several_files_the_one_of_the_right_width_is_taken_and_the_least_rounded(tmp_path: Path) -> None:
    write_flux2_tokenizer(tmp_path, "qwen3")
    path = write_flux2_text_encoder(tmp_path, "comfyui", "qwen3")
    tensors = load_file(path)
    for name in ("qwen_3_8b", "qwen_3_8b_fp8mixed", "qwen_3_8b_fp4"):
        save_file(
            tensors | {"model.embed_tokens.weight": torch.zeros(4, 8)}, tmp_path / f"{name}.safetensors"
        )
    assert find(tmp_path).component.files == (path,)
    assert find(tmp_path, width=8).component.files == (tmp_path / "qwen_3_8b.safetensors",)


def test_what_the_user_names_wins(tmp_path: Path) -> None:
    write_flux2_text_encoder(tmp_path, "comfyui", "qwen3")
    write_flux2_tokenizer(tmp_path, "qwen3")
    path = write_flux2_text_encoder(tmp_path / "other", "diffusers", "qwen3")
    tokenizer = write_flux2_tokenizer(tmp_path / "third", "qwen3")
    for given in (path, path.parent, next(path.glob("*.index.json"))):
        found = find(tmp_path, text_encoder=given, tokenizer=tokenizer / "tokenizer.json")
        assert found.problems == () and found.tokenizer == tokenizer
        assert found.component is not None and found.component.files[0].parent == path


def test_a_missing_text_encoder_is_one_line_that_names_it(tmp_path: Path) -> None:
    write_flux2_tokenizer(tmp_path, "mistral3")
    (problem,) = find(tmp_path, "mistral3", 5120).problems
    assert "the text encoder is missing (a Mistral-3 of width 5120" in problem
    assert "set model.text_encoder" in problem and "licence" in problem


def test_another_language_model_is_named_in_one_line(tmp_path: Path) -> None:
    path = write_flux2_text_encoder(tmp_path, "comfyui", "qwen3")
    write_flux2_tokenizer(tmp_path, "qwen3")
    (problem,) = find(tmp_path, "mistral3", text_encoder=path).problems
    assert problem.endswith("holds a Qwen3 of width 32; this model needs a Mistral-3 of width 32")
    (problem,) = find(tmp_path, "qwen3", 4096).problems
    assert problem.endswith("holds a Qwen3 of width 32; this model needs a Qwen3 of width 4096")


def test_a_missing_shard_and_a_path_that_is_not_there_are_reported(tmp_path: Path) -> None:
    path = write_flux2_text_encoder(tmp_path, "diffusers", "qwen3")
    write_flux2_tokenizer(tmp_path, "qwen3")
    next(path.glob("*-00001-of-*")).unlink()
    assert "-00001-of-" in find(tmp_path).problems[0]
    assert find(tmp_path, text_encoder="gone").problems == (
        "model.text_encoder = 'gone': no such file or folder",
    )


def test_a_tokenizer_that_is_missing_embedded_or_without_a_template_is_one_line(tmp_path: Path) -> None:
    write_flux2_text_encoder(tmp_path, "comfyui", "qwen3")
    assert "the tokenizer is missing (tokenizer/tokenizer.json); set model.tokenizer" in str(
        find(tmp_path).problems
    )
    mistral = tmp_path / "mistral"
    write_flux2_text_encoder(mistral, "comfyui", "mistral3")
    (problem,) = find(mistral, "mistral3").problems
    assert COMFYUI_FILES["mistral3"] in problem and "'tekken_model', which is not read" in problem
    folder = write_flux2_tokenizer(tmp_path, "qwen3")
    (folder / "chat_template.jinja").unlink()
    (problem,) = find(tmp_path).problems
    assert "no chat template" in problem
    shutil.rmtree(folder)
    (problem,) = find(tmp_path, tokenizer=folder).problems
    assert problem == f"model.tokenizer = '{folder}': no such file or folder"
