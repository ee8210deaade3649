from __future__ import annotations

from pathlib import Path

import pytest

from tworeel.cli.options import datasets, device_list, read_config
from tworeel.errors import UserError


def test_options_are_stronger_than_settings_and_settings_than_the_file(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text("[train]\nsteps = 1\nseed = 1\nwarmup_steps = 1\n[lora]\nrank = 1\n", encoding="utf-8")
    config = read_config(
        file,
        ["train.seed=2", "lora.rank = 2"],
        model__path="wan",
        data__sources=datasets([Path("a"), Path("b")]),
        lora__rank=3,
        train__output=None,
        engine__devices=device_list("cpu, cpu"),
    )
    assert (config.train.steps, config.train.seed, config.lora.rank) == (1, 2, 3)
    assert config.train.output == tmp_path / "output"
    assert [source.path.name for source in config.data.sources] == ["a", "b"]
    assert config.engine.devices == ("cpu", "cpu")


def test_a_setting_without_a_value_is_refused() -> None:
    with pytest.raises(UserError, match="must be KEY=VALUE"):
        read_config(None, ["train.steps"])
    with pytest.raises(UserError, match="must be KEY=VALUE"):
        read_config(None, ["=1"])


def test_settings_without_a_value_are_told_with_all_else_that_is_wrong() -> None:
    with pytest.raises(UserError) as raised:
        read_config(None, ["nonsense", "train.steps=-5", "more nonsense", "foo.bar=1"])
    lines = raised.value.problems
    assert [line.partition(":")[0] for line in lines[:2]] == ["--set nonsense", "--set more nonsense"]
    assert any("train.steps" in line for line in lines[2:]) and any("foo" in line for line in lines[2:])
