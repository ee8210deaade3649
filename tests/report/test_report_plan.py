from __future__ import annotations

from dataclasses import replace

import pytest
from rich.console import Console

from tworeel.engine.residency import Residency
from tworeel.planning.plans import Alternative, Plan, StagePlan
from tworeel.report.plan import alternatives_table, duration, misfit, plan_lines, plan_tables, verdict_lines

GIB = 2**30
FIRST = StagePlan(
    device="cuda:0",
    card="RTX 4090",
    first=0,
    last=20,
    kept=0,
    residency=Residency.OFFLOAD_SELECTIVE,
    streamed=4,
    in_flight=3,
    parts={"weights": 13 * GIB, "activations": 8 * GIB},
    of_each=2 * GIB,
    spare=GIB,
    free=23 * GIB,
    forward=4.1,
    backward=10.0,
    computing=14.1,
    forward_kernels=1500,
    backward_kernels=2500,
)
SECOND = replace(FIRST, device="cuda:1", first=21, last=39, kept=2, residency=Residency.SELECTIVE, streamed=0)
PLAN = Plan(
    model="wan2.2-t2v-a14b",
    precision="bfloat16",
    compiled=True,
    cpp_wrapper=False,
    micro_batches=8,
    tokens=20_280,
    stages=(FIRST, SECOND),
    host_memory=34 * GIB,
    host_free=60 * GIB,
    seconds_per_step=118.0,
    busy=(0.96, 0.86),
    host_bound=False,
    steps=1000,
    steps_per_epoch=12.5,
    calibrated=False,
)


def printed(*things: object) -> str:
    console = Console(width=80)
    with console.capture() as capture:
        for thing in things:
            console.print(thing)
    return capture.get()


def row(text: str, name: str) -> list[str]:
    lines = [[cell.strip() for cell in line.strip("│").split("│")] for line in text.splitlines()]
    (found,) = [cells[1:] for cells in lines if cells[0] == name]
    return found


def test_the_table_has_a_column_a_stage() -> None:
    (table,) = plan_tables(PLAN, Console(width=80))
    text = printed(table)
    assert "wan2.2-t2v-a14b, bfloat16, 20,280 tokens, 8 clips a step" in text and "…" not in text
    assert row(text, "card") == ["RTX 4090"] * 2
    assert row(text, "blocks") == ["0 to 20", "21 to 39"]
    assert row(text, "precision") == ["bfloat16"] * 2
    assert row(text, "leave behind") == ["21 offload-selective", "17 selective, 2 keep"]
    assert row(text, "weights streamed") == ["4 of 21", "none"]
    assert row(text, "peak") == ["21.0 GiB"] * 2
    assert row(text, "busy") == ["96 %", "86 %"]
    assert row(text, "left to the allocator") == ["1.0 GiB"] * 2
    assert row(text, "free") == ["23.0 GiB"] * 2


def test_of_cards_by_name_the_table_says_what_cuda_takes_beside_what_is_free() -> None:
    context = "driver, CUDA context"
    (here,) = plan_tables(PLAN, Console(width=80))
    assert context not in printed(here)
    stages = (replace(FIRST, context=GIB), replace(SECOND, context=2 * GIB))
    (table,) = plan_tables(replace(PLAN, stages=stages), Console(width=80))
    assert row(printed(table), context) == ["1.0 GiB", "2.0 GiB"]


def test_more_stages_than_the_console_has_room_for_are_in_several_tables() -> None:
    stages = tuple(replace(FIRST, device=f"cuda:{number}") for number in range(8))
    plan = replace(PLAN, stages=stages, busy=tuple(number / 10 for number in range(8)))
    tables = plan_tables(plan, Console(width=80))
    text = printed(*tables)
    assert len(tables) > 1 and "…" not in text and "offload-selective" in text
    assert [f"cuda:{number}" in text for number in range(8)] == [True] * 8
    assert [f" {number}0 %" in text for number in range(1, 8)] == [True] * 7
    assert len(plan_tables(plan, Console(width=300))) == 1


def test_the_verdict_says_whether_it_fits_how_long_it_takes_and_what_limits() -> None:
    lines = verdict_lines(PLAN)
    assert lines[0] == "It fits."
    assert "A clip takes 14.8 s, a step 118 s (by the cards' figures)" in lines[1]
    assert "An epoch takes 24.6 minutes, 1,000 steps 32.8 hours" in lines[2]
    assert "34.0 GiB of 60.0 GiB" in lines[3]
    assert "memory" in lines[4]


def test_the_verdict_says_where_it_rests_on_what_was_measured() -> None:
    words = "What blocks take is as measured on these cards"
    assert words not in verdict_lines(PLAN)
    assert words in verdict_lines(replace(PLAN, measured_bytes=True))
    assert "(as measured on these cards)" in verdict_lines(replace(PLAN, calibrated=True))[1]


def test_what_does_not_fit_is_told_with_what_is_missing() -> None:
    plan = replace(PLAN, stages=(replace(FIRST, free=20 * GIB), SECOND))
    lacking = "cuda:0 would need 22.0 GiB and has 20.0 GiB (2.0 GiB too few, most is weights)"
    assert verdict_lines(plan)[0] == f"It does not fit: {lacking}"
    plan = replace(plan, stages=(plan.stages[0], replace(SECOND, free=22 * GIB - 2**20)))
    assert plan.limit == f"{lacking}; {plan.stages[1].shortfall}"
    assert plan.limit.endswith("(1 MiB too few, most is weights)")


def test_figures_of_stages_that_share_a_card_are_not_called_the_cards() -> None:
    stages = [replace(stage, device="cuda:1", shared=2, free=20 * GIB) for stage in (FIRST, SECOND)]
    plan = replace(PLAN, stages=tuple(stages))
    needed, lacking = "cuda:1 would need 22.0 GiB and has 20.0 GiB", "2.0 GiB too few, most is weights"
    assert plan.shortfalls == [f"{needed} (blocks 0 to 20, 1/2 of the card's: {lacking})"]
    assert row(printed(*plan_tables(plan, Console(width=80))), "free, 1/2 of the card's") == ["20.0 GiB"] * 2
    assert plan_lines(plan)[0].endswith("blocks 0 to 20, 21.0 GiB of 20.0 GiB, 1/2 of the card's")


@pytest.mark.parametrize(
    ("busy", "host", "limit"),
    [
        ((0.7, 0.8), 34, "the cards wait 25 % of a step: more micro-batches a step"),
        (
            (0.4, 0.96),
            34,
            "the cards wait 32 % of a step for cuda:1, which works 96 %: more memory on the others",
        ),
        ((0.4, 0.96), 58, "the cards wait 32 % of a step for cuda:1, which works 96 %: more host memory"),
    ],
)
def test_what_the_cards_wait_for_is_told(busy: tuple[float, float], host: int, limit: str) -> None:
    plan = replace(PLAN, busy=busy, host_memory=host * GIB)
    assert plan.limit == limit


def test_host_memory_that_lacks_here_need_not_lack_elsewhere() -> None:
    plan = replace(PLAN, host_memory=61 * GIB)
    assert verdict_lines(plan, host_is_here=True)[0].endswith("--host-memory-gib plans for another")
    assert "--host-memory-gib" not in verdict_lines(plan)[0]
    small = replace(PLAN, stages=(replace(FIRST, free=20 * GIB), SECOND))
    assert "--host-memory-gib" not in verdict_lines(small, host_is_here=True)[0]


def test_what_does_not_fit_is_told_with_the_changes_that_would_and_their_figures() -> None:
    plan = replace(PLAN, host_memory=61 * GIB)
    assert misfit(plan) == f"{plan.limit}. What would fit it: nothing that is known"
    shorter = Alternative(
        name="clips of at most 45 frames", fits=True, seconds_per_step=90.0, peaks=(GIB, 2 * GIB), reason=""
    )
    other = replace(shorter, name="model.quantize = 'fp8'", peaks=(GIB,))
    assert misfit(replace(plan, changes=(shorter, other))).endswith(
        "What would fit it: clips of at most 45 frames (90.0 s a step: 1.0 GiB, 2.0 GiB); "
        "model.quantize = 'fp8' (90.0 s a step: 1.0 GiB)"
    )


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"host_memory": 61 * GIB},
            "61.0 GiB of host memory would be pinned, 60.0 GiB may be (1.0 GiB",
        ),
        ({"host_bound": True}, "the host"),
        ({"busy": (0.5, 0.5)}, "the cards wait 50 % of a step"),
        ({"stages": (replace(FIRST, kept=21), replace(SECOND, kept=19))}, "compute"),
    ],
)
def test_each_limit_has_words(changes: dict[str, object], words: str) -> None:
    assert words in replace(PLAN, **changes).limit


def test_in_short_it_is_a_line_a_stage() -> None:
    first, second, time = plan_lines(PLAN)
    assert first == "Plan: cuda:0 (RTX 4090) runs blocks 0 to 20, 21.0 GiB of 23.0 GiB"
    assert "blocks 21 to 39" in second and "14.8 s a clip, 32.8 hours in all" in time


def test_in_short_it_says_what_was_not_chosen() -> None:
    lost = Alternative(name="bfloat16 weights", fits=False, seconds_per_step=9, peaks=(), reason="no room")
    assert plan_lines(replace(PLAN, alternatives=(lost,)))[-1] == "Plan: not bfloat16 weights: no room"


def test_alternatives_have_their_figures_and_a_reason() -> None:
    one = Alternative(
        name="keep all activations",
        fits=False,
        seconds_per_step=90.0,
        peaks=(60 * GIB, 50 * GIB),
        reason="no room",
    )
    text = printed(alternatives_table([one], "What else was weighed"))
    assert "90.0 s" in text and "60.0 GiB" in text and "no room" in text


def test_what_was_clear_without_a_plan_has_no_figures() -> None:
    one = Alternative(name="bf16 weights", fits=False, seconds_per_step=None, peaks=(), reason="too large")
    text = printed(alternatives_table([one], "What else was weighed"))
    assert "bf16 weights" in text and "too large" in text and "None" not in text


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(50, "50 seconds"), (300, "5.0 minutes"), (7200, "2.0 hours"), (260_000, "3.0 days")],
)
def test_durations_have_a_unit_that_fits(seconds: float, words: str) -> None:
    assert duration(seconds) == words


def test_what_a_device_of_several_stages_holds_is_told() -> None:
    stages = tuple(replace(stage, device="cuda:0") for stage in PLAN.stages)
    text = " ".join(verdict_lines(replace(PLAN, stages=stages, apart={"cuda:0": 12 * GIB})))
    assert "cuda:0 holds 30.0 GiB at most: its stages' peaks do not come together" in text
    assert "at most" not in " ".join(verdict_lines(PLAN))
