"""Blocks through `torch.compile`: one compilation for all blocks of a kind and a residency."""

from __future__ import annotations

import logging
import sys
import threading
import types
from collections.abc import Callable
from functools import cache
from types import TracebackType
from typing import Any

import torch
from torch import nn
from torch._dynamo import lookup_backend
from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException
from torch._functorch import config as functorch_config
from torch._inductor.custom_graph_pass import CustomGraphPass

from tworeel.engine.attention_layout import LaidOutGradients
from tworeel.engine.norms import RecomputedCasts, keep_norms_whole
from tworeel.engine.recomputing import RecomputedWeights, is_quantized

MOST_COMPILATIONS = 64
"""Of one function, before it counts as failed; torch's own limit is 8."""

BACKEND = "inductor"
"""What compiles the graphs."""

TRIED_FROM_CPP = frozenset({None, "fp8", "int8"})
"""Precisions of frozen weights whose kernels are known to run launched from C++."""

MOST_OPERATIONS = 70
"""Of a kernel, before it is cut into two with a tensor between them. More than twice torch's own limit: what
rounds after each operation has about twice as many. Tried with torch 2.11 from 30 to 100: with fewer than 70,
FLUX.2's gated feed-forward held up to 10 hidden states more than it has to, with more than 70, 8 more.
"""

log = logging.getLogger(__name__)

BlockCall = Callable[..., Any]
"""(block, *args, **kwargs) -> what the block's forward returns."""


class _OneAtATime:
    """Lets one thread at a time look for the compilation that fits, until that begins to run.

    torch keeps the state of this search with the compilation: a second thread in the midst of it, which only
    happens where sizes are open, finds that none fits, and compiles again.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._here = threading.local()

    def __enter__(self) -> None:
        self._lock.acquire()
        self._here.searches = True

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.found()

    def found(self) -> None:
        """This thread has what it looked for."""
        if getattr(self._here, "searches", False):
            self._here.searches = False
            self._lock.release()


_searching = _OneAtATime()


def require_cpp_compiler() -> None:
    """Look for the C++ compiler that Inductor would take.

    Raises:
        ValueError: there is none.
    """
    from torch._inductor.cpp_builder import get_cpp_compiler  # with most of Inductor, which takes a second

    try:
        get_cpp_compiler()
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"launching from C++ needs a C++ compiler: {reason}") from None


def may_launch_from_cpp() -> bool:
    """Whether blocks are launched from C++ here without being asked to: on Linux, with a compiler."""
    try:
        require_cpp_compiler()
    except ValueError:
        return False
    return sys.platform == "linux"


def _raise_limit() -> None:
    """Let torch compile as often as it takes: since 2.13 a thread does not see what another one has set."""
    # One for each device, for the first block (whose input needs no gradient) and for other shapes.
    if torch._dynamo.config.recompile_limit < MOST_COMPILATIONS:
        torch._dynamo.config.recompile_limit = MOST_COMPILATIONS


@cache
def _backend(cpp_wrapper: bool, exact: bool) -> BlockCall:
    """What `torch.compile` is given: torch keeps it for good, so it holds no compiler of ours."""
    launching: dict[str, Any] = {}
    if cpp_wrapper:
        from torch._inductor.compile_fx import get_cpp_wrapper_config

        # With all that belongs to it: when a backward is compiled, torch (2.11) has left that behind.
        launching = {"cpp_wrapper": True, **get_cpp_wrapper_config()}
        launching["post_grad_custom_pre_pass"] = LaidOutGradients()

    def compile_graph(graph: torch.fx.GraphModule, inputs: Any) -> BlockCall:
        """As any other backend, but says when what it has compiled begins to run.

        The backward is compiled with the forward: where that fails there is still another way to run the
        block, kernels are tuned before its activations are there, and this thread's settings of torch hold.

        Without AOTAutograd's cache, which would give a block another attention kernel than is asked for: the
        kernel is chosen below what it takes for its key. Inductor's own sees it, and saves most of the time.
        """
        patches = dict(launching)
        quantized = any(map(is_quantized, inputs))
        whole_norms = takes_whole_norms(exact=exact, quantized=quantized, cpp_wrapper=cpp_wrapper)
        if rounds_as_written(exact=exact, quantized=quantized):
            patches |= {"emulate_precision_casts": True, "realize_opcount_threshold": MOST_OPERATIONS}
        if whole_norms:
            keep_norms_whole(graph)
        if (marks := joint_pass(quantized=quantized, whole_norms=whole_norms)) is not None:
            patches["joint_custom_post_pass"] = marks
        # Else timings would decide whether a product is padded, which shows in its last bits.
        if torch.are_deterministic_algorithms_enabled():
            patches["deterministic"] = True
        options = {"config_patches": patches} if patches else {}
        with functorch_config.patch(force_non_lazy_backward_lowering=True, enable_autograd_cache=False):
            compiled = lookup_backend(BACKEND)(graph, inputs, **options)

        def run(*args: Any) -> Any:
            _searching.found()
            return compiled(*args)

        return run

    return compile_graph


def rounds_as_written(*, exact: bool, quantized: bool) -> bool:
    """Whether a compiled block rounds where it does uncompiled; its kernels are `MOST_OPERATIONS` long then.

    Args:
        exact: as `BlockCompiler` has it.
        quantized: whether frozen weights of the block are.
    """
    # Weights in 8 bits move the numbers far more, and a forward would hold one more hidden state for it.
    return exact and not quantized


def takes_whole_norms(*, exact: bool, quantized: bool, cpp_wrapper: bool) -> bool:
    """Whether a compiled block's norms are PyTorch's own kernels.

    Args:
        exact, cpp_wrapper: as `BlockCompiler` has them.
        quantized: whether frozen weights of the block are.
    """
    # From C++, PyTorch's kernels may be launched by a turn through Python.
    return rounds_as_written(exact=exact, quantized=quantized) and not cpp_wrapper


def joint_pass(*, quantized: bool, whole_norms: bool) -> CustomGraphPass | None:
    """What marks a block's graph of forward and backward before the compiler, or a plan, divides it."""
    if quantized:
        return RecomputedWeights()
    return RecomputedCasts() if whole_norms else None


class BlockCompiler:
    """Compiles block calls, and goes on without where that fails: with a warning, never in silence.

    The weights are inputs of what is compiled, so that all blocks of a class share it. Another shape is
    compiled again once, then for any size.

    Args:
        cpp_wrapper: let the kernels be launched from C++ (Inductor's C++ wrapper). The threads of all devices
            launch through Python by turns; this they do side by side. Takes a C++ compiler, and longer.
        exact: let blocks whose weights are not quantized round to bf16 where they do when they are not
            compiled, also in a kernel's midst, and launched from Python let norms sum as they do then.

    Raises:
        ValueError: there is no C++ compiler.
    """

    def __init__(self, *, cpp_wrapper: bool = False, exact: bool = True) -> None:
        if cpp_wrapper:
            require_cpp_compiler()
        self._cpp_wrapper, self._exact = cpp_wrapper, exact
        # It warns of in-place operations in selective checkpoints; a block that has some is not selective.
        logging.getLogger("torch._higher_order_ops.wrap").setLevel(logging.ERROR)
        self._compiled: dict[tuple[BlockCall, bool], BlockCall] = {}
        """By the call, and whether it is launched from C++."""
        self._lock = threading.Lock()
        self.failed: set[BlockCall] = set()
        """What could not be compiled and runs as it is."""

    def __call__(self, call: BlockCall, block: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """Run `call(block, *args, **kwargs)` compiled; give the same `call` for all blocks of a class.

        A call that has failed for another block is tried all the same: a recomputation has to repeat what its
        forward did. Look at `failed` before a forward.
        """
        _raise_limit()
        from_cpp = self._cpp_wrapper
        try:
            compiled = self._compiled_of(call, block, from_cpp)
            with _searching:
                return compiled(block, *args, **kwargs)
        except (TorchDynamoException, FailOnRecompileLimitHit) as error:
            reason = _reason(error)
        # Not while it is handled: what is raised then would keep its frames, and these tensors.
        if "out of memory" in reason:
            raise torch.OutOfMemoryError(reason)
        if from_cpp:
            self._launch_from_python(block, reason)
            return self(call, block, *args, **kwargs)
        self._give_up(call, block, reason)
        return call(block, *args, **kwargs)

    def _compiled_of(self, call: BlockCall, block: nn.Module, from_cpp: bool) -> BlockCall:
        key = (call, from_cpp)
        with self._lock:
            if key not in self._compiled:
                name = f"{type(block).__name__}_{call.__name__}"
                # The whole block or nothing: torch would run the rest as it is and say nothing of it.
                self._compiled[key] = torch.compile(
                    _with_own_code(call, name), fullgraph=True, backend=_backend(from_cpp, self._exact)
                )
            return self._compiled[key]

    def _launch_from_python(self, block: nn.Module, reason: str) -> None:
        with self._lock:
            if self._cpp_wrapper:  # another device's thread may have come to it first
                _warn(block, "Inductor's C++ wrapper", reason)
            self._cpp_wrapper = False

    def _give_up(self, call: BlockCall, block: nn.Module, reason: str) -> None:
        with self._lock:
            if call not in self.failed:  # another thread may have come to it first
                _warn(block, "torch.compile", reason)
            self.failed.add(call)


def _reason(error: Exception) -> str:
    """The first line of what was the matter."""
    inner = getattr(error, "inner_exception", None) or error
    if isinstance(error, FailOnRecompileLimitHit):
        inner = error.__cause__ or error
    return next(iter(str(inner).strip().splitlines()), type(inner).__name__)


def _warn(block: nn.Module, without: str, reason: str) -> None:
    log.warning("%s runs without %s, which failed: %s", type(block).__name__, without, reason)


def _with_own_code(call: BlockCall, name: str) -> BlockCall:
    """A copy of a function with a code object of its own: torch counts recompilations by code object."""
    assert isinstance(call, types.FunctionType)
    copy = types.FunctionType(
        call.__code__.replace(co_name=name), call.__globals__, name, call.__defaults__, call.__closure__
    )
    copy.__kwdefaults__ = call.__kwdefaults__
    return copy
