from __future__ import annotations

import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest

from tworeel.config import RunConfig, dump_config, load_config
from tworeel.config.writing import toml_value

Load = Callable[..., RunConfig]

EVERYTHING = """
weight = 0.25
repeats = 3

[[data.sources]]
path = "more.csv"

[data]
resolution = [640, 640]
frames = [81]
frame_rate = 24.0

[cache]
devices = ["cpu"]
folder = "cache"

[lora]
targets = ["blocks.*.attn1.to_q", "it's \\"quoted\\""]
alpha = 1e-9
dora = true
init_from = "old.safetensors"

[train]
max_grad_norm = "none"
learning_rate = 3e-05
name = "Grüße 日本"

[engine]
devices = ["cuda:0", "cuda:1"]
split_at = [13]
"""


@pytest.mark.parametrize("more", ["", EVERYTHING])
def test_a_written_configuration_loads_back_equal(load: Load, tmp_path: Path, more: str) -> None:
    config = load(more)
    written = tmp_path / "run" / "config.toml"
    written.parent.mkdir()
    written.write_text(dump_config(config), encoding="utf-8")
    assert load_config(written, {}) == config


@pytest.mark.parametrize(
    "value",
    [
        True,
        0,
        -3,
        1e-30,
        1e300,
        0.1,
        "",
        'a"b\\c\n\t\x7f\x01',
        "日本 😀",
        [1, 2],
        ["a", "b"],
        [],
        {"a b": 1, "c": "d"},
    ],
)
def test_values_survive_writing(value: object) -> None:
    assert tomllib.loads(f"value = {toml_value(value)}")["value"] == value
