"""Runs a split model's blocks: by what each leaves behind, where its weights are, how far ahead it is."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from tworeel.engine.parking import Berth
from tworeel.engine.passage import Passage
from tworeel.engine.placement import Unit
from tworeel.engine.probing import Probe
from tworeel.engine.residency import Residency, run_block

if TYPE_CHECKING:
    from tworeel.engine.split import Split


class BlockRuns:
    """Runs a split's blocks as the split says at that moment.

    Args:
        split: whose blocks they are.
    """

    def __init__(self, split: Split) -> None:
        self._split = split
        self._probe: Probe | None = None

    @contextmanager
    def probed(self, probe: Probe) -> Iterator[None]:
        """Measure each block that runs inside."""
        self._probe = probe
        try:
            yield
        finally:
            self._probe = None

    def run(self, unit: Unit, position: int, passage: Passage, args: Any, kwargs: Any) -> Any:
        """Run a block, or what lives beside the block at `position`, along a micro-batch's way.

        Args:
            unit: what is run.
            position: of the block, counted over all block lists.
            passage: the micro-batch's.
            args, kwargs: of the module's forward, on its device.
        """
        split, stage = self._split, unit.stage
        residency = split.residencies[position]
        before, berth = passage.berths.get(stage), Berth(split.host_pool) if residency.is_parked else None
        split.streamed.use(stage, position, backward=False)
        block = split.model.get_submodule(unit.name)
        if self._probe is not None:
            outputs = self._run_probed(self._probe, unit, block, args, kwargs)
            if unit.name == split.placement.block_names[-1]:
                device = split.placement.devices[stage]
                outputs = self._probe.begin_head(stage, device, (args, kwargs), outputs)
            return outputs
        outputs = run_block(
            block,
            args,
            kwargs,
            residency=residency,
            berth=berth,
            compiler=split.compiler,
            kept_ops=split.kept_ops,
            redraws=passage.is_alone,
        )
        passage.berths[stage] = berth
        device = split.placement.devices[stage]
        split.departures.begin(device, berth)
        split.run_ahead.block_queued(device)
        has_begun = False

        def begin_backward(_: Tensor) -> None:
            nonlocal has_begun
            if not has_begun:  # of each of its outputs
                split.run_ahead.block_queued(device)
            has_begun = True
            split.departures.settle(device, but=berth)
            for one in (berth, before):
                if one is not None:
                    one.prefetch()
            split.streamed.use(stage, position, backward=True)

        _before_backward(outputs, (args, kwargs), begin_backward)
        return outputs

    def _run_probed(self, probe: Probe, unit: Unit, block: nn.Module, args: Any, kwargs: Any) -> Any:
        """Run a block without gradients, and measure what it would leave behind with them."""

        def run(residency: Residency, args: Any, kwargs: Any) -> Any:
            return run_block(
                block,
                args,
                kwargs,
                residency=residency,
                compiler=self._split.compiler,
                kept_ops=self._split.kept_ops,
            )

        with torch.no_grad():
            outputs = run_block(block, args, kwargs, residency=Residency.KEEP)
        device = self._split.placement.devices[unit.stage]
        probe.measure(unit.stage, unit.kind, device, block, run, args, kwargs, outputs)
        return outputs


def _before_backward(outputs: Any, inputs: Any, begin: Callable[[Tensor], None]) -> None:
    """Let `begin` be called before the backward of what made `outputs` from `inputs`."""
    # On all: autograd is done with the block behind before it takes the first of these, whichever it is.
    # What the block only hands through is not its own.
    handed_through = {id(leaf) for leaf in tree_leaves(inputs)}
    for tensor in tree_leaves(outputs):
        if isinstance(tensor, Tensor) and tensor.requires_grad and id(tensor) not in handed_through:
            tensor.register_hook(begin)
