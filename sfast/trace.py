"""A module's call as one flat graph of tensor operators, for every shape, without a copy of any weight.

`torch.jit.trace` scripts each submodule first, bakes weights in, and loses or stumbles over some Python. Here a plain
function over flat tensors is traced: the weights are *inputs* of the graph beside the activations, so an edited, moved or
replaced weight needs no new trace, and the graph holds no memory of its own. Only this file, `normalize.py`
and `rewrite.py` call TorchScript; `merged_linears.py` and `hoist.py` edit the graphs that they are handed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import threading
import warnings
from collections import Counter
from collections.abc import Callable, Hashable, Iterator
from typing import Any

import torch

from sfast import hoist, rewrite
from sfast.containers import Changes, ChangesContainers, Contents
from sfast.decisions import Function, Guard, Sizes, Untraceable
from sfast.fallback import is_out_of_memory, keeping_exceptions, let_through
from sfast.merged_linears import NAME, Pack, merge_linears
from sfast.overwritten import ReadFirst
from sfast.reads import Reads
from sfast.recording import Recording
from sfast.structure import flatten, unflatten
from sfast.tracing_mode import TracingMode
from sfast.upload import mark_uploads
from sfast.writes import blocks_of, outputs_of, read_by, written_values

FEW = 512  # values that tell what sizes decide; they take about as many calls of PyTorch at each new shape

_tracing_lock = threading.RLock()  # the tracer's state and the patches below belong to the whole process


@dataclasses.dataclass(eq=False)
class Trace:
    """A traced call: `run(weights, tensors)` computes it, for any shapes that take the same way through the module."""

    graph: Any
    function: Callable[..., Any]
    used_weights: list[int]  # places in the weight list; a weight that no operator reads is not passed
    output: Hashable  # description of the result, see structure.py
    contiguous: list[bool]  # which results eager lays out without gaps, in their order: so will we
    fusions: Counter[str]
    packs: list[Pack]  # weights that should be neighbours in memory, by their places in the weight list
    changes: Changes = ()  # what the call does to its arguments' containers
    hoisted: Split | None = None  # the two parts that have proved right, to begin with at the next shape
    guard: Guard | None = None  # computes by what values Python took its way through the module
    sizes: Sizes | None = None  # and by what sizes

    def run(self, weights: list[torch.Tensor], tensors: list[torch.Tensor]) -> list[torch.Tensor]:
        """The flat output tensors, computed operator by operator on the current stream, without gradients."""
        return self._finish(_interpret(self.function, [*[weights[i] for i in self.used_weights], *tensors]))

    def fits(self, weights: list[torch.Tensor], tensors: list[torch.Tensor]) -> bool | None:
        """Whether Python goes the traced way at the shapes of a call, as far as sizes decide that; None if nobody knows."""
        return self.sizes is None or self.sizes.fit(weights, tensors)

    def unflatten(self, outputs: list[torch.Tensor]) -> Any:
        """The result as the module returns it."""
        return unflatten(self.output, outputs)

    def split(self, stable: frozenset[int]) -> Split | None:
        """Prologue and body, for calls whose tensors at the places `stable` stay the same; None if it is not worth it."""
        if self.hoisted is not None and self.hoisted.stable == stable:
            return self.hoisted
        with _tracing_lock, _quiet():
            graphs = hoist.split(self.graph, len(self.used_weights), stable, torch._C._jit_pass_dce)
            if graphs is None:
                return None
            used = [rewrite.drop_unused_inputs(graph, len(self.used_weights)) for graph in graphs]
            functions = [_callable(graph) for graph in graphs]
        places = [[self.used_weights[i] for i in part] for part in used]
        return Split(self, stable, functions[0], places[0], functions[1], places[1])

    def _finish(self, results: list[torch.Tensor]) -> list[torch.Tensor]:
        return [r.contiguous() if dense else r for r, dense in zip(results, self.contiguous, strict=True)]


@dataclasses.dataclass(eq=False)
class Split:
    """A trace in two parts: `body(weights, tensors, prologue(weights, tensors))` is what the whole computes."""

    whole: Trace
    stable: frozenset[int]  # places, among the call's tensors, of those that the prologue takes for the same
    _prologue: Callable[..., Any]
    prologue_weights: list[int]
    _body: Callable[..., Any]
    body_weights: list[int]

    def prologue(self, weights: list[torch.Tensor], tensors: list[torch.Tensor]) -> list[torch.Tensor]:
        """The hoisted values."""
        return _interpret(self._prologue, [*[weights[i] for i in self.prologue_weights], *tensors])

    def body(
        self, weights: list[torch.Tensor], tensors: list[torch.Tensor], hoisted: list[torch.Tensor]
    ) -> list[torch.Tensor]:
        """The flat output tensors."""
        results = _interpret(self._body, [*[weights[i] for i in self.body_weights], *tensors, *hoisted])
        kept = {value.untyped_storage().data_ptr() for value in hoisted}  # the caller may write to what it gets
        return [r.clone() if r.untyped_storage().data_ptr() in kept else r for r in self.whole._finish(results)]


def _interpret(function: Callable[..., Any], inputs: list[torch.Tensor]) -> list[torch.Tensor]:
    device_type = inputs[0].device.type if inputs and not inputs[0].is_meta else "cpu"
    with torch.no_grad(), torch.autocast(device_type, enabled=False), _plain_interpreter(), keeping_exceptions():
        try:
            result = function(*inputs)
        except RuntimeError as error:
            _raise_what_is_no_failure(str(error))
            raise
    return [result] if isinstance(result, torch.Tensor) else list(result)


def _raise_what_is_no_failure(text: str) -> None:
    """TorchScript makes a RuntimeError of everything: an interruption must end the call, and memory may return."""
    cause = text.rpartition("\nRuntimeError: ")[2].partition("\n")[0]
    name, _, message = cause.partition(": ")
    if name == "KeyboardInterrupt":
        raise KeyboardInterrupt from None
    if name == "SystemExit":
        raise SystemExit(int(message) if message.isdecimal() else message) from None
    if name == "OutOfMemoryError" or name.startswith("CUDA out of memory"):
        raise torch.OutOfMemoryError(message if name == "OutOfMemoryError" else cause) from None


def _callable(graph: Any) -> Callable[..., Any]:
    if len(list(graph.outputs())) > 1:
        graph.makeMultiOutputIntoTuple()
    function: Callable[..., Any] = torch._C._create_function_from_graph("forward", graph)
    return function


def trace(
    forward: Callable[..., Any],
    weights: list[torch.Tensor],
    call: Hashable,
    tensors: list[torch.Tensor],
    fusions: list[rewrite.Fusion],
    merge: bool = False,
    recording: Recording | None = None,
    keep_sizes: bool = True,
    checked: bool = False,
) -> Trace:
    """Trace `forward` at one call and fuse its graph.

    Args:
        forward: the module's eager forward.
        weights: every tensor that the module owns and may read; no two the same object.
        call, tensors: the call's (args, kwargs), as `structure.flatten` takes them apart.
        fusions: what to fuse, in order; without any the graph stays as it was traced.
        merge: whether to merge linear layers that read the same tensor.
        recording: of the numbers that stand for the values in the last of `tensors`.
        keep_sizes: whether what Python makes of sizes may stay what the graph computes.
        checked: whether each new shape is compared with eager: then nothing that would take as long as the call is kept
            for telling whether Python goes the same way there.

    Raises:
        Untraceable: the module calls an operator that takes Python functions of elements.
        DecidesByValue: it reads a value in Python that is random, or that it has computed itself.
        ChangesContainers: what it does to its arguments cannot be repeated.
        Anything that `forward` raises under tracing, and structure.UnsupportedStructure if the result is not made of
        tensors, plain values and containers of them.
    """
    with _tracing_lock, torch.no_grad(), _quiet(), _no_autocast_cache():
        try:
            record = _record(forward, weights, call, tensors, recording, keep_sizes)
        except Exception as error:
            let_through(error)
            if not keep_sizes or isinstance(error, _FINAL) or is_out_of_memory(error):
                raise
            record = _record(forward, weights, call, tensors, recording, keep_sizes=False)
        graph, reads, own = record.graph, record.reads, len(record.contiguous)
        torch._C._jit_pass_inline(graph)
        torch._C._jit_pass_lower_all_tuples(graph)
        by_values = range(own, own + len(reads.values))
        by_sizes = range(by_values.stop, by_values.stop + len(reads.sizes))
        guard = _guard(_only(graph, by_values), reads, len(weights)) if by_values else None
        sizes = _sizes(graph, by_sizes, reads, len(weights), checked) if by_sizes else None
        for place in reversed((*by_values, *by_sizes)):
            graph.eraseOutput(place)
        mark_uploads(graph, len(weights))
        fired = rewrite.rewrite(graph, fusions)
        packs = merge_linears(graph, weights) if merge else []
        fired.update({NAME: len(packs)} if packs else {})
        used = rewrite.drop_unused_inputs(graph, len(weights))
        _drop_sources(graph)
        function = _callable(graph.copy())
        graph = graph.copy()  # in one piece: between the nodes of the other one there is what tracing has left
    kept = record.output, record.contiguous, fired, packs, record.changes
    return Trace(graph, function, used, *kept, guard=guard, sizes=sizes)


def _drop_sources(graph: Any) -> None:
    """Let go of Python's stack, which each node carries as a text of its own: nobody is shown it."""
    blank = graph.create("prim::Constant", [], 1)
    for node in _all_nodes(graph):
        node.copyMetadata(blank)
    blank.destroy()


def _all_nodes(block: Any) -> Iterator[Any]:
    for node in block.nodes():
        yield node
        for inner in blocks_of(node):
            yield from _all_nodes(inner)


# What another way of tracing would not change.
_FINAL = (Untraceable, ChangesContainers, ReadFirst)


@dataclasses.dataclass(frozen=True, eq=False)
class _Record:
    """A call as it was traced: the graph's results are the module's, what Python asked of values, and of sizes."""

    graph: Any
    output: Hashable
    contiguous: list[bool]
    changes: Changes
    reads: Reads


def _record(
    forward: Callable[..., Any],
    weights: list[torch.Tensor],
    call: Hashable,
    tensors: list[torch.Tensor],
    recording: Recording | None,
    keep_sizes: bool,
) -> _Record:
    """With `keep_sizes`, what Python makes of sizes are sizes; a forward that insists on numbers may raise then."""
    seen: list[tuple[Hashable, list[bool], Changes]] = []

    def flat(*flat_inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        if recording is not None:
            recording.vector = flat_inputs[-1]
        args, kwargs = unflatten(call, list(flat_inputs[len(weights) :]), int if not keep_sizes else None)
        results: list[torch.Tensor] = []
        before = Contents((args, kwargs))
        output = flatten(forward(*args, **kwargs), results)
        if not results:
            raise ValueError("the module returns no tensor")
        changes = before.changes(results)
        seen.append((output, [result.is_contiguous() for result in results], changes))
        results += [*reads.values, *reads.sizes]
        # A result that is an input or a weight itself gets a value of its own in the graph.
        return tuple([result.view_as(result) for result in results])

    mode = TracingMode(keep_sizes)
    reads = mode.reads
    with mode, recording or contextlib.nullcontext():
        graph, _ = torch._C._create_graph_by_tracing(flat, (*weights, *tensors), lambda _: "", True, False)
    return _Record(graph, *seen[0], reads)


def _only(graph: Any, places: range, of_sizes: bool = False) -> Any:
    """A graph that computes some results of another one, and little else."""
    part = graph.copy()
    if of_sizes:
        _drop_writes(part)
    for place in reversed(range(len(list(graph.outputs())))):
        if place not in places:
            part.eraseOutput(place)
    torch._C._jit_pass_dce(part)
    torch._C._jit_pass_erase_shape_information(part)
    return part


def _drop_writes(graph: Any) -> None:
    """Remove what is written into tensors, but for single numbers: their sizes stay the same."""
    for node in list(graph.nodes()):
        kind = node.output().type() if node.outputsSize() == 1 else None
        if kind is not None and node.kind() in _WRITES and kind.kind() == "TensorType" and kind.dim():
            node.output().replaceAllUsesWith(node.inputsAt(0))
            node.destroy()


_WRITES = frozenset(
    f"aten::{name}_" for name in ("copy", "fill", "zero", "add", "sub", "mul", "div", "masked_fill", "index_put")
)


def _guard(asked: Any, reads: Reads, count: int) -> Guard:
    """What Python asked for of the values of tensors, as a function of their own."""
    asked = _simplified(asked)
    text = str(asked)
    _to_device(asked, "cpu")
    function, weights, tensors = _function_of_few(asked, count)
    numbers = any(value.is_floating_point() for value in reads.values)
    return Guard(function, weights, tensors, text, reads.where, numbers)


def _sizes(graph: Any, places: range, reads: Reads, count: int, checked: bool) -> Sizes:
    """What Python asked for of sizes, as a function of tensors without memory: nothing is computed but sizes."""
    answers = [size.tolist() for size in reads.sizes]
    if checked and not _takes_few(graph, places):
        return Sizes(answers, None)
    asked = _only(graph, places, of_sizes=True)
    torch._C._jit_pass_constant_pooling(asked)
    _drop_sources(asked)

    def make() -> Function:
        with _tracing_lock, _quiet():
            simplified = _simplified(asked)
            _to_device(simplified, "meta")
            _without_backends(simplified)
            return _function_of_few(simplified, count)

    return Sizes(answers, make)


def _takes_few(graph: Any, places: range) -> bool:
    """Whether few operators compute these results of a graph."""
    outputs = list(graph.outputs())
    seen: set[int] = set()
    pending = [outputs[place] for place in places]
    while pending and len(seen) <= FEW:
        value = pending.pop()
        if value.unique() not in seen:
            seen.add(value.unique())
            pending += read_by(value.node())
    return not pending


def _function_of_few(graph: Any, count: int) -> Function:
    """A function of the weights and tensors that a graph reads, and their places."""
    read = [i for i, value in enumerate(graph.inputs()) if value.uses()]
    weights = rewrite.drop_unused_inputs(graph, count)
    function = _callable(graph)

    def compute(own: list[torch.Tensor], tensors: list[torch.Tensor]) -> list[torch.Tensor]:
        return _interpret(function, [*[own[i] for i in weights], *tensors])

    return compute, weights, [i - count for i in read if i >= count]


def _to_device(graph: Any, device: str) -> None:
    """Let a graph make its tensors on another device; on the one without memory, single numbers stay where they are."""
    for node in graph.findAllNodes("prim::Constant"):
        kind = node.output().type().kind()
        if kind == "DeviceObjType":
            node.s_("value", device)
        elif kind == "TensorType" and (node.t("value").dim() or device != "meta"):
            node.t_("value", node.t("value").to(device))


def _without_backends(graph: Any) -> None:
    """Let convolutions not look for a backend, of which there is none for tensors without memory."""
    for node in graph.findAllNodes("aten::_convolution"):
        plain = graph.create("aten::convolution", list(node.inputs())[:9], 1)
        plain.insertBefore(node)
        plain.output().setType(node.output().type())
        node.output().replaceAllUsesWith(plain.output())
        node.destroy()


def _simplified(graph: Any) -> Any:
    """The same graph without what its results do not need, each thing computed once, in names that do not tell two apart."""
    _keep_only_results(graph)
    torch._C._jit_pass_cse(graph)
    return torch._C._jit_pass_canonicalize(graph)


def _keep_only_results(graph: Any) -> None:
    """Remove what the results do not need, also where it writes to tensors that they have no part in."""
    needed: set[int] = set()
    pending = list(graph.outputs())
    while pending:
        value = pending.pop()
        if value.unique() not in needed:
            needed.add(value.unique())
            pending += read_by(value.node())
    if needed.isdisjoint(written_values(graph)):
        for node in reversed(list(graph.nodes())):
            if needed.isdisjoint([value.unique() for value in outputs_of(node)]):
                node.destroy()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence the tracer's warnings and TorchScript's deprecation, here and nowhere else."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", torch.jit.TracerWarning)
        warnings.filterwarnings("ignore", message=".*torch.jit.*")
        warnings.filterwarnings("ignore", message=".*TorchScript.*")
        yield


@contextlib.contextmanager
def _no_autocast_cache() -> Iterator[None]:
    """Autocast must cast inside the trace, not reuse a weight that was cast before it."""
    before = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(before)


@contextlib.contextmanager
def _plain_interpreter() -> Iterator[None]:
    """Run the graph as it stands: no profiling runs, no re-optimization at a new shape."""
    before = torch._C._get_graph_executor_optimize()
    torch._C._set_graph_executor_optimize(False)
    try:
        yield
    finally:
        torch._C._set_graph_executor_optimize(before)


def is_scripted(module: torch.nn.Module) -> bool:
    """Whether a module's forward is TorchScript already, and no Python that could be traced."""
    return isinstance(module, torch.jit.ScriptModule)


def is_tracing() -> bool:
    """Whether someone (we, or the user's own trace) is tracing right now."""
    return torch._C._get_tracing_state() is not None
