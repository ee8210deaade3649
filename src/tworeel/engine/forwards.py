"""Meets the forwards of a split model and of its parts, without touching the model's code."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import MethodType
from typing import TYPE_CHECKING, Any

from torch import nn

from tworeel.engine.neighbours import refuse_replaced
from tworeel.engine.passage import Passage
from tworeel.engine.placement import Unit
from tworeel.engine.strays import Strays, without_strays

if TYPE_CHECKING:
    from tworeel.engine.split import Split

Forward = Callable[..., Any]


class Forwards:
    """The forwards of a split's model and of its units: they run by the split until they are given back.

    Args:
        split: whose model it is.

    Raises:
        ValueError: a forward is replaced already (see `refuse_replaced`); then nothing is changed.
    """

    def __init__(self, split: Split) -> None:
        self._split = split
        self._wrapped: list[tuple[nn.Module, Any, Any]] = []
        self._take_over()

    def give_back(self) -> None:
        """Let the modules run as they did before."""
        for module, ours, before in self._wrapped:
            if module is self._split.model or module.__dict__.get("forward") is ours:
                del module.forward
                if before is not None:
                    module.forward = before
        self._wrapped.clear()

    def _take_over(self) -> None:
        model, placement = self._split.model, self._split.placement
        positions = {name: i for i, name in enumerate(placement.block_names)}
        units = [(unit, model.get_submodule(unit.name)) for unit in placement.units]
        for unit, module in units:
            refuse_replaced(unit.name, module, is_block=unit.is_block)
        refuse_replaced(type(model).__name__, model, is_block=True)
        for unit, module in units:
            self._wrap(module, partial(self._staged, unit, positions.get(unit.beside or unit.name)))
        self._wrap(model, self._rooted)

    def _wrap(self, module: nn.Module, make: Callable[[Forward], Forward]) -> None:
        before = module.__dict__.get("forward")
        module.forward = make(module.forward)
        self._wrapped.append((module, module.forward, before))

    def _rooted(self, forward: Forward) -> Forward:
        """The whole model's: opens the way of a micro-batch unless a pipeline has done so."""
        split = self._split

        def root(_: nn.Module, *args: Any, **kwargs: Any) -> Any:
            passage = split.under_way.current()
            if passage is None:
                split.place_adapters()
                with split.passage() as alone:
                    return split.bring_home(run(alone, args, kwargs))
            return run(passage, args, kwargs)

        def run(passage: Passage, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if passage.stage > 0:
                raise RuntimeError("the model ran twice in one micro-batch: give each run its own")
            args, kwargs = passage.arrive(0, (args, kwargs), block=False)
            with without_strays(), Strays(passage):
                return forward(*args, **kwargs)

        root.split = split  # type: ignore[attr-defined]
        # A method, as accelerate takes its wrappers off and on.
        return MethodType(root, split.model)

    def _staged(self, unit: Unit, position: int | None, forward: Forward) -> Forward:
        """That of a unit: goes on to its stage, and leaves behind what the block's residency says."""
        split = self._split

        def staged(*args: Any, **kwargs: Any) -> Any:
            passage = split.under_way.current()
            if passage is None:
                if position is not None and position in split.streamed:
                    raise RuntimeError(
                        f"{unit.name} has its weights streamed and runs in its model's forward alone: leave "
                        "recomputation to the residency, turn the model's own checkpointing off"
                    )
                args, kwargs = split.under_way.recall(unit.stage, (args, kwargs))
                return forward(*args, **kwargs)
            _refuse_return(unit, passage)
            passage.comes_back(unit.stage)
            with passage.within(), without_strays():
                args, kwargs = passage.arrive(unit.stage, (args, kwargs), block=unit.is_block)
                if position is None:
                    outputs = passage.leave_prologue(forward(*args, **kwargs))
                else:
                    outputs = split.block_runs.run(unit, position, passage, args, kwargs)
            passage.own(outputs, unit.stage)
            passage.comes_back(unit.stage)
            return outputs

        staged.__wrapped__ = forward  # type: ignore[attr-defined]
        return staged


def _refuse_return(unit: Unit, passage: Passage) -> None:
    if unit.is_block and unit.stage < passage.stage and not passage.is_alone:
        raise RuntimeError(
            f"{unit.name} of stage {unit.stage} runs after a module of stage {passage.stage}: name "
            "what runs before the blocks, tworeel.split(..., first=[...])"
        )
