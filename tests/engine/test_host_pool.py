"""Host memory that tensors of any size share; what is pinned needs an accelerator (tests/gpu)."""

from __future__ import annotations

import random

import pytest
import torch
from toy_wan import make_micro_batch, make_wan, square_loss

from tworeel import Pipeline
from tworeel.engine import host_pool, parking
from tworeel.engine.host_pool import ALIGNMENT, HostPool, Place, pinned_size, pool_bytes, slab_size


def take(pool: HostPool, size: int) -> Place:
    """A place that there has to be."""
    place = pool.take(size, pinned=False)
    assert place is not None and place.size >= size
    return place


class Read:
    """Takes the place of an event."""

    def __init__(self, happened: bool) -> None:
        self._happened = happened

    def query(self) -> bool:
        return self._happened


def test_a_smaller_tensor_gets_the_room_of_a_larger_one():
    pool = HostPool(limit=1000)
    for place in [take(pool, 400), take(pool, 400)]:
        pool.give_back(place, None)
    for _ in range(2):
        take(pool, 300)
    assert pool.held == 2 * 448 <= 1000


def test_a_larger_tensor_gets_the_room_of_smaller_ones_that_are_gone():
    pool = HostPool(limit=10 * ALIGNMENT)
    places = [take(pool, 2 * ALIGNMENT) for _ in range(5)]
    for place in places[:4]:
        pool.give_back(place, None)
    take(pool, 7 * ALIGNMENT)
    assert pool.held == 9 * ALIGNMENT
    assert places[4].slab.nbytes == 2 * ALIGNMENT, "what is in use stays"


def test_nothing_is_given_up_for_a_tensor_that_does_not_fit_all_the_same():
    pool = HostPool(limit=10 * ALIGNMENT)
    first, _ = take(pool, 5 * ALIGNMENT), take(pool, 5 * ALIGNMENT)
    pool.give_back(first, None)
    assert pool.take(6 * ALIGNMENT, pinned=False) is None
    assert take(pool, 5 * ALIGNMENT).slab is first.slab


def test_with_a_lower_limit_what_is_not_in_use_is_given_up():
    pool = HostPool()
    places = [take(pool, size * ALIGNMENT) for size in (2, 3, 5)]
    for place in places[1:]:
        pool.give_back(place, None)
    pool.limit_to(6 * ALIGNMENT)
    assert pool.held == 5 * ALIGNMENT
    assert pool.take(4 * ALIGNMENT, pinned=False) is not None
    assert pool.take(4 * ALIGNMENT, pinned=False) is None


def test_with_a_limit_below_what_is_in_use_all_else_is_given_up():
    pool = HostPool(limit=10 * ALIGNMENT)
    places = [take(pool, size * ALIGNMENT) for size in (2, 3, 5)]
    pool.give_back(places[1], None)
    pool.limit_to(4 * ALIGNMENT)
    assert pool.held == 7 * ALIGNMENT


def test_memory_that_cannot_be_had_is_not_counted(monkeypatch):
    def refuse(*_, **__):
        raise RuntimeError("no more")

    monkeypatch.setattr(torch, "empty", refuse)
    pool = HostPool()
    with pytest.raises(RuntimeError):
        take(pool, ALIGNMENT)
    assert pool.held == 0


def test_neighbours_that_are_free_become_one_place():
    pool = HostPool(limit=4 * ALIGNMENT)
    pool.give_back(whole := take(pool, 4 * ALIGNMENT), None)
    parts = [take(pool, ALIGNMENT) for _ in range(4)]
    assert [part.begin for part in parts] == [n * ALIGNMENT for n in range(4)]
    for n in (0, 2, 1, 3):
        pool.give_back(parts[n], None)
    assert take(pool, 4 * ALIGNMENT).slab is whole.slab


def test_a_place_is_written_after_all_that_still_reads_it():
    pool, done, first, second = HostPool(4 * ALIGNMENT), Read(True), Read(False), Read(False)
    pool.give_back(take(pool, 4 * ALIGNMENT), None)
    parts = [take(pool, ALIGNMENT) for _ in range(3)]
    for part, read in zip(parts, (first, done, second), strict=True):
        pool.give_back(part, read)
    assert take(pool, 4 * ALIGNMENT).reads == {first, second}


def test_places_never_overlap_and_the_limit_holds():
    choose, pool, used = random.Random(0), HostPool(limit=100 * ALIGNMENT), []
    refused = 0
    for _ in range(2000):
        if used and choose.random() < 0.5:
            pool.give_back(used.pop(choose.randrange(len(used))), None)
        elif place := pool.take(choose.randrange(1, 40) * ALIGNMENT, pinned=False):
            assert not any(
                place.slab is other.slab and place.begin < other.end and other.begin < place.end
                for other in used
            )
            used.append(place)
        else:
            refused += 1
        assert sum(place.size for place in used) <= pool.held <= pool.limit
    assert refused
    for place in used:
        pool.give_back(place, None)
    take(pool, 100 * ALIGNMENT)


def test_what_stays_on_its_device_is_told_once(caplog):
    pool = HostPool(limit=3 * 2**29)
    pool.held = pool.limit
    for _ in range(2):
        assert pool.take(1, pinned=False) is None
    (line,) = caplog.messages
    assert "stay on their devices: the limit of 1.5 GiB is reached" in line


@pytest.mark.parametrize("seeds", [(2, 1, 0), (0, 1, 2), (1, 0, 2, 0, 1, 2)])
def test_clips_of_several_sizes_are_parked_in_the_room_of_the_largest(monkeypatch, caplog, seeds):
    monkeypatch.setattr(parking, "SMALLEST", 0)
    batches = {seed: make_micro_batch("t2v", torch.float32, seed) for seed in seeds}
    pipeline = Pipeline(make_wan("t2v", torch.float32), ["cpu"], residency="offload")
    pipeline.step([batches[2]], square_loss)
    limit = pipeline.split.host_pool.held
    pipeline.split.host_pool = HostPool(limit)
    pipeline.step([batches[seed] for seed in seeds], square_loss)
    assert not [record for record in caplog.records if record.name == host_pool.__name__]
    assert 0 < pipeline.split.host_pool.held <= limit


def test_pinned_memory_comes_in_powers_of_two():
    assert [pinned_size(size) for size in (1, 2, 3, 704 * 2**20, 2**30)] == [1, 2, 4, 2**30, 2**30]


@pytest.mark.parametrize("size", [2**20, 2**20 + 64, 3 * 2**19, 2**21 - 64, 700_032])
@pytest.mark.parametrize("count", [1, 4, 9, 40, 101])
def test_a_pool_pins_what_is_counted_for_it_and_has_room_for_all_at_that_limit(monkeypatch, size, count):
    empty = torch.empty
    # Not pinned here; the sizes are those of pinned memory.
    monkeypatch.setattr(torch, "empty", lambda size, *, pin_memory=False, **how: empty(size, **how))
    counted = pool_bytes(count * size, size)
    pool = HostPool(limit=counted)
    assert all(pool.take(size) for _ in range(count))
    assert pool.held == counted >= count * size


def test_slabs_are_filled_at_least_to_five_sixths():
    for size in range(2**10, 2**12, 64):
        slab = slab_size(size)
        assert slab // size * size >= 5 / 6 * slab and slab >= 4 * size
