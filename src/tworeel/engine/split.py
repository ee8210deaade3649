"""Spread a model over devices from outside, without touching its code."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.optim import Optimizer
from torch.utils._pytree import tree_map_only

from tworeel.engine.attention_layout import keep_gradient_layouts
from tworeel.engine.block_runs import BlockRuns
from tworeel.engine.compiling import BlockCompiler
from tworeel.engine.footprints import Footprints
from tworeel.engine.forwards import Forwards
from tworeel.engine.host_pool import HostPool
from tworeel.engine.moving import lodgers, move
from tworeel.engine.neighbours import adapters_of, dropouts_of, keep_spread, place_adapters, refuse_copies
from tworeel.engine.parking import Departures
from tworeel.engine.passage import Gate, Passage
from tworeel.engine.placement import Placement, place
from tworeel.engine.probing import Probe
from tworeel.engine.residency import AUTO, Residency, one_a_block
from tworeel.engine.run_ahead import RunAhead
from tworeel.engine.streamed_blocks import (
    StreamedBlocks,
    refuse_kept_streamed,
    refuse_too_much_streamed,
    streamed_positions,
)
from tworeel.engine.under_way import UnderWay


def split(
    model: nn.Module,
    devices: Sequence[str | torch.device],
    *,
    at: Sequence[int] | None = None,
    blocks: Sequence[str] | None = None,
    first: Sequence[str] = (),
    residency: Residency | str | Sequence[Residency | str] = Residency.KEEP,
    kept_ops: Collection[OpOverload[..., Any]] = (),
    compile: bool = False,
    cpp_wrapper: bool = False,
    exact: bool = True,
    streamed: Sequence[int] | None = None,
    may_stream: bool | None = None,
    host_limit: int | None = None,
    run_ahead: int | None = None,
    io_same_device: bool = False,
    beside: Mapping[str, str] | None = None,
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
        kept_ops: operations whose results the selective residencies keep beside those of torch's attentions,
            for example `[torch.ops.flash_attn._flash_attn_forward.default]`.
        compile: run the blocks through `torch.compile`; where that fails, without, after a warning.
        cpp_wrapper, exact: how blocks are compiled, see `BlockCompiler`.
        streamed: how many blocks of each stage have their frozen weights in pinned host memory and are
            brought to the device ahead of use. Such blocks have to recompute. None by default; with the
            residency `auto`, as many as are needed.
        may_stream: whether the residency `auto` may let more weights be streamed than `streamed` says; by
            default where that says nothing.
        host_limit: bytes of pinned host memory for streamed weights and, in what they leave, for activations:
            those that do not fit stay on the devices, after a warning.
        run_ahead: blocks that may be queued on a device behind the one that it computes; no limit by default.
        io_same_device: bring what the forward returns back to the first device, where a loop that knows
            nothing of the split has its targets. A `Pipeline` computes its loss on the last one all the same.
        beside: names of modules that the forward calls between blocks, each with the block that it follows:
            they live on that block's device and leave behind what it does.

    Raises:
        ValueError: no block lists, more stages than blocks, boundaries out of order, as many residencies or
            counts of streamed blocks as there are not, a streamed block that keeps its activations, more
            streamed weights than `host_limit` allows,
            `cpp_wrapper` without `compile` or without a C++ compiler, the model is split already.

    Example:
        >>> split(transformer, ["cuda:0", "cuda:1"])
        >>> loss = mse(transformer(x, t, text), target)
        >>> loss.backward()
    """
    if find_split(model) is not None:
        raise ValueError(f"{type(model).__name__} is split already: call .remove() on its split first")
    if cpp_wrapper and not compile:
        raise ValueError("cpp_wrapper: what is not compiled cannot be launched from C++")
    # Before anything is planned: even blocks that are not compiled now may be later in this process.
    keep_gradient_layouts()
    compiler = BlockCompiler(cpp_wrapper=cpp_wrapper, exact=exact) if compile else None
    placement = place(model, devices, at=at, blocks=blocks, first=first, beside=beside)
    positions = streamed_positions(placement, streamed)
    refuse_kept_streamed(one_a_block(residency, placement.boundaries[-1]), positions)
    refuse_too_much_streamed(model, placement, positions, host_limit)
    move(model, placement, positions)
    return Split(
        model,
        placement,
        residency,
        positions,
        kept_ops=kept_ops,
        may_stream=streamed is None if may_stream is None else may_stream,
        compiler=compiler,
        host_limit=host_limit,
        run_ahead=run_ahead,
        io_same_device=io_same_device,
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
        kept_ops: operations whose results the selective residencies keep, too.
        is_auto: whether the pipeline chooses the residencies (`tworeel.engine.fitter`).
        footprints: what a block of each kind takes on each stage, as was measured for that at the last time;
            nothing of stages on a CPU, nor before.
        streamed: which blocks have their weights streamed.
        may_stream: whether the pipeline may then let weights be streamed, too.
        compiler: runs the blocks compiled; None runs them as they are.
        host_pool: pinned host memory for activations: what streamed weights leave of the limit.
        departures: activations that are on their way there.
        run_ahead: bounds how many blocks are queued on a device.
        io_same_device: whether the forward's result comes back to the first device.
        optimizer: that trains the model; may be set. The residency `auto` leaves room for its moments until
            they are there; without it, always.
        under_way: the micro-batches that are on their way.
        block_runs: runs a block as all of this says.
    """

    def __init__(
        self,
        model: nn.Module,
        placement: Placement,
        residency: Residency | str | Sequence[Residency | str],
        streamed: Sequence[int] = (),
        *,
        kept_ops: Collection[OpOverload[..., Any]] = (),
        may_stream: bool = True,
        compiler: BlockCompiler | None = None,
        host_limit: int | None = None,
        run_ahead: int | None = None,
        io_same_device: bool = False,
    ) -> None:
        self.model = model
        self.placement = placement
        self.residencies = one_a_block(residency, placement.boundaries[-1])
        self.is_auto = self._chooses(residency)
        self.footprints: Sequence[Mapping[str, Footprints]] = ()
        self.kept_ops = frozenset(kept_ops)
        self.compiler = compiler
        self.departures = Departures()
        self.run_ahead = RunAhead(run_ahead)
        self.io_same_device = io_same_device
        self.streamed = StreamedBlocks(model, placement, streamed)
        self._host_limit = host_limit
        self.host_pool = HostPool(self.host_room)
        self.may_stream = may_stream
        self.optimizer: Optimizer | None = None
        self.under_way = UnderWay(placement)
        self.block_runs = BlockRuns(self)
        self._forwards = Forwards(self)
        keep_spread(model, self._homes)
        refuse_copies(model)
        # Between two blocks, parameters of streamed ones show a slot, with whatever weights are in it.
        self._at_state_dict = model.register_state_dict_pre_hook(lambda *_: self._before_saving())
        self._device_map_before = getattr(model, "hf_device_map", None)
        model.hf_device_map = self.device_map  # type: ignore[assignment]

    @property
    def device_map(self) -> dict[str, torch.device]:
        """Device of each part by its name; also the model's `hf_device_map`, so that accelerate leaves it."""
        return {unit.name: self.placement.devices[unit.stage] for unit in self.placement.units}

    @property
    def streamed_bytes(self) -> int:
        """Bytes of pinned host memory that hold weights, with what rounding loses."""
        return self.streamed.host_bytes

    @property
    def host_room(self) -> int | None:
        """Bytes of the host memory's limit that streamed weights leave; None without a limit."""
        return None if self._host_limit is None else self._host_limit - self.streamed_bytes

    def set_residency(self, residency: Residency | str | Sequence[Residency | str]) -> None:
        """Change what the blocks leave behind, from the next forward on; as for `split`."""
        residencies = one_a_block(residency, self.placement.boundaries[-1])
        refuse_kept_streamed(residencies, self.streamed.positions)
        self.residencies = residencies
        self.is_auto = self._chooses(residency)

    def _chooses(self, residency: Any) -> bool:
        return residency == AUTO and any(device.type != "cpu" for device in self.placement.devices)

    @contextmanager
    def probing(self, probe: Probe) -> Iterator[None]:
        """Let the model's forward, without gradients, also measure its blocks."""
        try:
            with self.block_runs.probed(probe), self.passage(), torch.no_grad():
                yield
        finally:
            self.rest()
            # Under the caller's autocast it may hold casts that were made without gradients.
            torch.clear_autocast_cache()

    def streamed_on(self, stage: int) -> list[int]:
        """Positions of the stage's blocks whose weights are streamed."""
        return self.streamed.on(stage)

    def stream(self, stage: int, count: int) -> None:
        """Let the weights of so many blocks of a stage wait in host memory from now on.

        What such a block has kept would show other weights by its backward: it recomputes.
        """
        self.streamed.stream(stage, count)
        for position in self.streamed_on(stage):
            if not self.residencies[position].recomputes:
                self.residencies[position] = Residency.RECOMPUTE
        self.host_pool.limit_to(self.host_room)

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
        self.streamed.expect(stage, backward=backward)

    def rest(self) -> None:
        """Let streamed parameters be what is in host memory, until a block uses them again."""
        self.streamed.rest()

    def remove(self) -> None:
        """Let the model's modules run as they did before; they stay on their devices."""
        if "_apply" not in self.model.__dict__:
            return  # it was removed before
        self.rest()
        self._forwards.give_back()
        self._at_state_dict.remove()
        del self.model._apply, self.model.__deepcopy__, self.model.hf_device_map
        if self._device_map_before is not None:
            self.model.hf_device_map = self._device_map_before

    def place_adapters(self) -> None:
        """Bring LoRA modules that stand outside of the model to the devices of the layers they stand for.

        Every forward does it, too. Call it before the state of an optimizer is loaded.
        """
        place_adapters(self.model, self.placement.device_of)

    def refuse_dropout(self) -> None:
        """Raise ValueError if a block draws random numbers that a recomputation would not draw again.

        Several threads share one generator: a recomputation would not see the mask of its forward.
        """
        residencies = dict(zip(self.placement.block_names, self.residencies, strict=True))
        recomputed = [
            unit.name
            for unit in self.placement.units
            if (residency := residencies.get(unit.beside or unit.name)) is not None and residency.recomputes
        ]
        for name in recomputed:
            for path, p in dropouts_of(self.model.get_submodule(name)):
                where = f"{name}.{path}" if path else name
                raise ValueError(f"{where}: dropout of {p} cannot be recomputed; use residency 'keep'")
        prefixes = tuple(f"{name}." for name in recomputed)
        for adapter, layer in adapters_of(self.model).items():
            for _, p in dropouts_of(adapter) if layer.startswith(prefixes) else ():
                raise ValueError(
                    f"{layer}: dropout of {p} in its adapter cannot be recomputed; use residency 'keep'"
                )

    def passage(self, gate: Gate | None = None) -> AbstractContextManager[Passage]:
        """Open the way of one micro-batch; the model's forward on this thread runs along it."""
        return self.under_way.passage(gate)

    def bring_home(self, outputs: Any) -> Any:
        """What the forward returns, on the first device where that is wanted."""
        if not self.io_same_device:
            return outputs
        return tree_map_only(Tensor, lambda tensor: tensor.to(self.placement.devices[0]), outputs)

    def _before_saving(self) -> None:
        if self.streamed.positions and self.under_way.in_pipeline:
            raise RuntimeError(
                "state_dict: weights are streamed in the midst of a Pipeline's step; save behind it"
            )
        self.rest()

    def _homes(self) -> dict[int, torch.device]:
        """Device of each tensor of the model and its gradient, by `id`; not of those that are streamed."""
        if not self.under_way.in_pipeline:  # whose threads use what is streamed
            self.rest()
        homes = {}
        for tensor, device in lodgers(self.model, self.placement, self.streamed.positions):
            homes[id(tensor)] = device
            if tensor.grad is not None:
                homes[id(tensor.grad)] = device
        return homes
