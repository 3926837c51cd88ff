"""A module's call as one flat graph of tensor operators, for every shape, without a copy of any weight.

`torch.jit.trace` scripts each submodule first, bakes weights in, and loses or stumbles over some Python. Here a plain
function over flat tensors is traced: the weights are *inputs* of the graph beside the activations, so an edited, moved or
replaced weight needs no new trace, and the graph holds no memory of its own. Only this file, `normalize.py`
and `rewrite.py` call TorchScript; `merge.py` and `hoist.py` edit the graphs that they are handed.
"""

from __future__ import annotations

import builtins
import contextlib
import dataclasses
import math
import threading
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Hashable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch._ops import HigherOrderOperator
from torch.overrides import TorchFunctionMode

from sfast import hoist, rewrite
from sfast.containers import Changes, Contents
from sfast.decisions import DecidesByValue, Guard, Untraceable, depends_on_values, question, read_by_python
from sfast.fallback import keeping_exceptions
from sfast.merge import NAME, Pack, merge_linears
from sfast.structure import flatten, unflatten
from sfast.writes import written_values

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
    served: set[Hashable] = dataclasses.field(default_factory=set)  # kinds of sizes that it was right for
    hoisted: Split | None = None  # the two parts that have proved right, to begin with at the next shape
    guard: Guard | None = None  # computes by what values Python took its way through the module

    def run(self, weights: list[torch.Tensor], tensors: list[torch.Tensor]) -> list[torch.Tensor]:
        """The flat output tensors, computed operator by operator on the current stream, without gradients."""
        return self._finish(_interpret(self.function, [*[weights[i] for i in self.used_weights], *tensors]))

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
    device_type = inputs[0].device.type if inputs else "cpu"
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
) -> Trace:
    """Trace `forward` at one call and fuse its graph.

    Args:
        forward: the module's eager forward.
        weights: every tensor that the module owns and may read; no two the same object.
        call, tensors: the call's (args, kwargs), as `structure.flatten` takes them apart.
        fusions: what to fuse, in order; without any the graph stays as it was traced.
        merge: whether to merge linear layers that read the same tensor.

    Raises:
        Untraceable: the module calls an operator that takes Python functions of elements.
        DecidesByValue: it reads a value in Python that is random, or that it has computed itself.
        ChangesContainers: what it does to its arguments cannot be repeated.
        Anything that `forward` raises under tracing, and structure.UnsupportedStructure if the result is not made of
        tensors, plain values and containers of them.
    """
    output: list[Hashable] = []
    changes: list[Changes] = []
    contiguous: list[bool] = []

    def flat(*flat_inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        args, kwargs = unflatten(call, list(flat_inputs[len(weights) :]))
        results: list[torch.Tensor] = []
        before = Contents((args, kwargs))
        output.append(flatten(forward(*args, **kwargs), results))
        if not results:
            raise ValueError("the module returns no tensor")
        changes.append(before.changes(results))
        results += repairs.asked
        contiguous.extend(result.is_contiguous() for result in results)
        # A result that is an input or a weight itself gets a value of its own in the graph.
        return tuple([result.view_as(result) for result in results])

    repairs = _Repairs()
    with _tracing_lock, torch.no_grad(), _quiet(), _no_autocast_cache():
        with repairs:
            graph, _ = torch._C._create_graph_by_tracing(flat, (*weights, *tensors), lambda _: "", True, False)
        guard = _part_guard(graph, repairs, len(weights)) if repairs.asked else None
        fired = rewrite.rewrite(graph, fusions)
        packs = merge_linears(graph, weights) if merge else []
        fired.update({NAME: len(packs)} if packs else {})
        used = rewrite.drop_unused_inputs(graph, len(weights))
        function = _callable(graph.copy())
    del contiguous[len(contiguous) - len(repairs.asked) :]
    return Trace(graph, function, used, output[0], contiguous, fired, packs, changes[0], guard=guard)


def _part_guard(graph: Any, repairs: _Repairs, count: int) -> Guard:
    """Take the last results of a graph, which are what Python asked for, out of it into a function of their own."""
    torch._C._jit_pass_inline(graph)
    torch._C._jit_pass_lower_all_tuples(graph)
    asked = graph.copy()
    own = len(list(graph.outputs())) - len(repairs.asked)
    for place in reversed(range(own)):
        asked.eraseOutput(place)
    for _ in repairs.asked:
        graph.eraseOutput(own)
    _keep_only_results(asked)
    torch._C._jit_pass_erase_shape_information(asked)
    torch._C._jit_pass_cse(asked)
    asked = torch._C._jit_pass_canonicalize(asked)
    text = str(asked)
    read = [i for i, value in enumerate(asked.inputs()) if value.uses()]
    weights = rewrite.drop_unused_inputs(asked, count)
    function = _callable(asked)

    def compute(own: list[torch.Tensor], tensors: list[torch.Tensor]) -> list[torch.Tensor]:
        return _interpret(function, [*[own[i] for i in weights], *tensors])

    numbers = any(tensor.is_floating_point() for tensor in repairs.asked)
    return Guard(compute, weights, [i - count for i in read if i >= count], text, repairs.where, numbers)


def _keep_only_results(graph: Any) -> None:
    """Remove what the results do not need, also where it writes to tensors that they have no part in."""
    torch._C._jit_pass_dce(graph)
    needed: set[int] = set()
    pending = list(graph.outputs())
    while pending:
        value = pending.pop()
        if value.unique() not in needed:
            needed.add(value.unique())
            pending += value.node().inputs()
    if needed.isdisjoint(written_values(graph)):
        for node in reversed(list(graph.nodes())):
            if needed.isdisjoint([value.unique() for value in node.outputs()]):
                node.destroy()


class _Repairs(TorchFunctionMode):
    """Mends what a plain trace loses, and watches what it bakes in.

    - `tensor.data` stays an alias that the trace knows, so writes through it are kept.
    - `round()`, `math.trunc()`, `math.floor()` and `math.ceil()` of a size work.
    - `len()` of a tensor is a size, too, where Python itself would make a number of it: that of a prompt, say.
    - `repeat_interleave` by a size stays a shape operation: by a tensor it would be an index on the tensor's device.
    - True and False as numbers to fill with or compare to are 1 and 0: TorchScript knows no operators for them.
    - A module without hooks calls its forward at once: for every operator the tracer looks at all Python frames below it,
      which takes as long as everything else about tracing, and most of these frames are `Module.__call__`'s.
    - A size that becomes a Python number is a decision for this shape; other shapes are compared with eager.
    - A tensor's *value* that becomes a Python number is asked for again before every later call: see `decisions.py`.
    """

    def __init__(self) -> None:
        super().__init__()
        self._data = torch.Tensor.data.__get__
        self._call = torch.nn.Module.__call__
        self._len = builtins.len
        self._harmless: set[tuple[int, bool]] = set()  # what `depends_on_values` has been through already
        self.asked: list[torch.Tensor] = []  # the values that Python has decided by
        self.where = ""  # the model's line that did so first

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func == self._data:
            return args[0].detach()
        if isinstance(func, HigherOrderOperator) or torch._C._functorch.maybe_current_level() is not None:
            raise Untraceable(f"it calls Python functions of elements (flex_attention, vmap): {_where()}")
        if func in (torch.repeat_interleave, torch.Tensor.repeat_interleave) and _is_size(*args[1:2], **(kwargs or {})):
            return _repeat_each(*args, **(kwargs or {}))
        if func in _TAKE_A_NUMBER or (func is torch.full and "dtype" in (kwargs or {})):
            args = tuple([int(arg) if isinstance(arg, bool) else arg for arg in args])
            names = ("value", "fill_value", "other")
            kwargs = {k: int(v) if k in names and isinstance(v, bool) else v for k, v in (kwargs or {}).items()}
        if read := read_by_python(func, args):
            why = [depends_on_values(torch._C._get_value_trace(tensor), self._harmless) for tensor in read]
            if any(why):
                reason = next(filter(None, why))
                raise DecidesByValue(f"it decides in Python by the value of a tensor, {reason}: {_where()}")
            if "" in why:
                self.asked += question(func, args, kwargs or {}, read)
                self.where = self.where or _where()
        return func(*args, **(kwargs or {}))

    def __enter__(self) -> _Repairs:
        for name, method in _ROUNDING.items():
            setattr(torch.Tensor, name, method)
        torch.nn.Module.__call__ = _shorter(self._call, threading.get_ident())
        builtins.len = _first_size(self._len, threading.get_ident())
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        for name in _ROUNDING:
            delattr(torch.Tensor, name)
        torch.nn.Module.__call__ = self._call
        builtins.len = self._len
        super().__exit__(*error)


_ROUNDING: dict[str, Callable[..., Any]] = {
    "__round__": lambda tensor, digits=None: round(tensor.item(), digits),
    "__trunc__": lambda tensor: math.trunc(tensor.item()),
    "__floor__": lambda tensor: math.floor(tensor.item()),
    "__ceil__": lambda tensor: math.ceil(tensor.item()),
}
_HOOKS = ("_backward_hooks", "_backward_pre_hooks", "_forward_hooks", "_forward_pre_hooks", "_compiled_call_impl")
_GLOBAL_HOOKS = [
    hooks
    for name, hooks in vars(torch.nn.modules.module).items()
    if name.startswith("_global_") and name.endswith("_hooks")
]


def _first_size(length: Callable[[Any], int], thread: int) -> Callable[[Any], Any]:
    """`len` for one thread, where the tracer has to see it."""

    def first_size(value: Any) -> Any:
        if isinstance(value, torch.Tensor) and threading.get_ident() == thread and value.dim():
            return value.size(0)
        return length(value)

    return first_size


def _shorter(call: Callable[..., Any], thread: int) -> Callable[..., Any]:
    """`Module.__call__` with fewer frames, for one thread and for modules where it would do nothing but call `forward`."""

    def call_forward(module: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        if threading.get_ident() == thread and not any(map(module.__dict__.get, _HOOKS)) and not any(_GLOBAL_HOOKS):
            return module.forward(*args, **kwargs)
        return call(module, *args, **kwargs)

    return call_forward if call is torch.nn.Module._wrapped_call_impl else call


def _is_size(repeats: Any = None, **_: Any) -> bool:
    return isinstance(repeats, torch.Tensor) and repeats.dim() == 0


def _repeat_each(
    x: torch.Tensor, repeats: torch.Tensor, dim: int | None = None, output_size: Any = None
) -> torch.Tensor:
    """`x.repeat_interleave(repeats, dim)` for one number of repeats, out of views and one copy."""
    x, dim = (x.flatten(), 0) if dim is None else (x, dim % x.dim())
    before, after = x.shape[:dim], x.shape[dim + 1 :]
    wide = x.unsqueeze(dim + 1).expand(*before, x.shape[dim], repeats, *after)
    return wide.reshape(*before, x.shape[dim] * repeats, *after)


# The dtype of their results does not depend on their number's.
_TAKE_A_NUMBER = frozenset(
    (
        *(torch.full_like, torch.masked_fill, torch.index_fill, torch.scatter, torch.eq, torch.ne),
        *(torch.Tensor.new_full, torch.Tensor.fill_, torch.Tensor.masked_fill, torch.Tensor.masked_fill_),
        *(torch.Tensor.index_fill, torch.Tensor.index_fill_, torch.Tensor.scatter, torch.Tensor.scatter_),
        *(torch.Tensor.eq, torch.Tensor.ne, torch.Tensor.__eq__, torch.Tensor.__ne__),
    )
)


def _where() -> str:
    """The model's own source line, for a message."""
    for frame in reversed(traceback.extract_stack()):
        if "/torch/" not in frame.filename.replace("\\", "/") and frame.filename != __file__:
            return f"{Path(frame.filename).name}:{frame.lineno}: {frame.line}"
    return "somewhere in its forward"


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
