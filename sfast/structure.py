"""Nested arguments as a flat list of tensors and a hashable description of everything else.

A trace is valid for one structure: which keys are there, which values are None, every number, string and flag. Tensors are
the only thing that may differ between two calls of the same trace.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
import types
from collections.abc import Callable, Hashable, Iterator, Mapping
from typing import Any

import torch

from sfast.known import plain


class UnsupportedStructure(TypeError):
    """An argument or result holds an object that cannot be taken apart and put together again."""


PLAIN = (
    type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.memory_format, torch.layout,
    enum.Enum, type, types.FunctionType, types.BuiltinFunctionType, types.MethodType,
)  # fmt: skip

TENSOR = ("tensor",)  # the place of one tensor in a description
SIZE = ("size",)  # and of an integer that may be a size: that of a tensor with nothing in it, which stands for it
LARGEST_SIZE = 2**31 - 1


def flatten(value: Any, tensors: list[torch.Tensor], sizes_on: torch.device | None = None) -> Hashable:
    """Append the tensors of `value` to `tensors`, depth first, and return a hashable description of the rest.

    With `sizes_on`, a device, an integer of the caller's (`height`, `num_frames`) is a size like those of tensors, which
    may differ between two calls of one trace: it is described by a tensor [n, 0] on that device.

    Raises:
        UnsupportedStructure: `value` holds something other than tensors, plain values, tuples, lists, mappings,
            dataclasses and diffusers or transformers outputs.
    """
    if isinstance(value, torch.Tensor):
        tensors.append(plain(value))
        return TENSOR
    if sizes_on is not None and type(value) is int and 0 <= value <= LARGEST_SIZE:
        tensors.append(_of_size(value, sizes_on))
        return SIZE
    if isinstance(value, PLAIN):
        # 1, 1.0 and True are equal in Python but not for a model.
        return ("plain", type(value), value)
    kind = type(value)
    if isinstance(value, (tuple, list)):
        # An integer in a list may be there to be counted up (the place in a cache), which no size can be.
        on = [None if kind is list and type(item) is int else sizes_on for item in value]
        return ("sequence", kind, tuple([flatten(item, tensors, where) for item, where in zip(value, on, strict=True)]))
    if isinstance(value, Mapping):  # also diffusers' and transformers' ModelOutput
        if dataclasses.is_dataclass(value) or kind in (dict,) or _takes_pairs(kind):
            items = tuple([(key, flatten(item, tensors, sizes_on)) for key, item in value.items()])
            return ("mapping", kind, items)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: getattr(value, f.name) for f in dataclasses.fields(value) if f.init}
        items = tuple([(name, flatten(item, tensors, sizes_on)) for name, item in fields.items()])
        return ("dataclass", kind, items)
    if isinstance(value, torch.Generator):
        raise UnsupportedStructure("it draws from a random generator of the caller's, and a trace from PyTorch's own")
    raise UnsupportedStructure(f"a value of type {kind.__module__}.{kind.__qualname__} cannot be traced")


def unflatten(description: Any, tensors: list[torch.Tensor], of_size: Callable[[Any], Any] | None = None) -> Any:
    """Put together what `flatten` took apart; takes tensors from the front of `tensors`, and `of_size` of each size."""
    return _build(description, iter(tensors), of_size)


def _build(description: Any, tensors: Iterator[torch.Tensor], of_size: Callable[[Any], Any] | None) -> Any:
    tag = description[0]
    if tag == "tensor":
        return next(tensors)
    if tag == "size":
        size = next(tensors).shape[0]
        return size if of_size is None else of_size(size)
    _, kind, content = description
    if tag == "plain":
        return content
    if tag == "sequence":
        items = [_build(item, tensors, of_size) for item in content]
        return kind(*items) if hasattr(kind, "_fields") else kind(items)
    fields = {key: _build(item, tensors, of_size) for key, item in content}
    if tag == "mapping" and not dataclasses.is_dataclass(kind):
        return kind(fields)
    return kind(**fields)


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
