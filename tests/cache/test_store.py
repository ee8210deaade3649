from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from tworeel.cache.store import BadEntry, CacheStore
from tworeel.errors import UserError

KEY = "latents/" + "3f" * 32
OTHER = "latents/" + "07" * 32
TENSORS = {
    "latents": torch.linspace(-3, 3, 12).reshape(1, 3, 4),
    "text": torch.linspace(-1, 1, 7).to(torch.bfloat16),
    "scale": torch.tensor(0.5, dtype=torch.float64),
    "none": torch.empty(0, 4),
    "mask": torch.tensor([True, False]),
}


@pytest.fixture
def store(tmp_path: Path) -> CacheStore:
    store = CacheStore(tmp_path / "cache")
    store.write(KEY, TENSORS, subject="a.mp4")
    return store


def test_an_entry_comes_back_bit_by_bit(store: CacheStore) -> None:
    assert store.path_of(KEY) == store.folder / "latents" / "3f" / f"{'3f' * 32}.safetensors"
    assert store.has(KEY) and store.is_intact(KEY)
    read = store.read(KEY)
    assert read.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert read[name].dtype == tensor.dtype
        assert torch.equal(read[name], tensor)


def test_views_and_transposed_tensors_are_stored_as_they_look(store: CacheStore) -> None:
    whole = torch.arange(24.0).reshape(2, 3, 4)
    store.write(OTHER, {"a": whole.mT, "b": whole[:, 1], "c": whole}, subject="b.mp4")
    read = store.read(OTHER)
    assert torch.equal(read["a"], whole.mT) and torch.equal(read["b"], whole[:, 1])


def test_a_flipped_bit_in_any_byte_is_found(store: CacheStore) -> None:
    path = store.path_of(KEY)
    good = path.read_bytes()
    for position in range(len(good)):
        bad = bytearray(good)
        bad[position] ^= 1 << position % 8
        path.write_bytes(bad)
        assert not store.is_intact(KEY), f"byte {position}"


def test_every_truncation_is_found(store: CacheStore) -> None:
    path = store.path_of(KEY)
    good = path.read_bytes()
    for length in range(len(good)):
        path.write_bytes(good[:length])
        assert not store.is_intact(KEY), f"{length} bytes"


def test_an_entry_under_another_name_is_found(store: CacheStore) -> None:
    store.path_of(OTHER).parent.mkdir(parents=True)
    os.replace(store.path_of(KEY), store.path_of(OTHER))
    assert not store.is_intact(OTHER)


def test_a_bad_entry_is_named(store: CacheStore) -> None:
    store.path_of(KEY).write_bytes(b"")
    with pytest.raises(BadEntry, match=f"{'3f' * 32}.safetensors: the cache entry is damaged"):
        store.read(KEY)
    assert not store.has(OTHER)
    with pytest.raises(BadEntry, match="is missing"):
        store.read(OTHER)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_nan_and_inf_are_refused_and_nothing_is_written(store: CacheStore, value: float) -> None:
    latents = torch.zeros(4, 5)
    latents[2, 3] = value
    with pytest.raises(UserError, match=r"b\.mp4: .* 1 of 20 values of 'latents'"):
        store.write(OTHER, {"latents": latents, "text": torch.ones(1)}, subject="b.mp4")
    assert [path.name for path in store.folder.rglob("*.*")] == [store.path_of(KEY).name]


def test_many_writers_and_readers_of_one_entry_do_not_disturb_each_other(store: CacheStore) -> None:
    def write_and_read(_: int) -> bool:
        store.write(KEY, TENSORS, subject="a.mp4")
        return store.is_intact(KEY)

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(write_and_read, range(80)))
    assert len(list(store.folder.rglob("*.*"))) == 1


def test_the_sweep_leaves_entries_alone(store: CacheStore) -> None:
    store.sweep()
    assert store.is_intact(KEY)
    CacheStore(store.folder / "absent").sweep()
