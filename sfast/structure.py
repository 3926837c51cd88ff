"""Nested arguments as a flat list of tensors and a hashable description of everything else.

A trace is valid for one structure: which keys are there, which values are None, every number, string and flag. Tensors are
the only thing that may differ between two calls of the same trace. So two descriptions are equal only where no Python could
tell the values apart: -0.0 is not 0.0, one tensor given twice is not two of them, and what carries more than is to be seen
(a function with a closure, a list with attributes) has no description.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
import math
import types
from collections.abc import Callable, Hashable, Iterator, Mapping
from typing import Any

import torch

from sfast.mirrored import Mirrored, plain
from sfast.patches import is_users


class UnsupportedStructure(TypeError):
    """An argument or result holds an object that cannot be taken apart and put together again."""


_VALUES = (
    type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.memory_format, torch.layout,
    enum.Enum,
)  # fmt: skip
_CODE = (type, types.FunctionType, types.BuiltinFunctionType, types.MethodType)
PLAIN = _VALUES + _CODE
# Equal values of one of these types are the same to everybody; of an `int` or `float`, most are.
_EXACT = frozenset((type(None), bool, str, bytes, torch.dtype, torch.device, torch.memory_format, torch.layout))
_CONTAINERS = frozenset((tuple, list, dict))
_TENSORS = (torch.Tensor, torch.nn.Parameter, Mirrored)  # whoever has made another one may do anything in its operators

TENSOR = ("tensor",)  # the place of one tensor in a description
PARAMETER = ("tensor", "parameter")
SIZE = ("size",)  # and of an integer that may be a size: that of a tensor with nothing in it, which stands for it
LARGEST_SIZE = 2**31 - 1


def flatten_call(value: Any, tensors: list[torch.Tensor], sizes_on: torch.device | None = None) -> Hashable:
    """`flatten`, for the arguments of a call: Python may ask whether two of them are the same object (`a is b`).

    A tensor that is given twice has one place in `tensors`, to which the later ones refer; so it is with lists and
    dictionaries, among which some are shared on purpose (`[shapes] * batch`).
    """
    description = flatten(value, tensors, sizes_on, {})
    if len({*map(id, tensors)}) == len(tensors):
        return description
    given, kept = iter(list(tensors)), tensors
    kept.clear()
    return _sharing(description, given, kept, {})


def _sharing(description: Any, given: Iterator[torch.Tensor], kept: list[torch.Tensor], places: dict[int, int]) -> Any:
    tag = description[0]
    if tag in ("tensor", "size"):
        tensor = next(given)
        if tag == "tensor" and id(tensor) in places:
            return ("same", places[id(tensor)])
        if tag == "tensor":
            places[id(tensor)] = len(kept)
        kept.append(tensor)
        return description
    if tag in ("plain", "shared"):
        return description
    tag, kind, content = description
    if tag == "sequence":
        return (tag, kind, tuple([_sharing(item, given, kept, places) for item in content]))
    return (tag, kind, tuple([(key, _sharing(item, given, kept, places)) for key, item in content]))


def flatten(
    value: Any,
    tensors: list[torch.Tensor],
    sizes_on: torch.device | None = None,
    containers: dict[int, int] | None = None,
) -> Hashable:
    """Append the tensors of `value` to `tensors`, depth first, and return a hashable description of the rest.

    With `sizes_on`, a device, an integer of the caller's (`height`, `num_frames`) is a size like those of tensors, which
    may differ between two calls of one trace: it is described by a tensor [n, 0] on that device.
    `containers`: numbers of the lists, dictionaries and dataclasses found so far, by their ids; None where nobody asks.

    Raises:
        UnsupportedStructure: `value` holds something other than tensors, plain values, tuples, lists, mappings,
            dataclasses and diffusers or transformers outputs, or a function or class of somebody's own.
    """
    kind = type(value)
    if kind in _EXACT:
        return ("plain", kind, value)  # 1, 1.0 and True are equal in Python but not for a model
    if kind in _TENSORS or isinstance(value, torch.Tensor):
        if kind not in _TENSORS or value.layout is not torch.strided:
            raise UnsupportedStructure(f"a tensor of type {_name(kind)} and layout {value.layout} cannot be traced")
        tensor = plain(value)
        if tensor.__dict__ and not all(map(_is_compilers, tensor.__dict__)):
            raise UnsupportedStructure("a tensor with attributes of somebody's own cannot be traced")
        tensors.append(tensor)
        return PARAMETER if kind is torch.nn.Parameter else TENSOR
    if kind is int:
        if sizes_on is not None and 0 <= value <= LARGEST_SIZE:
            tensors.append(_of_size(value, sizes_on))
            return SIZE
        return ("plain", kind, value)
    if kind is float:
        return ("plain", kind, value) if value and value == value else _zero_or_nan(kind, value)
    plainly = kind in _CONTAINERS  # most are, and all other questions take ten times as long as this one
    if not plainly and isinstance(value, PLAIN):
        return _of_plain(kind, value)
    if containers is not None and not isinstance(value, tuple):
        if (number := containers.setdefault(id(value), -1)) >= 0:
            return ("shared", number)
        containers[id(value)] = len(containers) - 1
    if not plainly and dataclasses.is_dataclass(kind):
        return _of_dataclass(kind, value, tensors, sizes_on, containers)
    if isinstance(value, (tuple, list)):
        _refuse_attributes(kind, value)
        # An integer in a list may be there to be counted up (the place in a cache), which no size can be.
        on = [None if kind is list and type(item) is int else sizes_on for item in value]
        items = [flatten(item, tensors, where, containers) for item, where in zip(value, on, strict=True)]
        return ("sequence", kind, tuple(items))
    if kind is dict or (isinstance(value, Mapping) and _takes_pairs(kind)):
        _refuse_attributes(kind, value)
        return ("mapping", kind, _of_items(value, tensors, sizes_on, containers))
    if isinstance(value, torch.Generator):
        raise UnsupportedStructure("it draws from a random generator of the caller's, and a trace from PyTorch's own")
    raise UnsupportedStructure(f"a value of type {_name(kind)} cannot be traced")


def _of_items(
    items: Mapping[Any, Any],
    tensors: list[torch.Tensor],
    sizes_on: torch.device | None,
    containers: dict[int, int] | None,
) -> tuple[tuple[Hashable, Hashable], ...]:
    if any([type(key) is not str for key in items]):
        kinds = {type(key) for key in items} - {str, int, type(None)}
        if any([not issubclass(kind, enum.Enum) for kind in kinds]):  # 1.0 and True are 1 as a key
            raise UnsupportedStructure("a dictionary with keys other than strings and integers cannot be traced")
    return tuple([(key, flatten(item, tensors, sizes_on, containers)) for key, item in items.items()])


def _of_dataclass(
    kind: type,
    value: Any,
    tensors: list[torch.Tensor],
    sizes_on: torch.device | None,
    containers: dict[int, int] | None,
) -> tuple[Hashable, ...]:
    fields = dataclasses.fields(kind)
    names = {field.name for field in fields}
    if not all(field.init for field in fields) or not names.issuperset(getattr(value, "__dict__", ())):
        raise UnsupportedStructure(f"a value of type {_name(kind)} with more in it than its fields cannot be traced")
    if isinstance(value, Mapping):  # diffusers' and transformers' ModelOutput
        return ("mapping", kind, _of_items(value, tensors, sizes_on, containers))
    items = {field.name: getattr(value, field.name) for field in fields}
    return ("dataclass", kind, _of_items(items, tensors, sizes_on, containers))


def _of_plain(kind: type, value: Any) -> Hashable:
    """Of values that are not of the very types for which equal is the same."""
    if isinstance(value, enum.Enum):
        return ("plain", kind, value)
    if isinstance(value, _CODE):
        own = value if isinstance(value, type) else getattr(value, "__self__", None)
        bound = own is not None and not isinstance(own, (types.ModuleType, type))
        if bound or is_users(getattr(own if isinstance(own, type) else value, "__module__", None)) or _carries(value):
            name = getattr(value, "__qualname__", kind.__qualname__)
            raise UnsupportedStructure(f"nobody can see whether `{name}`, a function or class, will do the same again")
        return ("plain", kind, value)
    _refuse_attributes(kind, value)
    if isinstance(value, float):
        return ("plain", kind, value) if value and value == value else _zero_or_nan(kind, value)
    return ("plain", kind, value, repr(value)) if isinstance(value, complex) else ("plain", kind, value)


def _zero_or_nan(kind: type, value: float) -> Hashable:
    """0.0 and -0.0 are equal, and NaN is not, but only Python takes them for that."""
    if value == 0:
        return ("plain", kind, value) if math.copysign(1.0, value) > 0 else ("plain", kind, value, "negative")
    return ("plain", kind, math.nan if kind is float else value, "nan")


def _carries(function: Any) -> bool:
    """Whether a function has values of its own."""
    return bool(getattr(function, "__closure__", None)) or bool(not isinstance(function, type) and vars_of(function))


def _is_compilers(name: str) -> bool:
    """Whether it is an attribute that torch.compile gives to results of another size than at first: a neighbour may be its."""
    return name.startswith("_dynamo_")


def vars_of(value: Any) -> Mapping[str, Any]:
    """The attributes of an object, where it has any."""
    return getattr(value, "__dict__", {})


def _refuse_attributes(kind: type, value: Any) -> None:
    if vars_of(value):
        raise UnsupportedStructure(f"a value of type {_name(kind)} with attributes cannot be traced")


def _name(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def unflatten(description: Any, tensors: list[torch.Tensor], of_size: Callable[[Any], Any] | None = None) -> Any:
    """Put together what `flatten` took apart; takes tensors from the front of `tensors`, and `of_size` of each size."""
    return _build(description, iter(tensors), tensors, of_size, [])


def _build(
    description: Any,
    rest: Iterator[torch.Tensor],
    tensors: list[torch.Tensor],
    of_size: Callable[[Any], Any] | None,
    containers: list[Any],
) -> Any:
    tag = description[0]
    if tag == "tensor":
        return next(rest)
    if tag == "same":
        return tensors[description[1]]
    if tag == "shared":
        if containers[description[1]] is None:
            raise UnsupportedStructure("a list or dictionary that contains itself cannot be traced")
        return containers[description[1]]
    if tag == "size":
        size = next(rest).shape[0]
        return size if of_size is None else of_size(size)
    _, kind, content, *_ = description
    if tag == "plain":
        return content
    number = None if issubclass(kind, tuple) else len(containers)
    if number is not None:
        containers.append(None)
    if tag == "sequence":
        items = [_build(item, rest, tensors, of_size, containers) for item in content]
        built = kind(*items) if hasattr(kind, "_fields") else kind(items)
    else:
        fields = {key: _build(item, rest, tensors, of_size, containers) for key, item in content}
        built = kind(fields) if tag == "mapping" and not dataclasses.is_dataclass(kind) else kind(**fields)
    if number is not None:
        containers[number] = built
    return built


def _takes_pairs(kind: type) -> bool:
    return issubclass(kind, dict) and kind.__init__ is dict.__init__


def layout(tensor: torch.Tensor) -> tuple[int, ...]:
    """How a tensor lies in memory: its strides, but for sizes of one, where whoever has made it may have chosen any."""
    strides, sizes = tensor.stride(), tensor.shape
    if 1 not in sizes:
        return strides
    return tuple([stride if size != 1 else 0 for stride, size in zip(strides, sizes, strict=True)])


@functools.lru_cache(maxsize=1024)
def _of_size(size: int, device: torch.device) -> torch.Tensor:
    """The same tensor for the same size, so that it is seen to stay the same from step to step."""
    with torch.inference_mode(False):
        return torch.empty((size, 0), device=device)


def describe_shapes(tensors: list[torch.Tensor]) -> str:
    """Shapes for a log line, e.g. `2x4x64x64, 2x77x768, 24`."""
    shapes = [t.shape[:1] if t.shape[1:] == (0,) else t.shape for t in tensors]
    return ", ".join("x".join(map(str, shape)) or "scalar" for shape in shapes)
