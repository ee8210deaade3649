"""Spread a model over devices from outside, without touching its code."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from tworeel.engine.compiling import BlockCompiler
from tworeel.engine.fitting import Probe
from tworeel.engine.moving import lodgers, move
from tworeel.engine.neighbours import adapters_of, dropouts_of, keep_spread, place_adapters, refuse_replaced
from tworeel.engine.parking import Berth, HostPool
from tworeel.engine.passage import Gate, Passage
from tworeel.engine.placement import Placement, Unit, place
from tworeel.engine.residency import Residency, refuse_dropout, run_block
from tworeel.engine.run_ahead import RunAhead
from tworeel.engine.strays import Strays
from tworeel.engine.weight_streaming import refuse_kept_streamed, spread, streamed_positions, streamer_of

AUTO = "auto"


def split(
    model: nn.Module,
    devices: Sequence[str | torch.device],
    *,
    at: Sequence[int] | None = None,
    blocks: Sequence[str] | None = None,
    first: Sequence[str] = (),
    residency: Residency | str | Sequence[Residency | str] = Residency.KEEP,
    compile: bool = False,
    streamed: Sequence[int] | None = None,
    host_limit: int | None = None,
    run_ahead: int | None = None,
    io_same_device: bool = False,
    beside: Mapping[str, str] | None = None,
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
        first: names of modules that run before the blocks although the model lists them behind.
        residency: what each block leaves behind for its backward; one for all, or one a block. `auto` keeps
            as much as the devices have room for, found out before the first step of a `Pipeline`.
        compile: run the blocks through `torch.compile`; where that fails, without, after a warning.
        streamed: how many blocks of each stage have their frozen weights in pinned host memory and are
            brought to the device ahead of use. Such blocks have to recompute. None by default; with the
            residency `auto`, as many as are needed.
        host_limit: bytes of pinned host memory for activations; what does not fit stays on the devices.
        run_ahead: blocks that may be queued on a device behind the one that it computes; no limit by default.
        io_same_device: bring what the forward returns back to the first device, where a loop that knows
            nothing of the split has its targets. A `Pipeline` computes its loss on the last one all the same.
        beside: names of modules that the forward calls between blocks, each with the block that it follows:
            they live on that block's device and leave behind what it does.
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
    placement = place(model, devices, at=at, blocks=blocks, first=first, beside=beside)
    positions = streamed_positions(placement, streamed)
    refuse_kept_streamed(_one_a_block(residency, placement.boundaries[-1]), positions)
    move(model, placement, positions)
    return Split(
        model,
        placement,
        residency,
        None if streamed is None else positions,
        compile=compile,
        host_limit=host_limit,
        run_ahead=run_ahead,
        io_same_device=io_same_device,
        between=between,
    )


def find_split(model: nn.Module) -> Split | None:
    """The split that `model` runs under, if any, also behind another library's wrappers."""
    forward = model.__dict__.get("forward")
    while forward is not None:
        if isinstance(found := getattr(forward, "split", None), Split):
            return found
        forward = getattr(forward, "__wrapped__", None)
    return None


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
        io_same_device: whether the forward's result comes back to the first device.
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
        io_same_device: bool = False,
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
        self.io_same_device = io_same_device
        self._probe: Probe | None = None
        self._here = threading.local()
        self._open: set[Passage] = set()
        self._wrapped: list[tuple[nn.Module, Any, Any]] = []
        self._streamed = tuple(streamed or ())
        self.may_stream = streamed is None
        self._streamers = [
            streamer_of(model, placement, stage, self._streamed) for stage in range(placement.num_stages)
        ]
        self._take_over()

    @property
    def device_map(self) -> dict[str, torch.device]:
        """Device of each part by its name; also the model's `hf_device_map`, so that accelerate leaves it."""
        return {unit.name: self.placement.devices[unit.stage] for unit in self.placement.units}

    @property
    def streamed_bytes(self) -> int:
        """Bytes of pinned host memory that hold weights."""
        return sum(streamer.host_bytes for streamer in self._streamers)

    def set_residency(self, residency: Residency | str | Sequence[Residency | str]) -> None:
        """Change what the blocks leave behind, from the next forward on; as for `split`."""
        residencies = _one_a_block(residency, self.placement.boundaries[-1])
        refuse_kept_streamed(residencies, self._streamed)
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
        self._streamers[stage] = streamer_of(self.model, self.placement, stage, self._streamed)

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
        for module, ours, before in self._wrapped:
            if module is self.model or module.__dict__["forward"] is ours:
                del module.forward
                if before is not None:
                    module.forward = before
        self._wrapped.clear()
        del self.model._apply, self.model.hf_device_map

    def place_adapters(self) -> None:
        """Bring LoRA modules that stand outside of the model to the devices of the layers they stand for.

        Every forward does it, too. Call it before the state of an optimizer is loaded.
        """
        place_adapters(self.model, self.placement.device_of)

    def refuse_dropout(self) -> None:
        """Raise ValueError if a block draws random numbers that a recomputation would not draw again."""
        blocks = zip(self.placement.block_names, self.residencies, strict=True)
        recomputed = [name for name, residency in blocks if residency.recomputes]
        for name in recomputed:
            refuse_dropout(name, self.model.get_submodule(name))
        prefixes = tuple(f"{name}." for name in recomputed)
        for adapter, layer in adapters_of(self.model).items():
            for p in dropouts_of(adapter) if layer.startswith(prefixes) else ():
                raise ValueError(
                    f"{layer}: dropout of {p} in its adapter cannot be recomputed; use residency 'keep'"
                )

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

    def _take_over(self) -> None:
        """Let the model's forward, and those of its parts, run by this split."""
        positions = {name: i for i, name in enumerate(self.placement.block_names)}
        units = [(unit, self.model.get_submodule(unit.name)) for unit in self.placement.units]
        for unit, module in units:
            refuse_replaced(unit.name, module, is_block=unit.is_block)
        refuse_replaced(type(self.model).__name__, self.model, is_block=True)
        for unit, module in units:
            self._wrap(module, partial(self._staged, unit, positions.get(unit.beside or unit.name)))
        self._wrap(self.model, self._rooted)
        keep_spread(self.model, self._homes)
        self.model.hf_device_map = self.device_map  # type: ignore[assignment]

    def _homes(self) -> dict[int, torch.device]:
        """Device of each tensor of the model and its gradient, by `id`; not of those that are streamed."""
        homes = {}
        for tensor, device in lodgers(self.model, self.placement, self._streamed):
            homes[id(tensor)] = device
            if tensor.grad is not None:
                homes[id(tensor.grad)] = device
        return homes

    def _wrap(self, module: nn.Module, make: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
        before = module.__dict__.get("forward")
        module.forward = make(module.forward)
        self._wrapped.append((module, module.forward, before))

    def _rooted(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        def root(_: nn.Module, *args: Any, **kwargs: Any) -> Any:
            passage = self._current()
            if passage is None:
                self.place_adapters()
                with self.passage() as alone:
                    return self._bring_home(run(alone, args, kwargs))
            return run(passage, args, kwargs)

        def run(passage: Passage, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if passage.stage > 0:
                raise RuntimeError("the model ran twice in one micro-batch: give each run its own")
            args, kwargs = passage.arrive(0, (args, kwargs), block=False)
            with Strays(passage) if self._between else nullcontext():
                return forward(*args, **kwargs)

        root.split = self  # type: ignore[attr-defined]
        # A method, as accelerate takes its wrappers off and on.
        return MethodType(root, self.model)

    def _bring_home(self, outputs: Any) -> Any:
        if not self.io_same_device:
            return outputs
        return tree_map_only(Tensor, lambda tensor: tensor.to(self.placement.devices[0]), outputs)

    def _staged(self, unit: Unit, position: int | None, forward: Callable[..., Any]) -> Callable[..., Any]:
        def staged(*args: Any, **kwargs: Any) -> Any:
            passage = self._current()
            if passage is None:
                args, kwargs = self._recall(unit.stage, (args, kwargs))
                return forward(*args, **kwargs)
            if unit.is_block and unit.stage < passage.stage and not passage.is_alone:
                raise RuntimeError(
                    f"{unit.name} of stage {unit.stage} runs after a module of stage {passage.stage}: name "
                    "what runs before the blocks, tworeel.split(..., first=[...])"
                )
            with passage.within():
                args, kwargs = passage.arrive(unit.stage, (args, kwargs), block=unit.is_block)
                if position is None:
                    outputs = passage.leave_prologue(forward(*args, **kwargs))
                else:
                    outputs = self._run_block(unit, position, passage, args, kwargs)
            passage.own(outputs, unit.stage)
            return outputs

        staged.__wrapped__ = forward  # type: ignore[attr-defined]
        return staged

    def _run_block(self, unit: Unit, position: int, passage: Passage, args: Any, kwargs: Any) -> Any:
        device, streamer = self.placement.devices[unit.stage], self._streamers[unit.stage]
        residency = self.residencies[position]
        berth = Berth(self.host_pool, passage.berths.get(unit.stage)) if residency.is_parked else None
        streamer.use(position, backward=False)
        block = self.model.get_submodule(unit.name)
        if self._probe is not None:
            return self._run_probed(self._probe, unit, block, args, kwargs)
        outputs = run_block(
            block,
            args,
            kwargs,
            residency=residency,
            berth=berth,
            compiler=self.compiler,
            redraws=passage.is_alone,
        )
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

    def _run_probed(self, probe: Probe, unit: Unit, block: nn.Module, args: Any, kwargs: Any) -> Any:
        """Run a block without gradients, and measure what it would leave behind with them."""

        def run(residency: Residency, args: Any, kwargs: Any) -> Any:
            return run_block(block, args, kwargs, residency=residency, compiler=self.compiler)

        outputs = run_block(block, args, kwargs, residency=Residency.KEEP)
        device = self.placement.devices[unit.stage]
        probe.measure(unit.stage, unit.kind, device, block, run, args, kwargs, outputs)
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
