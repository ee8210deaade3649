"""Where the parts of DiffSynth's models go, that they stay there, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from test_diffsynth_variants import made, pipe_of, trained_whole
from torch import nn
from torch._subclasses import FakeTensorMode

from tworeel.diffsynth.encoders import waiting_bytes
from tworeel.diffsynth.launching import in_words
from tworeel.diffsynth.layouts import layout_of
from tworeel.diffsynth.settings import Settings
from tworeel.diffsynth.sharing import budgets as budgets_of_settings
from tworeel.diffsynth.splitting import split_pipeline
from tworeel.engine.residency import Residency
from tworeel.errors import UserError
from tworeel.planning.budgets import budget_of_card
from tworeel.planning.cards import known_cards, parse_cards
from tworeel.planning.shares import WEIGHTS_SHARE
from tworeel.quant.frozen import FrozenLinear

TWO = Settings(devices=("cpu", "cpu"))


def split_toy(name: str, settings: Settings = TWO, **how: bool) -> tuple[Any, Any, Any]:
    toy = made(name)
    pipe = pipe_of(name, toy)
    checkpointing = {"checkpointing": True, "offload": False, **how}
    division, layout = split_pipeline(pipe, settings, **checkpointing)
    return pipe, division, layout


@pytest.mark.usefixtures("diffsynth_package")
def test_modules_between_blocks_live_with_the_block_that_they_follow() -> None:
    for name, module, block in [
        ("s2v", "dit.audio_injector.injector.1", "dit.blocks.2"),
        ("wantodance", "dit.music_injector.injector.2", "dit.blocks.4"),
        ("animate", "animate_adapter.face_adapter.fuser_blocks.1", "dit.blocks.5"),
        ("video_as_prompt", "vap.blocks.2", "dit.blocks.4"),
    ]:
        _, division, _ = split_toy(name, Settings(devices=("cpu",) * 3))
        placement = division.placement
        assert placement.stage_of(module) == placement.stage_of(block) > 0
        assert placement.stage_of("dit.patch_embedding") == 0 and placement.stage_of("dit.head") == 2


@pytest.mark.usefixtures("diffsynth_package")
def test_a_boundary_counts_the_transformers_own_blocks() -> None:
    _, division, layout = split_toy("vace", Settings(devices=("cpu", "cpu"), split_at=(4,)))
    assert division.placement.boundaries == (0, 7, 9)
    said = in_words(division, layout)
    assert said.startswith("tworeel: VACE's blocks 0 to 2, blocks 0 to 3 on cpu; blocks 4 to 5 on cpu. ")
    with pytest.raises(UserError, match="SPLIT_AT=6: the transformer has 6 blocks, allowed are 1 to 5"):
        split_toy("vace", Settings(devices=("cpu", "cpu"), split_at=(6,)))
    with pytest.raises(UserError, match="7 devices for 6 blocks"):
        split_toy("t2v", Settings(devices=("cpu",) * 7))


@pytest.mark.usefixtures("diffsynth_package")
def test_the_scripts_checkpointing_options_say_what_blocks_leave_behind() -> None:
    for how, expected in [
        ({"checkpointing": True, "offload": False}, Residency.RECOMPUTE),
        ({"checkpointing": True, "offload": True}, Residency.OFFLOAD),
        ({"checkpointing": False, "offload": False}, Residency.KEEP),
    ]:
        _, division, _ = split_toy("t2v", **how)
        assert set(division.residencies) == {expected}
    _, division, _ = split_toy("t2v", Settings(devices=("cpu", "cpu"), residency="selective"))
    assert set(division.residencies) == {Residency.SELECTIVE}


@pytest.mark.usefixtures("diffsynth_package")
def test_a_split_transformer_stays_when_its_pipeline_is_moved_and_accelerate_leaves_it_too() -> None:
    from accelerate import Accelerator

    pipe, division, _ = split_toy("vace")
    object.__setattr__(division.placement, "devices", (torch.device("cuda:0"), torch.device("cuda:1")))
    first, last = pipe.vace.vace_blocks[0], pipe.dit.head
    with FakeTensorMode():
        for module in pipe.modules():
            module._parameters.clear()  # a module cannot move fake ones
            module._buffers.clear()
        for part in (first, last):
            part.register_buffer("scale", torch.empty(1))
        pipe.to("cuda:0")
        assert [str(part.scale.device) for part in (first, last)] == ["cuda:0", "cuda:1"]
    assert Accelerator(cpu=True).verify_device_map(pipe)


@pytest.mark.usefixtures("diffsynth_package")
def test_a_split_model_says_by_its_own_names_where_its_parts_are() -> None:
    pipe, _, _ = split_toy("vace")
    for model in (pipe.dit, pipe.vace):
        names = dict(model.named_modules())
        assert len(model.hf_device_map) > 3 and all(name in names for name in model.hf_device_map)


@pytest.mark.usefixtures("diffsynth_package")
def test_a_split_transformer_can_be_cast() -> None:
    pipe, _, _ = split_toy("t2v")
    pipe.dit.to(torch.bfloat16)
    assert {parameter.dtype for parameter in pipe.dit.parameters()} == {torch.bfloat16}


@pytest.mark.usefixtures("diffsynth_package")
def test_frozen_weights_go_to_fp8_and_the_loras_layers_do_not() -> None:
    pipe, division, _ = split_toy("t2v", Settings(devices=("cpu", "cpu"), fp8=True))
    block = pipe.dit.blocks[0]
    assert isinstance(block.self_attn.q.base_layer, FrozenLinear)
    assert block.self_attn.q.base_layer.weight.dtype == torch.float8_e4m3fn
    assert type(block.self_attn.q.lora_A["default"]) is nn.Linear
    toy = made("t2v")
    loss = division.model(lambda: pipe.model_fn(dit=pipe.dit, **toy.inputs).square().mean())
    loss.backward()
    gradients = [p.grad for p in pipe.dit.parameters() if p.requires_grad]
    assert len(gradients) == 120 and all(g is not None and g.any() for g in gradients)


@pytest.mark.usefixtures("diffsynth_package")
def test_layers_that_are_trained_do_not_go_to_fp8() -> None:
    fp8 = Settings(devices=("cpu", "cpu"), fp8=True)
    toy = trained_whole("t2v")
    with pytest.raises(UserError, match="FP8=true: all linear layers are trained"):
        split_pipeline(pipe_of("t2v", toy), fp8, checkpointing=True, offload=False)
    toy.models["dit"].blocks[:5].requires_grad_(False)
    split_pipeline(pipe_of("t2v", toy), fp8, checkpointing=True, offload=False)
    assert isinstance(toy.models["dit"].blocks[4].ffn[0], FrozenLinear)
    assert type(toy.models["dit"].blocks[5].ffn[0]) is nn.Linear


@pytest.mark.parametrize("name", ["vram_management_enabled", "quantize_config"])
@pytest.mark.usefixtures("diffsynth_package")
def test_layers_that_diffsynth_binds_to_one_device_are_refused(name: str) -> None:
    toy = made("t2v")
    setattr(toy.models["dit"], name, True)
    with pytest.raises(UserError, match=r"--fp8_models|--quant_options"):
        split_pipeline(pipe_of("t2v", toy), TWO, checkpointing=True, offload=False)


def test_a_transformer_that_is_not_known_is_refused() -> None:
    with pytest.raises(UserError, match="Linear is not known here"):
        layout_of({"dit": nn.Linear(2, 2)})


class Pipe(nn.Module):
    """A pipeline with its models, and an encoder that goes to the first device."""

    def __init__(self, name: str) -> None:
        super().__init__()
        toy = made(name)
        self.model_fn = pipe_of(name, toy).model_fn
        for key, model in toy.models.items():
            self.add_module(key, model)


@pytest.mark.parametrize(
    ("memory", "encoder", "boundaries"),
    [((4.0, 4.0), 0.0, (0, 3, 6)), ((4.0, 0.5), 0.0, (0, 4, 6)), ((4.0, 4.0), 3.5, (0, 2, 6))],
)
@pytest.mark.usefixtures("diffsynth_package")
def test_unless_the_user_says_the_devices_memory_decides_the_boundary(
    monkeypatch: pytest.MonkeyPatch, memory: tuple[float, float], encoder: float, boundaries: tuple[int, ...]
) -> None:
    """Memory and encoder in the bytes of all blocks."""
    pipe = Pipe("t2v")
    whole = sum(p.nbytes for p in pipe.dit.blocks.parameters()) / WEIGHTS_SHARE
    (card,) = parse_cards("RTX 4090", known_cards())
    budgets = [replace(budget_of_card(card, i), free=int(share * whole)) for i, share in enumerate(memory)]
    monkeypatch.setattr("tworeel.diffsynth.splitting.budgets", lambda devices: tuple(budgets))
    pipe.vae = nn.Linear(1 + int(encoder * whole * WEIGHTS_SHARE / 4), 1, bias=False)
    division, _ = split_pipeline(pipe, TWO, checkpointing=True, offload=False)
    assert division.placement.boundaries == boundaries
    given = Settings(devices=("cpu", "cpu"), split_at=(5,))
    division, _ = split_pipeline(Pipe("t2v"), given, checkpointing=True, offload=False)
    assert division.placement.boundaries == (0, 5, 6)


@pytest.mark.parametrize(
    ("asked", "free", "waits"),
    [(None, 30, False), (None, 29, True), ("device", 29, False), ("host", 99, True)],
)
@pytest.mark.usefixtures("diffsynth_package")
def test_a_text_encoder_that_would_crowd_out_the_training_waits_in_host_memory(
    monkeypatch: pytest.MonkeyPatch, asked: str | None, free: int, waits: bool
) -> None:
    """It and a device's share of the blocks are a little less than ten, as is the room for training."""
    pipe = Pipe("t2v")
    whole = sum(tensor.nbytes for tensor in pipe.dit.parameters())
    (card,) = parse_cards("RTX 4090", known_cards())
    budgets = tuple(replace(budget_of_card(card, i), free=free * whole) for i in range(2))
    monkeypatch.setattr("tworeel.diffsynth.splitting.budgets", lambda devices: budgets)
    monkeypatch.setattr("tworeel.diffsynth.sharing.TRAINING_ROOM", 20 * whole)
    pipe.text_encoder = nn.Linear(1, 9 * whole // 4, bias=False).requires_grad_(False)
    expected = pipe.text_encoder.weight.detach().clone()
    settings = replace(TWO, text_encoder=asked)
    division, layout = split_pipeline(pipe, settings, checkpointing=True, offload=False)
    assert waiting_bytes(pipe) == (expected.nbytes if waits else 0)
    words = ". The text encoder's weights, 0.0 GiB, wait in host memory"
    assert in_words(division, layout, waiting_bytes(pipe)).endswith(words) == waits
    # Moved and cast with its pipeline, and used all the same.
    pipe.to("cpu")
    assert torch.equal(pipe.text_encoder(torch.ones(1, 1)), expected.T)


@pytest.mark.usefixtures("diffsynth_package")
def test_a_text_encoder_that_is_trained_stays_on_its_device() -> None:
    pipe = Pipe("t2v")
    pipe.text_encoder = nn.Linear(2, 2)
    split_pipeline(pipe, TWO, checkpointing=True, offload=False)
    assert waiting_bytes(pipe) == 0
    with pytest.raises(UserError, match="TEXT_ENCODER=host: it is trained; allowed is device"):
        split_pipeline(pipe, replace(TWO, text_encoder="host"), checkpointing=True, offload=False)


class Managed(nn.Module):
    """An encoder that DiffSynth casts, or brings from disk, for each use."""

    vram_management_enabled = True

    def __init__(self, told: list[str], name: str) -> None:
        super().__init__()
        self.layer = nn.Identity()
        for act in ("onload", "offload"):
            setattr(self.layer, act, lambda words=f"{act} {name}": told.append(words))


@pytest.mark.usefixtures("diffsynth_package")
def test_encoders_that_diffsynth_brings_are_brought_without_emptying_caches(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    told: list[str] = []
    pipe = Pipe("t2v")
    pipe.text_encoder, pipe.vae = Managed(told, "text"), Managed(told, "vae")
    split_pipeline(pipe, TWO, checkpointing=True, offload=False)
    monkeypatch.setattr(torch.cpu, "empty_cache", lambda: told.append("emptied"), raising=False)
    pipe.load_models_to_device(["text_encoder"])
    assert told == ["offload vae", "onload text"]


def test_where_a_device_is_a_cpu_there_is_nothing_to_weigh() -> None:
    assert budgets_of_settings(["cpu", "cuda:0"]) is None
