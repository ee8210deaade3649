"""How far the host runs ahead of a device."""

from __future__ import annotations

import pytest
import torch

from tworeel.engine.run_ahead import RunAhead
from tworeel.engine.streams import mark

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("limit", [0, 2])
def test_no_more_blocks_are_unfinished_than_the_limit(gpu: torch.device, limit: int) -> None:
    ahead, matrix, blocks = RunAhead(limit), torch.ones(4096, 4096, device=gpu), []
    for _ in range(10):
        for _ in range(4):
            torch.mm(matrix, matrix)  # takes far longer than it takes to queue it
        blocks.append(mark(gpu))
        ahead.block_queued(gpu)
        assert sum(not block.query() for block in blocks) <= limit
