"""What is computed row by row and modulates activations is computed once for each run of equal rows: see `kernels/runs.py`.

Not a pattern like the fusions: any number of blocks read one embedding. From the operators that take something for every
token (`..._sums`) we go back, as long as each row comes from the row before alone, to the first linear layer. What it reads
is sought for runs; everything behind it then has one row for each run. Who else reads of that gets all rows, as before.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from sfast.writes import inputs_of, outputs_of, written_values

NAME = "runs"

# (x, weight, bias, ..) → whether SiLU follows, and the place of what tells the result's precision
_LINEARS = {
    "aten::linear": (False, None),
    "sfast::linear": (False, None),
    "sfast::linear_silu": (True, None),
    "sfast::linear_rounded": (False, 3),
}
_READERS = {  # places of what they add for every token
    "sfast::layer_norm_modulate_sums": (6, 8),
    "sfast::gate_add_layer_norm_sums": (3,),
    "sfast::gate_add_layer_norm_modulate_sums": (3, 9, 11),
}
_ELEMENTWISE = frozenset(("aten::silu", "aten::gelu", "aten::tanh", "aten::type_as"))
_ALONG = {
    "aten::unsqueeze": 1,
    "aten::unflatten": 1,
    "aten::chunk": 2,
}  # a dimension, which the argument at this place tells


@dataclasses.dataclass
class _Chain:
    """Everything that is computed from the rows of one value alone, and who reads it token by token."""

    source: Any
    nodes: dict[int, Any]  # by the id of their first result, from the readers back
    readers: list[Any]


def share_runs(graph: Any) -> int:
    """Have what equal rows give computed once, in place; returns in how many places."""
    chains: dict[int, _Chain] = {}
    for reader in [node for node in graph.nodes() if node.kind() in _READERS]:
        walks = [_walk(reader.inputsAt(place)) for place in _READERS[reader.kind()]]
        sources = {source.unique() for source, _ in walks if source is not None}
        if len(sources) == 1 and all(source is not None for source, _ in walks):
            chain = chains.setdefault(sources.pop(), _Chain(walks[0][0], {}, []))
            chain.readers.append(reader)
            for _, nodes in walks:
                chain.nodes.update((_id(node), node) for node in nodes)
    written = written_values(graph) if chains else frozenset()
    worthwhile = [chain for chain in chains.values() if _may_be_shared(chain, written)]
    for chain in worthwhile:
        _share(graph, chain)
    return len(worthwhile)


def _walk(value: Any) -> tuple[Any | None, list[Any]]:
    """The value that a chain of operators begins at whose first is a linear layer, and which ends at `value`; its nodes."""
    source, nodes, passed = None, [], []
    while True:
        node = value.node()
        if node.kind() in _LINEARS and all(map(_is_given, inputs_of(node)[1:3])):
            passed.append(node)
            source, nodes = node.inputsAt(0), [*passed]
        elif node.kind() == "prim::ListUnpack" or _keeps_rows(node):
            passed.append(node)
        else:
            return source, nodes
        value = node.inputsAt(0)


def _is_given(value: Any) -> bool:
    return value.node().kind() in ("prim::Param", "prim::Constant")


def _keeps_rows(node: Any) -> bool:
    """Whether each of an operator's rows [B, T, ..] comes from that of its first input alone."""
    kind = node.kind()
    if kind in _ALONG:
        dim = node.inputsAt(_ALONG[kind])
        return bool(dim.node().kind() == "prim::Constant" and dim.toIValue() >= 2)
    if kind == "aten::to":
        return all(value.node().kind() == "prim::Constant" for value in inputs_of(node)[1:])
    return kind in _ELEMENTWISE


def _may_be_shared(chain: _Chain, written: frozenset[int]) -> bool:
    """Whether nobody writes to any of it, and its lists are only taken apart."""
    values = [value for node in chain.nodes.values() for value in outputs_of(node)]
    lists = [node.output() for node in chain.nodes.values() if node.kind() == "aten::chunk"]
    unpacked = all(use.user.kind() == "prim::ListUnpack" for value in lists for use in value.uses())
    return unpacked and written.isdisjoint(value.unique() for value in (chain.source, *values))


def _share(graph: Any, chain: _Chain) -> None:
    linears = [node for node in graph.nodes() if node.kind() in _LINEARS and _id(node) in chain.nodes]
    runs = graph.create("sfast::runs", [chain.source], 3)
    runs.insertBefore(linears[0])
    first, run, count = outputs_of(runs)
    for node in linears:
        silu, like = _LINEARS[node.kind()]
        constants = [graph.insertConstant(silu), *([graph.insertConstant(None)] if like is None else [])]
        x, weight, bias = inputs_of(node)[:3]
        x = first if x.unique() == chain.source.unique() else x
        told = node.inputsAt(like) if like is not None else constants[1]
        shared = graph.create("sfast::linear_runs", [x, weight, bias, count, constants[0], told], 1)
        shared.insertBefore(node)
        for constant in constants:
            constant.node().moveBefore(shared)
        del chain.nodes[_id(node)]
        chain.nodes[_id(shared)] = shared
        node.output().replaceAllUsesWith(shared.output())
        node.destroy()
    readers: dict[int, tuple[int, ...]] = {}
    for node in chain.readers:
        kind = node.kind()
        reader = graph.create(f"{kind.removesuffix('_sums')}_runs", [*inputs_of(node), run], node.outputsSize())
        reader.insertBefore(node)
        readers[_id(reader)] = _READERS[kind]
        for old, new in zip(outputs_of(node), outputs_of(reader), strict=True):
            old.replaceAllUsesWith(new)
        node.destroy()
    for node in list(chain.nodes.values()):
        for value in outputs_of(node) if node.kind() != "aten::chunk" else ():
            _spread(graph, node, value, run, chain, readers)


def _spread(graph: Any, node: Any, value: Any, run: Any, chain: _Chain, readers: dict[int, tuple[int, ...]]) -> None:
    """Give all rows of a value to whoever reads them, and is none of the chain or its readers."""

    def is_own(use: Any) -> bool:
        key = _id(use.user)
        return (key in chain.nodes and use.offset == 0) or use.offset in readers.get(key, ())

    others = [use.user for use in value.uses() if not is_own(use) and use.user.kind() != "aten::size"]
    if not others:
        return
    numbers = [graph.insertConstant(number) for number in (0, 1)]
    rows = graph.create("aten::flatten", [value, *numbers], 1)
    every = graph.create("aten::index_select", [rows.output(), numbers[0], run], 1)
    whole = graph.create("aten::view_as", [every.output(), value], 1)
    before = node
    for made in (*(number.node() for number in numbers), rows, every, whole):
        made.moveAfter(before) if made.kind() == "prim::Constant" else made.insertAfter(before)
        before = made
    for other in others:
        for place, read in enumerate(inputs_of(other)):
            if read.unique() == value.unique() and place not in readers.get(_id(other), ()):
                other.replaceInput(place, whole.output())


def _id(node: Any) -> int:
    return node.outputsAt(0).unique() if node.outputsSize() else -1
