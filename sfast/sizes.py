"""Numbers that Python makes of sizes stay sizes while a call is traced, so that one trace serves them all.

A size is a tensor then, and arithmetic with it is recorded. `int(h / 2)`, `len(x)` and `math.ceil(h / 8)` would end that with
a number for the one shape at hand; here they give tensors. Whatever needs a number after all (`range`, an `if`) asks for
it in its own time, and that is noted: see `reads.py`. Fractions are computed in double precision, as Python does it.
"""

from __future__ import annotations

import builtins
import math
import operator
import sys
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sfast.patches import is_users
from sfast.reads import Reads, is_traced_by, listed
from sfast.recording import Number

_MODELS = ("diffusers.models.", "transformers.models.")
_ROUNDING: dict[str, tuple[Callable[..., Any], Callable[[Tensor], Tensor]]] = {
    "__round__": (round, torch.round),
    "__trunc__": (math.trunc, torch.trunc),
    "__floor__": (math.floor, torch.floor),
    "__ceil__": (math.ceil, torch.ceil),
}
_SHOWN: dict[str, Callable[[Any], Any]] = {"__hash__": hash, "__repr__": repr}  # as those of the number
# Of integers: what tensors compute only as long as it fits into 64 bits, and the right operands that it may have.
LIMITED: dict[Any, tuple[Callable[[Any, Any], Any], range | None]] = {
    Tensor.mul: (operator.mul, None),
    **dict.fromkeys((Tensor.pow, Tensor.__pow__), (operator.pow, range(4))),
    Tensor.__rpow__: (lambda x, y: y**x, range(0)),
    **dict.fromkeys((Tensor.__lshift__, torch.bitwise_left_shift), (operator.lshift, range(17))),
}
LARGE = 2**40  # where tensors of sizes may overflow at other shapes, and Python does not
_DIVISIONS = frozenset((Tensor.div, Tensor.__rdiv__))
ARITHMETIC = _DIVISIONS.union(
    (Tensor.add, Tensor.sub, Tensor.__rsub__, Tensor.mul, Tensor.pow, Tensor.__rpow__, Tensor.neg, Tensor.abs),
    (Tensor.__floordiv__, Tensor.__rfloordiv__, Tensor.remainder, Tensor.__rmod__),
    (Tensor.lt, Tensor.le, Tensor.gt, Tensor.ge, Tensor.__eq__, Tensor.__ne__),
)


CONSTRUCTORS = frozenset((torch.tensor, torch.as_tensor))


class Sizes:
    """What Python's functions of numbers do for sizes, between `start` and `stop`, in one thread."""

    def __init__(self, reads: Reads, keep: bool = True, checked: bool = False) -> None:
        self._reads = reads
        # `len({h, w})` asks for more than it needs: whether they are equal is noted anyway. Where each shape is compared with
        # eager, the comparison tells the rest.
        self._hashes_unnoted = checked and keep
        self._keeps = keep  # or else all that Python makes of sizes are numbers
        self.fractions: dict[int, Tensor] = {}  # of sizes, by their ids
        self._thread = 0
        self._len: Callable[[Any], int] = getattr(builtins.len, "own", builtins.len)

    def start(self) -> None:
        """Let rounding, `len` and `int` take sizes; `int` by its name in the files of models."""
        self._thread = threading.get_ident()
        for name, rounded in _ROUNDING.items():
            setattr(Tensor, name, self._rounding(*rounded))
        for name, shown in _SHOWN.items():
            setattr(Tensor, name, self._showing(shown, getattr(getattr(Tensor, name), "own", getattr(Tensor, name))))
        self._files: list[dict[str, Any]] = []
        if self._keeps:
            builtins.len = self._length()
            files = [vars(module) for name, module in list(sys.modules.items()) if is_of_models(name, module)]
            self._files = [*{id(file): file for file in files}.values()]
            names = self._kinds()
            for file in self._files:
                file.update(names)

    def stop(self) -> None:
        """Leave everything as it was."""
        builtins.len = self._len
        for name in _ROUNDING:
            if name in vars(Tensor):
                delattr(Tensor, name)
        for name in _SHOWN:
            setattr(Tensor, name, getattr(getattr(Tensor, name), "own", getattr(Tensor, name)))
        for file in self._files:
            for name in _NAMES:
                file.pop(name, None)

    def arithmetic(self, func: Any, args: tuple[Any, ...]) -> Any:
        """What an operator gives for numbers that Python would compute with in double precision, or without any limit.

        None for all others.
        """
        if not self._keeps or (func not in ARITHMETIC and func not in LIMITED):
            return None
        if func not in _DIVISIONS and not any([isinstance(x, float) or id(x) in self.fractions for x in args]):
            return self._large(func, args)  # integers, or no numbers
        if not all(map(self._is_number, args)):
            return None
        with torch._C.DisableTorchFunction():
            x, *others = [arg.double() if isinstance(arg, Tensor) else arg for arg in args]
            if func is Tensor.__rdiv__:  # it multiplies by 1 / x, which rounds twice
                result = torch.tensor(others[0], dtype=torch.float64) / x
            else:
                result = func(x, *others)
        if result.is_floating_point():
            self.fractions[id(result)] = result
        return result

    def _large(self, func: Any, args: tuple[Any, ...]) -> Any:
        """The number that integers become where it is too large for a tensor: it is one for these sizes alone."""
        if (
            func not in LIMITED
            or len(args) != 2
            or not all(map(_may_be_whole, args))
            or not all(map(self._is_number, args))
        ):
            return None
        function, allowed = LIMITED[func]
        with torch._C.DisableTorchFunction():
            values = [torch._C.TensorBase.item(arg) if isinstance(arg, Tensor) else arg for arg in args]
        exact = function(*values)
        if abs(exact) < LARGE and (allowed is None or values[1] in allowed):
            return None
        for arg in args:
            if isinstance(arg, Tensor):
                arg.item()  # which is noted
        return exact

    def tensor(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
        """`torch.tensor` of sizes and numbers, put together by operators; None for everything else."""
        plain = func in CONSTRUCTORS and len(args) == 1 and kwargs.keys() <= {"dtype", "device"}
        parts = listed(args[0]) if plain and self._keeps else []
        if not any([isinstance(part, Tensor) for part in parts]) or not all(map(self._is_number, parts)):
            return None
        whole = not any([isinstance(part, float) or id(part) in self.fractions for part in parts])
        dtype = kwargs.get("dtype") or (torch.int64 if whole else torch.get_default_dtype())
        with torch._C.DisableTorchFunction():
            return _stacked(args[0]).to(kwargs.get("device") or torch.get_default_device(), dtype)

    def for_tensors(self, value: Any) -> Any:
        """An operator's argument: fractions of sizes are of the dtype that PyTorch gives them."""
        if not self.fractions:
            return value
        if isinstance(value, (list, tuple)) and type(value) in (list, tuple):
            return type(value)([self.for_tensors(item) for item in value])
        return value.to(torch.get_default_dtype()) if id(value) in self.fractions else value

    def has(self, value: Any) -> bool:
        """Whether a value is a size, or computed from sizes."""
        return isinstance(value, Tensor) and is_traced_by(self._thread) and self._reads.of_sizes(value)

    def _is_number(self, value: Any) -> bool:
        if not isinstance(value, Tensor):
            return type(value) in (int, float)
        if id(value) in self.fractions:
            return True
        return value.dim() == 0 and value.dtype is torch.int64 and value.is_cpu and self._reads.of_sizes(value)

    def _rounding(self, of_number: Callable[..., Any], of_tensor: Callable[[Tensor], Tensor]) -> Callable[..., Any]:
        def rounded(x: Tensor, *digits: Any) -> Any:
            if digits or not self._keeps or not is_traced_by(self._thread) or not self._reads.of_sizes(x):
                return of_number(x.item(), *digits)
            with torch._C.DisableTorchFunction():
                return of_tensor(x).long()

        return rounded

    def _length(self) -> Callable[[Any], Any]:
        def first_size(value: Any) -> Any:
            if isinstance(value, Tensor) and is_traced_by(self._thread) and value.dim():
                return value.size(0)
            return self._len(value)

        first_size.own = self._len  # type: ignore[attr-defined]
        return first_size

    def _showing(self, of_number: Callable[[Any], Any], of_tensor: Callable[[Tensor], Any]) -> Callable[[Tensor], Any]:
        def show(x: Tensor, **options: Any) -> Any:
            if (
                is_traced_by(self._thread)
                and (id(x) in self.fractions or x.dtype is torch.int64)
                and self._is_number(x)
            ):
                if of_number is hash and self._hashes_unnoted:
                    with torch._C.DisableTorchFunction():
                        return hash(torch._C.TensorBase.item(x))
                return of_number(x.item())
            return of_tensor(x, **options)

        show.own = of_tensor  # type: ignore[attr-defined]
        return show

    def _kinds(self) -> dict[str, type]:
        """`int`, but for sizes, and `type`, which calls them so."""
        sizes = self

        class Int(int, metaclass=_LikeInt):
            _sizes = sizes

            def __new__(cls, value: Any = 0, *base: Any) -> Any:
                return math.trunc(value) if sizes.has(value) else int(value, *base)

        class Type(type, metaclass=_LikeType):
            _int = Int

        Int.__name__ = Int.__qualname__ = "int"
        return {"int": Int, "type": Type}


def _may_be_whole(value: Any) -> bool:
    return type(value) is int or (isinstance(value, Tensor) and not value.dim() and value.dtype is torch.int64)


def _stacked(data: Any) -> Tensor:
    if isinstance(data, (list, tuple)):
        return torch.stack([_stacked(part) for part in data])
    return data.double() if isinstance(data, Tensor) else torch.tensor(data, dtype=torch.float64)


class _LikeInt(type):
    """Makes a class pass for `int` wherever somebody compares with it. A whole size is an instance."""

    _sizes: Sizes

    def __instancecheck__(cls, value: Any) -> bool:
        if isinstance(value, Tensor) and value.dim() == 0 and value.dtype is torch.int64:
            return cls._sizes.has(value)
        return isinstance(value, int)

    def __subclasscheck__(cls, kind: type) -> bool:
        return issubclass(kind, int)

    def __eq__(cls, other: object) -> bool:
        return other is int or other is cls

    def __hash__(cls) -> int:
        return hash(int)


class _LikeType(type):
    """Makes a class pass for `type`. The type of a size is `int`, and that of a number that is traced `float`."""

    _int: type

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        if len(args) != 1:
            return type(*args, **kwargs)
        kind = type(args[0])
        if kind is int or (kind is Tensor and isinstance(args[0], cls._int)):
            return cls._int
        return float if issubclass(kind, Number) else kind

    def __instancecheck__(cls, value: Any) -> bool:
        return isinstance(value, type)

    def __subclasscheck__(cls, kind: type) -> bool:
        return issubclass(kind, type)

    def __eq__(cls, other: object) -> bool:
        return other is type or other is cls

    def __hash__(cls) -> int:
        return hash(type)


_NAMES = ("int", "type")


def is_of_models(name: str, module: Any) -> bool:
    """Whether a model may be written in a file."""
    if not name.startswith(_MODELS) and not is_users(name):
        return False
    names = getattr(module, "__dict__", {})
    # Where an interruption has kept `stop` from its work, ours may still be there.
    free = all(name not in names or type(names[name]) in (_LikeInt, _LikeType) for name in _NAMES)
    return free and not {"torch", "nn", "Tensor"}.isdisjoint(names)
