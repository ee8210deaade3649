from __future__ import annotations

import re
from pathlib import Path

import pytest

from tworeel.config import load_config
from tworeel.config.fields import all_options
from tworeel.config.template import EXAMPLES, commented_toml
from tworeel.models.family import Traits

TRAITS = Traits(
    family="wan",
    variant="wan2.2-t2v-a14b",
    expert="low",
    frame_rate=16,
    spatial_multiple=16,
    temporal_stride=4,
    tokens_per_pixel_area=256,
)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_template_loads_back_to_the_defaults(folder: Path) -> None:
    path = folder / "run.toml"
    path.write_text(commented_toml("wan", "clips"), encoding="utf-8")
    assert load_config(path, {}) == load_config(
        None, {"model.path": "wan", "data.sources": [{"path": "clips"}]}
    )


def test_what_is_commented_out_is_valid_as_well(folder: Path) -> None:
    path = folder / "run.toml"
    text = re.sub(r"^# (\w+ = )", r"\1", commented_toml("wan", "clips"), flags=re.MULTILINE)
    path.write_text(text, encoding="utf-8")
    config = load_config(path, {})
    assert config.engine.split_at == (20,)
    assert config.cache.folder == folder / "cache"


def test_every_option_is_in_the_template_with_its_sentence() -> None:
    text = commented_toml("wan", "clips")
    prose = " ".join(line.removeprefix("# ") for line in text.splitlines())
    for option in all_options():
        assert option.doc, option.key
        if option.key != "data.sources":
            assert option.doc in prose
            assert re.search(rf"^(# )?{option.name} = ", text, flags=re.MULTILINE)


def test_options_that_are_not_set_have_an_example() -> None:
    """If this fails, a new option needs an entry in `EXAMPLES`."""
    unset = {option.key for option in all_options() if option.default is None and not option.required}
    assert unset == set(EXAMPLES)


def test_the_template_names_the_model_that_was_found(folder: Path) -> None:
    text = commented_toml("wan", "clips", TRAITS)
    assert "wan2.2-t2v-a14b, low-noise expert" in text
    (folder / "run.toml").write_text(text, encoding="utf-8")
    assert load_config(folder / "run.toml", {}).model.expert == "low"
