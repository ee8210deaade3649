from __future__ import annotations

import pytest

from tworeel.diffsynth.settings import Settings, read_settings
from tworeel.errors import UserError

TWO = {"DIFFSYNTH_DUAL_GPU": "true", "DIFFSYNTH_DUAL_GPU_DEVICES": "cpu,cpu"}


def problems(**variables: str) -> str:
    named = {f"DIFFSYNTH_DUAL_GPU_{name}": value for name, value in variables.items()}
    with pytest.raises(UserError) as raised:
        read_settings(TWO | named)
    return str(raised.value)


def test_the_variables_say_where_to_split_and_what_blocks_leave_behind() -> None:
    named = {"SPLIT_AT": " 3, 7", "DEVICES": "cpu, cpu,cpu", "RESIDENCY": "offload", "FP8": "True"}
    given = TWO | {f"DIFFSYNTH_DUAL_GPU_{name}": value for name, value in named.items()}
    expected = Settings(devices=("cpu",) * 3, split_at=(3, 7), residency="offload", fp8=True)
    assert read_settings(given) == expected


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
    with pytest.raises(UserError) as raised:
        read_settings(given | {"DIFFSYNTH_DUAL_GPU_RESIDENCY": "all", "DIFFSYNTH_DUAL_GPU_DEVICES": "gpu9"})
    message = str(raised.value)
    assert len(raised.value.problems) == 6, message
    for word in (
        "--num_processes 2",
        "FP8=maybe",
        "'x'",
        "RESIDENCY=all",
        "'gpu9' is no device",
        "found: gpu9",
    ):
        assert word in message
