from __future__ import annotations

import pytest
import torch

from tworeel.benchmarks import machine
from tworeel.errors import UserError

CPU = torch.device("cpu")


def test_overlapping_kernels_count_once() -> None:
    assert machine._covered([(5.0, 6.0), (0.0, 2.0), (1.0, 3.0), (1.5, 2.5)]) == 4.0


def test_the_cpu_has_a_rate_and_no_memory_of_its_own() -> None:
    assert machine.matmul_rates([CPU, CPU])["cpu"] > 1e8
    assert machine.peaks([CPU]) == machine.memory_limits([CPU], None) == {}
    assert machine.kernel_share([CPU], lambda: None) is None


def test_the_memory_of_the_cpu_cannot_be_limited() -> None:
    with pytest.raises(UserError, match="--cap-gib: the memory of cpu"):
        machine.limit_memory([CPU, CPU], 1.0)


def test_a_device_that_is_not_there_is_named_by_its_option() -> None:
    with pytest.raises(UserError, match=r"^--devices: 'cuda:77' does not exist"):
        machine.devices_of(["cpu", "cuda:77"])
