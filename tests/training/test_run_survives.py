"""A run that is killed or signalled at any moment ends, once resumed, with the same bits (R1, R7)."""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from run_in_process import process_context, start
from tiny_runs import digest_of, losses_of

from tworeel.config.schema import RunConfig
from tworeel.errors import UserError
from tworeel.training.checkpoint import CheckpointStore
from tworeel.training.run import train

STEPS = 8
CONTEXT, IS_FAST = process_context()
KILLS, SIGNALS = (20, 8) if IS_FAST else (4, 2)
MakeConfig = Callable[..., RunConfig]


@pytest.fixture
def make_run(make_config: MakeConfig, tmp_path: Path) -> Callable[..., RunConfig]:
    """A function (name, **train options) -> a run with a cache of its own."""

    def make(name: str, **train: Any) -> RunConfig:
        cache = {"folder": tmp_path / f"{name}-cache", "dtype": "float32"}
        return make_config(name, train={"steps": STEPS, "save_every": 1, **train}, cache=cache)

    return make


def undisturbed(config: RunConfig) -> tuple[str, float]:
    """The digest of a run that nobody disturbs, and its seconds; one goes before to warm the files up."""
    for _ in range(2):
        folder = config.train.output
        process = start(CONTEXT, config)
        begin = time.perf_counter()
        process.join()
        seconds = time.perf_counter() - begin
        assert process.exitcode == 0
        digest = digest_of(config)
        folder.rename(folder.with_name(f"{folder.name}-{time.time_ns()}"))
        assert config.cache.folder is not None
        config.cache.folder.rename(folder.with_name(f"cache-{time.time_ns()}"))
    return digest, seconds


def newest_step(config: RunConfig) -> int:
    """The newest checkpoint; every one that is there is intact."""
    checkpoint, skipped = CheckpointStore(config.train.output / "checkpoints").newest_intact()
    assert skipped == []
    return checkpoint.step if checkpoint else -1


def leftovers(config: RunConfig) -> list[Path]:
    assert config.cache.folder is not None
    return [*config.train.output.rglob(".tmp-*"), *config.cache.folder.rglob(".tmp-*")]


@pytest.mark.slow
def test_kills_at_any_moment_lose_no_checkpoint_and_change_no_bit(
    make_run: Callable[..., RunConfig],
) -> None:
    expected, seconds = undisturbed(make_run("whole"))
    rng, kills, run, reached = random.Random(20), 0, 0, -1
    phases: set[str] = set()
    for attempt in range(6 * KILLS):
        config = make_run(f"run{run}")
        process = start(CONTEXT, config)
        if kills < KILLS:
            # Spread over the life of a fresh run, so also over scan, caching, training and saving
            process.join(rng.uniform(0, seconds) if attempt % 2 else seconds * kills / KILLS)
        else:
            process.join()
        if process.is_alive():
            process.kill()
            process.join()
            kills += 1
            phases.add("before training" if reached < 0 else "training")
            assert newest_step(config) >= reached, "a checkpoint was lost"
            reached = newest_step(config)
            continue
        assert process.exitcode == 0
        assert digest_of(config) == expected
        assert leftovers(config) == []
        run, reached = run + 1, -1
        if kills == KILLS:
            break
    assert kills == KILLS
    assert phases == {"before training", "training"}


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no signals to send")
def test_signals_at_any_moment_save_the_work_and_change_no_bit(
    make_run: Callable[..., RunConfig],
) -> None:
    # Checkpoints only at the end: what is there after a signal was saved because of it.
    expected, seconds = undisturbed(make_run("whole", save_every=STEPS))
    rng, sent, run, saves = random.Random(7), 0, 0, 0
    for _ in range(6 * SIGNALS):
        config = make_run(f"run{run}", save_every=STEPS)
        process = start(CONTEXT, config)
        process.join(rng.uniform(0, seconds) if sent < SIGNALS else None)
        if process.is_alive():
            signum = (signal.SIGTERM, signal.SIGINT)[sent % 2]
            assert process.pid is not None
            os.kill(process.pid, signum)
            begin = time.perf_counter()
            process.join()
            assert time.perf_counter() - begin < 10
            sent += 1
            if process.exitcode != 0:  # 0: the signal came after the last step
                assert process.exitcode == 128 + signum
                trained = losses_of(config)
                if trained:
                    assert newest_step(config) == trained[-1][0], "a step that was done is not saved"
                    saves += 1
                continue
        assert process.exitcode == 0
        assert digest_of(config) == expected
        assert leftovers(config) == []
        run += 1
        if sent == SIGNALS:
            break
    assert sent == SIGNALS
    assert saves > 0


def test_a_folder_that_another_run_writes_to_is_refused(
    make_run: Callable[..., RunConfig],
) -> None:
    config = make_run("shared", steps=100_000)
    process = start(CONTEXT, config)
    try:
        while len(losses_of(config)) < 2:  # by then the first checkpoint stands
            assert process.is_alive()
            time.sleep(0.05)
        with pytest.raises(UserError, match=rf"another run is writing to .*shared \(process {process.pid}\)"):
            train(config, resume=True)
    finally:
        process.kill()
        process.join()
    done = newest_step(config)
    assert train(make_run("shared", steps=done + 1), resume=True).steps == done + 1
