"""Carries the micro-batches of a step through the stages, one behind the other."""

from __future__ import annotations

import operator
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import ExitStack, contextmanager
from contextvars import copy_context
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tworeel.engine.fitter import fit
from tworeel.engine.passage import Passage
from tworeel.engine.releasing import clear_frames
from tworeel.engine.residency import Residency
from tworeel.engine.schedule import Action, Order, make_orders, most_in_flight, one_by_one_first
from tworeel.engine.split import Split, find_split, split
from tworeel.engine.timeline import Span, Timeline
from tworeel.engine.turnstile import Turnstile

Loss = Callable[[Any, Any], Tensor]
"""(the model's output, the micro-batch) -> scalar, on the last stage's device."""


def call_model(model: nn.Module, micro_batch: Any) -> Any:
    """Run `model` on a micro-batch: a mapping gives keyword arguments, a tuple or list positional ones."""
    if isinstance(micro_batch, Mapping):
        return model(**micro_batch)
    if isinstance(micro_batch, tuple | list):
        return model(*micro_batch)
    return model(micro_batch)


@dataclass(frozen=True)
class StepResult:
    """What a step gives back; the gradients are in the parameters' `.grad`."""

    losses: tuple[Tensor, ...]
    """The loss of each micro-batch, detached, on the last stage's device."""
    spans: tuple[Span, ...] = ()
    """When each stage worked on what, if the step was timed."""


class Pipeline:
    """Keeps all stages of a split model at work by 1F1B over micro-batches.

    Args:
        model: a model, or what `split` returned for it. A model that is not split yet needs `devices`.
        devices, at, blocks: as for `split`.
        residency: as for `split`; changes that of a model that is split already.
        compile, cpp_wrapper, exact, streamed: as for `split`.
        forward: how the model is run on a micro-batch; see `call_model`.
        slack: micro-batches in flight beyond what 1F1B needs; see `one_f_one_b`.

    Raises:
        ValueError: as `split`; or the model is neither split nor are devices given.

    Example:
        >>> pipeline = Pipeline(transformer, ["cuda:0", "cuda:1"], residency="recompute")
        >>> result = pipeline.step(micro_batches, lambda output, batch: mse(output, batch["target"]) / 8)
        >>> optimizer.step()
    """

    def __init__(
        self,
        model: nn.Module | Split,
        devices: Sequence[str | torch.device] | None = None,
        *,
        at: Sequence[int] | None = None,
        blocks: Sequence[str] | None = None,
        residency: Residency | str | Sequence[Residency | str] | None = None,
        compile: bool = False,
        cpp_wrapper: bool = False,
        exact: bool = True,
        streamed: Sequence[int] | None = None,
        forward: Callable[[nn.Module, Any], Any] = call_model,
        slack: int = 0,
    ) -> None:
        found = model if isinstance(model, Split) else find_split(model)
        if found is None and devices is None:
            raise ValueError("give the devices, or split the model first: tworeel.split(model, devices)")
        if found is not None and (devices or at or blocks or compile or cpp_wrapper or not exact or streamed):
            raise ValueError(
                "the model is split already: devices, at, blocks, compile, cpp_wrapper, exact "
                "and streamed belong to that split"
            )
        if found is None:
            assert isinstance(model, nn.Module) and devices is not None
            found = split(
                model,
                devices,
                at=at,
                blocks=blocks,
                residency=residency or Residency.KEEP,
                compile=compile,
                cpp_wrapper=cpp_wrapper,
                exact=exact,
                streamed=streamed,
            )
        elif residency is not None:
            found.set_residency(residency)
        self.split = found
        self._forward = forward
        self._slack = slack
        self._compiled_for: set[Hashable] = set()
        self._fitted_for: tuple[int, list[int]] = (0, [0] * self.split.placement.num_stages)
        self._threads, self._num_threads = ThreadPoolExecutor(1), 0

    def step(self, micro_batches: Sequence[Any], loss: Loss, *, timed: bool = False) -> StepResult:
        """Run forward and backward of all micro-batches; gradients add up in `.grad`.

        The gradients are the sum over the micro-batches, as with one `backward()` each: divide in `loss`
        for a mean. They add up in the order of the micro-batches, so the same step gives the same bits.
        Work is queued on each device's default stream.

        Args:
            micro_batches: what `forward` takes, one by one; their shapes may differ.
            loss: called on the last stage with the model's output and the micro-batch.
            timed: also measure when each stage works.

        Raises:
            ValueError: no micro-batches, or dropout in a block that is recomputed.
            Exception: what a micro-batch raised first; the others have ended, `.grad` is then undefined.
        """
        if not micro_batches:
            raise ValueError("a step needs at least one micro-batch")
        self.split.refuse_dropout()
        self.split.place_adapters()
        devices = self.split.placement.devices
        if self.split.is_auto:
            self._fit(micro_batches)
        orders = self._orders(micro_batches)
        run = _Step(self.split, self._forward, loss, Turnstile(orders), Timeline(devices) if timed else None)
        try:
            # A micro-batch is on the first stage first and last.
            pool = self._pool(most_in_flight(orders, len(devices))[0])
            # With the caller's context: torch (2.13) keeps the settings of its compiler there.
            futures = [
                pool.submit(copy_context().run, run.carry, i, batch) for i, batch in enumerate(micro_batches)
            ]
            wait(futures, return_when=FIRST_EXCEPTION)
            if run.turnstile.error is not None:
                raise run.turnstile.error
        except BaseException as error:  # also Ctrl-C here, or a thread that cannot start
            self._compiled_for.clear()  # who knows how far compilation came
            self._num_threads = 0
            run.turnstile.abort(error)  # those that have begun may wait for others
            self._threads.shutdown(cancel_futures=True)
            raise
        finally:
            self.split.rest()
        spans = run.timeline.spans() if run.timeline else []
        return StepResult(tuple(f.result() for f in futures), tuple(spans))

    def _pool(self, count: int) -> ThreadPoolExecutor:
        """At least so many threads, the same in each step: cuDNN makes its plans anew for a new thread."""
        if count > self._num_threads:
            self._threads.shutdown()
            self._threads, self._num_threads = ThreadPoolExecutor(count, thread_name_prefix="tworeel"), count
        return self._threads

    def _fit(self, micro_batches: Sequence[Any]) -> None:
        """Choose what the blocks leave behind, if a micro-batch or a step is larger than at the last time."""
        largest = max(micro_batches, key=_bytes)
        depths = self._depths(len(micro_batches))
        size, deepest = self._fitted_for
        if _bytes(largest) > size or any(map(operator.gt, depths, deepest)):
            fit(self.split, lambda: self._forward(self.split.model, largest), depths)
            self._fitted_for = _bytes(largest), depths

    def _depths(self, num_micro_batches: int) -> list[int]:
        """The most micro-batches whose activations each stage holds at a time."""
        devices = self.split.placement.devices
        return most_in_flight(make_orders(devices, num_micro_batches, slack=self._slack), len(devices))

    def _orders(self, micro_batches: Sequence[Any]) -> list[Order]:
        """The orders of work; micro-batches up to the last that has to be compiled go one by one."""
        count, most = len(micro_batches), self._depths(len(micro_batches))
        # The last one may as well be the whole of a pipeline.
        num_first = min(self._num_to_compile(micro_batches), count - 1)
        while any(map(operator.gt, self._depths(count - num_first), most)):
            num_first += 1  # interleaved, a smaller number can be deeper
        rest = make_orders(self.split.placement.devices, count - num_first, slack=self._slack)
        return one_by_one_first(rest, num_first)

    def _num_to_compile(self, micro_batches: Sequence[Any]) -> int:
        """How many micro-batches there are up to the last whose like no step has had.

        Compilation is not made for several threads at once.
        """
        if self.split.compiler is None:
            return 0
        residencies, number = tuple(self.split.residencies), 0
        for i, batch in enumerate(micro_batches, 1):
            like = (_shapes(batch), residencies)
            if like not in self._compiled_for:
                self._compiled_for.add(like)
                number = i
        return number


def _tensors(thing: Any) -> Iterator[Tensor]:
    """All tensors in a nesting of whatever kind."""
    if isinstance(thing, Tensor):
        yield thing
    elif is_dataclass(thing):
        for field in fields(thing):
            yield from _tensors(getattr(thing, field.name))
    elif isinstance(thing, Mapping):
        for value in thing.values():
            yield from _tensors(value)
    elif isinstance(thing, tuple | list):
        for value in thing:
            yield from _tensors(value)


def _bytes(micro_batch: Any) -> int:
    return sum(tensor.nbytes for tensor in _tensors(micro_batch))


def _shapes(micro_batch: Any) -> Hashable:
    """What a compilation depends on: shapes and dtypes of all tensors."""
    return tuple((tuple(tensor.shape), tensor.dtype) for tensor in _tensors(micro_batch))


class _Step:
    """What the threads of one step share."""

    def __init__(
        self,
        split: Split,
        forward: Callable[[nn.Module, Any], Any],
        loss: Loss,
        turnstile: Turnstile,
        timeline: Timeline | None,
    ) -> None:
        self.split = split
        self.forward = forward
        self.loss = loss
        self.turnstile = turnstile
        self.timeline = timeline
        self.last = split.placement.num_stages - 1
        self.autocast = _autocast_state(split.placement.devices)

    def carry(self, number: int, micro_batch: Any) -> Tensor:
        """Take one micro-batch through the whole forward and backward; runs in a thread of its own."""
        try:
            with _autocast(self.autocast), self.split.passage(carrier := _Carrier(self, number)) as passage:
                return self._carry(carrier, passage, micro_batch)
        except BaseException as error:
            # An error keeps the frames it came through, and these the activations. In torch 2.11 an open
            # checkpoint is among them, which only its own thread can close.
            clear_frames(error)
            self.turnstile.abort(error)
            raise

    def _carry(self, carrier: _Carrier, passage: Passage, micro_batch: Any) -> Tensor:
        carrier.enter(Action("F", carrier.number, 0))
        loss = self.loss(self.forward(self.split.model, micro_batch), micro_batch)
        passage.done = True
        if passage.stage != self.last:
            raise RuntimeError(f"the forward ended on stage {passage.stage}, before stage {self.last}")
        carrier.leave()
        for stage in range(self.last, -1, -1):
            carrier.enter(Action("B", carrier.number, stage))
            passage.backward(stage, loss if stage == self.last else None)
            carrier.leave()
        return loss.detach()


class _Carrier:
    """A thread's place at the turnstile: the gate of its passage."""

    def __init__(self, step: _Step, number: int) -> None:
        self.number = number
        self._step = step
        self._action: Action | None = None
        self._span = ExitStack()

    def enter(self, action: Action) -> None:
        self._step.turnstile.enter(action)
        self._action = action
        device = self._step.split.placement.devices[action.stage]
        if device.type != "cpu":
            torch.accelerator.set_device_index(device)
        if self._step.timeline is not None:
            self._span.enter_context(self._step.timeline.span(action))

    def leave(self) -> None:
        assert self._action is not None
        self._span.close()
        following = self._step.turnstile.after(self._action)
        if following is not None:
            self._step.split.expect(following.stage, backward=following.kind == "B")
        self._step.turnstile.leave(self._action)

    def advance(self, stage: int, to: int) -> None:
        self.leave()
        self.enter(Action("F", self.number, to))


def _autocast_state(devices: Sequence[torch.device]) -> list[tuple[str, torch.dtype, bool]]:
    """The caller's autocast: thread-local, so each carrying thread has to be told."""
    kinds, cached = {device.type for device in devices}, torch.is_autocast_cache_enabled()
    return [(k, torch.get_autocast_dtype(k), cached) for k in sorted(kinds) if torch.is_autocast_enabled(k)]


@contextmanager
def _autocast(state: list[tuple[str, torch.dtype, bool]]) -> Iterator[None]:
    with ExitStack() as stack:
        for kind, dtype, cached in state:
            stack.enter_context(torch.autocast(kind, dtype, cache_enabled=cached))
        yield
