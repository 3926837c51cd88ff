"""Split a graph in two: what the prompt decides, and what each step decides.

In a denoising loop the prompt does not change, and everything that depends on nothing else need not be computed again:
the keys and values of cross-attention, embeddings of text, size and class, a ControlNet's view of its image. Which
operators these are follows from data dependence alone. The prologue computes them when what it reads has changed; the
body takes them as inputs at every step. The results are the same, bit for bit, because the operators are.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sfast.writes import blocks_of, inputs_of, outputs_of, written_values

# Nothing less is worth a graph of its own.
WORTHWHILE = frozenset(
    ("aten::linear", "aten::conv1d", "aten::conv2d", "aten::conv3d", "aten::matmul", "aten::bmm", "aten::embedding")
)


def split(graph: Any, weights: int, stable: frozenset[int], clean: Callable[[Any], None]) -> tuple[Any, Any] | None:
    """Prologue and body of a graph whose inputs are `weights` weights and then the call's tensors.

    Args:
        stable: places, among the call's tensors, of those that stay the same from step to step.
        clean: removes operators that nobody reads from a graph.

    Returns:
        Two graphs with all of the inputs that `graph` has. The prologue returns the hoisted values; the body takes them as
        further inputs, in that order. None if nothing worth it depends on the stable tensors alone, or if some operator
        draws random numbers, whose order would change. What lies in memory that some operator writes to is never hoisted.
    """
    nodes = list(graph.nodes())
    if any(_draws(node) for node in nodes):
        return None
    early = _early(graph, nodes, weights, stable)
    frontier = _frontier(graph, nodes, early)
    hoisted = [node for node in nodes if node.outputsSize() and early.get(node.outputsAt(0).unique())]
    if not frontier or not any(_is_worthwhile(node) for node in hoisted):
        return None
    places = [(i, o) for i, node in enumerate(nodes) for o in range(node.outputsSize()) if _id(node, o) in frontier]
    return _prologue(graph, places), _body(graph, places, clean)


def _early(graph: Any, nodes: list[Any], weights: int, stable: frozenset[int]) -> dict[int, bool]:
    """Ids of values known before the loop → whether a stable tensor has a part in them (and not weights alone)."""
    early: dict[int, bool] = {}
    written = written_values(graph)
    for place, value in enumerate(graph.inputs()):
        if place < weights or place - weights in stable:
            early[value.unique()] = place >= weights
    for node in nodes:
        inputs = [value.unique() for value in inputs_of(node)]
        if blocks_of(node):
            continue  # a loop or branch also reads values that are not among its inputs
        if not written.isdisjoint([*inputs, *[value.unique() for value in outputs_of(node)]]):
            continue
        if all(key in early for key in inputs):
            depends = any(early[key] for key in inputs)
            early.update((value.unique(), depends) for value in outputs_of(node))
    return early


def _frontier(graph: Any, nodes: list[Any], early: dict[int, bool]) -> set[int]:
    """Ids of the early tensors that the rest of the graph reads."""
    inputs = {value.unique() for value in graph.inputs()}
    late = [node for node in nodes if any(value.unique() not in early for value in outputs_of(node))]
    pending = [value for node in (*late, graph.return_node()) for value in inputs_of(node)]
    sizes = _computed_from_sizes(nodes)
    frontier: set[int] = set()
    seen: set[int] = set()
    while pending:
        value = pending.pop()
        key = value.unique()
        if key in seen or key in inputs or key not in early:
            continue
        seen.add(key)
        if early[key] and str(value.type()) == "Tensor" and key not in sizes:
            frontier.add(key)
        else:
            # Sizes, lists, and what weights alone decide: made again in the body, out of what they are made of.
            pending += inputs_of(value.node())
    return frontier


def _computed_from_sizes(nodes: list[Any]) -> set[int]:
    """Ids of the 0-dimensional tensors on the CPU in which a trace computes with sizes."""
    sizes: set[int] = set()
    for node in nodes:
        inputs = [value for value in inputs_of(node) if value.node().kind() != "prim::Constant"]
        if node.kind() == "prim::NumToTensor" or (inputs and all(value.unique() in sizes for value in inputs)):
            sizes.update(value.unique() for value in outputs_of(node))
    return sizes


def _prologue(graph: Any, places: list[tuple[int, int]]) -> Any:
    prologue = graph.copy()
    nodes = list(prologue.nodes())
    for _ in range(len(list(prologue.outputs()))):
        prologue.eraseOutput(0)
    for node, output in places:
        prologue.registerOutput(nodes[node].outputsAt(output))
    for node in reversed(nodes):  # also those that write: what they write to is not hoisted
        if not any(value.uses() for value in outputs_of(node)):
            node.destroy()
    return prologue


def _body(graph: Any, places: list[tuple[int, int]], clean: Callable[[Any], None]) -> Any:
    body = graph.copy()
    nodes = list(body.nodes())
    for node, output in places:
        old = nodes[node].outputsAt(output)
        new = body.addInput()
        new.setTypeAs(old)
        old.replaceAllUsesWith(new)
    clean(body)
    return body


def _is_worthwhile(node: Any) -> bool:
    return node.kind() in WORTHWHILE or node.kind().startswith("sfast::")


def _draws(node: Any) -> bool:
    """Whether an operator draws random numbers; attention would for its dropout alone."""
    if node.kind() == "aten::scaled_dot_product_attention":
        return bool(node.inputsAt(4).toIValue() != 0)
    return bool(node.isNondeterministic())


def _id(node: Any, output: int) -> int:
    unique: int = node.outputsAt(output).unique()
    return unique
