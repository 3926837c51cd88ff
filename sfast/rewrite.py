"""Find a plain PyTorch function inside a traced graph and put one fused operator in its place.

A pattern is a function; it is traced and normalized like the model itself, so that both are spelled alike. The matcher
walks back from the pattern's result through the graph: constants are compared by value, `add` and `mul` in both orders,
and a value that someone outside the match still reads refuses the fusion. `merged_linears.py` and `hoist.py` edit, too.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from sfast.normalize import is_constant, normalize
from sfast.writes import blocks_of, inputs_of, may_alias, outputs_of, writes, written_values


@dataclasses.dataclass(frozen=True, eq=False)
class Fusion:
    """A chain of small operators and the single operator that replaces it.

    `torch.ops.sfast.<name>` takes the pattern's arguments in the pattern's order and returns what the pattern returns.
    Fusions of one name are several spellings of one idea.
    """

    name: str
    pattern: Callable[..., Any]
    examples: tuple[Any, ...]  # what the pattern is traced with; a number, string or list here stands for any value of
    #                            its kind, so it must differ from every constant inside the pattern
    needs: tuple[str, ...] = ()  # config fields that must be on
    only: Mapping[str, Callable[[Any], bool]] | None = None  # what the value of an argument must be in the graph
    shared: frozenset[str] = frozenset()  # operators inside the pattern that stay where others read them, too
    implied: tuple[str, ...] = ()  # arguments that the operator does not take, because the others tell it


def rewrite(graph: Any, fusions: list[Fusion]) -> Counter[str]:
    """Normalize `graph`, apply every fusion wherever it matches, in order, and return how many of each stand there then.

    Without fusions the graph stays as it was traced: what is left when a rewritten one fails.
    """
    if fusions:
        normalize(graph)
        unsafe = written_values(graph)
        for fusion in fusions:
            fuse(graph, fusion, unsafe)
        _renew_constant_results(graph)
    torch._C._jit_pass_dce(graph)
    torch._C._jit_pass_lint(graph)
    names = {f"sfast::{fusion.name}": fusion.name for fusion in fusions}
    return Counter(names[node.kind()] for node in graph.nodes() if node.kind() in names)


def _renew_constant_results(graph: Any) -> None:
    """A result that does not depend on the inputs became a constant; the caller may write to what it gets."""
    for place, result in enumerate(list(graph.outputs())):
        source = result.node()
        while may_alias(source) and source.inputsSize():
            source = source.inputsAt(0).node()
        if source.kind() == "prim::Constant":
            renewed = graph.create("aten::clone", [result, graph.insertConstant(None)], 1)
            graph.appendNode(renewed)
            graph.return_node().replaceInput(place, renewed.output())


def drop_unused_inputs(graph: Any, count: int) -> list[int]:
    """Erase those of the first `count` inputs that nothing reads; return the places of the ones that stay."""
    inputs = list(graph.inputs())[:count]
    used = [i for i, value in enumerate(inputs) if value.uses()]
    for i in reversed(range(count)):
        if not inputs[i].uses():
            graph.eraseInput(i)
    return used


# ------------------------------------------------------------------------------------------------------------ matching


@dataclasses.dataclass
class _Pattern:
    graph: Any  # keeps the values below alive
    outputs: list[Any]
    arguments: list[int]  # for each argument of the function: the id of its value
    argument_ids: set[int]
    argument_types: list[Any]  # TorchScript types from the operator's schema; None for what it does not take
    conditions: list[Callable[[Any], bool] | None]  # for each argument


@functools.cache
def _trace_pattern(fusion: Fusion) -> _Pattern:
    """The pattern as a graph. Tensor arguments are its inputs, other arguments constants known by their example value."""
    tensors = [example for example in fusion.examples if isinstance(example, torch.Tensor)]
    names = list(inspect.signature(fusion.pattern).parameters)
    assert len(names) == len(fusion.examples), f"{fusion.name}: one example for each of {names}"

    def flat(*flat_inputs: torch.Tensor) -> Any:
        rest = iter(flat_inputs)
        return fusion.pattern(*[next(rest) if isinstance(e, torch.Tensor) else e for e in fusion.examples])

    with torch.no_grad():
        graph, _ = torch._C._create_graph_by_tracing(flat, tuple(tensors), lambda _: "", True, False)
    normalize(graph)
    inputs = iter(graph.inputs())
    constants = {_freeze(n.output().toIValue()): n.output() for n in graph.nodes() if n.kind() == "prim::Constant"}
    arguments = []
    for name, example in zip(names, fusion.examples, strict=True):
        value = next(inputs) if isinstance(example, torch.Tensor) else constants.get(_freeze(example))
        assert value is not None, f"{fusion.name}: the pattern does not use `{name}`"
        arguments.append(value.unique())
    schema = getattr(torch.ops.sfast, fusion.name).default._schema
    taken = iter(schema.arguments)
    types = [None if name in fusion.implied else next(taken).type for name in names]
    conditions = [(fusion.only or {}).get(name) for name in names]
    return _Pattern(graph, list(graph.outputs()), arguments, set(arguments), types, conditions)


def _freeze(constant: Any) -> Any:
    return (type(constant), tuple(constant) if isinstance(constant, list) else constant)


def fuse(graph: Any, fusion: Fusion, unsafe: frozenset[int] = frozenset()) -> int:
    """Replace every place where `fusion.pattern` occurs by its operator; returns how many.

    Args:
        unsafe: ids of values whose memory some operator of the graph writes to; a match that touches one is refused.
    """
    pattern = _trace_pattern(fusion)
    anchor_kind = pattern.outputs[0].node().kind()
    fired = 0
    for anchor in graph.findAllNodes(anchor_kind, False):
        fired += any(_replace(graph, fusion, pattern, match, unsafe) for match in _matches(pattern, anchor))
    return fired


def _matches(pattern: _Pattern, anchor: Any) -> Iterator[dict[int, Any]]:
    """Values of the graph for each value of the pattern, if the pattern's first result can be `anchor`'s.

    There may be several: either side of an addition can be the convolution before it, and one of the two be read elsewhere.
    """
    start = pattern.outputs[0]
    if anchor.outputsSize() <= start.offset():
        return
    for bound in _solve([(start, anchor.outputsAt(start.offset()))], {}, pattern):
        if all(key in bound for key in (*pattern.arguments, *_ids(pattern.outputs))):
            yield bound


def _solve(pairs: list[tuple[Any, Any]], bound: dict[int, Any], pattern: _Pattern) -> Iterator[dict[int, Any]]:
    """Unify all pairs of (pattern value, graph value), with `add` and `mul` in both orders."""
    if not pairs:
        yield bound
        return
    (wanted, value), rest = pairs[0], pairs[1:]
    key = wanted.unique()
    if key in bound:
        if bound[key].unique() == value.unique():
            yield from _solve(rest, bound, pattern)
        return
    node = wanted.node()
    if key in pattern.argument_ids:
        place = pattern.arguments.index(key)
        kind = pattern.argument_types[place]
        wanted_number = kind is not None and str(kind) in ("float", "int")
        fits = kind is None or (wanted_number if _is_number(value) else value.type().isSubtypeOf(kind))
        condition = pattern.conditions[place]
        if fits and (condition is None or condition(value)):
            yield from _solve(rest, {**bound, key: value}, pattern)
        return
    if node.kind() == "prim::Constant":
        if is_constant(value) and _is_same(value, node.output()):
            yield from _solve(rest, bound, pattern)
        return
    other = value.node()
    if other.kind() != node.kind() or value.offset() != wanted.offset() or other.inputsSize() != node.inputsSize():
        return
    if other.outputsSize() != node.outputsSize():
        return
    bound = {
        **bound,
        **dict(zip(_ids(outputs_of(node)), outputs_of(other), strict=True)),
    }  # a result may be its sibling
    wanted_inputs, inputs = inputs_of(node), inputs_of(other)
    orders = [inputs]
    if _commutes(other, inputs):
        orders.append([inputs[1], inputs[0], *inputs[2:]])
    for order in orders:
        yield from _solve([*zip(wanted_inputs, order, strict=True), *rest], bound, pattern)


def _is_same(a: Any, b: Any) -> bool:
    """Whether two constants are one; to a tensor of floating-point numbers, 1 and 1.0 are."""
    numbers = [each.toIValue() for each in (a, b)]
    if all(map(_is_number, (a, b))) and not any(isinstance(number, (bool, complex)) for number in numbers):
        return bool(numbers[0] == numbers[1])
    return _freeze(numbers[0]) == _freeze(numbers[1])


def _is_number(value: Any) -> bool:
    """Whether a value is the 1 of `x + 1`: a tensor to the graph, but an operator of ours would be handed a number."""
    return is_constant(value) and str(value.type()) == "Tensor" and not isinstance(value.toIValue(), torch.Tensor)


def _commutes(node: Any, inputs: list[Any]) -> bool:
    if node.kind() == "aten::add":
        return len(inputs) == 3 and is_constant(inputs[2]) and inputs[2].toIValue() == 1
    return node.kind() == "aten::mul"


def _ids(values: list[Any]) -> list[int]:
    return [value.unique() for value in values]


# ----------------------------------------------------------------------------------------------------------- replacing


def _replace(graph: Any, fusion: Fusion, pattern: _Pattern, match: dict[int, Any], unsafe: frozenset[int]) -> bool:
    """Put the operator in the place of the matched nodes, unless that could change what the graph computes."""
    arguments = [match[key] for key in pattern.arguments]
    taken = [value for value, kind in zip(arguments, pattern.argument_types, strict=True) if kind is not None]
    results = [match[key] for key in _ids(pattern.outputs)]
    inner = [value for key, value in match.items() if key not in pattern.argument_ids]
    distinct = {_id(value.node()): value.node() for value in inner}
    nodes = sorted(distinct.values(), key=functools.cmp_to_key(_before))
    sums = _sums_asked_for_size(nodes, results)
    kept = _kept(nodes, results, fusion.shared)
    left = [value for node in kept for value in outputs_of(node)]
    if _read_outside(nodes, [*results, *left], sums) or not unsafe.isdisjoint(_ids([*arguments, *inner])):
        return False
    known = set(_ids(results))
    moved = [node for node in kept if not known.isdisjoint(_ids(inputs_of(node)))]
    behind = [*results, *[value for node in moved for value in outputs_of(node)]]
    place = _place(nodes, arguments, behind, unsafe)
    if place is None:  # an argument may wait for no more than the size of a result: that of the next block's modulation
        own = set(distinct)
        asked = [value for value in results if _is_asked_for_size(value, own) and _operands(value, own)]
        for value in asked:
            _ask_operands_for_size(graph, value, nodes)
        place = _place(nodes, arguments, behind, unsafe) if asked else None
    if place is None:
        return False
    for value in sums:
        _ask_operands_for_size(graph, value, nodes)
    fused = graph.create(f"sfast::{fusion.name}", taken, len(results))
    fused.insertBefore(place)
    for i, value in enumerate(taken):
        if _is_number(value):  # the op takes it as one
            number = graph.insertConstant(value.toIValue())
            number.node().moveBefore(fused)
            fused.replaceInput(i, number)
    for old, new in zip(results, outputs_of(fused), strict=True):
        old.replaceAllUsesWith(new)
    last = fused
    for node in moved:
        node.moveAfter(last)
        last = node
    for node in reversed(nodes):
        if node not in kept:
            node.destroy()
    return True


def _kept(nodes: list[Any], results: list[Any], kinds: frozenset[str]) -> list[Any]:
    """Those of the matched nodes that may stay for other readers, and have some; what they read stays available."""
    own = {_id(node): node for node in nodes}
    gone = set(own) - {value.unique() for value in results}
    kept = [
        node
        for node in nodes
        if node.kind() in kinds and any(_id(use.user) not in own for value in outputs_of(node) for use in value.uses())
    ]
    return [node for node in kept if gone.isdisjoint(value.unique() for value in inputs_of(node))]


def _before(a: Any, b: Any) -> int:
    return -1 if a.isBefore(b) else 1


def _id(node: Any) -> int:
    return node.outputsAt(0).unique() if node.outputsSize() else -1


def _read_outside(nodes: list[Any], results: list[Any], sums: list[Any]) -> bool:
    own, allowed = {_id(node) for node in nodes}, {*_ids(results), *_ids(sums)}
    inner = [value for node in nodes for value in outputs_of(node) if value.unique() not in allowed]
    return any(_id(use.user) not in own for value in inner for use in value.uses())


def _sums_asked_for_size(nodes: list[Any], results: list[Any]) -> list[Any]:
    """Matched sums of tensors, no results themselves, of which the rest of the graph reads nothing but sizes."""
    own, known = {_id(node) for node in nodes}, set(_ids(results))
    sums = [node.output() for node in nodes if node.kind() == "aten::add" and node.output().unique() not in known]
    outside = [[use.user for use in value.uses() if _id(use.user) not in own] for value in sums]
    readers = {user.kind() for users in outside for user in users}
    asked = [value for value, users in zip(sums, outside, strict=True) if users] if readers == {"aten::size"} else []
    return asked if all(_operands(value, own) for value in asked) else []


def _is_asked_for_size(value: Any, own: set[int]) -> bool:
    """Whether a value is a sum, and an operator outside of the match reads its size."""
    users = [use.user for use in value.uses() if _id(use.user) not in own]
    return value.node().kind() == "aten::add" and any(user.kind() == "aten::size" for user in users)


def _operands(value: Any, own: set[int]) -> list[Any]:
    """The tensors outside of the match that a matched sum is made of; none if it adds what only the match computes."""
    operands, pending = [], [value]
    while pending:
        source = pending.pop()
        if _id(source.node()) not in own:
            operands.append(source)
        elif source.node().kind() in ("aten::add", "aten::mul"):
            tensors = [each for each in inputs_of(source.node()) if str(each.type()) == "Tensor"]
            pending += [each for each in tensors if not _is_number(each)]
        else:
            return []
    return operands


def _ask_operands_for_size(graph: Any, value: Any, nodes: list[Any]) -> None:
    """The size of a sum that is about to go is the size to which its operands broadcast: asking for it touches no memory."""
    own = {_id(node) for node in nodes}
    operands = _operands(value, own)
    together = graph.create("prim::ListConstruct", operands, 1)
    together.output().setType(torch._C.ListType.ofTensors())
    together.insertAfter(value.node())
    broadcast = graph.create("aten::broadcast_tensors", [together.output()], 1)
    broadcast.output().setType(torch._C.ListType.ofTensors())
    broadcast.insertAfter(together)
    unpack = graph.create("prim::ListUnpack", [broadcast.output()], len(operands))
    unpack.insertAfter(broadcast)
    for use in list(value.uses()):
        if _id(use.user) not in own and use.user.kind() == "aten::size":
            use.user.replaceInputWith(value, unpack.outputsAt(0))


def _place(nodes: list[Any], arguments: list[Any], results: list[Any], unsafe: frozenset[int]) -> Any | None:
    """The node to insert before: behind all arguments, and before any reader of a result.

    What an argument is made of moves up there if it comes later and could as well come earlier.
    """
    own = {_id(node) for node in nodes}
    readers = [use.user for value in results for use in value.uses() if _id(use.user) not in own]
    place = min([nodes[-1], *readers], key=functools.cmp_to_key(_before))
    later: dict[int, Any] = {}
    if not all(_can_come_before(place, argument.node(), own, unsafe, later) for argument in arguments):
        return None
    for node in later.values():
        node.moveBefore(place)
    return place


def _can_come_before(place: Any, node: Any, own: set[int], unsafe: frozenset[int], later: dict[int, Any]) -> bool:
    """Whether a node is, or may be, before `place`; `later` takes what has to move for it, in order."""
    if _id(node) in own:
        return False  # it would wait for itself
    if node.kind() == "prim::Param" or node.isBefore(place) or _id(node) in later:
        return True
    fixed = node.isNondeterministic() or writes(node) or bool(blocks_of(node))
    if fixed or not unsafe.isdisjoint(_ids([*inputs_of(node), *outputs_of(node)])):
        return False
    if not all(_can_come_before(place, value.node(), own, unsafe, later) for value in inputs_of(node)):
        return False
    later[_id(node)] = node
    return True
