"""A module's call as one flat graph of tensor operators, for every shape, without a copy of any weight.

`torch.jit.trace` scripts each submodule first, bakes weights in, and loses or stumbles over some Python. Here a plain
function over flat tensors is traced: the weights are *inputs* of the graph beside the activations, so an edited, moved or
replaced weight needs no new trace, and the graph holds no memory of its own. Only this file, `questions.py`,
`interpreter.py`, `normalize.py` and `rewrite.py` call TorchScript; `merged_linears.py` and `hoist.py` edit the graphs that
they are handed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections import Counter
from collections.abc import Callable, Hashable, Iterator
from typing import Any

import torch

from sfast import bounds, hoist, rewrite
from sfast.containers import Changes, ChangesContainers, Contents
from sfast.decisions import Guard, Sizes, Untraceable
from sfast.fallback import is_out_of_memory, let_through
from sfast.gc_pause import gc_paused
from sfast.interpreter import callable_of, drop_sources, interpret, quiet, tracing_lock
from sfast.merged_linears import NAME, Pack, merge_linears
from sfast.overwritten import ReadFirst
from sfast.questions import guard_of, sizes_of
from sfast.reads import Reads
from sfast.recording import Recording
from sfast.runs import NAME as RUNS
from sfast.runs import share_runs
from sfast.structure import flatten, unflatten
from sfast.tracing_mode import TracingMode
from sfast.upload import mark_uploads


@dataclasses.dataclass(eq=False)
class Trace:
    """A traced call: `run(weights, tensors)` computes it, for any shapes that take the same way through the module."""

    function: Any  # TorchScript's, of the graph
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
        return self._finish(interpret(self.function, [*[weights[i] for i in self.used_weights], *tensors]))

    def fits(self, weights: list[torch.Tensor], tensors: list[torch.Tensor]) -> bool | None:
        """Whether Python goes the traced way at the shapes of a call, as far as sizes decide that; None if nobody knows."""
        return self.sizes is None or self.sizes.fit(weights, tensors)

    @functools.cached_property
    def indexes(self) -> bool:
        """Whether it takes elements by their indices, which may be out of bounds where it does not fit."""
        return any(self.function.graph.findAllNodes(name) for name in bounds.NAMES)

    def unflatten(self, outputs: list[torch.Tensor]) -> Any:
        """The result as the module returns it."""
        return unflatten(self.output, outputs)

    def split(self, stable: frozenset[int]) -> Split | None:
        """Prologue and body, for calls whose tensors at the places `stable` stay the same; None if it is not worth it."""
        if self.hoisted is not None and self.hoisted.stable == stable:
            return self.hoisted
        with tracing_lock, quiet():
            graph = self.function.graph.copy()
            torch._C._jit_pass_lower_all_tuples(graph)  # its results are one there
            graphs = hoist.split(graph, len(self.used_weights), stable, torch._C._jit_pass_dce)
            if graphs is None:
                return None
            used = [rewrite.drop_unused_inputs(graph, len(self.used_weights)) for graph in graphs]
            functions = [callable_of(graph) for graph in graphs]
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
        return interpret(self._prologue, [*[weights[i] for i in self.prologue_weights], *tensors])

    def body(
        self, weights: list[torch.Tensor], tensors: list[torch.Tensor], hoisted: list[torch.Tensor]
    ) -> list[torch.Tensor]:
        """The flat output tensors."""
        results = interpret(self._body, [*[weights[i] for i in self.body_weights], *tensors, *hoisted])
        kept = {value.untyped_storage().data_ptr() for value in hoisted}  # the caller may write to what it gets
        return [r.clone() if r.untyped_storage().data_ptr() in kept else r for r in self.whole._finish(results)]


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
    # Python may ask for the mode; who needs gradients is not here.
    grad = torch.is_grad_enabled() and not any([tensor.requires_grad for tensor in (*weights, *tensors)])
    with tracing_lock, torch.set_grad_enabled(grad), quiet(), _no_autocast_cache(), gc_paused():
        try:
            record = _record(forward, weights, call, tensors, recording, keep_sizes, checked)
        except Exception as error:
            let_through(error)
            if not keep_sizes or isinstance(error, _FINAL) or is_out_of_memory(error):
                raise
            record = _record(forward, weights, call, tensors, recording, False, checked)
        graph, reads, own = record.graph, record.reads, len(record.contiguous)
        torch._C._jit_pass_inline(graph)
        torch._C._jit_pass_lower_all_tuples(graph)
        by_values = range(own, own + len(reads.values))
        by_sizes = range(by_values.stop, by_values.stop + len(reads.sizes))
        guard = guard_of(graph, by_values, reads, len(weights)) if by_values else None
        sizes = sizes_of(graph, by_sizes, reads, len(weights), checked) if by_sizes else None
        for place in reversed((*by_values, *by_sizes)):
            graph.eraseOutput(place)
        mark_uploads(graph, len(weights))
        fired = rewrite.rewrite(graph, fusions)
        fired.update({RUNS: shared} if (shared := share_runs(graph)) else {})
        packs = merge_linears(graph, weights) if merge else []
        fired.update({NAME: len(packs)} if packs else {})
        used = rewrite.drop_unused_inputs(graph, len(weights))
        drop_sources(graph)
        function = callable_of(graph.copy())  # in one piece: between the nodes of this one is what tracing has left
    kept = record.output, record.contiguous, fired, packs, record.changes
    return Trace(function, used, *kept, guard=guard, sizes=sizes)


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
    checked: bool,
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
        if not checked and any(map(mode.is_number, results)):
            raise Untraceable("it returns numbers that are made of sizes")
        changes = before.changes(results)
        seen.append((output, [result.is_contiguous() for result in results], changes))
        results += [*reads.values, *reads.sizes]
        # A result that is an input or a weight itself gets a value of its own in the graph.
        return tuple([result.view_as(result) for result in results])

    mode = TracingMode(keep_sizes, checked)
    reads = mode.reads
    with mode, recording or contextlib.nullcontext():
        graph, _ = torch._C._create_graph_by_tracing(flat, (*weights, *tensors), lambda _: "", True, False)
    return _Record(graph, *seen[0], reads)


@contextlib.contextmanager
def _no_autocast_cache() -> Iterator[None]:
    """Autocast must cast inside the trace, not reuse a weight that was cast before it."""
    before = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(before)


def is_scripted(module: torch.nn.Module) -> bool:
    """Whether a module's forward is TorchScript already, and no Python that could be traced."""
    return isinstance(module, torch.jit.ScriptModule)


def is_tracing() -> bool:
    """Whether someone (we, or the user's own trace) is tracing right now."""
    return torch._C._get_tracing_state() is not None
