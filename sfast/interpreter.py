"""A graph as a function: TorchScript's interpreter runs it as it stands, operator by operator, without gradients.

No profiling runs, no re-optimization at a new shape, no freezing: a captured graph has no use for a fast interpreter. What
an operator raises comes out as what it was, although TorchScript makes one kind of error of everything.
"""

from __future__ import annotations

import contextlib
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch

from sfast.fallback import keeping_exceptions
from sfast.writes import blocks_of

tracing_lock = threading.RLock()  # the tracer's state and the patches below belong to the whole process


def interpret(function: Callable[..., Any], inputs: list[torch.Tensor]) -> list[torch.Tensor]:
    """The flat results of a graph's function."""
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


def callable_of(graph: Any) -> Callable[..., Any]:
    """The function of a graph, which is its own from now on."""
    if len(list(graph.outputs())) > 1:
        graph.makeMultiOutputIntoTuple()
    function: Callable[..., Any] = torch._C._create_function_from_graph("forward", graph)
    return function


def drop_sources(graph: Any) -> None:
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


@contextlib.contextmanager
def _plain_interpreter() -> Iterator[None]:
    """Run the graph as it stands: no profiling runs, no re-optimization at a new shape."""
    before = torch._C._get_graph_executor_optimize()
    torch._C._set_graph_executor_optimize(False)
    try:
        yield
    finally:
        torch._C._set_graph_executor_optimize(before)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence the tracer's warnings and TorchScript's deprecation, here and nowhere else."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", torch.jit.TracerWarning)
        warnings.filterwarnings("ignore", message=".*torch.jit.*")
        warnings.filterwarnings("ignore", message=".*TorchScript.*")
        yield
