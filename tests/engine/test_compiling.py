"""Compiled blocks: the same gradients, one compilation a kind, and eager after a failure."""

from __future__ import annotations

import gc
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from types import NoneType

import pytest
import torch
from functorch.compile import make_boxed_func
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch._functorch import config as functorch_config
from torch._inductor import cpp_builder
from torch._inductor.codegen.cpp_wrapper_cpu import CppWrapperCpu
from torch._inductor.exc import InvalidCxxCompiler
from toy_wan import assert_close, gradients, make_micro_batch, make_wan, run_unsplit, square_loss

from tworeel import Pipeline, split
from tworeel.engine import compiling
from tworeel.engine.compiling import BlockCompiler, may_launch_from_cpp
from tworeel.engine.norms import RecomputedCasts
from tworeel.engine.recomputing import RecomputedWeights
from tworeel.engine.residency import plain_call

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


@pytest.mark.slow
@pytest.mark.parametrize("residency", ["selective", "offload"])
def test_compiled_equals_the_unsplit_eager_model(residency, monkeypatch):
    # Through inductor, where each kernel takes a C++ compiler 2 seconds, are selective blocks in bf16 below,
    # those that keep nothing from C++, those that keep all in tests/training/test_run_engine.py.
    monkeypatch.setattr(compiling, "BACKEND", "aot_eager")
    # Not of one frame: torch compiles a size of 1 for itself, which takes as long as all the others.
    batches = [make_micro_batch("t2v", torch.float32, seed) for seed in (1, 2, 4)]
    losses, expected = run_unsplit(make_wan("t2v", torch.float32), batches)
    model = make_wan("t2v", torch.float32)
    pipeline = Pipeline(model, ["cpu", "cpu"], residency=residency, compile=True, slack=1)
    for _ in range(2):  # the first is carried by one thread
        model.zero_grad()
        result = pipeline.step(batches, square_loss)
        torch.testing.assert_close(list(result.losses), losses, rtol=1e-5, atol=0)
        assert_close(gradients(model), expected, 1e-4)
    compiler = pipeline.split.compiler
    assert compiler is not None and not compiler.failed and len(compiler._compiled) == 1


@pytest.mark.slow
def test_compiled_in_bf16_each_gradient_is_that_of_the_unsplit_eager_model():
    batches = [make_micro_batch("t2v", torch.bfloat16, seed=1)]
    _, expected = run_unsplit(make_wan("t2v", torch.bfloat16, num_layers=2), batches)
    model = make_wan("t2v", torch.bfloat16, num_layers=2)
    Pipeline(model, ["cpu"], residency="selective", compile=True).step(batches, square_loss)
    found = gradients(model)
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        cosine = torch.cosine_similarity(gradient.double().flatten(), expected[name].double().flatten(), 0)
        assert cosine >= 0.9999, name


@pytest.mark.parametrize(
    ("kind", "exact", "from_cpp", "rounds", "marks"),
    [
        (torch.bfloat16, True, False, True, RecomputedCasts),
        (torch.bfloat16, True, True, True, NoneType),
        (torch.bfloat16, False, False, False, NoneType),
        (torch.float8_e4m3fn, True, False, False, RecomputedWeights),
        (torch.int8, False, True, False, RecomputedWeights),
    ],
)
def test_where_weights_are_whole_it_is_rounded_and_summed_where_the_block_itself_does(
    monkeypatch, kind, exact, from_cpp, rounds, marks
):
    found = []

    def backend(graph, inputs, **options):
        found.append(options.get("config_patches", {}))
        return graph

    monkeypatch.setattr(compiling, "BACKEND", backend)
    weight, mask = torch.ones(4, 4).to(kind), torch.ones(4, dtype=torch.bool)
    graph = torch.fx.symbolic_trace(nn.LayerNorm(4))
    before = [node.target for node in graph.graph.nodes]
    compiling._backend(from_cpp, exact)(graph, [weight, mask, 4])
    (patches,) = found
    sums = marks is RecomputedCasts
    assert type(patches.get("joint_custom_post_pass")) is marks
    assert ([node.target for node in graph.graph.nodes] != before) is sums
    names = ("emulate_precision_casts", "realize_opcount_threshold", "joint_custom_post_pass")
    assert [name in patches for name in names] == [rounds, rounds, marks is not NoneType]
    assert all(hasattr(torch._inductor.config, name) for name in names), "torch knows them"


@pytest.mark.slow
def test_blocks_that_are_launched_from_cpp_equal_the_unsplit_eager_model(monkeypatch, tmp_path):
    written = []
    generate = CppWrapperCpu.generate
    monkeypatch.setattr(CppWrapperCpu, "generate", lambda *args: written.append(1) or generate(*args))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))  # else an earlier run may have compiled it
    batches = [make_micro_batch("t2v", torch.float32, seed) for seed in (1, 2)]
    losses, expected = run_unsplit(make_wan("t2v", torch.float32), batches)
    model = make_wan("t2v", torch.float32)
    pipeline = Pipeline(model, ["cpu", "cpu"], residency="recompute", compile=True, cpp_wrapper=True)
    result = pipeline.step(batches, square_loss)
    torch.testing.assert_close(list(result.losses), losses, rtol=1e-5, atol=0)
    assert_close(gradients(model), expected, 1e-4)
    assert pipeline.split.compiler is not None and not pipeline.split.compiler.failed
    assert len(written) >= 2, "a forward and a backward"


def test_without_a_cpp_compiler_or_compilation_nothing_is_split(monkeypatch):
    def search(names: object) -> str:
        raise InvalidCxxCompiler("no-such-compiler")

    monkeypatch.setattr(cpp_builder, "cpp_compiler_search", search)
    model = make_wan("t2v", torch.float32)
    with pytest.raises(ValueError, match=r"needs a C\+\+ compiler: .*no-such-compiler"):
        split(model, ["cpu", "cpu"], compile=True, cpp_wrapper=True)
    with pytest.raises(ValueError, match="cpp_wrapper: what is not compiled"):
        split(model, ["cpu", "cpu"], cpp_wrapper=True)
    split(model, ["cpu", "cpu"], compile=True)
    assert not may_launch_from_cpp()


@pytest.mark.parametrize(("system", "may"), [("linux", True), ("win32", False)])
def test_blocks_are_launched_from_cpp_unasked_only_on_linux(monkeypatch, system, may):
    monkeypatch.setattr("tworeel.engine.compiling.require_cpp_compiler", lambda: None)
    monkeypatch.setattr("sys.platform", system)
    assert may_launch_from_cpp() is may


class Block(nn.Module):
    """Takes part in a pipeline of any number of them."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x).relu()


def call(compiler: BlockCompiler, block: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Run a block as `run_block` does."""
    return compiler(plain_call(type(block)), block, x)


def told(caplog: pytest.LogCaptureFixture) -> list[str]:
    """The warnings that are ours: torch has some of its own."""
    return [record.getMessage() for record in caplog.records if record.name == compiling.__name__]


def test_blocks_of_a_kind_share_one_compilation(monkeypatch):
    made = []
    monkeypatch.setattr(torch, "compile", lambda call, **_: made.append(call) or call)
    compiler, x = BlockCompiler(), torch.ones(2, 4)
    for block in (Block(), Block(), Block()):
        call(compiler, block, x)
    assert len(made) == 1


def test_a_compiler_that_is_given_up_leaves_nothing_behind(monkeypatch):
    monkeypatch.setattr(compiling, "BACKEND", "eager")
    compiler = BlockCompiler()
    call(compiler, Block(), torch.ones(2, 4))
    gone = weakref.ref(compiler)
    del compiler
    gc.collect()
    assert gone() is None


def test_where_the_cpp_wrapper_fails_blocks_stay_compiled(monkeypatch, caplog):
    def compile_graph(graph: torch.fx.GraphModule, inputs: object, config_patches: object) -> object:
        if "cpp_wrapper" in config_patches:
            raise RuntimeError("no header files")
        return graph.forward

    monkeypatch.setattr(compiling, "lookup_backend", lambda name: compile_graph)
    compiler, block, x = BlockCompiler(cpp_wrapper=True), Block(), torch.ones(2, 4)
    torch.testing.assert_close(call(compiler, block, x), block(x))
    call(compiler, Block(), x)
    assert not compiler.failed
    assert told(caplog) == ["Block runs without Inductor's C++ wrapper, which failed: no header files"]


@pytest.mark.parametrize("inner", [torch.OutOfMemoryError, RuntimeError])
@pytest.mark.parametrize("cpp_wrapper", [False, True])
def test_running_out_of_memory_while_kernels_are_tuned_is_told_as_such_and_holds_nothing(
    monkeypatch, inner, cpp_wrapper
):
    """So that who looks for what fits goes on with less."""
    held = []

    def compile_graph(graph: torch.fx.GraphModule, inputs: object, **options: object) -> object:
        try:
            tensor = torch.ones(2)
            held.append(weakref.ref(tensor))
            raise inner("no room")
        except RuntimeError as error:
            text = "Failed to run autotuning code block: CUDA out of memory. Tried to allocate 2 GiB"
            raise inner(text) from error

    monkeypatch.setattr(compiling, "lookup_backend", lambda name: compile_graph)
    compiler = BlockCompiler(cpp_wrapper=cpp_wrapper)
    with pytest.raises(torch.OutOfMemoryError, match="out of memory") as caught:
        call(compiler, Block(), torch.ones(2, 4))
    assert caught.value.__context__ is None and held[0]() is None
    assert not compiler.failed


def test_the_backward_is_compiled_before_the_forward_runs(monkeypatch):
    done = []

    def noting(name: str) -> object:
        def compile_graph(graph: torch.fx.GraphModule, inputs: object) -> object:
            done.append(name)
            return make_boxed_func(lambda *tensors: done.append("runs") or graph(*tensors))

        return compile_graph

    backend = aot_autograd(fw_compiler=noting("forward"), bw_compiler=noting("backward"))
    monkeypatch.setattr(compiling, "BACKEND", backend)
    call(BlockCompiler(), Block(), torch.ones(2, 4, requires_grad=True))
    assert done == ["forward", "backward", "runs"]


def test_every_thread_compiles_as_often_as_it_takes(monkeypatch):
    """Threads do not see each other's settings of torch."""
    compiled: list[torch.fx.GraphModule] = []
    monkeypatch.setattr(compiling, "BACKEND", lambda graph, *_, **__: compiled.append(graph) or graph)
    compiler, block, sizes = BlockCompiler(), Block(), range(2, 16)

    def run() -> None:
        with torch._dynamo.config.patch(automatic_dynamic_shapes=False):
            for size in sizes:
                call(compiler, block, torch.ones(size, 4))

    with ThreadPoolExecutor(1) as other:
        other.submit(run).result()
    assert len(compiled) == len(sizes) and not compiler.failed


def test_blocks_run_side_by_side_but_one_thread_at_a_time_looks_for_its_compilation(monkeypatch):
    """The first thread's block runs until the second one's does: neither waits for the other's end."""
    both = threading.Barrier(2, timeout=60)
    searches = []

    def meeting(graph, inputs, **options):
        def run(*args):
            searches.append(compiling._searching._lock.locked())
            if len(searches) > 1:  # the first call compiles, alone
                both.wait()
            return graph(*args)

        return run

    monkeypatch.setattr(compiling, "BACKEND", meeting)
    compiler, block, x = BlockCompiler(), Block(), torch.ones(2, 4)
    call(compiler, block, x)
    threads = [threading.Thread(target=call, args=(compiler, block, x)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not both.broken and len(searches) == 3
    assert not searches[0] and not compiling._searching._lock.locked()


def test_an_error_in_a_block_leaves_the_way_free_for_others(monkeypatch):
    monkeypatch.setattr(compiling, "BACKEND", "eager")
    compiler = BlockCompiler()
    with pytest.raises(RuntimeError):
        call(compiler, Block(), torch.ones(2, 5))
    assert not compiling._searching._lock.locked()


def test_a_failure_is_told_once_and_the_blocks_run_as_they_are(monkeypatch, caplog):
    def broken(graph, inputs, **options):
        raise RuntimeError("no compiler on this machine")

    monkeypatch.setattr(compiling, "BACKEND", broken)
    compiler, block, x = BlockCompiler(), Block(), torch.ones(2, 4)
    assert torch.equal(call(compiler, block, x), block(x))
    call(compiler, block, x)
    assert told(caplog) == ["Block runs without torch.compile, which failed: no compiler on this machine"]


def test_each_kind_of_block_that_fails_is_told(monkeypatch, caplog):
    monkeypatch.setattr(compiling, "BACKEND", lambda *_, **__: 1 / 0)
    compiler, x = BlockCompiler(), torch.ones(2, 4)
    for block in (Block(), Other(), Block()):
        call(compiler, block, x)
    assert [line.split()[0] for line in told(caplog)] == ["Block", "Other"]


class Other(Block):
    """Of another kind."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) + 1


class Wary(Block):
    """Runs only while no thread holds the search; cannot be compiled as a whole."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        torch._dynamo.graph_break()
        assert not compiling._searching._lock.locked()
        return super().forward(x)


def test_what_torch_would_compile_in_parts_runs_as_it_is_after_a_warning(monkeypatch, caplog):
    monkeypatch.setattr(compiling, "BACKEND", "eager")
    compiler, block, x = BlockCompiler(), Wary(), torch.ones(2, 4)
    for _ in range(2):
        assert torch.equal(call(compiler, block, x), block(x))
    assert len(compiler.failed) == 1
    assert told(caplog) == [
        "Wary runs without torch.compile, which failed: Call to `torch._dynamo.graph_break()`"
    ]


def test_past_torchs_limit_of_compilations_a_block_runs_as_it_is_after_a_warning(monkeypatch, caplog):
    monkeypatch.setattr(compiling, "BACKEND", "eager")
    monkeypatch.setattr(compiling, "MOST_COMPILATIONS", 2)
    compiler, block = BlockCompiler(), Block()
    with torch._dynamo.config.patch(automatic_dynamic_shapes=False, recompile_limit=2):
        for size in range(2, 6):
            x = torch.ones(size, 4)
            assert torch.equal(call(compiler, block, x), block(x))
            assert len(compiler.failed) == (size > 3) and not compiling._searching._lock.locked()
    assert told(caplog) == ["Block runs without torch.compile, which failed: Dynamo recompile limit exceeded"]


def test_code_of_others_keeps_autograds_cache(monkeypatch):
    found = []

    def backend(graph, inputs, **options):
        found.append(functorch_config.enable_autograd_cache)
        return graph

    monkeypatch.setattr(compiling, "BACKEND", backend)
    with functorch_config.patch(enable_autograd_cache=True):
        call(BlockCompiler(), Block(), torch.ones(2, 4))
        assert functorch_config.enable_autograd_cache
    assert found == [False]


@pytest.mark.parametrize("asked", [False, True])
def test_where_bits_have_to_repeat_no_timing_decides_about_a_kernel(monkeypatch, asked):
    found = []

    def backend(graph, inputs, **options):
        found.append(options)
        return graph

    monkeypatch.setattr(compiling, "BACKEND", backend)
    torch.use_deterministic_algorithms(asked)
    try:
        call(BlockCompiler(), Block(), torch.ones(2, 4))
    finally:
        torch.use_deterministic_algorithms(False)
    assert [options["config_patches"].get("deterministic", False) for options in found] == [asked]
    assert isinstance(torch._inductor.config.deterministic, bool)  # torch knows it


def test_where_the_cpp_wrapper_fails_all_threads_go_on_from_python(monkeypatch, caplog):
    from_python, threads = [], []

    def backend(graph, inputs, config_patches):
        if "cpp_wrapper" not in config_patches:
            from_python.append(graph)
            return graph
        if not threads:  # the other device's thread comes while this one tries
            threads.append(threading.Thread(target=call, args=(compiler, block, x)))
            threads[0].start()
            time.sleep(0.2)
        raise RuntimeError("no such operation")

    monkeypatch.setattr(compiling, "BACKEND", backend)
    monkeypatch.setattr(compiling, "require_cpp_compiler", lambda: None)
    compiler, block, x = BlockCompiler(cpp_wrapper=True), Block(), torch.ones(2, 4)
    assert torch.equal(call(compiler, block, x), block(x))
    threads[0].join()
    assert not compiler.failed and from_python and len(told(caplog)) == 1


def test_a_mistake_in_the_block_is_told_by_its_own_error():
    with pytest.raises(RuntimeError, match="mat1 and mat2 shapes"):
        call(BlockCompiler(), Block(), torch.ones(2, 5))


class Uncompilable(Block):
    """Uses an operation that has no fake kernel."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return twice(self.linear(x))


@torch.library.custom_op("tworeel_tests::twice", mutates_args=())
def twice(x: torch.Tensor) -> torch.Tensor:
    """2 x, unknown to the compiler."""
    return x * 2


twice.register_autograd(lambda _, gradient: gradient * 2)


@pytest.mark.slow
@pytest.mark.parametrize("residency", ["keep", "recompute", "selective"])
def test_what_is_compiled_stays_so_when_another_kind_of_block_is_not(residency):
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.ModuleList(Block() for _ in range(2))
            self.second = nn.ModuleList(Uncompilable() for _ in range(2))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for block in (*self.first, *self.second):
                x = block(x)
            return x

    torch.manual_seed(0)
    model, batches = Model(), [torch.randn(2, 4) for _ in range(3)]
    for batch in batches:
        model(batch).square().sum().backward()
    expected = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    pipeline = Pipeline(model, ["cpu", "cpu"], residency=residency, compile=True)
    pipeline.step(batches, lambda output, _: output.square().sum())
    torch.testing.assert_close([p.grad for p in model.parameters()], expected)
    assert pipeline.split.compiler is not None and len(pipeline.split.compiler.failed) == 1
