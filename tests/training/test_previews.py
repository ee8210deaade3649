"""A run with previews is, to the bit, the run without them."""

from __future__ import annotations

import errno
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_runs import T2V, Watcher, digest_of, losses_of
from torch import nn

from tworeel.config.schema import ModelConfig, RunConfig
from tworeel.engine import Split, compiling
from tworeel.errors import UserError
from tworeel.lora.state import lora_parameters
from tworeel.models.wan.vae_decoder import WanDecoder
from tworeel.sampling.rendering import Renderer
from tworeel.signals import Stopped
from tworeel.training.run import train
from tworeel.training.sample import sample

MakeConfig = Callable[..., RunConfig]
MakeModel = Callable[..., ModelConfig]

TWO_PROMPTS = ("a red ball", "the snow")
PREVIEWS = {"every": 1, "prompts": ("a red ball",), "steps": 2, "size": (32, 32), "frames": 5}


def previews_of(config: RunConfig) -> dict[str, bytes]:
    folder = config.train.output / "samples"
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*.*")}


@pytest.mark.parametrize(
    ("variant", "options"),
    [
        (T2V, {"lora": {"dora": True}}),
        (T2V, {"model": {"quantize": "fp8"}, "engine": {"streamed_blocks": (1, 2), "residency": "offload"}}),
        ("wan2.2-ti2v-5b", {"engine": {"devices": ("cpu",)}}),
    ],
)
def test_previews_change_no_bit_of_a_run(
    make_config: MakeConfig, make_model: MakeModel, variant: str, options: dict[str, Any]
) -> None:
    more = dict(options)
    model = make_model(variant).model_copy(update=more.pop("model", {}))
    plain = make_config("plain", model=model, **more)
    previews = {**PREVIEWS, "prompts": TWO_PROMPTS, "strengths": (0, 1)}
    shown = make_config("shown", model=model, sample=previews, **more)
    drawn = []
    for config in (plain, shown):
        torch.manual_seed(5)
        train(config)
        drawn.append(torch.rand(3))
    assert torch.equal(*drawn), "a preview has used the global generator"
    assert digest_of(shown) == digest_of(plain)
    found = previews_of(shown)
    assert len(found) == 4 * (1 + 2 * 2)
    assert found["step-000001/prompt-01-strength-0.mp4"] == found["step-000004/prompt-01-strength-0.mp4"]
    assert found["step-000001/prompt-01-strength-1.mp4"] != found["step-000004/prompt-01-strength-1.mp4"]


@pytest.mark.parametrize("dora", [False, True])
def test_a_preview_is_what_is_rendered_from_the_file_that_the_run_leaves(
    make_config: MakeConfig, tmp_path: Path, dora: bool
) -> None:
    asked = {**PREVIEWS, "prompts": TWO_PROMPTS, "every": 4, "frames": 1, "strengths": (0, 0.5, 1)}
    config = make_config(sample=asked, lora={"rank": 3, "alpha": 2.0, "dora": dora})
    train(config)
    sheet = sample(config, folder=tmp_path / "sheet")
    found = previews_of(config)
    assert len(sheet.takes) == 6
    for path in (sheet.path, *sheet.takes):
        assert found[f"step-000004/{path.name}"] == path.read_bytes()


def test_compiled_blocks_are_not_compiled_again_for_a_preview(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    # What is compiled, and how often, is decided before a backend sees it; inductor takes a minute.
    monkeypatch.setattr(compiling, "BACKEND", "eager")
    counts = []
    for name, asked in (("plain", {}), ("shown", {**PREVIEWS, "strengths": (0, 0.5, 1)})):
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        train(make_config(name, sample=asked, engine={"compile": True}))
        counts.append(dict(torch._dynamo.utils.counters["stats"]))
    assert counts[0]["unique_graphs"] == counts[1]["unique_graphs"] > 0
    assert digest_of(make_config("shown")) == digest_of(make_config("plain"))


def test_a_resumed_run_has_the_same_bits_and_the_same_previews(make_config: MakeConfig) -> None:
    whole, halves = (make_config(name, sample=PREVIEWS) for name in ("whole", "halves"))
    train(whole)
    train(halves.model_copy(update={"train": halves.train.model_copy(update={"steps": 2})}))
    train(halves, resume=True)
    assert digest_of(halves) == digest_of(whole)
    assert previews_of(halves) == previews_of(whole)


def test_previews_may_be_changed_on_resume_without_a_word(make_config: MakeConfig) -> None:
    train(make_config(train={"steps": 2}))
    watcher = Watcher()
    train(make_config(sample=PREVIEWS), resume=True, observer=watcher)
    assert not [line for line in watcher.lines if line.startswith("changed")]
    assert [line for line in watcher.lines if line.startswith("step 4: preview ")]


class StopsInPreview(Watcher):
    """Stops the run in the middle of the first preview, as Ctrl-C does."""

    def __init__(self) -> None:
        super().__init__()
        self.renders = False

    def poll(self) -> None:
        if self.renders:
            raise Stopped(2)


def test_a_signal_during_a_preview_saves_the_step_and_changes_no_bit(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = make_config("plain")
    train(plain)
    stopped = make_config("stopped", train={"save_every": 4}, sample={**PREVIEWS, "strengths": (0.5,)})
    watcher, render = StopsInPreview(), Renderer.render

    def watched(self: Renderer, *args: Any) -> Any:
        watcher.renders = True
        return render(self, *args)

    with monkeypatch.context() as patched:
        patched.setattr(Renderer, "render", watched)
        with pytest.raises(Stopped):
            train(stopped, observer=watcher)
    assert [step for step, *_ in losses_of(stopped)] == [1]
    assert (stopped.train.output / "checkpoints" / "step-00000001").is_dir()
    train(stopped, resume=True)
    assert digest_of(stopped) == digest_of(plain)


def test_too_little_memory_for_a_preview_is_said_and_training_goes_on(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def decode(*_: Any) -> None:
        raise torch.OutOfMemoryError("out of memory. Tried to allocate 2 GiB")

    plain, config, watcher = make_config("plain"), make_config("shown", sample=PREVIEWS), Watcher()
    train(plain)
    monkeypatch.setattr(WanDecoder, "decode", decode)
    train(config, observer=watcher)
    assert "step 1: no preview, there is too little memory for it: out of memory" in "\n".join(watcher.lines)
    assert digest_of(config) == digest_of(plain)


def test_a_disk_that_is_full_for_a_preview_is_said_and_training_goes_on(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    plain, config, watcher = make_config("plain"), make_config("shown", sample=PREVIEWS), Watcher()
    train(plain)
    monkeypatch.setattr("tworeel.training.previews.write_takes", write)
    train(config, observer=watcher)
    lines = "\n".join(watcher.lines)
    assert "step 1: no preview: " in lines and "a preview was written; the training goes on" in lines
    assert digest_of(config) == digest_of(plain)


def test_the_model_is_left_as_it_was(make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    states: list[Any] = []
    render = Renderer.render

    def state_of(split: Split) -> Any:
        model: nn.Module = split.model
        return (
            [module.training for module in model.modules()],
            [(name, p.requires_grad, p.data_ptr()) for name, p in model.named_parameters()],
            [p.grad is not None for p in lora_parameters(model).values()],
            split.residencies,
            split.compiler,
        )

    def watched(self: Renderer, takes: Any, turn: int, split: Split, *rest: Any) -> Any:
        states.append(state_of(split))
        found = render(self, takes, turn, split, *rest)
        states.append(state_of(split))
        return found

    monkeypatch.setattr(Renderer, "render", watched)
    train(make_config(sample=PREVIEWS, engine={"streamed_blocks": (1, 1), "residency": "recompute"}))
    assert len(states) == 8
    assert all(before == after for before, after in zip(states[::2], states[1::2], strict=True))


def test_what_is_wrong_with_the_previews_is_said_before_a_run(make_config: MakeConfig) -> None:
    config = make_config(sample={**PREVIEWS, "prompts": (), "frames": 3, "image": Path("none.png")})
    with pytest.raises(UserError) as error:
        train(config)
    assert len(error.value.problems) == 3
    assert "sample.frames = 3: wan2.1-t2v-1.3b takes 4k+1 frames" in error.value.problems
    assert not (config.train.output / "config.toml").exists()
