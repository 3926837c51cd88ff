"""A module's call as one flat graph of tensor operators, for every shape, without a copy of any weight.

`torch.jit.trace` scripts each submodule first, bakes weights in, and loses or stumbles over some Python. Here a plain
function over flat tensors is traced: the weights are *inputs* of the graph beside the activations, so an edited, moved or
replaced weight needs no new trace, and the graph holds no memory of its own. Only this file, `normalize.py`
and `rewrite.py` call TorchScript; `merge.py` and `hoist.py` edit the graphs that they are handed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import threading
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Hashable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from sfast import hoist, rewrite
from sfast.containers import Changes, Contents
from sfast.fallback import keeping_exceptions
from sfast.merge import NAME, Pack, merge_linears
from sfast.structure import flatten, unflatten

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
    changes: Changes = ()  # what the call takes out of its arguments' containers
    hoisted: Split | None = None  # the two parts that have proved right, to begin with at the next shape

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
        DecidesByValue: the module reads a tensor's value in Python.
        ChangesContainers: it puts something into a container among its arguments.
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
        changes.append(before.changes())
        if not results:
            raise ValueError("the module returns no tensor")
        contiguous.extend(result.is_contiguous() for result in results)
        # A result that is an input or a weight itself gets a value of its own in the graph.
        return tuple([result.view_as(result) for result in results])

    with _tracing_lock, torch.no_grad(), _quiet(), _no_autocast_cache():
        with _Repairs():
            graph, _ = torch._C._create_graph_by_tracing(flat, (*weights, *tensors), lambda _: "", True, False)
        fired = rewrite.rewrite(graph, fusions)
        packs = merge_linears(graph, weights) if merge else []
        fired.update({NAME: len(packs)} if packs else {})
        used = rewrite.drop_unused_inputs(graph, len(weights))
        function = _callable(graph.copy())
    return Trace(graph, function, used, output[0], contiguous, fired, packs, changes[0])


class DecidesByValue(RuntimeError):
    """The module takes a Python decision from the values of a tensor, which no trace can repeat."""


class _Repairs(TorchFunctionMode):
    """Mends what a plain trace loses, and watches what it bakes in.

    - `tensor.data` stays an alias that the trace knows, so writes through it are kept.
    - `round()` of a size works.
    - `repeat_interleave` by a size stays a shape operation: by a tensor it would be an index on the tensor's device.
    - True and False as numbers to fill with or compare to are 1 and 0: TorchScript knows no operators for them.
    - A module without hooks calls its forward at once: for every operator the tracer looks at all Python frames below it,
      which takes as long as everything else about tracing, and most of these frames are `Module.__call__`'s.
    - A size that becomes a Python number is a decision for this shape; other shapes are compared with eager.
    - A tensor's *value* that becomes a Python number refuses the trace: the next call may decide otherwise.
    """

    _CONVERSIONS = frozenset(
        (
            torch.Tensor.__bool__,
            torch.Tensor.__int__,
            torch.Tensor.__float__,
            torch.Tensor.__index__,
            torch.Tensor.__complex__,
            torch.Tensor.item,
            torch.Tensor.tolist,
            torch.Tensor.numpy,
            torch.Tensor.__array__,
            torch.Tensor.__dlpack__,
            torch.Tensor.__contains__,
            torch.Tensor.equal,
            torch.Tensor.allclose,
            torch.Tensor.is_nonzero,
            torch.equal,
            torch.allclose,
            torch.is_nonzero,
        )
    )

    def __init__(self) -> None:
        super().__init__()
        self._data = torch.Tensor.data.__get__
        self._call = torch.nn.Module.__call__
        self._harmless: set[tuple[int, bool]] = set()  # what `_depends_on_values` has been through already

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func == self._data:
            return args[0].detach()
        if func in (torch.repeat_interleave, torch.Tensor.repeat_interleave) and _is_size(*args[1:2], **(kwargs or {})):
            return _repeat_each(*args, **(kwargs or {}))
        if func in _TAKE_A_NUMBER or (func is torch.full and "dtype" in (kwargs or {})):
            args = tuple([int(arg) if isinstance(arg, bool) else arg for arg in args])
            names = ("value", "fill_value", "other")
            kwargs = {k: int(v) if k in names and isinstance(v, bool) else v for k, v in (kwargs or {}).items()}
        read = args if func in self._CONVERSIONS else _listed(*args[:1]) if func in _CONSTRUCTORS else ()
        values = [torch._C._get_value_trace(arg) for arg in read if isinstance(arg, torch.Tensor)]
        if any(_depends_on_values(value, self._harmless) for value in values):
            raise DecidesByValue(f"it decides in Python by the value of a tensor, {_where()}")
        return func(*args, **(kwargs or {}))

    def __enter__(self) -> _Repairs:
        torch.Tensor.__round__ = lambda tensor, digits=None: round(tensor.item(), digits)
        torch.nn.Module.__call__ = _shorter(self._call, threading.get_ident())
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        del torch.Tensor.__round__
        torch.nn.Module.__call__ = self._call
        super().__exit__(*error)


_HOOKS = ("_backward_hooks", "_backward_pre_hooks", "_forward_hooks", "_forward_pre_hooks", "_compiled_call_impl")
_GLOBAL_HOOKS = [
    hooks
    for name, hooks in vars(torch.nn.modules.module).items()
    if name.startswith("_global_") and name.endswith("_hooks")
]


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

_CONSTRUCTORS = frozenset((torch.tensor, torch.as_tensor))


def _listed(data: Any = None) -> list[Any]:
    """The elements of nested lists: `torch.tensor([x.sum(), 1])` reads them."""
    return [item for part in data for item in _listed(part)] if isinstance(data, (list, tuple)) else [data]


_SHAPE_READERS = frozenset(("aten::size", "aten::sym_size", "aten::numel", "aten::dim"))
_SIZED_BY_VALUE = frozenset(
    f"aten::{name}"
    for name in (
        *("nonzero", "nonzero_numpy", "argwhere", "masked_select", "bincount", "repeat_interleave", "arange"),
        *("unique", "unique_dim", "_unique", "_unique2", "unique_consecutive"),
    )
)


def _depends_on_values(value: Any, harmless: set[tuple[int, bool]]) -> bool:
    """Whether a traced value is computed from the contents of an input or from random numbers, and not from sizes alone.

    Values that are not are remembered in `harmless`, so that all questions about a graph go through it once.
    """
    seen: set[tuple[int, bool]] = set()
    pending = [(value, False)]
    while pending:
        value, for_size = pending.pop()
        key = (value.unique(), for_size)
        if key in seen or key in harmless:
            continue
        seen.add(key)
        node = value.node()
        kind = node.kind()
        if kind == "prim::Constant":
            continue
        if not for_size and (kind == "prim::Param" or (node.isNondeterministic() and kind != "aten::dropout")):
            return True
        for_size = kind in _SHAPE_READERS or (for_size and not _is_sized_by_value(node))
        # Not `node.inputs()`: the end of such an iterator is a C++ exception, and costs more than all the rest here.
        pending += [(node.inputsAt(i), for_size) for i in range(node.inputsSize())]
    harmless |= seen
    return False


def _is_sized_by_value(node: Any) -> bool:
    """Whether the size of an operator's result depends on what is in its inputs: of `nonzero`, or of `x[mask]`."""
    if node.kind() == "aten::where":
        return bool(node.inputsSize() == 1)
    if node.kind() == "aten::repeat_interleave" and str(node.inputsAt(1).type()) == "int":
        # With four inputs as many repeats of each; with two the repeats, and the size of the result.
        return bool(node.inputsSize() < 4)
    if node.kind() != "aten::index":
        return node.kind() in _SIZED_BY_VALUE
    indices = node.inputsAt(1).node()
    kinds = [value.type() for value in indices.inputs() if value.type().kind() == "TensorType"]
    return any(kind.dtype() in (torch.bool, torch.uint8) for kind in kinds)


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
