"""Each layout loads to the same transformer, which is the one that diffusers loads."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import WanTransformer3DModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from tworeel.demo.checkpoint import write_checkpoint
from tworeel.errors import UserError
from tworeel.models.family import Component, Layout, ModelRequest
from tworeel.models.wan.keys import parameter_name, to_native
from tworeel.models.wan.layouts import locate
from tworeel.models.wan.transformer import KEEP_FP32, LORA_PRESETS, build_transformer
from tworeel.weights.loading import load_weights
from tworeel.weights.tensor_files import TensorFiles

VARIANTS = (
    "wan2.1-t2v-1.3b",
    "wan2.1-i2v-14b",
    "wan2.1-flf2v-14b",
    "wan2.2-t2v-a14b",
    "wan2.2-i2v-a14b",
    "wan2.2-ti2v-5b",
)
CPU, META = torch.device("cpu"), torch.device("meta")


def component_of(
    folder: Path, variant: str, layout: Layout, expert: str | None = None, **options
) -> Component:
    path = write_checkpoint(folder / layout, variant=variant, layout=layout, num_layers=2, **options)
    source = locate(ModelRequest(path=str(path), expert=expert))
    assert source is not None
    return source.transformer


def load(component: Component, dtype: torch.dtype = torch.float32, device_of=lambda name: CPU) -> nn.Module:
    model = build_transformer(component)
    load_weights(
        model,
        TensorFiles(*component.files),
        lambda key: parameter_name(component.layout, key),
        device_of=device_of,
        dtype_of=lambda name: torch.float32 if set(name.split(".")) & set(KEEP_FP32) else dtype,
    )
    return model


def differences(left: nn.Module, right: nn.Module) -> list[str]:
    """Return the names of tensors (rotary tables too) that are not bitwise the same."""
    ours, theirs = ({**dict(m.named_parameters()), **dict(m.named_buffers())} for m in (left, right))
    assert list(ours) == list(theirs)
    return [n for n in ours if ours[n].dtype != theirs[n].dtype or not torch.equal(ours[n], theirs[n])]


@pytest.mark.parametrize("variant", VARIANTS)
def test_three_layouts_load_to_bitwise_the_same_transformer(tmp_path, variant):
    expert = "low" if "a14b" in variant else None
    native, diffusers, comfyui = (
        load(component_of(tmp_path, variant, layout, expert)) for layout in ("native", "diffusers", "comfyui")
    )

    assert differences(native, diffusers) == []
    assert differences(native, comfyui) == []
    assert all(parameter.device == CPU for parameter in native.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("variant", VARIANTS)
def test_values_and_dtypes_are_those_of_from_pretrained(tmp_path, variant, dtype):
    expert = "low" if "a14b" in variant else None
    component = component_of(tmp_path, variant, "diffusers", expert, dtype=torch.float32)
    reference = WanTransformer3DModel.from_pretrained(component.files[0].parent, torch_dtype=dtype)

    assert differences(load(component, dtype), reference) == []


@pytest.mark.parametrize("variant", ["wan2.1-t2v-1.3b", "wan2.1-i2v-14b", "wan2.2-ti2v-5b"])
def test_a_native_file_loads_as_diffusers_loads_it(tmp_path, variant):
    native = component_of(tmp_path, variant, "native")
    diffusers = component_of(tmp_path, variant, "diffusers")
    single = tmp_path / "single.safetensors"
    with TensorFiles(*native.files) as files:
        save_file({name: files.read(name) for name in files.names}, single)
    reference = WanTransformer3DModel.from_single_file(
        str(single), config=str(diffusers.files[0].parent), torch_dtype=torch.float32
    )

    assert differences(load(native), reference) == []


def test_experts_are_different_transformers(tmp_path):
    high, low = (load(component_of(tmp_path, "wan2.2-t2v-a14b", "native", e)) for e in ("high", "low"))

    assert torch.any(high.patch_embedding.weight != low.patch_embedding.weight)


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model.", "diffusion_model."])
def test_fp8_scaled_files_dequantize_to_weight_times_scale(tmp_path, prefix):
    component = component_of(tmp_path, "wan2.1-t2v-1.3b", "comfyui", fp8_scaled=True, prefix=prefix)
    stored = {key.removeprefix(prefix): tensor for key, tensor in load_file(component.files[0]).items()}
    model = load(component, torch.bfloat16)

    scaled = [key for key in stored if key.removesuffix("weight") + "scale_weight" in stored]
    assert len(scaled) == 20
    for name, parameter in model.named_parameters():
        key = to_native(name)
        scale = stored.get(key.removesuffix("weight") + "scale_weight", torch.tensor(1.0))
        assert torch.equal(parameter, (stored[key].float() * scale).to(parameter.dtype)), name


def test_fp8_scaled_values_stay_near_those_they_were_made_from(tmp_path):
    exact = load(component_of(tmp_path / "exact", "wan2.1-t2v-1.3b", "comfyui"))
    rounded = load(component_of(tmp_path / "fp8", "wan2.1-t2v-1.3b", "comfyui", fp8_scaled=True))

    name = "blocks.0.attn1.to_q.weight"
    largest = exact.get_parameter(name).abs().max()
    error = (exact.get_parameter(name) - rounded.get_parameter(name)).abs().max()
    assert 0 < error <= largest / 16


def test_a_stage_loads_its_blocks_and_leaves_the_others(tmp_path):
    component = component_of(tmp_path, "wan2.1-t2v-1.3b", "native")
    model = load(component, device_of=lambda name: CPU if name.startswith("blocks.1.") else META)

    assert all(parameter.device == CPU for parameter in model.blocks[1].parameters())
    rest = [n for n, p in model.named_parameters() if not n.startswith("blocks.1.") and p.device != META]
    assert rest == []
    assert {buffer.device for buffer in model.rope.buffers()} == {META}


def test_a_file_that_lacks_a_layer_lists_it_before_reading(tmp_path):
    component = component_of(tmp_path, "wan2.1-t2v-1.3b", "native")
    shorter = Component(
        files=component.files, layout="native", config={**component.config, "num_layers": 3, "ffn_dim": 256}
    )

    with pytest.raises(UserError) as caught:
        load(shorter)
    missing, misshaped = caught.value.problems
    assert "27 tensors missing from the files: 'blocks.2.scale_shift_table'" in missing
    assert "'blocks.0.ffn.0.weight' is (512, 256), the model has (256, 256)" in misshaped


def test_lora_presets_name_linear_layers_of_every_block(tmp_path):
    model = build_transformer(component_of(tmp_path, "wan2.1-i2v-14b", "native"))
    linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]

    counts = {
        preset: sum(name.endswith(endings) for name in linears if name.startswith("blocks."))
        for preset, endings in LORA_PRESETS.items()
    }
    assert counts == {"attention": 2 * 8, "all-linear": 2 * 10, "all-linear-image": 2 * 12}
    assert not any(
        name.endswith(LORA_PRESETS["all-linear-image"]) for name in linears if "blocks" not in name
    )


def test_files_on_disk_have_the_authors_keys(tmp_path):
    component = component_of(tmp_path, "wan2.1-t2v-1.3b", "comfyui", prefix="model.diffusion_model.")
    with safe_open(component.files[0], framework="pt") as file:
        assert "model.diffusion_model.blocks.0.self_attn.norm_q.weight" in file.keys()  # noqa: SIM118
