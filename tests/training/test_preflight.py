"""What is wrong is said before a weight is read, all of it at once."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tiny_runs import Watcher
from torch._inductor import cpp_builder
from torch._inductor.exc import InvalidCxxCompiler

from tworeel.config.schema import ModelConfig, RunConfig, SourceConfig
from tworeel.errors import UserError
from tworeel.models.registry import FAMILIES
from tworeel.models.wan.family import WAN
from tworeel.training.checkpoint import CheckpointStore
from tworeel.training.loadable import torch_dtype
from tworeel.training.preflight import lora_targets, model_request, preflight
from tworeel.training.report import SilentRun
from tworeel.training.run import train
from tworeel.weights.tensor_files import TensorFiles

MakeConfig = Callable[..., RunConfig]
MakeModel = Callable[..., ModelConfig]


def problems_of(config: RunConfig) -> list[str]:
    with pytest.raises(UserError) as caught:
        preflight(config, SilentRun())
    return list(caught.value.problems)


def test_a_plan_reads_no_weight(make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: TensorFiles, *args: object) -> None:
        raise AssertionError("a weight was read")

    monkeypatch.setattr(TensorFiles, "read", refuse)
    job = preflight(make_config(engine={"devices": ("cpu",) * 4}), SilentRun())
    assert all(p.is_meta for p in job.transformer.parameters())
    assert job.placement.num_stages == 4
    assert len(job.clips) == 3
    assert len(job.targets) == 4 * 10
    assert job.init_from is None


def _find_none(names: object) -> str:
    raise InvalidCxxCompiler


def test_all_problems_come_at_once(
    make_config: MakeConfig, clips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(clips, broken)
    (broken / "clip_0.mp4").write_bytes(b"not a video")
    (broken / "clip_1.txt").unlink()
    lora = tmp_path / "start.safetensors"
    save_file({"unet.conv.weight": torch.zeros(2, 2)}, lora)
    monkeypatch.setattr(cpp_builder, "cpp_compiler_search", _find_none)
    config = make_config(
        data={"sources": (SourceConfig(path=broken), SourceConfig(path=tmp_path / "missing"))},
        lora={"targets": ("attn1.to_q", "attn9.to_z"), "init_from": lora},
        engine={"devices": ("cpu", "cuda:77"), "cpp_wrapper": True, "compile": True},
        train={"name": "../outside", "output": broken / "run"},
        cache={"devices": ("cuda:78",)},
    )
    found = problems_of(config)
    for words in (
        "train.name = '../outside'",
        "attn9.to_z",
        "start.safetensors",
        "engine.devices: 'cuda:77' does not exist",
        "cache.devices: 'cuda:78' does not exist",
        f"lies in the dataset's folder {broken}, where a run's pictures would be taken for clips",
        "engine.cpp_wrapper = true: launching from C++ needs a C++ compiler",
        "missing",
        "clip_0.mp4",
        "clip_1",
    ):
        assert any(words in line for line in found), (words, found)
    assert not (config.train.output.parent / "outside.safetensors").exists()


def test_without_a_model_devices_and_datasets_are_still_looked_at(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    found = problems_of(
        make_config(
            model=ModelConfig(path=str(tmp_path / "no-model")),
            data={"sources": (SourceConfig(path=tmp_path / "no-data"),)},
            engine={"devices": ("cuda:88",)},
        )
    )
    assert len(found) >= 3
    for words in ("no-model", "no-data", "cuda:88"):
        assert any(words in line for line in found), (words, found)


def test_an_expert_has_to_be_chosen(make_config: MakeConfig, make_model: MakeModel) -> None:
    model = make_model("wan2.2-t2v-a14b").model_copy(update={"expert": None})
    assert any("expert" in line for line in problems_of(make_config(model=model)))


@pytest.mark.parametrize(
    ("engine", "words"),
    [
        ({"devices": ("cpu",) * 5}, "engine: "),
        ({"devices": ("cpu",) * 2, "split_at": (4,)}, "engine.split_at = [4]: "),
        ({"devices": ("cpu",) * 3, "split_at": (3, 9)}, "engine.split_at = [3, 9]: "),
    ],
)
def test_stages_have_to_fit_the_blocks(
    make_config: MakeConfig, engine: dict[str, object], words: str
) -> None:
    assert [line[: len(words)] for line in problems_of(make_config(engine=engine))] == [words]


def test_a_disk_without_room_for_the_checkpoints_is_told_before_anything_is_encoded(
    make_config: MakeConfig, tiny_disk: Path
) -> None:
    config = make_config(lora={"rank": 16})
    train = config.train.model_copy(update={"output": tiny_disk / "run", "keep_checkpoints": 50})
    (line,) = problems_of(config.model_copy(update={"train": train}))
    assert "run: the run with its checkpoints and its LoRA needs " in line and "MiB are free" in line
    assert not (tiny_disk / "run").exists()


def test_a_folder_without_permission_is_told_and_nothing_is_made(
    make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.access", lambda path, mode: path != tmp_path)
    config = make_config()
    train = config.train.model_copy(update={"output": tmp_path / "deep" / "run"})
    (line,) = problems_of(config.model_copy(update={"train": train}))
    assert line.endswith(f"run: cannot write a run there: no permission to write to {tmp_path}")
    assert not (tmp_path / "deep").exists()


def test_an_unknown_preset_names_those_there_are(make_config: MakeConfig) -> None:
    (line,) = problems_of(make_config(lora={"targets": "everything"}))
    assert line.startswith("lora.targets = 'everything': no preset of wan; allowed are attention, all-linear")


def test_targets_that_match_nothing_are_refused(make_config: MakeConfig) -> None:
    (line,) = problems_of(make_config(lora={"targets": ("attn3.to_q",)}))
    assert "attn3.to_q" in line


def test_a_rank_beyond_the_layers_own_is_refused(make_config: MakeConfig) -> None:
    (problem,) = problems_of(make_config(lora={"rank": 10**11}))
    assert problem == "lora.rank = 100000000000: at most 128, the rank of the model's own layers"


def test_an_occupied_folder_is_told_together_with_the_rest(make_config: MakeConfig) -> None:
    config = make_config(engine={"devices": ("cuda:77",)})
    CheckpointStore(config.train.output / "checkpoints").save(1, {"lora": {"a": torch.zeros(1)}}, {})
    with pytest.raises(UserError) as caught:
        train(config)
    assert len(caught.value.problems) == 2
    assert "holds a run with checkpoints" in caught.value.problems[0]
    assert "cuda:77" in caught.value.problems[1]


def test_a_schedule_without_levels_for_the_expert_is_refused(
    make_config: MakeConfig, make_model: MakeModel
) -> None:
    low = make_model("wan2.2-t2v-a14b").model_copy(update={"expert": "low"})
    (line,) = problems_of(make_config(model=low, train={"shift": 1e7}))
    assert line.startswith("train.shift = 1e+07: ")


def test_a_transformer_that_lacks_a_tensor_is_refused_with_its_name(
    make_config: MakeConfig, make_model: MakeModel, tmp_path: Path
) -> None:
    whole = Path(make_model(layout="comfyui").path)
    shutil.copytree(whole.parent, tmp_path / "model")
    with TensorFiles(whole) as files:
        tensors = {name: files.read(name) for name in files.names}
    del tensors["blocks.2.ffn.0.weight"]
    save_file(tensors, tmp_path / "model" / whole.name)
    model = ModelConfig(path=str(tmp_path / "model" / whole.name), dtype="float32")
    assert any("blocks.2.ffn.net.0.proj.weight" in line for line in problems_of(make_config(model=model)))


def test_a_lora_to_start_from_that_does_not_fit_is_refused_before_the_model_is_read(
    make_config: MakeConfig,
) -> None:
    first = make_config("first", train={"steps": 1}, lora={"targets": ("attn1.to_q", "ffn.net.2")})
    train(first)
    path = first.train.output / "lora.safetensors"
    found = problems_of(make_config(lora={"init_from": path, "rank": 4, "targets": ("attn1.to_q",)}))
    assert len(found) == 2 and all(line.startswith(f"{path}: ") for line in found)
    assert found[0].endswith(
        "4 of its layers are not among the run's targets, the first is 'blocks.0.ffn.net.2'"
    )
    assert found[1].endswith("'blocks.0.attn1.to_q', as 3 more, has rank 2, the run has lora.rank = 4")


def test_a_cache_folder_that_cannot_be_is_refused(make_config: MakeConfig, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (line,) = problems_of(make_config(cache={"folder": tmp_path / "file" / "cache"}))
    assert line.endswith(f"{tmp_path / 'file'} is a file; the cache needs a folder")


def test_a_refused_run_leaves_nothing_but_its_folder(make_config: MakeConfig) -> None:
    config = make_config(engine={"devices": ("cuda:66",)})
    with pytest.raises(UserError):
        train(config, observer=Watcher())
    assert {path.name for path in config.train.output.iterdir()} <= {"run.lock"}


def test_names_of_presets_patterns_and_dtypes(make_config: MakeConfig) -> None:
    job = preflight(make_config(lora={"targets": "attention"}), SilentRun())
    assert len(job.targets) == 4 * 8
    own = ("attn1.to_q",)
    assert lora_targets(job.family, make_config(lora={"targets": own})) == own
    assert model_request(make_config()).path == make_config().model.path
    assert torch_dtype("bfloat16") is torch.bfloat16


def test_a_quantization_that_is_not_installed_is_a_problem(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    config = make_config()
    config = config.model_copy(update={"model": config.model.model_copy(update={"quantize": "nf4"})})
    (line,) = problems_of(config)
    assert line.startswith("model.quantize = 'nf4': needs bitsandbytes; pip install")


def test_a_way_to_embed_captions_that_the_model_does_not_have_is_said_at_once(
    make_config: MakeConfig,
) -> None:
    found = problems_of(make_config(cache={"text_placement": "spread", "text_quantize": "fp8"}))
    assert [line.partition(":")[0] for line in found] == [
        "cache.text_placement = 'spread'",
        "cache.text_quantize = 'fp8'",
    ]


def test_dora_on_one_of_three_layers_that_a_lora_file_fuses_is_said_at_once(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    fused = replace(
        WAN,
        to_native=lambda name: name.replace("to_q", "qkv").replace("to_k", "qkv").replace("to_v", "qkv"),
        native_parts=lambda name: (
            tuple(name.replace("qkv", part) for part in ("to_q", "to_k", "to_v"))
            if name.endswith("qkv")
            else ()
        ),
    )
    monkeypatch.setitem(FAMILIES, "wan", fused)
    options = {"targets": ("blocks.0.attn1.to_q",), "dora": True}
    found = problems_of(make_config(lora=options))
    assert found == [
        f"lora.targets: with lora.dora = true, 'blocks.0.attn1.{part}' must be among them too"
        for part in ("to_k", "to_v")
    ]
