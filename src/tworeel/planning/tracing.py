"""Runs one block of each kind on tensors without data, and reads off what it holds and costs.

Nothing of a model's code is known here: its own forward runs, on fake tensors of the size of the largest
clip, with its lists of blocks cut short. What a compiled block costs is read from the graphs that torch would
compile.
"""

from __future__ import annotations

import operator
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from functorch.compile import aot_function, make_boxed_func, min_cut_rematerialization_partition
from torch import Tensor, fx, nn
from torch._inductor.decomposition import select_decomp_table
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx._lazy_graph_module import _make_graph_module, _use_lazy_graph_module
from torch.fx.node import map_arg
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten
from torch.utils.checkpoint import CheckpointPolicy

from tworeel.data.clips import Bucket
from tworeel.engine.compiling import MOST_OPERATIONS, joint_pass, rounds_as_written, takes_whole_norms
from tworeel.engine.footprints import Footprint
from tworeel.engine.keeping import ATTENTION_OPS
from tworeel.engine.lean import upstream_forwards
from tworeel.engine.norms import WholeNorms
from tworeel.engine.probing import Forward, Head, as_in_training, own_copies, shared_bytes
from tworeel.engine.recomputing import is_quantized
from tworeel.engine.residency import Residency, is_kept, run_block
from tworeel.lora.inject import inject_lora
from tworeel.models.family import Family, ModelSource
from tworeel.planning.graphs import GraphCost, GraphReader
from tworeel.planning.traces import STORED_ONLY, BlockTrace, ModelTrace, TraceSettings
from tworeel.planning.watching import Watch, fused_norms
from tworeel.planning.work import Work, work_of
from tworeel.quant import block_linears, quantize_blocks
from tworeel.quant.frozen import FrozenLinear
from tworeel.quant.matmul import assumed_mode

BLOCKS = 2
"""Of each list: the first one's input may be special."""
TORCHS_MOST_OPERATIONS = 30
"""Of a kernel, where nothing else is asked for (`torch/_inductor/config.py`, `realize_opcount_threshold`)."""


@dataclass(frozen=True)
class _Call:
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    outputs: Any


def trace_model(
    family: Family,
    source: ModelSource,
    bucket: Bucket,
    settings: TraceSettings,
    *,
    cpp_wrapper: bool = False,
) -> ModelTrace:
    """Trace a block of each list on a clip of this bucket.

    Args:
        family: of the model.
        source: the model; nothing but its configuration is used.
        bucket: frames, height and width of the clip in pixels.
        settings: how the blocks are run.
        cpp_wrapper: whether compiled ones are launched from C++.
    """
    model = _shortened(family, source, settings)
    with FakeTensorMode(allow_non_fake_inputs=True), assumed_mode(settings.mode):
        _materialize(model, family, settings.dtype)
        calls, head = _record(model, family, source, bucket, settings)
        trace = _trace_eager
        if settings.compile:
            quantized = settings.quantize is not None
            whole_norms = takes_whole_norms(
                exact=settings.exact, quantized=quantized, cpp_wrapper=cpp_wrapper
            )
            rounds = rounds_as_written(exact=settings.exact, quantized=quantized)
            most_operations = MOST_OPERATIONS if rounds else TORCHS_MOST_OPERATIONS
            trace = partial(_trace_compiled, whole_norms=whole_norms, most_operations=most_operations)
        blocks = {name: trace(_traced(model, name), call) for name, call in calls.items()}
    found = ModelTrace(blocks=blocks, inputs=max(map(_shared_bytes, calls.values())), head=head)
    if settings.quantize == "int8" and settings.mode == "fused":  # its product is traced as one of fp8
        return found.mapped(partial(_with_products, torch.float8_e4m3fn, torch.int8))
    return found


def _with_products(dtype: torch.dtype, other: torch.dtype, work: Work) -> Work:
    """The same work with products in another dtype."""
    return replace(work, products={other if k is dtype else k: v for k, v in work.products.items()})


def _shortened(family: Family, source: ModelSource, settings: TraceSettings) -> nn.Module:
    """The model on the meta device with a few blocks of each list, quantized and with its LoRA."""
    model = family.build_transformer(source.transformer)
    for name in family.block_lists:
        blocks = model.get_submodule(name)
        assert isinstance(blocks, nn.ModuleList)
        model.set_submodule(name, nn.ModuleList(list(blocks)[:BLOCKS]))
    if settings.quantize is not None and settings.quantize not in STORED_ONLY:
        linears = block_linears(model, family.block_lists)
        quantize_blocks(model, settings.quantize, linears)
    there = {name for name, _ in model.named_modules()}
    inject_lora(
        model,
        rank=settings.rank,
        alpha=settings.rank,
        targets=[name for name in settings.targets if name in there],
        dora=settings.dora,
        block_lists=family.block_lists,
    )
    return model


def _traced(model: nn.Module, name: str) -> nn.Module:
    """The block of a list that is looked at."""
    blocks = model.get_submodule(name)
    assert isinstance(blocks, nn.ModuleList)
    return blocks[-1]


def _materialize(model: nn.Module, family: Family, dtype: torch.dtype) -> None:
    """Give every parameter memory of the size that it will have; needs a fake mode."""
    keep = set(family.keep_fp32)
    for module_name, module in model.named_modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            precise = parameter.requires_grad or keep & {*module_name.split("."), name}
            kind = torch.float32 if precise and dtype != torch.float64 else dtype
            value = torch.empty(parameter.shape, dtype=kind)
            if isinstance(module, FrozenLinear):
                module.accept(name, value)
            else:
                setattr(module, name, nn.Parameter(value, requires_grad=parameter.requires_grad))


def _record(
    model: nn.Module, family: Family, source: ModelSource, bucket: Bucket, settings: TraceSettings
) -> tuple[dict[str, _Call], int]:
    """Run the model's forward.

    Returns:
        What the last block of each list was called with, and gave; bytes that the model takes behind them.
    """
    shapes = family.cached_shapes(source, bucket.frames, bucket.height, bucket.width, bucket.references)
    cached = {name: torch.empty(shape) for name, shape in shapes.items()}
    sample = family.make_sample(
        source.traits,
        cached,
        torch.empty(shapes["latents"]),
        0.5,
        dtype=settings.dtype,
        condition_on_image=settings.condition_on_image,
    )
    calls: dict[str, _Call] = {}

    def keep_call(name: str, block: nn.Module, args: Any, kwargs: Any, outputs: Any) -> None:
        calls[name] = _Call(args, kwargs, outputs)

    before, watch, head = 0, Watch(), Head()

    def begin_head(_block: nn.Module, _args: Any, outputs: Any) -> Any:
        nonlocal before
        before = watch.live - sum(leaf.nbytes for leaf in tree_leaves(outputs) if isinstance(leaf, Tensor))
        watch.peak = watch.live
        return head.begin(outputs)

    last = {name: _traced(model, name) for name in family.block_lists}
    with ExitStack() as hooks, torch.no_grad(), watch:
        for name, block in last.items():
            hook = block.register_forward_hook(partial(keep_call, name), with_kwargs=True)
            hooks.callback(hook.remove)
        hooks.callback(last[family.block_lists[-1]].register_forward_hook(begin_head).remove)
        head.end(model(**sample.inputs, return_dict=False))
    return calls, watch.peak - before


def _shared_bytes(call: _Call) -> int:
    return shared_bytes((call.args, call.kwargs), call.outputs)


def _hidden_bytes(call: _Call) -> int:
    return sum(leaf.nbytes for leaf in tree_leaves(call.outputs) if isinstance(leaf, Tensor))


def _trace_compiled(block: nn.Module, call: _Call, *, whole_norms: bool, most_operations: int) -> BlockTrace:
    """From the forward and backward graphs that `torch.compile` would be given for the block.

    Args:
        block: what is compiled.
        call: what it is called with.
        whole_norms: norms are PyTorch's own kernels, as where weights are not quantized.
        most_operations: of a kernel.
    """
    with upstream_forwards(block):
        plain, selective = _compiled_graphs(block, call, whole_norms=whole_norms)
    hidden = _hidden_bytes(call)
    num_weights = len(list(block.parameters())) + len(list(block.buffers()))

    def cost(graphs: _Graphs) -> tuple[GraphCost, GraphCost, Footprint]:
        read = partial(GraphReader, most_operations=most_operations)
        reader = read(graphs.forward, num_weights=num_weights)
        there, back = reader.cost(), read(graphs.backward, reader.returned()).cost()
        working = max(there.peak - there.end, hidden + back.peak)
        return there, back, Footprint(kept=there.end, working=working, hidden=hidden)

    there, back, kept = cost(plain)
    most = kept.kept + kept.working
    footprints = {
        Residency.KEEP: kept,
        Residency.SELECTIVE: cost(selective)[-1],
        # Outside of what is compiled: it holds, while its backward runs, what it would have kept.
        Residency.RECOMPUTE: Footprint(kept=hidden, working=most - hidden, hidden=hidden),
    }
    attentions = [node for node in plain.forward.nodes if node.target in ATTENTION_OPS]
    keeps = [node for node in attentions if is_kept(node.target, _values(node))]
    spared = sum((work_of(node.target, _values(node), node.meta["val"]) for node in keeps), Work())
    again = replace(
        there.work,
        attention=there.work.attention - spared.attention,
        kernels=there.work.kernels - spared.kernels,
    )
    return BlockTrace(
        footprints=footprints,
        forward=there.work,
        backward=back.work + _gradients(block),
        recomputed={
            Residency.KEEP: Work(),
            Residency.SELECTIVE: again,
            Residency.RECOMPUTE: there.work,
        },
        repeats_attention=len(keeps) < len(attentions),
    )


def _gradients(block: nn.Module) -> Work:
    """Each gradient is added to what there is, outside of what is traced."""
    return Work(kernels=sum(parameter.requires_grad for parameter in block.parameters()))


def _values(node: fx.Node) -> list[Any]:
    return [argument.meta["val"] if isinstance(argument, fx.Node) else argument for argument in node.args]


@dataclass
class _Graphs:
    """What one way to run a block is compiled to."""

    forward: fx.Graph
    backward: fx.Graph


def _compiled_graphs(block: nn.Module, call: _Call, *, whole_norms: bool) -> tuple[_Graphs, _Graphs]:
    """Of a block that keeps everything, and of one under a checkpoint that keeps attentions."""
    args, kwargs = as_in_training((call.args, call.kwargs), call.outputs)
    leaves, spec = tree_flatten((args, kwargs))
    places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
    state = {**dict(block.named_parameters()), **dict(block.named_buffers())}
    quantized = any(map(is_quantized, state.values()))
    found: list[_Graphs] = []

    def run(state: dict[str, Tensor], *tensors: Tensor) -> Any:
        merged = list(leaves)
        for place, tensor in zip(places, tensors, strict=True):
            merged[place] = tensor
        inner_args, inner_kwargs = tree_unflatten(merged, spec)
        with WholeNorms() if whole_norms else nullcontext():
            return torch.func.functional_call(block, state, inner_args, inner_kwargs)

    def partition(joint: fx.GraphModule, inputs: Any, **options: Any) -> Any:
        """Into forward and backward, as the compiler would: both ways from one trace."""
        divide = partial(min_cut_rematerialization_partition, compiler="inductor", **options)
        copy = _copied(joint)
        if (marks := joint_pass(quantized=quantized, whole_norms=whole_norms)) is not None:
            marks(joint.graph)
        _mark_recomputed(copy.graph)
        plain, selective = divide(joint, inputs), divide(copy, inputs)
        found.extend(_Graphs(forward.graph, backward.graph) for forward, backward in (plain, selective))
        return plain

    def as_traced(module: fx.GraphModule, _inputs: Any) -> Any:
        """What it returns is known: it need not run."""
        returned = map_arg(module.graph.output_node().args[0], lambda node: node.meta["val"])
        return make_boxed_func(lambda *_: returned)

    compiled = aot_function(
        run,
        fw_compiler=as_traced,
        partition_fn=partition,
        decompositions=select_decomp_table(),
    )
    # Graphs that are only read need no Python code.
    with _use_lazy_graph_module(True):
        compiled(state, *(leaves[i] for i in places))
    plain, selective = found
    return plain, selective


def _copied(module: fx.GraphModule) -> fx.GraphModule:
    """With nodes of its own: dividing a graph changes it."""
    graph = fx.Graph()
    returned = graph.graph_copy(module.graph, {})
    graph.output(returned).meta = dict(module.graph.output_node().meta)
    return _make_graph_module(module, graph)


def _mark_recomputed(joint: fx.Graph) -> None:
    """Mark a forward's operations as `selective_call`'s checkpoint does when it is compiled.

    Args:
        joint: forward and backward of a block; what depends on the gradients that come in is the backward.
    """
    of_gradients: set[fx.Node] = set()
    for node in joint.nodes:
        if node.name.startswith("tangents") or of_gradients.intersection(node.all_input_nodes):
            of_gradients.add(node)
        elif node.op == "call_function":
            made_by = node.args[0] if node.target is operator.getitem else node
            kept = is_kept(made_by.target, _values(made_by))
            policy = CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE
            node.meta |= {"recompute": policy, "ac_graph_id": 0}


def _trace_eager(block: nn.Module, call: _Call) -> BlockTrace:
    """From a forward and a backward in each way."""
    args, kwargs = as_in_training((call.args, call.kwargs), call.outputs)
    measured = {
        residency: _run_watched(block, args, kwargs, residency)
        for residency in (Residency.KEEP, Residency.SELECTIVE, Residency.RECOMPUTE)
    }
    _, forward, backward = measured[Residency.KEEP]
    return BlockTrace(
        footprints={residency: footprint for residency, (footprint, _, _) in measured.items()},
        forward=forward,
        backward=backward + _gradients(block),
        recomputed={residency: more - backward for residency, (_, _, more) in measured.items()},
    )


def _run_watched(
    block: nn.Module, args: Any, kwargs: Any, residency: Residency
) -> tuple[Footprint, Work, Work]:
    """What the block holds, and the work of its forward and of its backward."""
    run = partial(_run_block, block, residency)
    trained = [parameter for parameter in block.parameters() if parameter.requires_grad]
    with fused_norms(block), Watch() as watch:
        inputs = [own_copies((args, kwargs))]
        watch.work = Work()
        ran = Forward(run, inputs)
        kept, forward = watch.live, watch.work
        watch.work = Work()
        ran.backward((args, kwargs), trained)
    footprint = Footprint(kept=kept, working=watch.peak - kept, hidden=ran.hidden)
    return footprint, forward, watch.work


def _run_block(block: nn.Module, residency: Residency, args: Any, kwargs: Any) -> Any:
    return run_block(block, args, kwargs, residency=residency)
