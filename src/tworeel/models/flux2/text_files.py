"""Where FLUX.2's text encoder and its tokenizer lie, in diffusers' folders or ComfyUI's files."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tworeel.errors import UserError
from tworeel.models.family import Component, ModelRequest
from tworeel.models.flux2.text_networks import QWEN, TextNetwork, plain_shapes, text_network
from tworeel.models.flux2.text_tokens import TOKENIZER_FILE
from tworeel.models.network_files import all_shards, is_standard, read_json, weight_files
from tworeel.weights.tensor_files import SUFFIXES, TensorFiles

_FOLDER = "text_encoder"
_COMFYUI_FOLDERS = ("text_encoders", "clip")
_LEVELS_UP = 3  # from a transformer in a subfolder of ComfyUI's models/diffusion_models up to models/
_EMBEDDED = "tekken_model"


@dataclass(frozen=True, kw_only=True)
class FoundText:
    """What was found, and what is wrong with it; without problems both are there."""

    component: Component | None
    tokenizer: Path | None
    problems: tuple[str, ...]


def find_text_encoder(
    request: ModelRequest, root: Path, network: TextNetwork, joint_attention_dim: int
) -> FoundText:
    """Find the language model that a transformer reads: where the request says, else in and near `root`.

    Names only say where to look; the headers tell whether it is the right one.

    Args:
        request: its `text_encoder` and `tokenizer` win over what lies near.
        root: the model's folder.
        network: `MISTRAL` for dev, `QWEN` for klein.
        joint_attention_dim: of the transformer.
    """
    wanted = _Wanted(network, joint_attention_dim)
    if request.text_encoder is not None:
        component, problems = _given(request.text_encoder, wanted)
    else:
        component, problems = _nearby(root, wanted)
    near = [file.parent for file in component.files] if component else []
    tokenizer, tokenizer_problems = _tokenizer(request.tokenizer, component, [root, *near], wanted)
    return FoundText(component=component, tokenizer=tokenizer, problems=(*problems, *tokenizer_problems))


@dataclass(frozen=True)
class _Wanted:
    network: TextNetwork
    joint_attention_dim: int

    def __str__(self) -> str:
        return (
            f"a {self.network.title} of width {self.joint_attention_dim // len(self.network.hidden_states)}"
        )

    @property
    def pattern(self) -> str:
        return r"qwen[-_ ]?3" if self.network is QWEN else r"mistral"

    def misfit(self, component: Component) -> str | None:
        """Say what a component holds instead; None if it is the right one."""
        try:
            with TensorFiles(*component.files) as files:
                shapes = plain_shapes(files.names)
        except UserError as error:
            return "; ".join(error.problems)
        found = text_network(shapes)
        file = component.files[0]
        if found is None:
            return f"{file}: holds neither a Mistral-3 nor a Qwen3 language model; this model needs {self}"
        width = shapes["embed_tokens.weight"][1]
        if found is self.network and width * len(found.hidden_states) == self.joint_attention_dim:
            return None
        return f"{file}: holds a {found.title} of width {width}; this model needs {self}"


def _given(given: str, wanted: _Wanted) -> tuple[Component | None, list[str]]:
    path = Path(given).expanduser()
    components = list(_at(path, wanted))
    if not components:
        what = "holds no text encoder" if path.exists() else "no such file or folder"
        return None, [f"model.text_encoder = '{given}': {what}"]
    return _first_fitting(components, wanted)


def _at(path: Path, wanted: _Wanted) -> Iterator[Component]:
    if path.is_file():
        if path.name.endswith(SUFFIXES):
            yield _of_file(path)
        return
    yield from _of_folder(path / _FOLDER)
    yield from _of_folder(path)
    yield from _of_files(path.glob("*"), wanted)


def _nearby(root: Path, wanted: _Wanted) -> tuple[Component | None, list[str]]:
    levels = [root / "models", root, *root.absolute().parents[:_LEVELS_UP]]
    folders = [level / name for level in levels for name in _COMFYUI_FOLDERS]
    files = (file for folder in folders for file in folder.rglob("*"))
    components = [*_at(root, wanted), *_of_files(files, wanted)]
    if components:
        return _first_fitting(components, wanted)
    return None, [
        f"{root}: the text encoder is missing ({wanted}, for example {wanted.network.example}, or "
        f"{_FOLDER}/); put it there or set model.text_encoder. "
        "On the hub, its licence may have to be accepted first"
    ]


def _first_fitting(components: Sequence[Component], wanted: _Wanted) -> tuple[Component | None, list[str]]:
    problems: list[str] = []
    for component in components:
        misfit = wanted.misfit(component)
        if misfit is None:
            return component, []
        problems.append(misfit)
    return None, problems


def _of_folder(folder: Path) -> Iterator[Component]:
    config = folder / "config.json"
    files = weight_files(folder) if config.is_file() else ()
    if files:
        yield Component(files=files, layout="diffusers", config=read_json(config))


def _of_files(files: Iterable[Path], wanted: _Wanted) -> Iterator[Component]:
    """Choose by name; what is rounded most comes last, then the plainest name counts."""
    named = [
        file
        for file in files
        if file.name.endswith(".safetensors") and re.search(wanted.pattern, file.name.lower())
    ]
    for file in sorted(named, key=lambda file: (*_rounding(file), len(file.name), file.name)):
        yield _of_file(file)


def _rounding(file: Path) -> tuple[bool, bool]:
    return "fp4" in file.name.lower(), "fp8" in file.name.lower()


def _of_file(path: Path) -> Component:
    config = path.parent / "config.json"
    if is_standard(path) and config.is_file():
        return Component(files=all_shards(path), layout="diffusers", config=read_json(config))
    return Component(files=all_shards(path), layout="comfyui")


def _tokenizer(
    given: str | None, component: Component | None, near: Sequence[Path], wanted: _Wanted
) -> tuple[Path | None, list[str]]:
    if given is not None:
        path = Path(given).expanduser()
        places, missing = [path], f"model.tokenizer = '{given}': "
        missing += f"holds no {TOKENIZER_FILE}" if path.exists() else "no such file or folder"
    else:
        places, missing = [*near, *(folder.parent for folder in near)], _missing(component, near[0], wanted)
    found = next((folder for place in places if (folder := _tokenizer_at(place))), None)
    if found is None:
        return None, [missing]
    if not _has_template(found):
        return found, [
            f"{found}: the tokenizer has no chat template (chat_template.jinja); {_advice(wanted)}"
        ]
    return found, []


def _tokenizer_at(path: Path) -> Path | None:
    if path.name == TOKENIZER_FILE and path.is_file():
        return path.parent
    return next(
        (folder for folder in (path / "tokenizer", path) if (folder / TOKENIZER_FILE).is_file()), None
    )


def _has_template(folder: Path) -> bool:
    if any((folder / name).is_file() for name in ("chat_template.jinja", "chat_template.json")):
        return True
    return "chat_template" in read_json(folder / "tokenizer_config.json")


def _missing(component: Component | None, root: Path, wanted: _Wanted) -> str:
    if component is not None and _embeds_tokenizer(component):
        file = component.files[0]
        return f"{file}: carries its tokenizer as '{_EMBEDDED}', which is not read; {_advice(wanted)}"
    return f"{root}: the tokenizer is missing (tokenizer/{TOKENIZER_FILE}); {_advice(wanted)}"


def _advice(wanted: _Wanted) -> str:
    return f"set model.tokenizer to the tokenizer folder of {wanted.network.repository}"


def _embeds_tokenizer(component: Component) -> bool:
    with TensorFiles(*component.files) as files:
        return _EMBEDDED in files.names
