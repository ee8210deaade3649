from __future__ import annotations

from dataclasses import replace

import pytest

from tworeel.diffsynth.settings import Settings, read_settings
from tworeel.errors import UserError

TWO = {
    "DIFFSYNTH_DUAL_GPU": "true",
    "DIFFSYNTH_DUAL_GPU_DEVICES": "cpu,cpu",
    "ACCELERATE_USE_CPU": "true",
}


def problems(**variables: str) -> str:
    named = {f"DIFFSYNTH_DUAL_GPU_{name}": value for name, value in variables.items()}
    with pytest.raises(UserError) as raised:
        read_settings(TWO | named)
    return str(raised.value)


def test_the_variables_say_where_to_split_and_what_blocks_leave_behind() -> None:
    named = {"SPLIT_AT": " 3, 7", "DEVICES": "cpu, cpu,cpu", "RESIDENCY": "offload", "FP8": "True"}
    named["TEXT_ENCODER"] = "host"
    given = TWO | {f"DIFFSYNTH_DUAL_GPU_{name}": value for name, value in named.items()}
    expected = Settings(devices=("cpu",) * 3, split_at=(3, 7), residency="offload", fp8=True)
    assert read_settings(given) == replace(expected, text_encoder="host")


def test_without_them_the_blocks_are_shared_out_evenly() -> None:
    assert read_settings(TWO) == Settings(devices=("cpu", "cpu"))


def test_all_visible_devices_are_used_and_fewer_than_two_are_an_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("tworeel.diffsynth.settings.visible_devices", lambda: ["cuda:0"])
    with pytest.raises(UserError, match="needs two devices or more, found: cuda:0"):
        read_settings({"DIFFSYNTH_DUAL_GPU": "true"})
    monkeypatch.setattr("tworeel.diffsynth.settings.visible_devices", lambda: ["cuda:0", "cuda:1"])
    assert read_settings({"DIFFSYNTH_DUAL_GPU": "true"}).devices == ("cuda:0", "cuda:1")


@pytest.mark.parametrize("name", ["cuda:2", "cuda:7", "meta"])
def test_a_device_that_is_not_there_is_said_with_those_that_are(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr("tworeel.diffsynth.settings.visible_devices", lambda: ["cuda:0", "cuda:1"])
    assert f"there is no {name} here; there are cuda:0, cuda:1, cpu" in problems(DEVICES=f"cpu,{name}")


def test_the_first_device_is_accelerates(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tworeel.diffsynth.settings.visible_devices", lambda: ["cuda:0", "cuda:1"])
    said = "accelerate computes on cpu, so that has to be the first device"
    assert said in problems(DEVICES="cuda:0,cuda:1")
    named = {"DIFFSYNTH_DUAL_GPU": "true", "DIFFSYNTH_DUAL_GPU_DEVICES": "cuda:1,cuda:0"}
    with pytest.raises(UserError, match="accelerate computes on cuda:0"):
        read_settings(named)
    devices = read_settings(named | {"ACCELERATE_TORCH_DEVICE": "cuda:1"}).devices
    assert devices == ("cuda:1", "cuda:0")
    assert read_settings(named | {"DIFFSYNTH_DUAL_GPU_DEVICES": "cuda,cuda:1"}).devices[0] == "cuda:0"


@pytest.mark.parametrize(
    ("name", "said"), [("gpu zero", "is no device"), ("cuda:9", "there is no cuda:9 here")]
)
def test_a_device_of_accelerates_that_is_none_is_said(name: str, said: str) -> None:
    with pytest.raises(UserError, match=f"ACCELERATE_TORCH_DEVICE: .*{said}"):
        read_settings(TWO | {"ACCELERATE_TORCH_DEVICE": name})


def test_a_misspelled_variable_is_an_error() -> None:
    message = problems(SPLITAT="2")
    assert "DIFFSYNTH_DUAL_GPU_SPLITAT: there is no such variable" in message
    assert "did you mean 'DIFFSYNTH_DUAL_GPU_SPLIT_AT'?" in message


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR"),
        ("ACCELERATE_USE_DEEPSPEED", "true"),
        ("ACCELERATE_USE_FSDP", "true"),
    ],
)
def test_what_of_accelerates_a_split_does_not_go_with_is_refused(name: str, value: str) -> None:
    with pytest.raises(UserError, match=f"{name}={value.lower()}: "):
        read_settings(TWO | {name: value})
    for off in ("no", "false") if "DYNAMO" not in name else ("NO",):
        assert read_settings(TWO | {name: off}).devices == ("cpu", "cpu")


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("twenty", "'twenty' is no whole number"),
        ("-3", "'-3' is no whole number"),
        ("3.5", "'3.5' is no whole number"),
        ("3,7", "2 devices need 1 numbers"),
        ("0", "must rise, from 1 on"),
    ],
)
def test_a_boundary_that_is_none_is_named_with_its_value(given: str, said: str) -> None:
    message = problems(SPLIT_AT=given)
    assert f"DIFFSYNTH_DUAL_GPU_SPLIT_AT={given}" in message and said in message


def test_all_that_is_wrong_is_said_at_once() -> None:
    given = TWO | {"WORLD_SIZE": "2", "DIFFSYNTH_DUAL_GPU_FP8": "maybe", "DIFFSYNTH_DUAL_GPU_SPLIT_AT": "x"}
    more = {"RESIDENCY": "all", "DEVICES": "gpu9", "TEXT_ENCODER": "disk"}
    given |= {f"DIFFSYNTH_DUAL_GPU_{name}": value for name, value in more.items()}
    with pytest.raises(UserError) as raised:
        read_settings(given)
    message = str(raised.value)
    assert len(raised.value.problems) == 7, message
    for word in (
        "--num_processes 2",
        "FP8=maybe",
        "'x'",
        "RESIDENCY=all",
        "TEXT_ENCODER=disk: allowed are device, host",
        "'gpu9' is no device",
        "found: gpu9",
    ):
        assert word in message
