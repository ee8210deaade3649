from __future__ import annotations

import itertools

import pytest
import torch

from tworeel.engine.schedule import (
    Action,
    Held,
    at_work,
    ideal_efficiency,
    in_flight,
    interleaved,
    make_orders,
    most_held,
    most_in_flight,
    one_by_one_first,
    one_f_one_b,
)

GRID = list(itertools.product((1, 2, 3, 4, 7), (1, 2, 3, 8, 20), (0, 1, 2)))


def execute(num_stages: int, num_micro_batches: int, slack: int) -> int:
    """Run the orders with unit times; return the number of time slots, or fail if they deadlock."""
    orders = one_f_one_b(num_stages, num_micro_batches, slack=slack)
    done: set[Action] = set()
    position = [0] * num_stages
    for slot in itertools.count(1):
        ready = []
        for stage, order in enumerate(orders):
            if position[stage] < len(order):
                action = order[position[stage]]
                needs = [Action("F", action.micro_batch, stage - 1)] if stage else []
                if action.kind == "B":
                    needs = [Action("F", action.micro_batch, stage)]
                    needs += [Action("B", action.micro_batch, stage + 1)] * (stage < num_stages - 1)
                if done.issuperset(needs):
                    ready.append(action)
        assert ready, "deadlock"
        for action in ready:
            position[action.stage] += 1
        done.update(ready)
        if len(done) == 2 * num_stages * num_micro_batches:
            return slot
    raise AssertionError


@pytest.mark.parametrize(("num_stages", "num_micro_batches", "slack"), GRID)
def test_every_action_stands_once_and_nothing_deadlocks(num_stages, num_micro_batches, slack):
    orders = one_f_one_b(num_stages, num_micro_batches, slack=slack)
    for stage, order in enumerate(orders):
        expected = {Action(k, m, stage) for k in "FB" for m in range(num_micro_batches)}
        assert len(order) == len(expected) and set(order) == expected
    execute(num_stages, num_micro_batches, slack)


@pytest.mark.parametrize(("num_stages", "num_micro_batches", "slack"), GRID)
def test_a_stage_never_holds_more_micro_batches_than_stated(num_stages, num_micro_batches, slack):
    for stage, order in enumerate(one_f_one_b(num_stages, num_micro_batches, slack=slack)):
        held = list(itertools.accumulate(1 if a.kind == "F" else -1 for a in order))
        assert max(held) == min(num_micro_batches, in_flight(num_stages, stage, slack=slack))


@pytest.mark.parametrize(
    ("num_stages", "num_micro_batches"), list(itertools.product((1, 2, 4), (1, 2, 4, 8)))
)
def test_it_takes_the_time_that_1f1b_promises(num_stages, num_micro_batches):
    slots = execute(num_stages, num_micro_batches, 0)
    assert slots == 2 * (num_micro_batches + num_stages - 1)
    assert ideal_efficiency(num_stages, num_micro_batches) == 2 * num_micro_batches / slots


def test_backwards_come_in_the_order_of_the_micro_batches():
    for order in one_f_one_b(3, 8, slack=1):
        assert [a.micro_batch for a in order if a.kind == "B"] == list(range(8))


def test_two_stages_take_turns_as_in_the_paper():
    assert [str(a) for a in one_f_one_b(2, 3)[0]] == ["F0@0", "F1@0", "B0@0", "F2@0", "B1@0", "B2@0"]
    assert [str(a) for a in one_f_one_b(2, 3)[1]] == ["F0@1", "B0@1", "F1@1", "B1@1", "F2@1", "B2@1"]


def interleaved_slots(num_devices: int, stages_per_device: int, num_micro_batches: int) -> int:
    """Run interleaved orders, a backward takes two slots and a forward one; fail if they deadlock."""
    orders = interleaved(num_devices, stages_per_device, num_micro_batches)
    num_stages = num_devices * stages_per_device
    ends: dict[Action, int] = {}
    free, position = [0] * num_devices, [0] * num_devices
    while len(ends) < 2 * num_stages * num_micro_batches:
        before = len(ends)
        for device, order in enumerate(orders):
            if position[device] == len(order):
                continue
            action = order[position[device]]
            needs = [Action("F", action.micro_batch, action.stage - 1)] if action.stage else []
            if action.kind == "B":
                needs = [Action("F", action.micro_batch, action.stage)]
                if action.stage < num_stages - 1:
                    needs.append(Action("B", action.micro_batch, action.stage + 1))
            if ends.keys() >= set(needs):
                begin = max([free[device], *(ends[need] for need in needs)])
                ends[action] = free[device] = begin + (1 if action.kind == "F" else 2)
                position[device] += 1
        assert len(ends) > before, "deadlock"
    return max(free)


@pytest.mark.parametrize(
    ("num_devices", "stages_per_device", "num_micro_batches"),
    list(itertools.product((2, 3, 4, 5), (1, 2, 3), range(1, 17))),
)
def test_interleaved_stages_never_deadlock(num_devices, stages_per_device, num_micro_batches):
    interleaved_slots(num_devices, stages_per_device, num_micro_batches)


@pytest.mark.parametrize(("num_devices", "stages_per_device"), [(2, 1), (2, 2), (2, 4), (4, 2)])
def test_interleaving_shortens_the_bubble_as_the_paper_says(num_devices, stages_per_device):
    work = 3 * stages_per_device * 8
    share = work / interleaved_slots(num_devices, stages_per_device, 8)
    assert share == pytest.approx(stages_per_device * 8 / (stages_per_device * 8 + num_devices - 1))


def test_devices_that_stand_again_in_the_same_order_are_interleaved():
    assert make_orders("abab", 4) == interleaved(2, 2, 4)
    assert make_orders("ab", 4, slack=1) == one_f_one_b(2, 4, slack=1)
    assert make_orders("abba", 4) == one_f_one_b(4, 4)


def test_one_device_takes_one_micro_batch_after_the_other_whatever_stages_it_has():
    (order,) = make_orders("aa", 2, slack=1)
    assert " ".join(map(str, order)) == "F0@0 F0@1 B0@1 B0@0 F1@0 F1@1 B1@1 B1@0"
    assert most_in_flight([order], 2) == [1, 1]
    assert make_orders("a", 3) == one_f_one_b(1, 3)


def test_the_stages_of_a_cpu_run_side_by_side():
    assert make_orders([torch.device("cpu")] * 2, 4, slack=1) == one_f_one_b(2, 4, slack=1)
    assert make_orders(["cpu"] * 4, 4) == one_f_one_b(4, 4)


def test_in_flight_is_counted_from_the_orders():
    assert most_in_flight(one_f_one_b(3, 8, slack=1), 3) == [in_flight(3, s, slack=1) for s in range(3)]
    assert most_in_flight(interleaved(2, 2, 8), 4) == [4, 3, 2, 1]


def test_at_each_action_it_is_known_what_is_held_and_who_works():
    (order,) = make_orders(["cuda:0", "cuda:0"], 1)
    found = [(dict(held), stage) for held, stage in at_work(order)]
    assert found == [({0: 1, 1: 0}, 0), ({0: 1, 1: 1}, 1), ({0: 1, 1: 1}, 1), ({0: 1, 1: 0}, 0)]
    order = interleaved(2, 2, 8)[0]
    together = [held[0] + held[2] for held, _ in at_work(order)]
    assert max(together) == 5 < sum(most_in_flight(interleaved(2, 2, 8), 4)[::2])


def test_a_stage_holds_the_inputs_of_all_micro_batches_that_the_stage_before_is_not_through_with():
    assert [held.given for held in most_held([4, 3, 1])] == [4, 4, 3]
    assert most_held([1]) == [Held(in_flight=1, given=1, waiting=1)]


def test_what_waits_has_come_early_or_is_about_to_leave_or_is_a_gradient():
    """The last stage, with one micro-batch in flight, has two that came early; the second one, and 1 + 2."""
    assert [held.waiting for held in most_held([4, 3, 1])] == [4, 1 + 1 + 2, 2]


@pytest.mark.parametrize("devices", ["ab", "abcd", "abab", "aa"])
def test_the_first_micro_batches_may_go_one_by_one(devices):
    rest = make_orders(devices, 3, slack=1)
    orders = one_by_one_first(rest, 2)
    for order, plain in zip(orders, rest, strict=True):
        stages = len({action.stage for action in order})
        for number in (0, 1):
            alone = order[2 * stages * number : 2 * stages * (number + 1)]
            assert {action.micro_batch for action in alone} == {number}
            assert [action.stage for action in alone] == sorted(a.stage for a in alone if a.kind == "F") + (
                sorted((a.stage for a in alone if a.kind == "B"), reverse=True)
            )
        assert [(a.kind, a.micro_batch - 2, a.stage) for a in order[4 * stages :]] == [
            (a.kind, a.micro_batch, a.stage) for a in plain
        ]
    assert one_by_one_first(rest, 0) == rest
