"""What Python asked of tensors and sizes while a call was traced, as small functions cut out of its graph.

The questions are results of the traced graph beside the module's own (`reads.py`); here the part of the graph that computes
them becomes a function that is asked before later calls (`decisions.py`).
"""

from __future__ import annotations

from typing import Any

import torch

from sfast import rewrite
from sfast.decisions import Function, Guard, Sizes
from sfast.interpreter import callable_of, drop_sources, interpret, quiet, tracing_lock
from sfast.reads import Reads
from sfast.writes import outputs_of, read_by, written_values

FEW = 512  # values that tell what sizes decide; they take about as many calls of PyTorch at each new shape


def guard_of(graph: Any, places: range, reads: Reads, count: int) -> Guard:
    """What Python asked for of the values of tensors, as a function of their own.

    Args:
        graph: as it was traced; its first `count` inputs are weights.
        places: of the questions among its results.
    """
    asked = _simplified(_only(graph, places))
    drop_sources(asked)
    text = str(asked)
    _to_device(asked, "cpu")
    function, weights, tensors = _function_of_few(asked, count)
    numbers = any(value.is_floating_point() for value in reads.values)
    return Guard(function, weights, tensors, text, reads.where, numbers)


def sizes_of(graph: Any, places: range, reads: Reads, count: int, checked: bool) -> Sizes:
    """What Python asked for of sizes, as a function of tensors without memory: nothing is computed but sizes."""
    answers = [size.tolist() for size in reads.sizes]
    if checked and not _takes_few(graph, places):
        return Sizes(answers, None)
    asked = _only(graph, places, of_sizes=True)
    torch._C._jit_pass_constant_pooling(asked)
    drop_sources(asked)

    def make() -> Function:
        with tracing_lock, quiet():
            simplified = _simplified(asked)
            _to_device(simplified, "meta")
            _without_backends(simplified)
            return _function_of_few(simplified, count)

    return Sizes(answers, make)


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
    function = callable_of(graph)

    def compute(own: list[torch.Tensor], tensors: list[torch.Tensor]) -> list[torch.Tensor]:
        return interpret(function, [*[own[i] for i in weights], *tensors])

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
