"""Spread a model over devices from outside, without touching its code."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from tworeel.engine.compiling import BlockCompiler
from tworeel.engine.fitting import Probe
from tworeel.engine.parking import Berth, HostPool
from tworeel.engine.passage import Gate, Passage
from tworeel.engine.placement import Placement, Unit, place
from tworeel.engine.residency import Residency, refuse_dropout, run_block
from tworeel.engine.run_ahead import RunAhead
from tworeel.engine.strays import Strays
from tworeel.engine.weight_streaming import WeightStreamer, frozen_parameters, spread

AUTO = "auto"


def split(
    model: nn.Module,
    devices: Sequence[str | torch.device],
    *,
    at: Sequence[int] | None = None,
    blocks: Sequence[str] | None = None,
    residency: Residency | str | Sequence[Residency | str] = Residency.KEEP,
    compile: bool = False,
    streamed: Sequence[int] | None = None,
    host_limit: int | None = None,
    run_ahead: int | None = None,
    beside: Mapping[str, str] | None = None,
    after: Sequence[str] | None = None,
    between: bool = False,
) -> Split:
    """Spread `model`'s blocks over `devices`; its forward and backward then work as before.

    Any training loop goes on unchanged: tensors cross between devices by themselves, one micro-batch at a
    time. Give the result to `Pipeline` to keep all devices busy at once. What comes before the blocks lives
    on the first device, what comes after them on the last. The model's blocks are moved in place.

    Args:
        model: any module whose forward runs one or more lists of blocks, each block once and in order.
        devices: one device a stage, for example `["cuda:0", "cuda:1"]`; a device may stand more than once.
        at: first block of each stage after the first, for example `[20]`; even shares by default.
        blocks: dotted names of the block lists, for example `["blocks"]`; found by themselves by default.
        residency: what each block leaves behind for its backward; one for all, or one a block. `auto` keeps
            as much as the devices have room for, found out before the first step of a `Pipeline`.
        compile: run the blocks through `torch.compile`; where that fails, without, after a warning.
        streamed: how many blocks of each stage have their frozen weights in pinned host memory and are
            brought to the device ahead of use. Such blocks have to recompute. None by default; with the
            residency `auto`, as many as are needed.
        host_limit: bytes of pinned host memory for activations; what does not fit stays on the devices.
        run_ahead: blocks that may be queued on a device behind the one that it computes; no limit by default.
        beside: names of modules that the forward calls between blocks, each with the block that it follows:
            they live on that block's device and leave behind what it does.
        after: names of the modules that run after the blocks, if those registered behind the blocks are
            not the ones.
        between: whether the forward's own code between the blocks may use tensors from before an earlier
            block, which are then brought to where it runs. Costs microseconds an operation.

    Raises:
        ValueError: no block lists, more stages than blocks, boundaries out of order, as many residencies or
            counts of streamed blocks as there are not, a streamed block that keeps its activations, the
            model is split already.

    Example:
        >>> split(transformer, ["cuda:0", "cuda:1"])
        >>> loss = mse(transformer(x, t, text), target)
        >>> loss.backward()
    """
    if find_split(model) is not None:
        raise ValueError(f"{type(model).__name__} is split already: call .remove() on its split first")
    placement = place(model, devices, at=at, blocks=blocks, beside=beside, after=after)
    positions = streamed_positions(placement, streamed)
    _refuse_kept_streamed(_one_a_block(residency, placement.boundaries[-1]), positions)
    _move(model, placement, positions)
    return Split(
        model,
        placement,
        residency,
        None if streamed is None else positions,
        compile=compile,
        host_limit=host_limit,
        run_ahead=run_ahead,
        between=between,
    )


def find_split(model: nn.Module) -> Split | None:
    """The split that `model` runs under, if any."""
    return getattr(model.__dict__.get("forward"), "split", None)


class Split:
    """A model that runs over several stages. Made by `split`.

    Attributes:
        model: the model itself.
        placement: which unit runs on which stage and device.
        residencies: what each block leaves behind for its backward.
        is_auto: whether the pipeline chooses the residencies (`tworeel.engine.fitter`).
        may_stream: whether it may then let weights be streamed, too.
        compiler: runs the blocks compiled; None runs them as they are.
        host_pool: pinned host memory for activations.
        run_ahead: bounds how many blocks are queued on a device.
    """

    def __init__(
        self,
        model: nn.Module,
        placement: Placement,
        residency: Residency | str | Sequence[Residency | str],
        streamed: Sequence[int] | None = None,
        *,
        compile: bool = False,
        host_limit: int | None = None,
        run_ahead: int | None = None,
        between: bool = False,
    ) -> None:
        self.model = model
        self._between = between
        self.placement = placement
        self.residencies = _one_a_block(residency, placement.boundaries[-1])
        self.is_auto = self._chooses(residency)
        self.compiler = BlockCompiler() if compile else None
        self.host_pool = HostPool(host_limit)
        self.run_ahead = RunAhead(run_ahead)
        self._probe: Probe | None = None
        self._here = threading.local()
        self._open: set[Passage] = set()
        self._wrapped: list[nn.Module] = []
        self._streamed = tuple(streamed or ())
        self.may_stream = streamed is None
        self._streamers = [
            _streamer(model, placement, stage, self._streamed) for stage in range(placement.num_stages)
        ]
        positions = {name: i for i, name in enumerate(placement.block_names)}
        for unit in placement.units:
            position = positions.get(unit.beside or unit.name)
            self._wrap(model.get_submodule(unit.name), partial(self._staged, unit, position))
        self._wrap(model, self._rooted)

    @property
    def streamed_bytes(self) -> int:
        """Bytes of pinned host memory that hold weights."""
        return sum(streamer.host_bytes for streamer in self._streamers)

    def set_residency(self, residency: Residency | str | Sequence[Residency | str]) -> None:
        """Change what the blocks leave behind, from the next forward on; as for `split`."""
        residencies = _one_a_block(residency, self.placement.boundaries[-1])
        _refuse_kept_streamed(residencies, self._streamed)
        self.residencies = residencies
        self.is_auto = self._chooses(residency)

    def _chooses(self, residency: Any) -> bool:
        return residency == AUTO and any(device.type != "cpu" for device in self.placement.devices)

    @contextmanager
    def probing(self, probe: Probe) -> Iterator[None]:
        """Let the model's forward, without gradients, also measure its blocks."""
        self._probe = probe
        try:
            with self.passage(), torch.no_grad():
                yield
        finally:
            self._probe = None
            self.rest()

    def streamed_on(self, stage: int) -> list[int]:
        """Positions of the stage's blocks whose weights are streamed."""
        return [position for position in self.placement.blocks_of(stage) if position in self._streamed]

    def stream(self, stage: int, count: int) -> None:
        """Let the weights of so many blocks of a stage wait in host memory from now on."""
        blocks = self.placement.blocks_of(stage)
        others = [position for position in self._streamed if position not in blocks]
        self._streamed = tuple(sorted([*others, *spread(blocks, count)]))
        self._streamers[stage] = _streamer(self.model, self.placement, stage, self._streamed)

    def residency_in_words(self) -> str:
        """For example `stage 0: 12 selective, 8 keep; stage 1: 20 keep`."""
        return "; ".join(map(self._stage_in_words, range(self.placement.num_stages)))

    def _stage_in_words(self, stage: int) -> str:
        blocks = self.placement.blocks_of(stage)
        counts = Counter(self.residencies[position] for position in blocks)
        parts = [f"{count} {residency}" for residency, count in counts.items()]
        if streamed := self.streamed_on(stage):
            parts.append(f"weights of {len(streamed)} streamed")
        return f"stage {stage}: {', '.join(parts)}"

    def expect(self, stage: int, *, backward: bool) -> None:
        """The stage's next work begins at its last block (a backward) or at its first."""
        self._streamers[stage].expect(backward=backward)

    def rest(self) -> None:
        """Let streamed parameters be what is in host memory, until a block uses them again."""
        for streamer in self._streamers:
            streamer.rest()

    def remove(self) -> None:
        """Let the model's modules run as they did before; they stay on their devices."""
        self.rest()
        for module in self._wrapped:
            del module.forward
        self._wrapped.clear()

    def refuse_dropout(self) -> None:
        """Raise ValueError if a block draws random numbers that a recomputation would not draw again."""
        for name, residency in zip(self.placement.block_names, self.residencies, strict=True):
            if residency.recomputes:
                refuse_dropout(name, self.model.get_submodule(name))

    @contextmanager
    def passage(self, gate: Gate | None = None) -> Iterator[Passage]:
        """Open the way of one micro-batch; the model's forward on this thread runs along it."""
        passage = Passage(self.placement.devices, gate)
        self._open.add(passage)
        self._here.passage = passage
        try:
            yield passage
        finally:
            self._here.passage = None
            self._open.discard(passage)

    def _wrap(self, module: nn.Module, make: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
        if "forward" in module.__dict__:
            raise ValueError(
                f"{type(module).__name__}.forward is replaced already, by another library's hooks"
            )
        module.forward = make(module.forward)
        self._wrapped.append(module)

    def _rooted(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        def root(*args: Any, **kwargs: Any) -> Any:
            passage = self._current()
            if passage is None:
                with self.passage() as alone:
                    return run(alone, args, kwargs)
            return run(passage, args, kwargs)

        def run(passage: Passage, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if passage.stage > 0:
                raise RuntimeError("the model ran twice in one micro-batch: give each run its own")
            args, kwargs = passage.arrive(0, (args, kwargs), block=False)
            with Strays(passage) if self._between else nullcontext():
                return forward(*args, **kwargs)

        root.split = self  # type: ignore[attr-defined]
        return root

    def _staged(self, unit: Unit, position: int | None, forward: Callable[..., Any]) -> Callable[..., Any]:
        def staged(*args: Any, **kwargs: Any) -> Any:
            passage = self._current()
            if passage is None:
                args, kwargs = self._recall(unit.stage, (args, kwargs))
                return forward(*args, **kwargs)
            with passage.within():
                args, kwargs = passage.arrive(unit.stage, (args, kwargs), block=unit.is_block)
                if position is None:
                    outputs = passage.leave_prologue(forward(*args, **kwargs))
                else:
                    outputs = self._run_block(unit, position, passage, args, kwargs)
            passage.own(outputs, unit.stage)
            return outputs

        return staged

    def _run_block(self, unit: Unit, position: int, passage: Passage, args: Any, kwargs: Any) -> Any:
        device, streamer = self.placement.devices[unit.stage], self._streamers[unit.stage]
        residency = self.residencies[position]
        berth = Berth(self.host_pool, passage.berths.get(unit.stage)) if residency.is_parked else None
        streamer.use(position, backward=False)
        block = self.model.get_submodule(unit.name)
        if self._probe is not None:
            return self._run_probed(self._probe, unit.stage, block, args, kwargs)
        outputs = run_block(block, args, kwargs, residency=residency, berth=berth, compiler=self.compiler)
        copies = berth is not None or position in self._streamed
        self.run_ahead.block_queued(device, copies=copies, leaving=berth is not None)
        if berth is not None:
            passage.berths[unit.stage] = berth

        def begin_backward(_: Tensor) -> None:
            self.run_ahead.block_queued(device, copies=copies)
            streamer.use(position, backward=True)

        # On all: autograd is done with the block behind before it takes the first of these, whichever it is.
        # What the block only hands through is not its own.
        handed_through = {id(leaf) for leaf in tree_leaves((args, kwargs))}
        for tensor in tree_leaves(outputs):
            if isinstance(tensor, Tensor) and tensor.requires_grad and id(tensor) not in handed_through:
                tensor.register_hook(begin_backward)
        return outputs

    def _run_probed(self, probe: Probe, stage: int, block: nn.Module, args: Any, kwargs: Any) -> Any:
        """Run a block without gradients, and measure what it would leave behind with them."""

        def run(residency: Residency, args: Any, kwargs: Any) -> Any:
            return run_block(block, args, kwargs, residency=residency, compiler=self.compiler)

        outputs = run_block(block, args, kwargs, residency=Residency.KEEP)
        probe.measure(stage, self.placement.devices[stage], block, run, args, kwargs, outputs)
        return outputs

    def _current(self) -> Passage | None:
        """This thread's passage while its forward runs."""
        passage = getattr(self._here, "passage", None)
        return None if passage is None or passage.done else passage

    def _recall(self, stage: int, inputs: Any) -> Any:
        """Inputs of a module that runs outside of a forward: another library's recomputation, or alone.

        A recomputation runs in threads of autograd's own, which know nothing of the micro-batch; but its
        inputs are the very tensors of the forward, and what stood for them then must stand for them now.
        """
        device = self.placement.devices[stage]

        def recall(tensor: Tensor) -> Tensor:
            stand_ins = (passage.recall(tensor, stage) for passage in tuple(self._open))
            known = next((s for s in stand_ins if s is not None), None)
            return tensor.to(device) if known is None else known

        return tree_map_only(Tensor, recall, inputs)


def _one_a_block(residency: Residency | str | Sequence[Residency | str], num_blocks: int) -> list[Residency]:
    if isinstance(residency, str):
        # Until it is fitted, `auto` recomputes.
        return [Residency.RECOMPUTE if residency == AUTO else Residency(residency)] * num_blocks
    if len(residency) != num_blocks:
        raise ValueError(f"{len(residency)} residencies for {num_blocks} blocks: give one, or one a block")
    return [Residency(one) for one in residency]


def _refuse_kept_streamed(residencies: Sequence[Residency], streamed: Sequence[int]) -> None:
    for position in streamed:
        if not residencies[position].recomputes:
            raise ValueError(f"block {position}: its weights are streamed, so its residency cannot be 'keep'")


def streamed_positions(placement: Placement, counts: Sequence[int] | None) -> list[int]:
    """Positions of the blocks whose weights are streamed, spread evenly over each stage.

    Raises:
        ValueError: not one count a stage, or more than the stage has blocks.
    """
    if counts is None:
        return []
    stages = [placement.blocks_of(stage) for stage in range(placement.num_stages)]
    if len(counts) != len(stages):
        raise ValueError(f"streamed={list(counts)}: {len(stages)} stages need as many numbers")
    for stage, (blocks, count) in enumerate(zip(stages, counts, strict=True)):
        if not 0 <= count <= len(blocks):
            raise ValueError(f"streamed={list(counts)}: stage {stage} has {len(blocks)} blocks")
    return [i for blocks, count in zip(stages, counts, strict=True) for i in spread(blocks, count)]


def _streamer(model: nn.Module, placement: Placement, stage: int, streamed: Sequence[int]) -> WeightStreamer:
    """That of one stage; without streamed blocks it does nothing."""
    blocks = [position for position in placement.blocks_of(stage) if position in streamed]
    names = placement.block_names
    return WeightStreamer(
        placement.devices[stage], {position: model.get_submodule(names[position]) for position in blocks}
    )


def _move(model: nn.Module, placement: Placement, streamed: Sequence[int]) -> None:
    """Move every parameter and buffer to its stage's device, but for those that are streamed."""
    waiting = {
        id(parameter)
        for i in streamed
        for parameter in frozen_parameters(model.get_submodule(placement.block_names[i]))
    }
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if id(tensor) not in waiting:
            tensor.data = tensor.data.to(placement.device_of(name))
