"""A configuration to start from: every option, what it means and its default."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from typing import TYPE_CHECKING

from tworeel.config.fields import Option, section_doc, sections
from tworeel.config.writing import toml_value

if TYPE_CHECKING:
    from tworeel.models.family import Traits

_HEADER = """\
Configuration of a Tworeel run. Start it with: tworeel train <this file>
Values are the defaults; options behind a # are not set. Relative paths start at this file's folder."""
_WIDTH = 100
EXAMPLES = {
    "model.quantize": '"fp8"',
    "model.expert": '"high"',
    "model.vae": '"models/wan_2.1_vae.safetensors"',
    "model.text_encoder": '"models/umt5_xxl_fp16.safetensors"',
    "model.tokenizer": '"models/umt5-xxl"',
    "model.image_encoder": '"models/clip_vision_h.safetensors"',
    "data.frame_rate": "16",
    "cache.folder": '"cache"',
    "cache.devices": '["cuda:0"]',
    "lora.alpha": "32",
    "lora.init_from": '"earlier.safetensors"',
    "train.shift": "5.0",
    "train.export_every": "250",
    "engine.devices": '["cuda:0", "cuda:1"]',
    "engine.compile": "false",
    "engine.split_at": "[20]",
    "engine.streamed_blocks": "[4, 4]",
    "sample.every": "250",
    "sample.strengths": "[0, 1]",
    "sample.image": '"first.png"',
    "sample.last_image": '"last.png"',
    "sample.guidance": "5.0",
    "sample.size": "[832, 480]",
    "sample.frames": "17",
}
"""What may be written where nothing is set by default."""


def commented_toml(model_path: str, data_path: str, traits: Traits | None = None) -> str:
    """Return the text of a TOML file with every option, ready to edit.

    Args:
        model_path: value of `model.path`.
        data_path: path of the one dataset.
        traits: if the model was found, comments name what it needs.
    """
    given = {"model.path": model_path, "data.sources.path": data_path}
    lines = [*_comment(_HEADER), *_facts(traits)]
    for section, options in sections().items():
        title = f"[[{section}]]" if "." in section else f"[{section}]"
        lines += ["", "", *_comment(section_doc(section)), title]
        for option in options:
            if option.key != "data.sources":
                lines += ["", *_comment(option.doc), _line(option, given, traits)]
    return "\n".join(lines) + "\n"


def _line(option: Option, given: dict[str, str], traits: Traits | None) -> str:
    if option.key == "model.expert" and traits and traits.expert:
        return f"{option.name} = {toml_value(traits.expert)}"
    if option.key in given:
        return f"{option.name} = {toml_value(given[option.key])}"
    if option.default is None:
        return f"# {option.name} = {EXAMPLES[option.key]}"
    return f"{option.name} = {toml_value(option.default)}"


def _facts(traits: Traits | None) -> Iterator[str]:
    if traits is None:
        return
    yield "#"
    expert = f", {traits.expert}-noise expert" if traits.expert else ""
    clips = "images"
    if not traits.images_only:
        clips = f"{traits.frame_rate:g} frames a second, clips of {traits.temporal_stride}k+1 frames"
    sizes = f"sizes in multiples of {traits.spatial_multiple} pixels"
    yield from _comment(f"The model is {traits.variant}{expert}: {clips}, {sizes}.")


def _comment(text: str) -> Iterator[str]:
    for line in text.splitlines():
        yield from (f"# {part}" for part in textwrap.wrap(line, _WIDTH - 2))
