"""Build a cache in a process of its own, and hang after a number of entries: the tests kill it there.

python build_in_process.py PICKLE FOLDER ENTRIES, where PICKLE holds (source, clips).
"""

from __future__ import annotations

import pickle
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from tworeel.cache import CacheStore, build_cache
from tworeel.models.wan.family import WAN


class HangingStore(CacheStore):
    """A store that takes a number of entries and then never returns."""

    def __init__(self, folder: Path, entries: int) -> None:
        super().__init__(folder)
        self._left = entries

    def write(self, key: str, tensors: Mapping[str, Tensor], *, subject: str) -> None:
        if self._left == 0:
            say("hangs")
            time.sleep(600)
        self._left -= 1
        super().write(key, tensors, subject=subject)


def say(word: str) -> None:
    sys.stdout.write(f"{word}\n")
    sys.stdout.flush()


def main(pickled: str, folder: str, entries: str) -> None:
    source, clips = pickle.loads(Path(pickled).read_bytes())
    store = HangingStore(Path(folder), int(entries))
    say("starts")
    build_cache(store, WAN, source, clips, devices=["cpu"], dtype=torch.float32, empty_caption=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
