"""FLUX.2's LoRA files: what diffusers and ComfyUI do with them is what was trained."""

from __future__ import annotations

import itertools
import re

import pytest
import torch
from diffusers import Flux2KleinPipeline
from flux2_samples import NAMING, QKV, TARGETS, WIDTH, inputs, linear_sizes, random_flux2_lora, tiny_flux2
from lora_samples import disturb, random_lora
from peft.tuners.lora.layer import Linear as LoraLinear
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tworeel.errors import UserError
from tworeel.lora.convert import convert_lora, family_of
from tworeel.lora.files import load_lora, save_lora
from tworeel.lora.formats import FORMS, from_tensors, to_tensors
from tworeel.lora.fusing import FUSED_NOTE, missing_parts
from tworeel.lora.inject import inject_lora
from tworeel.lora.scaling import same_bits
from tworeel.lora.state import export_lora, lora_parameters, without_needless_alpha
from tworeel.lora.tensors import LoraFile

BLOCK_LISTS = ("transformer_blocks", "single_transformer_blocks")


@pytest.fixture(scope="module")
def output():
    """A function (model) -> what the model makes of fixed inputs."""

    def run(model):
        with torch.no_grad():
            return model(**inputs()).sample

    return run


def trained(*, alpha=4.0, targets=TARGETS, **options):
    model = tiny_flux2()
    inject_lora(model, rank=4, alpha=alpha, targets=targets, block_lists=BLOCK_LISTS, **options)
    disturb(model)
    with torch.no_grad():  # enough to see it in the output of a network this small
        for name, parameter in lora_parameters(model).items():
            parameter.mul_(20 if name.endswith("lora_B") else 1)
    return model


def without_alpha(lora):
    return LoraFile(
        modules={
            name: type(part)(down=part.down, up=part.up * part.scale) for name, part in lora.modules.items()
        }
    )


CASES = {
    "plain": {},
    "alpha": {"alpha": 7.0},
    "rslora": {"alpha": 7.0, "rslora": True},
    "some layers": {"alpha": 3.0, "targets": ("to_q", "to_v", "add_k_proj", "linear_in", "to_qkv_mlp_proj")},
    "one block": {"targets": ("transformer_blocks.1.attn.to_k", "single_transformer_blocks.0.attn.to_out")},
}


@pytest.mark.parametrize("options", CASES.values(), ids=CASES.keys())
@pytest.mark.parametrize("form", ["diffusers", "kohya", "comfyui"])
def test_diffusers_pipeline_makes_of_the_file_what_was_trained(tmp_path, output, form, options):
    model = trained(**options)
    path = tmp_path / "lora.safetensors"
    lora = export_lora(model)
    if form == "comfyui":
        lora = without_alpha(lora) if "alpha" in options else without_needless_alpha(lora)
    save_lora(path, lora, form, NAMING)
    base = tiny_flux2()
    before = output(base)
    pipeline = Flux2KleinPipeline(
        scheduler=None, vae=None, text_encoder=None, tokenizer=None, transformer=base
    )
    pipeline.load_lora_weights(path)
    adapted = [module for module in base.modules() if isinstance(module, LoraLinear)]
    assert adapted
    after = output(base)
    torch.testing.assert_close(after, output(model), rtol=1e-4, atol=1e-4)
    assert (after - before).abs().max() > 1e-2, "a file that loads and changes nothing"


def test_dora_is_taken_by_diffusers_from_its_own_form(tmp_path, output):
    model = trained(alpha=6.0, dora=True)
    path = tmp_path / "lora.safetensors"
    save_lora(path, export_lora(model), "diffusers", NAMING)
    base = tiny_flux2()
    Flux2KleinPipeline(
        scheduler=None, vae=None, text_encoder=None, tokenizer=None, transformer=base
    ).load_lora_weights(path)
    torch.testing.assert_close(output(base), output(model), rtol=1e-4, atol=1e-4)


def test_diffusers_refuses_comfyuis_form_with_alpha_aloud(tmp_path):
    path = tmp_path / "lora.safetensors"
    save_lora(path, export_lora(trained()), "comfyui", NAMING)
    pipeline = Flux2KleinPipeline(
        scheduler=None, vae=None, text_encoder=None, tokenizer=None, transformer=tiny_flux2()
    )
    with pytest.raises(ValueError, match="alpha"):
        pipeline.load_lora_weights(path)


def test_diffusers_changes_nothing_for_diffsynths_form(tmp_path, output):
    """Why `tworeel convert` is needed for such a file."""
    path = tmp_path / "lora.safetensors"
    save_lora(path, export_lora(trained()), "diffsynth", NAMING)
    base = tiny_flux2()
    before = output(base)
    Flux2KleinPipeline(
        scheduler=None, vae=None, text_encoder=None, tokenizer=None, transformer=base
    ).load_lora_weights(path)
    assert torch.equal(output(base), before)


# ComfyUI's rules (comfy/lora.py, comfy/utils.py, as of 2026) as data: LoRA stem -> the model's tensor, and
# which third of its rows. A tensor's own name, with dots or with underscores behind `lora_unet_`, means all
# of it; diffusers' names behind `transformer.`, or without a prefix, are looked up here.
COMFYUI_SLICES = {
    r"transformer_blocks\.(\d+)\.attn\.to_q": (r"double_blocks.\1.img_attn.qkv", 0),
    r"transformer_blocks\.(\d+)\.attn\.to_k": (r"double_blocks.\1.img_attn.qkv", 1),
    r"transformer_blocks\.(\d+)\.attn\.to_v": (r"double_blocks.\1.img_attn.qkv", 2),
    r"transformer_blocks\.(\d+)\.attn\.add_q_proj": (r"double_blocks.\1.txt_attn.qkv", 0),
    r"transformer_blocks\.(\d+)\.attn\.add_k_proj": (r"double_blocks.\1.txt_attn.qkv", 1),
    r"transformer_blocks\.(\d+)\.attn\.add_v_proj": (r"double_blocks.\1.txt_attn.qkv", 2),
    r"transformer_blocks\.(\d+)\.attn\.to_out\.0": (r"double_blocks.\1.img_attn.proj", None),
    r"transformer_blocks\.(\d+)\.attn\.to_add_out": (r"double_blocks.\1.txt_attn.proj", None),
    r"transformer_blocks\.(\d+)\.ff\.linear_in": (r"double_blocks.\1.img_mlp.0", None),
    r"transformer_blocks\.(\d+)\.ff\.linear_out": (r"double_blocks.\1.img_mlp.2", None),
    r"transformer_blocks\.(\d+)\.ff_context\.linear_in": (r"double_blocks.\1.txt_mlp.0", None),
    r"transformer_blocks\.(\d+)\.ff_context\.linear_out": (r"double_blocks.\1.txt_mlp.2", None),
    r"single_transformer_blocks\.(\d+)\.attn\.to_qkv_mlp_proj": (r"single_blocks.\1.linear1", None),
    r"single_transformer_blocks\.(\d+)\.attn\.to_out": (r"single_blocks.\1.linear2", None),
}
NATIVE_SHAPES = {
    f"{blocks}.{index}.{layer}": shape
    for index in range(2)
    for blocks, layers in {
        "double_blocks": {
            **{f"{kind}_attn.qkv": (3 * WIDTH, WIDTH) for kind in ("img", "txt")},
            **{f"{kind}_attn.proj": (WIDTH, WIDTH) for kind in ("img", "txt")},
            **{f"{kind}_mlp.0": (6 * WIDTH, WIDTH) for kind in ("img", "txt")},
            **{f"{kind}_mlp.2": (WIDTH, 3 * WIDTH) for kind in ("img", "txt")},
        },
        "single_blocks": {"linear1": (9 * WIDTH, WIDTH), "linear2": (WIDTH, 4 * WIDTH)},
    }.items()
    for layer, shape in layers.items()
}
ENDINGS = (
    (".lora_A.weight", ".lora_B.weight"),
    (".lora_A.default.weight", ".lora_B.default.weight"),
    (".lora_down.weight", ".lora_up.weight"),
)


def comfyui_target(stem):
    """What ComfyUI patches for a key: (tensor, third of its rows or None); None if it skips the key."""
    joined = {f"lora_unet_{name.replace('.', '_')}": name for name in NATIVE_SHAPES}
    if stem in joined:
        return joined[stem], None
    if stem.startswith("diffusion_model.") and stem.removeprefix("diffusion_model.") in NATIVE_SHAPES:
        return stem.removeprefix("diffusion_model."), None
    for pattern, (tensor, third) in COMFYUI_SLICES.items():
        match = re.fullmatch(pattern, stem.removeprefix("transformer."))
        if match:
            return match.expand(tensor), third
    return None


def patched_by_comfyui(tensors):
    """The changes of ComfyUI's weights by tensor; every key must have been understood."""
    changes = {name: torch.zeros(shape) for name, shape in NATIVE_SHAPES.items()}
    used = set()
    for down_ending, up_ending in ENDINGS:
        for key in [key for key in tensors if key.endswith(up_ending)]:
            stem = key.removesuffix(up_ending)
            down, up, alpha = tensors[stem + down_ending], tensors[key], tensors.get(f"{stem}.alpha")
            target = comfyui_target(stem)
            assert target is not None, f"ComfyUI does not load {key}"
            rows = changes[target[0]] if target[1] is None else changes[target[0]].chunk(3)[target[1]]
            rows += (1.0 if alpha is None else float(alpha) / down.shape[0]) * (up @ down)
            used |= {stem + down_ending, key, f"{stem}.alpha"}
    assert set(tensors) <= used
    return changes


def merged_changes(lora):
    """The same from our layers: what training changed, in ComfyUI's tensors."""
    changes = {name: torch.zeros(shape) for name, shape in NATIVE_SHAPES.items()}
    for name, part in lora.modules.items():
        tensor, third = comfyui_target(f"transformer.{name}")
        rows = changes[tensor] if third is None else changes[tensor].chunk(3)[third]
        rows += part.scale * (part.up @ part.down)
    return changes


@pytest.mark.parametrize("options", CASES.values(), ids=CASES.keys())
@pytest.mark.parametrize("form", ["comfyui", "kohya", "diffsynth", "diffusers"])
def test_by_comfyuis_rules_each_key_changes_the_rows_that_were_trained(form, options):
    lora = export_lora(trained(**options))
    if form == "diffusers":  # its alpha stands in the header, which ComfyUI does not read
        lora = without_alpha(lora)
    tensors, _ = to_tensors(lora, FORMS[form], NAMING)
    changes, expected = patched_by_comfyui(tensors), merged_changes(lora)
    for name, change in expected.items():
        torch.testing.assert_close(changes[name], change, rtol=1e-5, atol=1e-6)
    assert any(change.any() for change in expected.values())


def test_the_keys_and_shapes_are_those_of_the_tools():
    lora = random_flux2_lora(0, alphas=(torch.tensor(2.0),))
    comfyui, _ = to_tensors(lora, FORMS["comfyui"], NAMING)
    assert comfyui["diffusion_model.double_blocks.0.img_attn.qkv.lora_A.weight"].shape == (12, WIDTH)
    assert comfyui["diffusion_model.double_blocks.1.txt_attn.qkv.lora_B.weight"].shape == (3 * WIDTH, 12)
    assert float(comfyui["diffusion_model.double_blocks.1.txt_attn.qkv.alpha"]) == 6.0
    assert comfyui["diffusion_model.single_blocks.1.linear1.lora_B.weight"].shape == (9 * WIDTH, 4)
    assert len(comfyui) == 3 * len(NATIVE_SHAPES)
    kohya, _ = to_tensors(lora, FORMS["kohya"], NAMING)
    assert "lora_unet_double_blocks_0_img_mlp_0.lora_down.weight" in kohya
    diffusers, _ = to_tensors(lora, FORMS["diffusers"], NAMING)
    assert "transformer.transformer_blocks.0.attn.add_k_proj.lora_A.weight" in diffusers
    diffsynth, _ = to_tensors(lora, FORMS["diffsynth"], NAMING)
    assert "single_transformer_blocks.0.attn.to_qkv_mlp_proj.lora_B.default.weight" in diffsynth


ALPHAS = {
    "missing": (None,),
    "the rank": (torch.tensor(4.0),),
    "half": (torch.tensor(2.0),),
    "no power of two": (torch.tensor(3.3),),
    "bf16": (torch.tensor(3.0, dtype=torch.bfloat16),),
    "mixed": (None, torch.tensor(1.0), torch.tensor([0.1]), torch.tensor(8)),
}


def assert_same_file(left, right):
    with safe_open(left, "pt") as one, safe_open(right, "pt") as other:
        assert (one.metadata() or {}) == (other.metadata() or {})
    tensors, others = load_file(left), load_file(right)
    assert tensors.keys() == others.keys()
    assert all(same_bits(tensor, others[key]) for key, tensor in tensors.items())


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("alphas", ALPHAS.values(), ids=ALPHAS.keys())
def test_there_and_back_restores_tensors_and_metadata(tmp_path, alphas, dtype, dora):
    forms = [name for name, form in FORMS.items() if form.magnitude or not dora]
    for seed, (first, second) in enumerate(itertools.permutations(forms, 2)):
        lora = random_flux2_lora(
            seed, alphas=alphas, dtype=dtype, dora=dora, ranks=(4, 8), metadata={"note": "a"}
        )
        one, two, three = (tmp_path / f"{seed}-{step}.safetensors" for step in range(3))
        save_lora(one, lora, first, NAMING)
        summary = convert_lora(one, two, second, NAMING)
        convert_lora(two, three, first, NAMING)
        assert_same_file(one, three)
        assert (summary.source_form, summary.target_form) == (first, second)
        assert summary.layers == len(linear_sizes())


PARTS = {
    "one of three": ["transformer_blocks.0.attn.to_k"],
    "two of three": ["transformer_blocks.1.attn.add_q_proj", "transformer_blocks.1.attn.add_v_proj"],
    "all of one, one of another": [
        *(f"transformer_blocks.0.attn.{part}" for part in QKV[:3]),
        "transformer_blocks.0.attn.add_v_proj",
    ],
    "outside the blocks": ["norm_out.linear", "x_embedder", "double_stream_modulation_txt.linear"],
}


@pytest.mark.parametrize("names", PARTS.values(), ids=PARTS.keys())
def test_layers_that_are_only_partly_adapted_come_back_as_they_were(tmp_path, names):
    lora = random_flux2_lora(3, names=names, alphas=(torch.tensor(2.0),))
    for form in ("comfyui", "kohya"):
        path = tmp_path / f"{form}.safetensors"
        save_lora(path, lora, form, NAMING)
        read = load_lora(path, NAMING)
        assert read.modules.keys() == lora.modules.keys()
        for name, part in lora.modules.items():
            other = read.modules[name]
            assert same_bits(other.down, part.down) and same_bits(other.up, part.up)
            assert other.scale == part.scale


def test_an_untrained_lora_whose_b_is_zero_comes_back_too(tmp_path):
    model = tiny_flux2()
    inject_lora(model, rank=4, alpha=4.0, targets=TARGETS, block_lists=BLOCK_LISTS)
    lora = export_lora(model)
    save_lora(tmp_path / "new.safetensors", lora, "comfyui", NAMING)
    read = load_lora(tmp_path / "new.safetensors", NAMING)
    assert all(same_bits(read.modules[name].down, part.down) for name, part in lora.modules.items())


@pytest.mark.parametrize("rank", [2, 3, 4, 6])
def test_a_file_whose_query_key_and_value_share_one_a_keeps_it(tmp_path, output, rank):
    """As trainers write it that train the fused layer itself."""
    generator = torch.Generator().manual_seed(rank)
    stem = "diffusion_model.double_blocks.1.img_attn.qkv"
    down, up = torch.randn(rank, WIDTH, generator=generator), torch.randn(96, rank, generator=generator)
    source, other, back = (tmp_path / f"{name}.safetensors" for name in ("source", "other", "back"))
    save_file({f"{stem}.lora_A.weight": down, f"{stem}.lora_B.weight": up}, source)
    lora = load_lora(source, NAMING)
    assert list(lora.modules) == [f"transformer_blocks.1.attn.{part}" for part in QKV[:3]]
    for third, part in enumerate(lora.modules.values()):
        torch.testing.assert_close(part.up @ part.down, up.chunk(3)[third] @ down)
    for form in ("diffusers", "diffsynth", "kohya"):
        convert_lora(source, other, form, NAMING)
        convert_lora(other, back, "comfyui", NAMING)
        assert_same_file(source, back)


def test_the_last_modulations_halves_stand_the_other_way_round_natively():
    lora = random_flux2_lora(5, names=["norm_out.linear"], dora=True)
    tensors, _ = to_tensors(lora, FORMS["comfyui"], NAMING)
    stem = "diffusion_model.final_layer.adaLN_modulation.1"
    part = lora.modules["norm_out.linear"]
    assert torch.equal(tensors[f"{stem}.lora_A.weight"], part.down)
    assert torch.equal(tensors[f"{stem}.lora_B.weight"], torch.cat(part.up.chunk(2)[::-1]))
    assert torch.equal(tensors[f"{stem}.dora_scale"][:, 0], torch.cat(part.magnitude.chunk(2)[::-1]))


@pytest.mark.parametrize("prefix", ["lora_transformer_", "lycoris_"])
def test_names_joined_by_underscores_are_read_from_other_tools_too(prefix):
    lora = random_flux2_lora(6, alphas=(torch.tensor(2.0),))
    tensors = {}
    for name, part in lora.modules.items():
        stem = prefix + name.replace(".", "_")
        tensors |= {f"{stem}.lora_down.weight": part.down, f"{stem}.lora_up.weight": part.up}
        tensors[f"{stem}.alpha"] = part.alpha
    read = from_tensors(tensors, {}, NAMING)
    assert read.form == "diffusers"
    assert all(torch.equal(read.modules[name].up, part.up) for name, part in lora.modules.items())


def test_the_spellings_that_diffusers_takes_are_read(tmp_path):
    lora = random_flux2_lora(7)
    own, _ = to_tensors(lora, FORMS["diffusers"], NAMING)
    native, _ = to_tensors(lora, FORMS["comfyui"], NAMING)
    for tensors, old, new in (
        (own, "transformer.transf", "diffusion_model.transf"),
        (own, "transformer.", ""),
        (native, "diffusion_model.", "base_model.model."),
        (native, "diffusion_model.", ""),
    ):
        respelled = {key.replace(old, new, 1): tensor for key, tensor in tensors.items()}
        read = from_tensors(respelled, {}, NAMING)
        assert read.modules.keys() == lora.modules.keys()
        assert all(torch.equal(read.modules[name].up, part.up) for name, part in lora.modules.items())


@pytest.mark.parametrize("form", FORMS)
def test_the_keys_tell_the_family(tmp_path, naming, form):
    namings = {"wan": naming, "flux2": NAMING}
    for family, lora in {"wan": random_lora(0), "flux2": random_flux2_lora(0)}.items():
        path = tmp_path / f"{family}.safetensors"
        save_lora(path, lora, form, namings[family])
        for order in (namings, dict(reversed(namings.items()))):
            assert family_of(path, order) == family


def changed(lora, name, **changes):
    part = lora.modules[name]
    values = {"down": part.down, "up": part.up, "alpha": part.alpha, "magnitude": part.magnitude} | changes
    return LoraFile(modules={**lora.modules, name: type(part)(**values)})


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"alpha": torch.tensor(3.0)}, "different scales"),
        ({"up": torch.zeros(WIDTH, 4, dtype=torch.bfloat16)}, "different dtypes"),
        ({"up": torch.zeros(7, 4)}, "different shapes"),
        ({"magnitude": torch.ones(WIDTH)}, "DoRA's magnitudes for some of them only"),
    ],
)
def test_parts_that_do_not_fit_into_one_layer_are_refused_in_words(changes, words):
    lora = changed(random_flux2_lora(8), "transformer_blocks.0.attn.to_k", **changes)
    with pytest.raises(UserError, match=rf"double_blocks\.0\.img_attn\.qkv.*{words}.*allowed is diffusers"):
        to_tensors(lora, FORMS["comfyui"], NAMING)
    to_tensors(lora, FORMS["diffusers"], NAMING)


def test_the_layers_that_dora_needs_beside_its_targets_are_known_before_the_training():
    targets = ["transformer_blocks.0.attn.to_q", "transformer_blocks.1.ff.linear_in"]
    missing = ["transformer_blocks.0.attn.to_k", "transformer_blocks.0.attn.to_v"]
    assert missing_parts(targets, NAMING) == missing
    assert missing_parts([*targets, *missing], NAMING) == []


def test_damaged_and_mixed_files_are_refused_in_words():
    lora = random_flux2_lora(9)
    native, metadata = to_tensors(lora, FORMS["comfyui"], NAMING)
    own, _ = to_tensors(lora, FORMS["diffusers"], NAMING)
    stem = "diffusion_model.double_blocks.0.img_attn.qkv"
    with pytest.raises(UserError, match=r"spelled in two ways.*double_blocks"):
        from_tensors(native | own, {}, NAMING)
    with pytest.raises(UserError, match=r"double_blocks\.0\.img_attn\.qkv: B \(lora_up\) missing"):
        from_tensors(
            {key: tensor for key, tensor in native.items() if key != f"{stem}.lora_B.weight"}, {}, NAMING
        )
    with pytest.raises(UserError, match="95 rows do not divide into 3 layers"):
        from_tensors(native | {f"{stem}.lora_B.weight": torch.zeros(95, 12)}, {}, NAMING)
    with pytest.raises(UserError, match=f"'{FUSED_NOTE}' is damaged"):
        from_tensors(native, metadata | {FUSED_NOTE: '{"a": "b"}'}, NAMING)


def test_a_note_that_no_longer_fits_is_void():
    lora = random_flux2_lora(10)
    native, metadata = to_tensors(lora, FORMS["comfyui"], NAMING)
    stale = metadata | {FUSED_NOTE: '{"double_blocks.0.img_attn.qkv": [6, 0, 6]}'}
    read = from_tensors(native, stale, NAMING)
    assert all(torch.equal(read.modules[name].up, part.up) for name, part in lora.modules.items())
