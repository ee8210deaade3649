"""What many tests use, made once in a session: tiny encoders, and the traces that plans rest on."""

from __future__ import annotations

import functools
import gc
import hashlib
import json
import os
import pickle
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

# Everything is local: a test that would ask a server has to fail at once. The hub client reads this when it
# is imported.
os.environ["HF_HUB_OFFLINE"] = "1"
# Tiny tensors gain nothing from more threads, and workers side by side would fight for the cores. Torch
# reads this when it is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# What one worker or child process has compiled serves the others, also the next time; torch locks its files.
os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(Path(tempfile.gettempdir()) / "tworeel-tests-compiled"))

from filelock import FileLock
from torch import Tensor

from tworeel.data.clips import Bucket
from tworeel.demo.tiny_encoders import (
    write_image_encoder,
    write_text_encoder,
    write_tokenizer,
    write_vae,
)
from tworeel.models.family import Component, Family, Layout, ModelSource
from tworeel.planning import planner
from tworeel.planning.traces import ModelTrace, TraceSettings
from tworeel.planning.tracing import trace_model
from tworeel.sampling.files import Sheet, write_takes

LAYOUTS: tuple[Layout, ...] = ("native", "diffusers", "comfyui")

Writer = Callable[..., Path]
OpenComponent = Callable[..., Component]


def pytest_collection_finish() -> None:
    """Leave what has been imported and collected by now out of every later garbage collection.

    The program collects garbage before it loads a model, and looked through 600,000 objects each time: 0.3 s.
    """
    gc.collect()
    gc.freeze()


def component_at(path: Path, layout: Layout) -> Component:
    """Describe a network's file or folder as `locate` does."""
    if path.is_file():
        return Component(files=(path,), layout=layout)
    config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    return Component(files=tuple(sorted(path.glob("*.safetensors"))), layout=layout, config=config)


def _component_fixture(write: Writer, folder: Path) -> OpenComponent:
    @functools.cache
    def component(layout: Layout, **options: int) -> Component:
        name = "-".join([layout, *(f"{key}{value}" for key, value in options.items())])
        return component_at(write(folder / name, layout, **options), layout)

    return component


@pytest.fixture(scope="session", params=LAYOUTS)
def layout(request: pytest.FixtureRequest) -> Layout:
    """Each of the three layouts in turn."""
    found: Layout = request.param
    return found


@pytest.fixture(scope="session")
def tiny_vae(tmp_path_factory: pytest.TempPathFactory) -> OpenComponent:
    """A function (layout, z=16, seed=0) -> Component of a tiny Wan VAE."""
    return _component_fixture(write_vae, tmp_path_factory.mktemp("vae"))


@pytest.fixture(scope="session")
def tiny_text_encoder(tmp_path_factory: pytest.TempPathFactory) -> OpenComponent:
    """A function (layout, seed=0, d_model=64) -> Component of a tiny UMT5 encoder."""
    return _component_fixture(write_text_encoder, tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="session")
def tiny_image_encoder(tmp_path_factory: pytest.TempPathFactory) -> OpenComponent:
    """A function (layout, seed=0) -> Component of a tiny CLIP image encoder."""
    return _component_fixture(write_image_encoder, tmp_path_factory.mktemp("image"))


@pytest.fixture(scope="session")
def tiny_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Layout], Path]:
    """A function (layout) -> folder of the tiny tokenizer, or ComfyUI's text encoder file that holds it."""
    folder = tmp_path_factory.mktemp("tokenizer")

    @functools.cache
    def tokenizer(layout: Layout) -> Path:
        if layout == "comfyui":
            return write_text_encoder(folder / layout, layout)
        return write_tokenizer(folder / layout, layout)

    return tokenizer


@pytest.fixture(scope="session")
def known_traces(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., ModelTrace]:
    """`trace_model`, which traces a block once: all workers of a test run know of it.

    A trace depends on nothing but the model, the clip and the settings.
    """
    folder = tmp_path_factory.getbasetemp()
    folder = (folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder) / "traces"
    folder.mkdir(exist_ok=True)

    def trace(
        family: Family, source: ModelSource, bucket: Bucket, settings: TraceSettings, **launching: bool
    ) -> ModelTrace:
        key = repr((source.traits, source.transformer.config, bucket, settings, sorted(launching.items())))
        path = folder / hashlib.sha256(key.encode()).hexdigest()
        if not path.exists():
            with FileLock(path.with_suffix(".lock")):
                if not path.exists():
                    written = path.with_suffix(".new")
                    written.write_bytes(
                        pickle.dumps(trace_model(family, source, bucket, settings, **launching))
                    )
                    written.rename(path)
        found: ModelTrace = pickle.loads(path.read_bytes())
        return found

    return trace


@pytest.fixture(autouse=True)
def traced_once(known_traces: Callable[..., ModelTrace], monkeypatch: pytest.MonkeyPatch) -> None:
    """Planners take the traces that are known."""
    monkeypatch.setattr(planner, "trace_model", known_traces)


@pytest.fixture
def latents(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """What was rendered last, before it was decoded."""
    kept: list[Tensor] = []

    def keep(folder: Path, prompts: Any, takes: Any, found: list[Tensor], *rest: Any) -> Sheet:
        kept[:] = found
        return write_takes(folder, prompts, takes, found, *rest)

    monkeypatch.setattr("tworeel.training.sample.write_takes", keep)
    return kept
