from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from real_models import CLIP, IMAGE, budgets_of, request_of, settings_of, source_of

from tworeel.engine.footprints import TOO_LARGE, Footprint, Footprints
from tworeel.engine.residency import Residency
from tworeel.planning.measured_bytes import keep_bytes, known_bytes
from tworeel.planning.measurements import FOLDER_VARIABLE
from tworeel.planning.planner import Planner
from tworeel.planning.precisions import in_precision
from tworeel.planning.requests import Request

VARIANT = "wan2.1-t2v-1.3b"
BLOCKS = "blocks"


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path / "home"))
    return tmp_path / "home"


def request(gpus: str = "2x RTX 4090", **changes: Any) -> Request:
    return request_of(VARIANT, **({"budgets": budgets_of(gpus), "split_at": (15,)} | changes))


def traced(request: Request) -> Footprints:
    return Planner(request).trace.blocks[BLOCKS].footprints


def larger(footprints: Footprints, share: float) -> dict[Residency, Footprint]:
    """What is measured of a block that takes more than its trace, in both ways."""
    return {
        key: replace(one, kept=int(one.kept * share), working=int(one.working * share))
        for key, one in footprints.items()
        if key in (Residency.KEEP, Residency.SELECTIVE)
    }


def keep(request: Request, *stages: Mapping[Residency, Footprint]) -> None:
    budgets = request.budgets[: len(stages)]
    keep_bytes(request, [(budget, {BLOCKS: found}) for budget, found in zip(budgets, stages, strict=True)])


def known(request: Request) -> dict[Residency, Footprint]:
    """What is kept of the blocks, of any clip."""
    return {residency: found for (_, _, residency), found in known_bytes(request).items()}


def as_known(request: Request) -> Request:
    return replace(request, measured=known_bytes(request))


def test_what_a_block_took_is_found_again_and_planned_with() -> None:
    some = request()
    found = larger(traced(some), 1.2)
    keep(some, found, found)
    assert known(some) == found
    trace = Planner(as_known(some)).trace
    footprints = trace.blocks[BLOCKS].footprints
    assert trace.measured and {key: footprints[key] for key in found} == found
    assert footprints[Residency.RECOMPUTE] == traced(some)[Residency.RECOMPUTE]


def test_a_plans_peak_grows_with_what_was_measured() -> None:
    some = request(residency="selective")
    found = larger(traced(some), 1.2)
    keep(some, found)
    before, after = Planner(some).best(), Planner(as_known(some)).best()
    assert after.measured_bytes and not before.measured_bytes and after.as_json()["measured_bytes"]
    selective, as_traced = found[Residency.SELECTIVE], traced(some)[Residency.SELECTIVE]
    for ours, theirs in zip(after.stages, before.stages, strict=True):
        kept = ours.in_flight * ours.num_blocks * (selective.kept - as_traced.kept)
        assert ours.peak - theirs.peak == kept + selective.working - as_traced.working
        assert ours.kept == theirs.kept == 0


def test_a_plan_without_the_cards_ever_having_been_here_rests_on_it_too() -> None:
    keep(request(), larger(traced(request()), 1.2))
    assert Planner(as_known(request("4x RTX 4090", split_at=None))).best().measured_bytes


@pytest.mark.parametrize(
    "changes",
    [
        {"budgets": budgets_of("2x RTX 3090")},
        {"budgets": budgets_of("RTX 4090, RTX 3090")},
        {"attention": "deterministic"},
        {"cpp_wrapper": True},
        {"trace": settings_of(VARIANT, rank=64)},
        {"trace": settings_of(VARIANT, dora=True)},
        {"trace": settings_of(VARIANT, quantize="fp8")},
        {"trace": settings_of(VARIANT, dtype=torch.float16)},
        {"trace": settings_of(VARIANT, compile=False)},
        {"trace": replace(settings_of(VARIANT), targets=("blocks.0.attn1.to_q",))},
        {"source": source_of("wan2.2-t2v-a14b")},
    ],
)
def test_of_another_card_model_or_lora_it_says_nothing(changes: dict[str, Any]) -> None:
    some = request()
    keep(some, larger(traced(some), 1.2))
    assert known(some) and not known_bytes(replace(some, **changes))


def test_of_another_clip_it_says_nothing() -> None:
    some = request()
    keep(some, larger(traced(some), 1.2))
    other = as_known(request(buckets={replace(CLIP, frames=81): 1.0}))
    assert other.measured and not Planner(other).trace.measured
    turned = as_known(request(buckets={replace(CLIP, height=CLIP.width, width=CLIP.height): 1.0}))
    assert Planner(turned).trace.measured, "as many tokens"


def test_several_clips_are_known_beside_each_other_and_the_newest_of_each_counts() -> None:
    some, image = request(), request(buckets={IMAGE: 1.0})
    keep(image, larger(traced(image), 1.1))
    keep(some, larger(traced(some), 1.2))
    keep(some, {Residency.KEEP: larger(traced(some), 1.3)[Residency.KEEP]})
    assert Planner(as_known(image)).trace.measured
    footprints = Planner(as_known(some)).trace.blocks[BLOCKS].footprints
    assert footprints[Residency.KEEP] == larger(traced(some), 1.3)[Residency.KEEP]
    assert footprints[Residency.SELECTIVE] == larger(traced(some), 1.2)[Residency.SELECTIVE]


def test_where_two_cards_differ_the_larger_counts() -> None:
    some = request("RTX 4090, RTX 3090")
    less, more = (larger(traced(some), share) for share in (1.1, 1.3))
    less[Residency.SELECTIVE] = replace(less[Residency.SELECTIVE], working=more[Residency.KEEP].working + 1)
    keep(some, less, more)
    found = known(some)
    assert found[Residency.KEEP] == more[Residency.KEEP]
    assert found[Residency.SELECTIVE].kept == more[Residency.SELECTIVE].kept
    assert found[Residency.SELECTIVE].working == max(one[Residency.SELECTIVE].working for one in (less, more))


def test_of_stages_on_like_cards_the_larger_counts_and_one_that_kept_all_says_nothing_of_the_others() -> None:
    some = request()
    less, more = (larger(traced(some), share) for share in (1.1, 1.3))
    keep(some, more, {Residency.KEEP: less[Residency.KEEP]})
    assert known(some) == more


def test_what_did_not_fit_is_not_kept(folder: Path) -> None:
    some = request()
    keep(some, dict.fromkeys((Residency.KEEP, Residency.SELECTIVE), TOO_LARGE))
    assert not folder.exists()
    selective = larger(traced(some), 1.2)[Residency.SELECTIVE]
    keep(some, {Residency.KEEP: TOO_LARGE, Residency.SELECTIVE: selective})
    assert known(some) == {Residency.SELECTIVE: selective}


def test_of_a_stage_on_which_nothing_is_measured_nothing_is_kept(folder: Path) -> None:
    some = request()
    keep_bytes(some, [(budget, {}) for budget in some.budgets])
    assert not folder.exists()


@pytest.mark.parametrize("share", [0.4, 2.1])
def test_what_is_far_off_its_trace_is_not_used(share: float) -> None:
    some = request()
    keep(some, larger(traced(some), share))
    trace = Planner(as_known(some)).trace
    assert not trace.measured and trace.blocks[BLOCKS].footprints == traced(some)


def test_a_dequantized_weight_that_was_measured_with_a_block_is_counted_once() -> None:
    some = request(trace=settings_of(VARIANT, quantize="nf4"), residency="selective")
    (weight, *_) = [draft.dequantized for draft in Planner(some).drafts(some.budgets, (15,))]
    with_weight = {
        key: replace(one, working=one.working + weight)
        for key, one in traced(some).items()
        if key is not Residency.RECOMPUTE
    }
    keep(some, with_weight)
    found = Planner(as_known(some)).best()
    assert weight and found.measured_bytes and found.peaks == Planner(some).best().peaks


def test_weights_in_another_precision_are_planned_with_what_was_measured_of_them() -> None:
    some = as_known(request())
    fp8 = in_precision(some, "fp8")
    assert not fp8.measured
    keep(fp8, larger(traced(fp8), 1.2))
    assert in_precision(some, "fp8").measured


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", '{"scope": []}', '{"scope": {"blocks 1 keep": [1, 2]}}', "\0", "[" * 100_000],
)
def test_a_damaged_file_is_as_none(folder: Path, content: str) -> None:
    folder.mkdir()
    (folder / "bytes.json").write_text(content, encoding="utf-8")
    some = request()
    assert not known_bytes(some)
    found = larger(traced(some), 1.2)
    keep(some, found)
    assert known(some) == found


@pytest.mark.parametrize(
    "damage", ["key", "residency", "clip", "sizes", "one size", "words", "infinite", "scope"]
)
def test_of_a_damaged_entry_nothing_is_used(folder: Path, damage: str) -> None:
    some = request()
    found = larger(traced(some), 1.2)
    keep(some, found)
    content = json.loads((folder / "bytes.json").read_text(encoding="utf-8"))
    ((scope, entries),) = content.items()
    hidden = found[Residency.KEEP].hidden
    key = f"{BLOCKS} {hidden} keep"
    sizes = entries.pop(key)
    broken = {
        "key": {"keep": sizes},
        "residency": {f"{BLOCKS} {hidden} kept": sizes},
        "clip": {f"{BLOCKS} x keep": sizes},
        "sizes": {key: 3},
        "one size": {key: sizes[:1]},
        "words": {key: ["many", "more"]},
        "infinite": {key: [float("inf"), 1]},
        "scope": {},
    }[damage]
    content[scope] = entries | broken if damage != "scope" else 3
    (folder / "bytes.json").write_text(json.dumps(content), encoding="utf-8")
    left = {} if damage == "scope" else {Residency.SELECTIVE: found[Residency.SELECTIVE]}
    assert known(some) == left
    keep(some, found)
    assert known(some) == found


def test_a_folder_that_cannot_be_written_stops_nothing(folder: Path) -> None:
    folder.touch()
    some = request()
    keep(some, larger(traced(some), 1.2))
    assert not known_bytes(some)
