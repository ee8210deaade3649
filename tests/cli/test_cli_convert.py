from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tworeel.models.flux2 import lora_names
from tworeel.models.registry import FAMILIES
from tworeel.models.wan.family import WAN

Run = Callable[..., Any]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["gone.safetensors", "new.safetensors"], "gone.safetensors"),
        (["gone", "new.safetensors"], "gone: no such file"),
        (["gone.safetensors", "there.safetensors"], "there.safetensors: exists already"),
        (["there.safetensors", "new.safetensors", "--to", "confyui"], "confyui"),
        (["there.safetensors", "new.safetensors", "--family", "wam"], "did you mean 'wan'?"),
        (["there.safetensors", "new.safetensors"], "there.safetensors"),
        (["there.safetensors", "new.pt"], "new.pt: must end in .safetensors"),
    ],
)
def test_what_cannot_be_converted_is_one_line(
    run: Run, tmp_path: Path, options: list[str], words: str
) -> None:
    (tmp_path / "there.safetensors").write_bytes(b"no tensors")
    done = run("convert", *options)
    assert done.code == 2
    assert len(done.err.splitlines()) == 1 and words in done.err
    assert not (tmp_path / "new.safetensors").exists()


def test_the_family_is_told_by_the_keys(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = replace(
        WAN,
        to_native=lora_names.to_native,
        from_native=lora_names.from_native,
        native_words=lora_names.NATIVE_WORDS,
        native_parts=lora_names.native_parts,
        diffsynth_names="diffusers",
    )
    monkeypatch.setitem(FAMILIES, "flux2", other)
    stem = "transformer.transformer_blocks.0.attn"
    tensors = {
        f"{stem}.{part}.{end}.weight": torch.rand(*shape)
        for part in ("to_q", "to_k", "to_v")
        for end, shape in {"lora_A": (2, 8), "lora_B": (8, 2)}.items()
    }
    save_file(tensors, tmp_path / "a.safetensors")
    done = run("convert", "a.safetensors", "b.safetensors", "--to", "comfyui")
    assert (done.code, done.err) == (0, "")
    assert "3 layers, rank 2" in done.out
    up = load_file(tmp_path / "b.safetensors")["diffusion_model.double_blocks.0.img_attn.qkv.lora_B.weight"]
    assert up.shape == (24, 6)
    assert run("convert", "b.safetensors", "c.safetensors", "--to", "diffusers").code == 0
    assert all(
        torch.equal(tensor, tensors[key]) for key, tensor in load_file(tmp_path / "c.safetensors").items()
    )
    wrong = run("convert", "a.safetensors", "d.safetensors", "--family", "wan")
    assert wrong.code == 2 and "these are no layers of wan: " in wrong.err


def test_all_that_is_wrong_with_a_conversion_is_said_at_once(run: Run, tmp_path: Path) -> None:
    done = run("convert", tmp_path / "a.safetensors", tmp_path / "b.pt", "--to", "foo", "--family", "bar")
    said = done.err.splitlines()
    assert done.code == 2 and len(said) == 3
    for words in ("--family bar: unknown family", "foo", "b.pt: must end in .safetensors"):
        assert any(words in line for line in said)
