"""Which values of a graph may lie in memory that some operator writes to.

Rewriting moves and merges operators, which is right only where nothing is written in between; so all who edit a graph ask.
"""

from __future__ import annotations

from typing import Any


def written_values(graph: Any) -> frozenset[int]:
    """Ids of all values that may share memory with one that an operator writes to."""
    if not any(writes(node) for node in graph.nodes()):
        return frozenset()
    leader: dict[int, int] = {}

    def find(key: int) -> int:
        while leader.get(key, key) != key:
            key = leader[key]
        return key

    written = []
    for node in graph.nodes():
        if writes(node) or may_alias(node):
            together = [value.unique() for value in _values(node) if "Tensor" in str(value.type())]
            written += together[:1] if writes(node) else []
            for other in together[1:]:
                leader[find(other)] = find(together[0])
    roots = {find(key) for key in written}
    values = [v.unique() for node in graph.nodes() for v in (*node.inputs(), *node.outputs())]
    return frozenset(key for key in values if find(key) in roots) if roots else frozenset()


def writes(node: Any) -> bool:
    """Whether an operator writes to a tensor that was there before: in place, by `out=`, or inside of a loop or branch."""
    kind = node.kind()
    if kind in ("prim::If", "prim::Loop"):
        return any(writes(inner) for block in node.blocks() for inner in block.nodes())
    return not kind.startswith("prim::") and "!" in node.schema()


def read_by(node: Any) -> list[Any]:
    """What an operator reads, also inside of a loop or branch."""
    inner = [value for block in node.blocks() for each in (*block.nodes(), block.returnNode()) for value in read_by(each)]
    return [*node.inputs(), *inner]


def _values(node: Any) -> list[Any]:
    inner = [value for block in node.blocks() for each in block.nodes() for value in _values(each)]
    return [*node.inputs(), *node.outputs(), *inner]


def may_alias(node: Any) -> bool:
    if node.kind().startswith("prim::"):
        lists = ("prim::ListConstruct", "prim::ListUnpack", "prim::TupleConstruct", "prim::TupleUnpack")
        return node.kind() in lists or any(True for _ in node.blocks())
    schema = node.schema()
    return not schema or "(a" in schema.rsplit("->", 1)[-1]
