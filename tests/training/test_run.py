"""Whole runs: every variant and layout, every kind of LoRA."""

from __future__ import annotations

import gc
import math
import shutil
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKLWan
from safetensors import safe_open
from tiny_runs import ITS_CLIPS, T2V, Watcher, lora_of, losses_of
from torch import Tensor, nn
from transformers import CLIPVisionModel, UMT5EncoderModel

from tworeel.config.schema import ModelConfig, RunConfig
from tworeel.signals import Stopped
from tworeel.training import run
from tworeel.training.metrics import read_metrics
from tworeel.training.report import SilentRun
from tworeel.training.run import train
from tworeel.training.space import OutOfSpace

MakeConfig = Callable[..., RunConfig]
MakeModel = Callable[..., ModelConfig]
LAYOUTS = ("native", "diffusers", "comfyui")
ALL = [
    (T2V, None, {}),
    ("wan2.1-i2v-14b", None, {"timestep_sampling": "logit_normal"}),
    ("wan2.1-flf2v-14b", None, {}),
    ("wan2.2-t2v-a14b", "high", {"timestep_sampling": "bell"}),
    ("wan2.2-t2v-a14b", "low", {}),
    ("wan2.2-i2v-a14b", "high", {}),
    ("wan2.2-i2v-a14b", "low", {}),
    ("wan2.2-ti2v-5b", None, {}),
    ("wan2.2-ti2v-5b", None, {"condition_on_image": False}),
]


def metadata_of(config: RunConfig) -> dict[str, str]:
    with safe_open(config.train.output / "lora.safetensors", "pt") as file:
        return dict(file.metadata())


def assert_trained(config: RunConfig) -> None:
    lora, losses = lora_of(config), losses_of(config)
    assert len(losses) == config.train.steps
    assert all(math.isfinite(loss) and norm > 0 for _, loss, norm in losses)
    assert all(tensor.isfinite().all() for tensor in lora.values())
    up = [tensor for name, tensor in lora.items() if name.endswith("lora_B.weight")]
    assert up and all(tensor.any() for tensor in up)


@pytest.mark.parametrize(("variant", "expert", "options"), ALL)
def test_every_variant_trains(
    make_config: MakeConfig,
    make_model: MakeModel,
    variant: str,
    expert: str | None,
    options: dict[str, Any],
) -> None:
    model = make_model(variant).model_copy(update={"expert": expert})
    config = make_config(model=model, data=ITS_CLIPS, train={"steps": 3, **options})
    result = train(config)
    assert_trained(config)
    assert result.lora == config.train.output / "lora.safetensors"
    metadata = metadata_of(config)
    assert metadata["tworeel.model"] == metadata["ss_base_model_version"] == variant
    assert metadata.get("tworeel.expert") == expert
    assert metadata["tworeel.steps"] == "3"


def test_all_layouts_of_one_model_train_to_the_same_bits(
    make_config: MakeConfig, make_model: MakeModel
) -> None:
    trained: list[tuple[dict[str, Tensor], Any]] = []
    for layout in LAYOUTS:
        config = make_config(layout, model=make_model(T2V, layout))
        train(config)
        trained.append((lora_of(config), losses_of(config)))
    (first, losses), *others = trained
    for lora, other_losses in others:
        assert other_losses == losses
        assert lora.keys() == first.keys()
        assert all(torch.equal(first[name], tensor) for name, tensor in lora.items())


@pytest.mark.parametrize("expert", ["high", "low"])
def test_an_expert_is_the_same_in_every_layout(
    make_config: MakeConfig, make_model: MakeModel, expert: str
) -> None:
    losses = []
    for layout in LAYOUTS:
        model = make_model("wan2.2-i2v-a14b", layout).model_copy(update={"expert": expert})
        config = make_config(layout, model=model, data=ITS_CLIPS, train={"steps": 2})
        train(config)
        losses.append(losses_of(config))
    assert losses[0] == losses[1] == losses[2]


def test_a_scaled_fp8_file_trains_close_to_its_original(
    make_config: MakeConfig, make_model: MakeModel
) -> None:
    losses = []
    for options in ({}, {"fp8_scaled": True}):
        config = make_config(f"fp8{len(options)}", model=make_model(T2V, "comfyui", **options))
        train(config)
        assert_trained(config)
        losses.append([loss for _, loss, _ in losses_of(config)])
    assert losses[0] != losses[1]
    assert losses[0] == pytest.approx(losses[1], rel=0.05)


@pytest.mark.parametrize("model_dtype", ["bfloat16", "float64"])
def test_other_precisions_train(make_config: MakeConfig, make_model: MakeModel, model_dtype: str) -> None:
    config = make_config(model=make_model().model_copy(update={"dtype": model_dtype}))
    train(config)
    assert_trained(config)
    expected = torch.float64 if model_dtype == "float64" else torch.float32
    assert {t.dtype for name, t in lora_of(config).items() if "lora_" in name} == {expected}


@pytest.mark.parametrize(
    "lora",
    [
        {"dora": True},
        {"rslora": True, "alpha": 3.0},
        {"targets": "attention"},
        {"targets": ("attn1.to_q", "ffn.net.2"), "rank": 5},
    ],
)
def test_every_kind_of_lora_trains(make_config: MakeConfig, lora: dict[str, Any]) -> None:
    config = make_config(lora=lora)
    train(config)
    assert_trained(config)
    trained = lora_of(config)
    rank = lora.get("rank", 2)
    assert {t.shape[0] for name, t in trained.items() if name.endswith("lora_A.weight")} == {rank}
    (alpha,) = {float(t) for name, t in trained.items() if name.endswith("alpha")}
    assert alpha == pytest.approx(3.0 * math.sqrt(2) if lora.get("rslora") else rank)
    assert any("dora" in name or "magnitude" in name for name in trained) is lora.get("dora", False)


def test_a_run_starts_from_another_runs_lora(make_config: MakeConfig) -> None:
    first = make_config("first", train={"learning_rate": 1e-2})
    train(first)
    second = make_config(
        "second",
        train={"steps": 1, "learning_rate": 1e-12},
        lora={"init_from": first.train.output / "lora.safetensors"},
    )
    train(second)
    for name, tensor in lora_of(first).items():
        torch.testing.assert_close(lora_of(second)[name], tensor, rtol=0, atol=1e-9)
    assert losses_of(second)[0][1] != losses_of(first)[0][1]
    # What it began with is in its checkpoints.
    lora = second.lora.model_copy(update={"init_from": second.train.output / "gone.safetensors"})
    longer = second.train.model_copy(update={"steps": 2})
    train(second.model_copy(update={"lora": lora, "train": longer}), resume=True)
    assert len(losses_of(second)) == 2


def test_schedules_and_dropout_leave_their_mark(make_config: MakeConfig) -> None:
    courses = {
        "plain": {},
        "warm": {"warmup_steps": 3},
        "cosine": {"lr_schedule": "cosine"},
        "linear": {"lr_schedule": "linear"},
        "dropped": {"caption_dropout": 1.0},
    }
    rates, losses = {}, {}
    for name, options in courses.items():
        config = make_config(name, train=options)
        train(config)
        lines = read_metrics(config.train.output / "metrics.jsonl")
        rates[name] = [line["learning_rate"] for line in lines]
        losses[name] = lines[0]["loss"]
    assert rates["plain"] == rates["dropped"] == [1e-3] * 4
    assert rates["warm"] == pytest.approx([1e-3 / 3, 2e-3 / 3, 1e-3, 1e-3])
    assert rates["linear"] == pytest.approx([1e-3, 7.5e-4, 5e-4, 2.5e-4])
    assert rates["cosine"][0] == 1e-3 and rates["cosine"][2] == pytest.approx(5e-4)
    assert losses["dropped"] != losses["plain"] == losses["warm"]


def test_loras_on_the_way_come_when_they_are_due_whatever_is_saved(make_config: MakeConfig) -> None:
    config = make_config(train={"steps": 7, "save_every": 5, "export_every": 2})
    train(config)
    exported = sorted(path.name for path in config.train.output.glob("*.safetensors"))
    assert exported == [
        "lora-000002.safetensors",
        "lora-000004.safetensors",
        "lora-000006.safetensors",
        "lora.safetensors",
    ]
    assert sorted(path.name for path in (config.train.output / "checkpoints").iterdir()) == [
        "step-00000005",
        "step-00000007",
    ]


def test_the_encoders_are_gone_before_the_transformer_loads(
    make_config: MakeConfig, make_model: MakeModel, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    encoders = (AutoencoderKLWan, CLIPVisionModel, UMT5EncoderModel)

    def alive() -> int:
        return sum(type(thing) in encoders for thing in gc.get_objects())

    gc.collect()
    before = alive()
    seen: list[int] = []
    load = run.load_model

    def watched(*args: Any) -> nn.Module:
        seen.append(alive())
        return load(*args)

    monkeypatch.setattr(run, "load_model", watched)
    config = make_config(
        model=make_model("wan2.1-i2v-14b"),
        data=ITS_CLIPS,
        train={"steps": 1},
        cache={"folder": tmp_path / "new"},
    )
    train(config)
    assert len(list((tmp_path / "new" / "latents").rglob("*.safetensors"))) == 2, "the encoders did run"
    assert seen == [before]


def test_what_a_run_leaves_behind(make_config: MakeConfig) -> None:
    config = make_config(train={"tensorboard": True})
    watcher = Watcher()
    result = train(config, observer=watcher)
    assert result.steps == 4 and result.folder == config.train.output
    assert sorted(path.name for path in config.train.output.iterdir() if path.name != "run.lock") == [
        "checkpoints",
        "config.toml",
        "lora.safetensors",
        "metrics.jsonl",
        "tensorboard",
    ]
    assert list((config.train.output / "tensorboard").iterdir())
    lines = read_metrics(config.train.output / "metrics.jsonl")
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert set(lines[0]) == {
        *("step", "loss", "grad_norm", "learning_rate", "seconds", "memory/cpu"),
        *("busy/stage0", "busy/stage1"),
    }


def test_a_full_disk_under_the_cache_is_told_and_what_is_cached_stays(
    make_config: MakeConfig, tiny_disk: Path
) -> None:
    filler = tiny_disk / "filler"
    filler.write_bytes(bytes(shutil.disk_usage(tiny_disk).free - 40 * 1024))
    config = make_config(cache={"folder": tiny_disk / "cache"})
    with pytest.raises(OutOfSpace, match=r"cache: the disk filled up while the cache was written; what it"):
        train(config)
    filler.unlink()
    train(config)
    assert_trained(config)


def test_a_stop_while_the_model_loads_comes_at_once(make_config: MakeConfig) -> None:
    phases = 4  # scanning, hashing, reading the encoders, checking the cache

    class Impatient(SilentRun):
        """Stops at the first poll after all clips are cached."""

        done = 0

        def finish(self) -> None:
            self.done += 1

        def poll(self) -> None:
            if self.done == phases:
                raise Stopped(2)

    train(make_config("first"))
    with pytest.raises(Stopped) as caught:
        train(make_config("second"), observer=Impatient())
    called = [frame.name for frame in traceback.extract_tb(caught.value.__traceback__)]
    assert "load_weights" in called
