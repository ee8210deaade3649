"""A model is found whichever of its files or folders the user points at, or every problem is named."""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tworeel.demo.checkpoint import write_checkpoint
from tworeel.errors import UserError
from tworeel.models.family import Layout, ModelRequest, ModelSource
from tworeel.models.wan.hub import needed_files
from tworeel.models.wan.layouts import locate

LAYOUTS: tuple[Layout, ...] = ("native", "diffusers", "comfyui")
VARIANTS = (
    "wan2.1-t2v-1.3b",
    "wan2.1-i2v-14b",
    "wan2.1-flf2v-14b",
    "wan2.2-t2v-a14b",
    "wan2.2-i2v-a14b",
    "wan2.2-ti2v-5b",
)
T2V, A14B, I2V = "wan2.1-t2v-1.3b", "wan2.2-t2v-a14b", "wan2.1-i2v-14b"

Written = Callable[[str, Layout], Path]


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> Written:
    """A function (variant, layout) -> path of a whole tiny checkpoint that tests only read."""

    @functools.cache
    def write(variant: str, layout: Layout) -> Path:
        folder = tmp_path_factory.mktemp("models") / f"{variant}-{layout}"
        return write_checkpoint(folder, variant=variant, layout=layout, num_layers=1)

    return write


@pytest.fixture
def copied(written, tmp_path) -> Written:
    """The same, copied so that a test may change it."""

    def copy(variant: str, layout: Layout) -> Path:
        path = written(variant, layout)
        folder = path if path.is_dir() else path.parent
        target = tmp_path / folder.name
        shutil.copytree(folder, target)
        return target if path.is_dir() else target / path.name

    return copy


def find(path: Path | str, **request: str | None) -> ModelSource:
    source = locate(ModelRequest(path=str(path), **request))
    assert source is not None
    return source


def problems(path: Path | str, **request: str | None) -> tuple[str, ...]:
    with pytest.raises(UserError) as caught:
        locate(ModelRequest(path=str(path), **request))
    return caught.value.problems


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_is_found_in_every_layout(written, variant, layout):
    expert = "low" if "a14b" in variant else None
    source = find(written(variant, layout), expert=expert)

    assert (source.traits.family, source.traits.variant, source.traits.expert) == ("wan", variant, expert)
    assert source.transformer.layout == layout
    assert source.transformer.config["num_layers"] == 1
    assert source.vae is not None and source.vae.layout == layout
    assert source.text_encoder is not None and source.text_encoder.layout == layout
    assert source.tokenizer is not None and source.tokenizer.exists()
    assert (source.image_encoder is not None) == (variant in ("wan2.1-i2v-14b", "wan2.1-flf2v-14b"))


@pytest.mark.parametrize(
    ("layout", "places"),
    [
        ("native", ["", "config.json", "diffusion_pytorch_model.safetensors.index.json", "{shard}"]),
        (
            "diffusers",
            ["", "model_index.json", "transformer", "transformer/config.json", "transformer/{shard}"],
        ),
        ("comfyui", ["", "wan2.1_t2v_1.3B_bf16.safetensors"]),
    ],
)
def test_the_path_may_be_any_of_the_models_places(written, layout, places):
    path = written(T2V, layout)
    folder = path if path.is_dir() else path.parent
    shard = next((file.name for file in folder.rglob("*-00001-of-*.safetensors")), "")
    sources = [find(folder / place.format(shard=shard)) for place in places]

    assert all(source == sources[0] for source in sources)


@pytest.mark.parametrize(
    ("layout", "places"),
    [
        ("native", {"high": ["high_noise_model"], "low": ["low_noise_model/config.json", "low_noise_model"]}),
        ("diffusers", {"high": ["transformer"], "low": ["transformer_2"]}),
        (
            "comfyui",
            {
                "high": ["wan2.2_t2v_high_noise_14B_bf16.safetensors"],
                "low": ["wan2.2_t2v_low_noise_14B_bf16.safetensors"],
            },
        ),
    ],
)
def test_a_place_inside_tells_the_expert(written, layout, places):
    root = written(A14B, layout)
    for expert, names in places.items():
        for name in names:
            assert find(root / name) == find(root, expert=expert)
            other = {"high": "low", "low": "high"}[expert]
            assert f"model.expert = '{other}', but" in problems(root / name, expert=other)[0]


def test_the_experts_lie_where_each_layout_puts_them(written):
    files = {layout: find(written(A14B, layout), expert="low").transformer.files for layout in LAYOUTS}

    assert files["native"][0].parent.name == "low_noise_model"
    assert files["diffusers"][0].parent.name == "transformer_2"
    assert files["comfyui"][0].name == "wan2.2_t2v_low_noise_14B_bf16.safetensors"


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_model_of_two_experts_needs_a_choice(written, layout):
    assert problems(written(A14B, layout)) == (
        "model.expert: this model has two experts; set it to 'high' or 'low'",
    )


@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_expert_that_a_model_does_not_have_is_refused(written, layout):
    (problem,) = problems(written(T2V, layout), expert="high")
    assert problem == f"model.expert = 'high': {T2V} has no experts; leave it out"


@pytest.mark.parametrize(
    ("layout", "gone"), [("native", "low_noise_model"), ("diffusers", "transformer_2"), ("comfyui", "*low*")]
)
def test_a_missing_expert_is_named_with_the_one_that_is_there(copied, layout, gone):
    root = copied(A14B, layout)
    for path in root.glob(gone):
        shutil.rmtree(path) if path.is_dir() else path.unlink()

    (problem,) = problems(root, expert="low")
    assert "model.expert = 'low': that expert is missing; there is high (" in problem


def test_a_file_whose_name_says_nothing_is_the_expert_that_the_user_says(copied):
    path = copied("wan2.2-i2v-a14b", "comfyui") / "wan2.2_i2v_high_noise_14B_bf16.safetensors"
    renamed = path.rename(path.with_name("my_finetune.safetensors"))

    assert find(renamed, expert="low").traits.expert == "low"
    assert "is one of two experts" in problems(renamed)[0]


def test_several_transformers_in_a_folder_are_listed(copied):
    path = copied(T2V, "comfyui")
    shutil.copy(path, path.with_name("another.safetensors"))

    (problem,) = problems(path.parent)
    assert "several transformers fit (another.safetensors, wan2.1_t2v_1.3B_bf16.safetensors)" in problem


@pytest.fixture
def comfyui_tree(copied, tmp_path) -> Path:
    """ComfyUI's folders with Wan 2.1 I2V, as a user has them; returns ComfyUI's own folder."""
    files = copied(I2V, "comfyui").parent
    models = tmp_path / "ComfyUI" / "models"
    moves = {
        "wan2.1_i2v_480p_14B_bf16.safetensors": "diffusion_models/wan",
        "wan_2.1_vae.safetensors": "vae",
        "umt5_xxl_fp16.safetensors": "text_encoders",
        "clip_vision_h.safetensors": "clip_vision",
    }
    for name, folder in moves.items():
        (models / folder).mkdir(parents=True)
        shutil.move(files / name, models / folder / name)
    return models.parent


def test_comfyuis_folders_are_searched_from_a_file_in_them(comfyui_tree):
    models = comfyui_tree / "models"
    source = find(models / "diffusion_models/wan/wan2.1_i2v_480p_14B_bf16.safetensors")

    assert source.vae.files == (models / "vae/wan_2.1_vae.safetensors",)
    assert source.text_encoder.files == (models / "text_encoders/umt5_xxl_fp16.safetensors",)
    assert source.tokenizer == models / "text_encoders/umt5_xxl_fp16.safetensors"
    assert source.image_encoder.files == (models / "clip_vision/clip_vision_h.safetensors",)


@pytest.mark.parametrize("place", [".", "models"])
def test_comfyuis_own_folder_can_be_given(comfyui_tree, place):
    transformer = comfyui_tree / "models/diffusion_models"
    shutil.move(transformer / "wan/wan2.1_i2v_480p_14B_bf16.safetensors", transformer)

    source = find(comfyui_tree / place)
    assert source.transformer.files == (transformer / "wan2.1_i2v_480p_14B_bf16.safetensors",)
    assert source.vae.files[0].name == "wan_2.1_vae.safetensors"


def test_of_several_text_encoders_the_more_precise_is_taken(copied):
    path = copied(T2V, "comfyui")
    shutil.copy(
        path.with_name("umt5_xxl_fp16.safetensors"),
        path.with_name("umt5_xxl_fp8_e4m3fn_scaled.safetensors"),
    )

    assert find(path).text_encoder.files[0].name == "umt5_xxl_fp16.safetensors"


def test_everything_that_is_missing_is_named_at_once_with_the_option_to_set(copied):
    path = copied(I2V, "comfyui")
    alone = path.rename(path.parent.parent / path.name)

    vae, text, image, tokenizer = problems(alone)
    assert "VAE is missing" in vae and "model.vae" in vae
    assert "text encoder is missing" in text and "model.text_encoder" in text
    assert "CLIP image encoder is missing" in image and "model.image_encoder" in image
    assert "tokenizer is missing" in tokenizer and "model.tokenizer" in tokenizer


def test_a_missing_expert_and_a_missing_encoder_are_named_together(copied):
    root = copied(A14B, "native")
    (root / "Wan2.1_VAE.pth").unlink()

    assert len(problems(root)) == 2


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_the_request_says_wins_and_may_be_in_any_layout(copied, written, layout):
    path = copied(I2V, "comfyui")
    alone = path.rename(path.parent.parent / path.name)
    other = written(I2V, layout)
    other = other if other.is_dir() else other.parent
    expected = find(other)

    # The tokenizer is found beside the text encoder, or in it.
    source = find(alone, **dict.fromkeys(("vae", "text_encoder", "image_encoder"), str(other)))
    assert (source.vae, source.text_encoder) == (expected.vae, expected.text_encoder)
    assert (source.tokenizer, source.image_encoder) == (expected.tokenizer, expected.image_encoder)
    assert (
        find(
            alone,
            vae=str(source.vae.files[0]),
            text_encoder=str(source.text_encoder.files[0]),
            tokenizer=str(source.tokenizer),
            image_encoder=str(source.image_encoder.files[0]),
        )
        == source
    )


def test_given_files_are_checked(written, tmp_path):
    (tmp_path / "empty").mkdir()
    found = problems(
        written(T2V, "native"),
        vae="/gone/vae.pth",
        text_encoder=str(tmp_path),
        tokenizer=str(tmp_path / "empty"),
    )

    assert found == (
        "model.vae = '/gone/vae.pth': no such file or folder",
        f"model.text_encoder = '{tmp_path}': holds no text encoder",
        f"model.tokenizer = '{tmp_path / 'empty'}': holds neither tokenizer.json nor spiece.model",
    )


def truncate(path: Path) -> Path:
    path.write_bytes(path.read_bytes()[:-100])
    return path


@pytest.mark.parametrize("layout", LAYOUTS)
def test_truncated_files_are_named(copied, layout):
    path = copied(T2V, layout)
    folder = path if path.is_dir() else path.parent
    transformer = truncate(find(path).transformer.files[0].parent.glob("*.safetensors").__next__())
    assert any(transformer.name in problem for problem in problems(path))

    shutil.rmtree(folder)
    path = copied(T2V, layout)
    source = find(path)
    broken = [truncate(component.files[0]) for component in (source.vae, source.text_encoder)]
    found = problems(path)
    assert all(any(file.name in problem for problem in found) for file in broken)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_damage_of_the_encoders_is_named_beside_that_of_the_transformer(copied, layout):
    path = copied(T2V, layout)
    source = find(path)
    networks = (source.transformer, source.vae, source.text_encoder)
    broken = [truncate(component.files[0]) for component in networks]
    found = problems(path)
    assert len(found) == len(set(found)) == 3
    assert all(any(str(file) in problem for problem in found) for file in broken)


def test_missing_shards_are_named_with_and_without_an_index(copied):
    root = copied(T2V, "native")
    gone = sorted(root.glob("*.safetensors"))[1]
    gone.unlink()
    assert gone.name in problems(root)[0]

    (root / "diffusion_pytorch_model.safetensors.index.json").unlink()
    assert gone.name in problems(root)[0]


def test_other_networks_and_folders_are_not_wan(tmp_path):
    save_file({"double_blocks.0.img_attn.qkv.weight": torch.zeros(3, 3)}, tmp_path / "flux.safetensors")
    (tmp_path / "notes.txt").write_text("hello")
    (tmp_path / "flux").mkdir()
    (tmp_path / "flux/model_index.json").write_text('{"_class_name": "FluxPipeline"}')
    (tmp_path / "flux/transformer").mkdir()

    for path in (tmp_path, tmp_path / "flux.safetensors", tmp_path / "notes.txt", tmp_path / "flux"):
        assert locate(ModelRequest(path=str(path))) is None


def test_a_kind_of_wan_that_is_not_supported_is_named(copied):
    path = copied(T2V, "comfyui")
    save_file(load_file(path) | {"vace_blocks.0.before_proj.weight": torch.zeros(2, 2)}, path)

    assert "a Wan VACE model, which is not supported yet" in problems(path)[0]


@pytest.mark.parametrize("path", ["no/such/folder", "missing.safetensors", "org/missing.safetensors"])
def test_a_path_that_is_nothing_is_named(path):
    assert problems(path) == (
        f"model.path = '{path}': no such file or folder, and not a hub id (organization/name)",
    )


def test_a_hub_id_out_of_reach_is_one_clear_problem():
    (problem,) = problems("some-org/Wan-that-is-not-there")

    assert "neither a file or folder nor a hub id within reach" in problem


def test_a_model_that_was_downloaded_before_is_used_without_a_connection(written, tmp_path, monkeypatch):
    repository = tmp_path / "models--some-org--tiny-wan"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs/main").write_text("0" * 40)
    shutil.copytree(written(T2V, "diffusers"), repository / "snapshots" / ("0" * 40))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))

    assert find("some-org/tiny-wan").traits.variant == T2V


def names_in(folder: Path) -> list[str]:
    return [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]


def test_only_what_one_expert_needs_is_downloaded(written):
    native, diffusers = (names_in(written(A14B, layout)) for layout in ("native", "diffusers"))
    low = needed_files([*native, "assets/x.png", "README.md"], ModelRequest(path="o/n", expert="low"))
    assert {name.split("/")[0] for name in low} == {
        "low_noise_model",
        "models_t5_umt5-xxl-enc-bf16.pth",
        "Wan2.1_VAE.pth",
        "google",
    }

    high = needed_files(diffusers, ModelRequest(path="o/n", expert="high", vae="/here/vae.pth"))
    assert {name.split("/")[0] for name in high} == {
        "model_index.json",
        "transformer",
        "text_encoder",
        "tokenizer",
    }


@pytest.mark.parametrize("layout", ["native", "diffusers"])
def test_a_downloaded_expert_alone_is_found(written, tmp_path, layout):
    root = written(A14B, layout)
    for expert in ("high", "low"):
        for name in needed_files(names_in(root), ModelRequest(path="o/n", expert=expert)):
            target = tmp_path / expert / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(root / name, target)

        traits = find(tmp_path / expert, expert=expert).traits
        assert (traits.variant, traits.expert) == (A14B, expert)


def test_the_hub_asks_for_an_expert_before_it_downloads(written):
    with pytest.raises(UserError, match="has two experts"):
        needed_files(names_in(written(A14B, "native")), ModelRequest(path="o/n"))
    with pytest.raises(UserError, match="has no experts"):
        needed_files(names_in(written(T2V, "native")), ModelRequest(path="o/n", expert="high"))
    assert needed_files(["flux.safetensors"], ModelRequest(path="o/n")) is None


def test_a_config_that_is_not_json_is_named(copied):
    root = copied(T2V, "native")
    (root / "config.json").write_text("{")
    assert "config.json: not readable as JSON" in problems(root)[0]
    (root / "config.json").write_text(json.dumps([1]))
    assert "config.json: is not a table" in problems(root)[0]
