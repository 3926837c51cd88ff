"""One spelling for every idea, so that one pattern finds it: the graph of a model, and of a pattern, is normalized first.

What is left out here returned its input: a division by one, dropout that is switched off, `x[:]`, a change of layout that
nobody asked for. What is renamed were several ways to call one operator.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from sfast.writes import inputs_of, may_alias, outputs_of, writes, written_values


def normalize(graph: Any) -> None:
    """Spell every idea in one way, so that one pattern finds it."""
    torch._C._jit_pass_dce(graph)  # who only asks for sizes that nobody wants is no reader
    _drop_identities(graph, same_dtype=_keeps_dtype)  # before the types that it reads are erased
    _interleave(graph)
    _sum_parts(graph)
    _add_numbers_last(graph)
    torch._C._jit_pass_erase_shape_information(graph)
    torch._C._jit_pass_inline(graph)
    torch._C._jit_pass_lower_all_tuples(graph)
    torch._C._jit_pass_remove_mutation(graph)
    _simplify_sizes(graph)
    torch._C._jit_pass_constant_propagation(graph)
    _drop_identities(graph)
    _name_convolutions(graph)
    _name_views(graph)
    _drop_layout_copies(graph)
    torch._C._jit_pass_cse(graph)
    torch._C._jit_pass_constant_pooling(graph)
    _drop_reunions(graph)
    torch._C._jit_pass_dce(graph)
    _constants_first(graph)


_IDENTITIES = frozenset(("aten::dropout", "aten::feature_dropout", "aten::slice", "aten::div", "aten::mul", "aten::to"))
_COMPUTED = object()  # stands for a value that is not constant
_WHOLE = 2**63 - 1  # the end of `x[:]`


def _drop_identities(graph: Any, same_dtype: Callable[[Any], bool] | None = None) -> None:
    """Remove operators that return their input: inactive dropout, `x[:]`, `x / 1`, `x.to(x.dtype)`."""
    written_to: bool | None = None  # whether `x / 1` may be a copy that is written to; looked up when it is asked
    for node in list(graph.nodes()):
        kind = node.kind()
        if kind not in _IDENTITIES:
            continue
        inputs = inputs_of(node)
        constants = [value.toIValue() if is_constant(value) else _COMPUTED for value in inputs]
        if kind == "aten::slice":
            identity = constants[2:] in ([0, _WHOLE, 1], [None, None, 1])
        elif kind == "aten::to":  # (x, dtype, non_blocking, copy, memory_format) gives x itself where it has the dtype
            plain = len(inputs) == 5 and isinstance(constants[1], int) and constants[3:] == [False, None]
            there = len(inputs) == 8 and constants[6:] == [False, None] and _is_on(inputs[0], constants[3])
            identity = (plain or there) and same_dtype is not None and same_dtype(node)
        elif kind in ("aten::div", "aten::mul"):
            identity = len(inputs) == 2 and _is_one(constants[1]) and same_dtype is not None and same_dtype(node)
            if identity and written_to is None:
                written_to = any(map(writes, graph.nodes()))
            identity = identity and not written_to and (_any_layout_will_do(node) or _is_made_for(node))
        else:
            identity = constants[2] is False
        if identity:
            node.output().replaceAllUsesWith(inputs[0])
            node.destroy()


def _is_on(value: Any, device: Any) -> bool:
    """Whether a value was traced on this very device: `x.to(device)`, as models made for several have it, is x."""
    kind = value.type()
    return kind.kind() == "TensorType" and isinstance(device, torch.device) and kind.device() == device


def _is_made_for(node: Any) -> bool:
    """Whether an operator's first input is a sum that nobody else reads: its strides are those that a copy would have."""
    source = node.inputsAt(0)
    return source.node().kind() == "aten::add" and len(source.uses()) == 1


def _is_one(constant: Any) -> bool:
    return isinstance(constant, (int, float)) and not isinstance(constant, bool) and constant == 1


def _keeps_dtype(node: Any) -> bool:
    before, after = node.inputsAt(0).type(), node.output().type()
    known = before.kind() == after.kind() == "TensorType" and before.dtype() is not None
    return known and before.dtype() == after.dtype()


def _interleave(graph: Any) -> None:
    """`y = empty_like(x); y[..., 0::2] = a; y[..., 1::2] = b` is `stack([a, b], -1).flatten(-2)`, without a write."""
    for node in [node for node in graph.nodes() if node.kind() == "aten::empty_like"]:
        writers = [use.user for use in node.output().uses()][:2]
        dim = _interleaved(node, writers)
        if dim is None:
            continue
        copies = [writer.output().uses()[0].user for writer in writers]
        readers = [use.user for use in node.output().uses() if use.user not in writers]
        first = readers[0]
        parts = graph.create("prim::ListConstruct", [copy.inputsAt(1) for copy in copies], 1)
        parts.output().setType(torch._C.ListType.ofTensors())
        numbers = [graph.insertConstant(value) for value in (dim, dim - 1)]
        stacked = graph.create("aten::stack", [parts.output(), numbers[0]], 1)
        flat = graph.create("aten::flatten", [stacked.output(), numbers[1], numbers[0]], 1)
        cast = graph.create("aten::type_as", [flat.output(), node.inputsAt(0)], 1)
        for made in (*(number.node() for number in numbers), parts, stacked, flat, cast):
            made.moveBefore(first) if made.kind() == "prim::Constant" else made.insertBefore(first)
        cast.output().setTypeAs(node.output())
        node.output().replaceAllUsesWith(cast.output())
        for writer, copy in zip(writers, copies, strict=True):
            copy.destroy()
            writer.destroy()
        node.destroy()


def _interleaved(node: Any, writers: list[Any]) -> int | None:
    """The dimension, counted from the end, whose even and odd places two slices of a new tensor write, and then it is read."""
    if len(writers) != 2 or any(writer.kind() != "aten::slice" for writer in writers):
        return None
    whole = node.output().type()
    dims: list[int] = []
    for start, writer in enumerate(writers):
        numbers = [value.toIValue() if is_constant(value) else None for value in inputs_of(writer)[1:]]
        uses = [use.user for use in writer.output().uses()]
        if numbers[1:] != [start, _WHOLE, 2] or len(uses) != 1 or uses[0].kind() != "aten::copy_":
            return None
        copy = uses[0]
        if copy.inputsAt(0).unique() != writer.output().unique() or copy.output().uses():
            return None
        if copy.inputsAt(1).type().sizes() is None or copy.inputsAt(1).type().sizes() != writer.output().type().sizes():
            return None  # what is written is spread
        dims.append(int(numbers[0] or 0))
    readers = [use.user for use in node.output().uses()[2:]]
    last = writers[1].output().uses()[0].user
    read_later = bool(readers) and all(last.isBefore(reader) and not may_alias(reader) for reader in readers)
    if not read_later or dims[0] != dims[1] or whole.sizes() is None or whole.sizes()[dims[0]] % 2:
        return None
    rank = len(whole.sizes())
    return int(dims[0] % rank - rank)


def _sum_parts(graph: Any) -> None:
    """`(table + x).chunk(n)` is the sum of chunks where x [B, T, n, C] is large: its parts are read apart, and need no sum."""
    for node in [node for node in graph.nodes() if node.kind() == "aten::chunk"]:
        total, users = node.inputsAt(0).node(), [use.user for use in node.output().uses()]
        if len(users) != 1 or users[0].kind() != "prim::ListUnpack" or not _spreads_a_table(total):
            continue
        if not is_constant(node.inputsAt(2)) or node.inputsAt(2).toIValue() not in (2, -2):
            continue
        unpack = users[0]
        parts = [_chunks(graph, node, value, unpack) for value in inputs_of(total)[:2]]
        for old, a, b in zip(outputs_of(unpack), *parts, strict=True):
            piece = graph.create("aten::add", [a, b, total.inputsAt(2)], 1)
            piece.insertBefore(unpack)
            old.replaceAllUsesWith(piece.output())
        unpack.destroy()
        node.destroy()


def _add_numbers_last(graph: Any) -> None:
    """`(1 + x).unsqueeze(d)` is `1 + x.unsqueeze(d)`, as most write it."""
    written: frozenset[int] | None = None
    for node in [node for node in graph.nodes() if node.kind() == "aten::unsqueeze"]:
        total = node.inputsAt(0).node()
        if total.kind() != "aten::add" or total.inputsSize() != 3 or len(total.output().uses()) != 1:
            continue
        x, *numbers = inputs_of(total)
        if not all(map(is_constant, numbers)) or not isinstance(numbers[0].toIValue(), (int, float)):
            continue
        if written is None:
            written = written_values(graph)
        if x.unique() not in written:
            node.replaceInput(0, x)
            late = graph.create("aten::add", [node.output(), *numbers], 1)
            late.insertAfter(node)
            node.output().replaceAllUsesWith(late.output())
            late.replaceInput(0, node.output())
            late.output().setType(node.output().type())
            total.destroy()


def _chunks(graph: Any, node: Any, value: Any, unpack: Any) -> list[Any]:
    """What each of a sum's chunks takes from one of its operands, in the precision of the sum."""
    count, precision = unpack.outputsSize(), node.inputsAt(0).type().dtype()
    cast = value.node() if value.node().kind() == "aten::to" and value.node().inputsSize() == 5 else None
    source, how = (value, []) if cast is None else (cast.inputsAt(0), inputs_of(cast)[1:])
    if cast is None and precision == torch.float32 and value.type().dtype() in (torch.float16, torch.bfloat16):
        how = [graph.insertConstant(constant) for constant in (_FLOAT, False, False, None)]
        for constant in how:
            constant.node().moveBefore(unpack)
    pieces = [source] * count
    if value.type().sizes()[2] != 1:
        chunk = graph.create("aten::chunk", [source, *inputs_of(node)[1:]], 1)
        chunk.output().setType(torch._C.ListType.ofTensors())
        unpacked = graph.create("prim::ListUnpack", [chunk.output()], count)
        chunk.insertBefore(unpack)
        unpacked.insertBefore(unpack)
        pieces = outputs_of(unpacked)
    return [_converted(graph, piece, how, unpack) for piece in pieces]


_FLOAT = 6  # fp32 as a graph says it


def _converted(graph: Any, piece: Any, how: list[Any], before: Any) -> Any:
    if not how:
        return piece
    converted = graph.create("aten::to", [piece, *how], 1)
    converted.insertBefore(before)
    return converted.output()


def _spreads_a_table(total: Any) -> bool:
    """Whether a value that one operator reads is the sum of [.., n, C], the same for all tokens, and [B, T, n or 1, C]."""
    if total.kind() != "aten::add" or total.inputsSize() != 3 or len(total.output().uses()) != 1:
        return False
    kinds = [total.output().type(), *(value.type() for value in inputs_of(total)[:2])]
    known = [kind.sizes() if kind.kind() == "TensorType" else None for kind in kinds]
    sizes = [size for size in known if size is not None and len(size) == 4]
    if len(sizes) != 3:
        return False
    whole, *operands = sizes
    alike = all(size[2:] in (whole[2:], [1, whole[3]]) for size in operands)
    return alike and whole[1] > 1 and sorted(size[1] for size in operands) == [1, whole[1]]


def _simplify_sizes(graph: Any) -> None:
    """`Int(NumToTensor(size))` is the size: without the detour through a tensor it stays a plain integer."""
    for node in list(graph.nodes()):
        if node.kind() == "aten::Int":
            source = node.input().node()
            if source.kind() == "prim::NumToTensor" and str(source.input().type()) == "int":
                node.output().replaceAllUsesWith(source.input())
                node.destroy()


def _name_convolutions(graph: Any) -> None:
    """`_convolution` with its thirteen arguments → `conv1d`, `conv2d` or `conv3d`, which read the global flags when run."""
    for node in list(graph.nodes()):
        if node.kind() != "aten::_convolution":
            continue
        values = inputs_of(node)
        stride, transposed, output_padding = (
            value.toIValue() if is_constant(value) else None for value in (values[3], values[6], values[7])
        )
        if stride is None or transposed is not False or output_padding is None or any(output_padding):
            continue
        operands = [*values[:3], *values[3:6], values[8]]
        renamed = graph.create(f"aten::conv{len(stride)}d", operands, 1)
        renamed.insertBefore(node)
        node.output().replaceAllUsesWith(renamed.output())
        node.destroy()


def _name_views(graph: Any) -> None:
    """`view` → `reshape`, which is the same where a view is possible, and a copy where we changed a layout before it."""
    written = written_values(graph)  # what is written to must stay a view
    for node in list(graph.nodes()):
        if node.kind() == "aten::view" and "dtype" not in node.schema() and node.output().unique() not in written:
            renamed = graph.create("aten::reshape", inputs_of(node), 1)
            renamed.insertBefore(node)
            node.output().replaceAllUsesWith(renamed.output())
            node.destroy()


# They give the same values whatever the strides of their inputs are, and no view of them.
_READ_ANY_LAYOUT = frozenset(
    f"aten::{name}"
    for name in (
        *("conv1d", "conv2d", "conv3d", "_convolution", "linear", "group_norm", "layer_norm", "cat", "add", "sub"),
        *("mul", "div", "silu", "gelu", "relu", "sigmoid", "tanh", "upsample_nearest2d", "upsample_nearest3d", "size"),
    )
)


def _drop_layout_copies(graph: Any) -> None:
    """Remove `x.contiguous()` where every reader takes any layout: with channels-last it would only undo what conv wants."""
    copies = [node for node in graph.nodes() if node.kind() == "aten::contiguous"]
    if not copies or any(map(writes, graph.nodes())):
        return  # where something is written in place, a copy may be there to be written to
    for node in copies:
        if _any_layout_will_do(node):
            node.output().replaceAllUsesWith(node.inputsAt(0))
            node.destroy()


def _any_layout_will_do(node: Any) -> bool:
    """Whether every reader of a copy may as well read what was copied, whatever its strides."""
    readers = [use.user for use in node.output().uses()]
    lists = [reader for reader in readers if reader.kind() == "prim::ListConstruct"]
    readers += [use.user for node in lists for use in node.output().uses()]  # a list is read by what concatenates it
    return all(reader.kind() in _READ_ANY_LAYOUT or reader in lists for reader in readers)


def _drop_reunions(graph: Any) -> None:
    """`cat([x[:n], x[n:]])` is x: some transformers part text and image after every block, only to join them again."""
    cats = [node for node in graph.nodes() if node.kind() == "aten::cat" and _any_layout_will_do(node)]
    written = written_values(graph) if cats else frozenset()
    for node in cats:
        whole = _reunited(node)
        if whole is not None and written.isdisjoint((whole.unique(), node.output().unique())):
            node.output().replaceAllUsesWith(whole)


def _reunited(cat: Any) -> Any | None:
    """The tensor that was cut into exactly the pieces that an operator joins, if there is one."""
    tensors = cat.inputsAt(0).node()
    pieces = [value.node() for value in inputs_of(tensors)] if tensors.kind() == "prim::ListConstruct" else []
    if len(pieces) < 2 or any(piece.kind() != "aten::slice" for piece in pieces):
        return None
    whole, *rest = [inputs_of(piece) for piece in pieces]
    source, dim, start, end, step = whole
    if not all(map(is_constant, (dim, start, step, cat.inputsAt(1)))) or start.toIValue() not in (0, None):
        return None
    for x, along, begin, until, each in rest:
        if x.unique() != source.unique() or along.unique() != dim.unique() or each.unique() != step.unique():
            return None
        if begin.unique() != end.unique():
            return None
        end = until
    to_the_end = is_constant(end) and end.toIValue() in (None, _WHOLE)
    return source if to_the_end and step.toIValue() == 1 and dim.toIValue() == cat.inputsAt(1).toIValue() else None


def _constants_first(graph: Any) -> None:
    """Constants before everything else, so that a fused operator may stand anywhere behind its tensors."""
    nodes = list(graph.nodes())
    first = next((node for node in nodes if node.kind() != "prim::Constant"), None)
    for node in nodes if first is not None else ():
        if node.kind() == "prim::Constant":
            node.moveBefore(first)


def is_constant(value: Any) -> bool:
    """Whether a value of a graph is known."""
    return bool(value.node().kind() == "prim::Constant")
