"""Which values of a graph may lie in memory that some operator writes to.

Rewriting moves and merges operators, which is right only where nothing is written in between; so all who edit a graph ask.
"""

from __future__ import annotations

import functools
from typing import Any

import torch


def written_values(graph: Any) -> frozenset[int]:
    """Ids of all values that may share memory with one that an operator writes to."""
    nodes = list(graph.nodes())
    writers = {i for i, node in enumerate(nodes) if writes(node)}
    if not writers:
        return frozenset()
    leader: dict[int, int] = {}

    def find(key: int) -> int:
        while (above := leader.get(key, key)) != key:
            leader[key] = leader.get(above, above)
            key = above
        return key

    written = []
    for i, node in enumerate(nodes):
        if i in writers or may_alias(node):
            together = [value.unique() for value in _values(node) if _may_hold_a_tensor(value)]
            written += together[:1] if i in writers else []
            for other in together[1:]:
                leader[find(other)] = find(together[0])
    roots = {find(key) for key in written}
    return frozenset(key for key in {*leader, *leader.values(), *written} if find(key) in roots)


def writes(node: Any) -> bool:
    """Whether an operator writes to a tensor that was there before: in place, by `out=`, or inside of a loop or branch."""
    kind = node.kind()
    if kind in ("prim::If", "prim::Loop"):
        return any(writes(inner) for block in node.blocks() for inner in block.nodes())
    if kind.startswith("prim::") or (kind.startswith("aten::") and node.inputsSize() not in _written_with(kind)):
        return False
    return "!" in node.schema()  # a text, made anew each time it is asked for


@functools.cache
def _written_with(kind: str) -> frozenset[int]:
    """How many inputs an operator of PyTorch's has where it writes to one of them."""
    schemas = torch._C._jit_get_schemas_for_operator(kind)
    return frozenset([len(schema.arguments) for schema in schemas if schema.is_mutable])


def read_by(node: Any) -> list[Any]:
    """What an operator reads, also inside of a loop or branch."""
    inner = [
        value for block in blocks_of(node) for each in (*block.nodes(), block.returnNode()) for value in read_by(each)
    ]
    return inputs_of(node) + inner


# An iterator of TorchScript's ends with an exception of C++, and takes longer than everything else here.


def inputs_of(node: Any) -> list[Any]:
    """What an operator reads itself."""
    return [node.inputsAt(i) for i in range(node.inputsSize())]


def outputs_of(node: Any) -> list[Any]:
    """An operator's results."""
    return [node.outputsAt(i) for i in range(node.outputsSize())]


def blocks_of(node: Any) -> list[Any]:
    """The bodies of a loop, the ways of a branch."""
    return list(node.blocks()) if node.kind().startswith("prim::") and node.kind() != "prim::Constant" else []


def _values(node: Any) -> list[Any]:
    inner = [value for block in blocks_of(node) for each in block.nodes() for value in _values(each)]
    return inputs_of(node) + outputs_of(node) + inner


def _may_hold_a_tensor(value: Any) -> bool:
    kind = value.type()
    return kind.kind() == "TensorType" or "Tensor" in str(kind)


def may_alias(node: Any) -> bool:
    if node.kind().startswith("prim::"):
        lists = ("prim::ListConstruct", "prim::ListUnpack", "prim::TupleConstruct", "prim::TupleUnpack")
        return node.kind() in lists or bool(blocks_of(node))
    schema = node.schema()
    return not schema or "(a" in schema.rsplit("->", 1)[-1]
