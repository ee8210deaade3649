"""Measures what a block keeps and takes: one of each kind of each stage, run once in each way.

On the largest micro-batch, beside a forward of the model without gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge
from torch.utils._pytree import tree_leaves, tree_map_only

from tworeel.engine.fitting import StageMemory, needs_fallback
from tworeel.engine.footprints import TOO_LARGE, Footprint
from tworeel.engine.releasing import clear_frames, release_memory
from tworeel.engine.residency import Residency

Run = Callable[[Residency, tuple[Any, ...], dict[str, Any]], Any]
"""(residency, args, kwargs of a block) -> its output."""


class Probe:
    """Measures what a block of each kind takes on each stage, beside a forward without gradients.

    Args:
        memories: of each stage, as far as it is known; None for those that are not measured.
    """

    def __init__(self, memories: Sequence[StageMemory | None]) -> None:
        self.memories = list(memories)
        """With the bytes of a micro-batch's inputs, and of the model's head."""
        self.footprints: list[dict[str, dict[Residency, Footprint]]] = [{} for _ in memories]
        """Of each stage, by the kind of block."""
        self._head = Head()
        self._before_head = 0

    def measure(
        self,
        stage: int,
        kind: str,
        device: torch.device,
        block: nn.Module,
        run: Run,
        args: Any,
        kwargs: Any,
        outputs: Any,
    ) -> None:
        """Run the block forward and backward in each way that is asked for.

        Args:
            stage, kind, device: of the block; each kind is measured once a stage.
            block: the block.
            run: runs it.
            args, kwargs: of its forward.
            outputs: what it returned for them.
        """
        memory = self.memories[stage]
        if memory is None or kind in self.footprints[stage]:
            return
        found = self.footprints[stage][kind] = {}
        inputs = max(memory.inputs, shared_bytes((args, kwargs), outputs))
        memory = self.memories[stage] = replace(memory, inputs=inputs)
        args, kwargs = as_in_training((args, kwargs), outputs)
        trained = [parameter for parameter in block.parameters() if parameter.requires_grad]
        for residency in (Residency.KEEP, Residency.SELECTIVE):
            if residency is Residency.KEEP or needs_fallback(memory, found[Residency.KEEP]):
                measure = partial(_footprint, residency, device, run, args, kwargs, trained)
                found[residency] = _after_warm_up(measure)

    def begin_head(self, stage: int, device: torch.device, inputs: Any, outputs: Any) -> Any:
        """The last block's outputs, behind which the forward goes on with gradients."""
        if self.memories[stage] is None:
            return outputs
        # What the block was given goes when it returns; what it gives is the head's.
        hidden = _bytes_like((inputs, outputs), outputs)
        self._before_head = torch.accelerator.memory_allocated(device) - hidden
        torch.accelerator.reset_peak_memory_stats(device)
        return self._head.begin(outputs)

    def end_head(self, stage: int, device: torch.device, outputs: Any) -> None:
        """Measure what the forward took since then, and its backward.

        Args:
            stage, device: of the last block.
            outputs: of the model.
        """
        if (memory := self.memories[stage]) is None:
            return
        self._head.end(outputs)
        most = torch.accelerator.max_memory_allocated(device) - self._before_head
        self.memories[stage] = replace(memory, head=most)


class Head:
    """What a model runs behind its last block, in a forward that was begun without gradients."""

    def __init__(self) -> None:
        self._inputs: list[Tensor] = []

    def begin(self, outputs: Any) -> Any:
        """The last block's outputs, anew; with gradients from here on, until the forward's `no_grad` ends."""
        torch.set_grad_enabled(True)

        def fresh(tensor: Tensor) -> Tensor:
            if not tensor.is_floating_point():
                return tensor
            self._inputs.append(tensor.detach().requires_grad_())
            return self._inputs[-1]

        return tree_map_only(Tensor, fresh, outputs)

    def end(self, outputs: Any) -> None:
        """Go back from the model's outputs to there."""
        leaves = [leaf for leaf in tree_leaves(outputs) if isinstance(leaf, Tensor) and leaf.requires_grad]
        if leaves and self._inputs:
            upstream = [torch.ones_like(leaf) for leaf in leaves]
            torch.autograd.grad(leaves, self._inputs, upstream, allow_unused=True)
        self._inputs.clear()


def as_in_training(inputs: Any, outputs: Any) -> Any:
    """A block's inputs anew: what comes out of a block goes into the next, and will need a gradient."""
    shapes = _shapes(outputs)

    def fresh(tensor: Tensor) -> Tensor:
        copy = tensor.detach()
        return copy.requires_grad_() if tensor.shape in shapes and tensor.is_floating_point() else copy

    return tree_map_only(Tensor, fresh, inputs)


def shared_bytes(inputs: Any, outputs: Any) -> int:
    """Bytes of what all blocks are given alike: of a block's inputs, those that no output looks like."""
    tensors = [leaf for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor)]
    return sum(tensor.nbytes for tensor in tensors) - _bytes_like(inputs, outputs)


def _bytes_like(tensors: Any, outputs: Any) -> int:
    """Bytes of those tensors that some output looks like."""
    shapes = _shapes(outputs)
    leaves = [leaf for leaf in tree_leaves(tensors) if isinstance(leaf, Tensor)]
    return sum(leaf.nbytes for leaf in leaves if leaf.shape in shapes)


def _shapes(outputs: Any) -> set[torch.Size]:
    return {leaf.shape for leaf in tree_leaves(outputs) if isinstance(leaf, Tensor)}


def _after_warm_up(measure: Callable[[], Footprint]) -> Footprint:
    """What the second run finds, since the first compiles; more than any device has if that does not fit."""
    try:
        with torch.enable_grad():
            measure()
            return measure()
    except torch.OutOfMemoryError as error:
        clear_frames(error)
    release_memory()
    return TOO_LARGE


def _footprint(
    residency: Residency,
    device: torch.device,
    run: Run,
    args: Any,
    kwargs: Any,
    trained: Sequence[nn.Parameter],
) -> Footprint:
    torch.accelerator.synchronize(device)
    before = torch.accelerator.memory_allocated(device)
    torch.accelerator.reset_peak_memory_stats(device)
    ran = Forward(partial(run, residency), [own_copies((args, kwargs))])
    kept = torch.accelerator.memory_allocated(device) - before
    ran.backward((args, kwargs), trained)
    peak = torch.accelerator.max_memory_allocated(device) - before
    return Footprint(kept=kept, working=peak - kept, hidden=ran.hidden)


def own_copies(inputs: Any) -> Any:
    """A block's inputs, of which those that need a gradient lie where nothing else holds them."""
    return tree_map_only(Tensor, lambda leaf: leaf.clone() if leaf.requires_grad else leaf, inputs)


class Forward:
    """A block's forward of which nothing is left but what it saved for its backward.

    Its input and its output may be among that, or not: what the block before, or the next one, keeps of them
    is counted there.

    Args:
        run: the block.
        inputs: (args, kwargs) in a list, which gives them up.

    Attributes:
        hidden: bytes that it gave.
    """

    def __init__(self, run: Callable[[Any, Any], Any], inputs: list[Any]) -> None:
        outputs = [leaf for leaf in tree_leaves(run(*inputs.pop())) if isinstance(leaf, Tensor)]
        self.hidden = sum(output.nbytes for output in outputs)
        outputs = [output for output in outputs if output.requires_grad]
        self._edges = [get_gradient_edge(output) for output in outputs]
        self._like = [partial(torch.ones, o.shape, dtype=o.dtype, device=o.device) for o in outputs]

    def backward(self, inputs: Any, trained: Sequence[nn.Parameter]) -> None:
        """Compute the gradients of the inputs that were copied and of the parameters.

        Not as a `backward()`, which would add to the parameters' gradients.
        """
        wanted = [leaf for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor) and leaf.requires_grad]
        gradients = [ones() for ones in self._like]
        torch.autograd.grad(self._edges, [*wanted, *trained], gradients, allow_unused=True)
