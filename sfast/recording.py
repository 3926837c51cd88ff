"""Python numbers while a call is traced: what becomes of them, and tensors where they meet tensors.

For everybody else, another thread that reads the module's attributes meanwhile above all, a `Number` is the float that it
stands for. What reads it past its methods in the thread that traces, as C code does, bakes its value in. Of that kind are the
functions of `math`, so while a call is traced they give such a number up (`_Functions`); for the rest there is the check of the
next values.
"""

from __future__ import annotations

import contextlib
import math
import operator
import sys
import threading
from collections.abc import Callable, Hashable, Iterator, Mapping
from types import BuiltinFunctionType
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from sfast.sizes import is_of_models

Place = tuple[Hashable, ...]  # where a number stands: ("attribute", path) or ("argument", index, index, ...)
Values = Mapping[Place, float]
Question = tuple[Callable[[Values], float], str, Callable[[Values], float]]


class Pinned(Exception):
    """The computation depends on numbers in a way that only their values can say."""

    def __init__(self, places: set[Place]) -> None:
        super().__init__(f"numbers are baked in: {places}")
        self.places = places


class Number(float):
    """A float while Python is traced: `exact` is its value, and `tensor` makes the 0-dimensional tensor that it is."""

    exact: float
    places: frozenset[Place]  # of the numbers that it is computed from
    value: Callable[[Values], float]  # what it is when these have other values
    tensor: Callable[[torch.dtype], torch.Tensor]
    recording: Recording

    def __new__(cls, exact: float, **parts: Any) -> Number:
        made = super().__new__(cls, exact)
        made.__dict__.update(parts, exact=exact)
        return made

    def __bool__(self) -> bool:
        return bool(self.recording.ask(self, "ne", 0.0))

    def __reduce_ex__(self, protocol: Any) -> Any:
        return float, (self.recording.pin(self),)

    def __pos__(self) -> Number:
        return self

    def __neg__(self) -> Any:
        return self.recording.computed(-self.exact, operator.neg, [self])


def _compute(name: str, reflected: bool) -> Callable[[Number, Any], Any]:
    function = getattr(operator, name)

    def method(self: Number, other: Any) -> Any:
        if not isinstance(other, (int, float)):
            return NotImplemented  # a tensor's own method is asked
        a, b = (other, self) if reflected else (self, other)
        exact = function(exact_of(a), exact_of(b))
        return self.recording.computed(exact, function, [a, b])

    return method


def _compare(name: str) -> Callable[[Number, Any], Any]:
    def method(self: Number, other: Any) -> Any:
        return self.recording.ask(self, name, other) if isinstance(other, (int, float)) else NotImplemented

    return method


def _pinned(name: str) -> Callable[..., Any]:
    def method(self: Number, *args: Any) -> Any:
        return getattr(self.recording.pin(self), name)(*args)

    return method


# IEEE arithmetic, which a GPU does in fp64 as Python does it.
_COMPUTED = ("add", "sub", "mul", "truediv")
_COMPARED = ("lt", "le", "eq", "ne", "gt", "ge")
for _method in _COMPUTED:
    setattr(Number, f"__{_method}__", _compute(_method, reflected=False))
    setattr(Number, f"__r{_method}__", _compute(_method, reflected=True))
for _method in _COMPARED:
    setattr(Number, f"__{_method}__", _compare(_method))
for _method in vars(float):
    if _method not in vars(Number) and callable(getattr(float, _method)) and not _method.startswith("__get"):
        setattr(Number, _method, _pinned(_method))


def exact_of(number: Any) -> Any:
    """The value of a number, whatever stands for it."""
    return number.exact if isinstance(number, Number) else number


class _Functions:
    """The functions of `math`, wherever the module itself or the files of models name them: none may read a `Number`."""

    def __init__(self) -> None:
        self._before: list[tuple[dict[str, Any], str, Any]] = []

    def exchange(self) -> None:
        """Have them pin the numbers that they get."""
        own = {id(each): _pinning(each) for each in vars(math).values() if isinstance(each, BuiltinFunctionType)}
        files = [vars(module) for name, module in list(sys.modules.items()) if is_of_models(name, module)]
        for names in [vars(math), *files]:
            for name, value in list(names.items()):
                if id(value) in own:
                    self._before.append((names, name, value))
                    names[name] = own[id(value)]

    def put_back(self) -> None:
        """Leave everything as it was."""
        while self._before:
            names, name, value = self._before.pop()
            names[name] = value


def _pinning(function: Callable[..., Any]) -> Callable[..., Any]:
    def pinned(*args: Any, **kwargs: Any) -> Any:
        return function(*map(_given_up, args), **{name: _given_up(arg) for name, arg in kwargs.items()})

    return pinned


def _given_up(value: Any) -> Any:
    return value.recording.pin(value) if isinstance(value, Number) else value


class Recording(TorchFunctionMode):
    """Numbers in the places of some of a call's, what Python asks about them, and tensors where they meet tensors."""

    def __init__(self, places: list[Place], values: Values) -> None:
        super().__init__()
        self.vector: torch.Tensor | None = None  # of the numbers' values, fp64 [places]: while tracing
        self.questions: dict[Hashable, tuple[Question, bool]] = {}
        self.pinned: set[Place] = set()
        self._thread = 0
        self._cast: dict[torch.dtype, torch.Tensor] = {}
        self.places = places
        self._numbers = {place: self._number(i, place, values[place]) for i, place in enumerate(places)}
        self._functions = _Functions()

    def __enter__(self) -> Recording:
        self._thread = threading.get_ident()
        super().__enter__()
        self._functions.exchange()
        return self

    def __exit__(self, *error: Any) -> None:
        self._functions.put_back()
        super().__exit__(*error)
        self._thread, self.vector = 0, None
        self._cast.clear()

    def in_arguments(self, structure: Any) -> Any:
        """A call's structure with the numbers in it."""
        for place, number in self._numbers.items():
            if place[0] == "argument":
                structure = replaced(structure, place[1:], ("plain", Number, number))
        return structure

    @contextlib.contextmanager
    def in_attributes(self, containers: Mapping[str, tuple[Any, Any]]) -> Iterator[None]:
        """For a while the numbers stand in the module's attributes, each in its (container, key)."""
        places = [(containers[str(p[1])], number) for p, number in self._numbers.items() if p[0] == "attribute"]
        before = [container[key] for (container, key), _ in places]
        try:
            for (container, key), number in places:
                container[key] = number
            yield
        finally:
            for ((container, key), number), value in zip(places, before, strict=True):
                if container[key] is number:
                    container[key] = value

    def check(self) -> None:
        """Raise `Pinned` if the trace is none for other values."""
        if self.pinned:
            raise Pinned(self.pinned)

    # What numbers ask for.

    def ask(self, number: Number, name: str, other: Any) -> bool:
        """Compare, and note the answer."""
        answer = bool(getattr(operator, name)(number.exact, exact_of(other)))
        if self._listens():
            left, right = number.value, _value_of(other)
            self.questions[_identity(number), name, _identity(other)] = (left, name, right), answer
        return answer

    def pin(self, number: Number) -> float:
        """Its value; nothing else can take its place."""
        if self._listens():
            self.pinned |= number.places
        return number.exact

    def computed(self, exact: float, function: Callable[..., float], operands: list[Any]) -> Any:
        """The number that Python has computed from others."""
        if not self._listens():
            return exact
        values = [_value_of(each) for each in operands]
        places = frozenset[Place]().union(*[each.places for each in operands if isinstance(each, Number)])

        def tensor(dtype: torch.dtype) -> torch.Tensor:
            wide = [each.tensor(torch.float64) if isinstance(each, Number) else each for each in operands]
            result: torch.Tensor = function(*wide)
            return result.to(dtype)

        made = Number(exact, recording=self, places=places, tensor=tensor)
        made.value = lambda given: function(*[value(given) for value in values])
        made.__dict__["identity"] = (function, *map(_identity, operands))
        return made

    def _number(self, i: int, place: Place, exact: float) -> Number:
        def tensor(dtype: torch.dtype) -> torch.Tensor:
            if dtype not in self._cast:
                assert self.vector is not None
                self._cast[dtype] = self.vector.to(dtype)
            return self._cast[dtype][i]

        made = Number(exact, recording=self, places=frozenset([place]), tensor=tensor)
        made.value = operator.itemgetter(place)
        made.__dict__["identity"] = place
        return made

    def _listens(self) -> bool:
        return threading.get_ident() == self._thread

    # What operators get.

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not any(_has_number(value) for value in (*args, *kwargs.values())):
            return func(*args, **kwargs)
        name = getattr(func, "__name__", "")
        if name in _WITH_TENSORS and not kwargs and len(args) == 2:
            result = self._with_tensor(_WITH_TENSORS[name], *args)
            if result is not None:
                return args[0].copy_(result) if name.endswith("_") and not name.endswith("__") else result
        elif name == "__setitem__" and isinstance(args[2], Number) and self._suits(args[0]):
            return func(args[0], args[1], args[2].tensor(args[0].dtype))
        elif func is torch.tensor and (made := self._made_of(*args, **kwargs)) is not None:
            return made
        return func(*_plain(self, args), **_plain(self, kwargs))

    def _with_tensor(self, function: Callable[..., torch.Tensor], a: Any, b: Any) -> torch.Tensor | None:
        """As eager computes: the number in the dtype in which such tensors are computed with, the result in theirs."""
        tensor = a if isinstance(a, torch.Tensor) else b
        if not self._suits(tensor):
            return None
        wide = torch.float32 if tensor.dtype in (torch.float16, torch.bfloat16) else tensor.dtype
        a, b = [x.tensor(wide) if isinstance(x, Number) else x.to(wide) for x in (a, b)]
        return function(a, b).to(tensor.dtype)

    def _made_of(
        self, data: Any, dtype: torch.dtype | None = None, device: Any = "cpu", **more: Any
    ) -> torch.Tensor | None:
        """`torch.tensor(data)`, of a number or a list of numbers."""
        assert self.vector is not None
        dtype = dtype or torch.get_default_dtype()
        numbers = data if isinstance(data, list) else [data]
        plain = all(isinstance(number, Number) for number in numbers) and dtype.is_floating_point and not more
        if not plain or torch.device(device or "cpu") != self.vector.device:
            return None
        tensors = [number.tensor(dtype) for number in numbers]
        return torch.stack(tensors) if isinstance(data, list) else tensors[0].clone()

    def _suits(self, tensor: Any) -> bool:
        assert self.vector is not None
        return isinstance(tensor, torch.Tensor) and tensor.is_floating_point() and tensor.device == self.vector.device


_WITH_TENSORS: dict[str, Callable[..., torch.Tensor]] = {
    **dict.fromkeys(("mul", "mul_", "__mul__", "__rmul__", "multiply"), torch.mul),
    **dict.fromkeys(("add", "add_", "__add__", "__radd__"), torch.add),
    **dict.fromkeys(("sub", "sub_", "__sub__", "subtract"), torch.sub),
    **dict.fromkeys(("div", "div_", "__truediv__", "divide", "true_divide"), torch.div),
    **dict.fromkeys(("rsub", "__rsub__"), lambda a, b: torch.sub(b, a)),
}


def _value_of(number: Any) -> Callable[[Values], float]:
    return number.value if isinstance(number, Number) else lambda values: number


def _identity(number: Any) -> Hashable:
    return number.__dict__["identity"] if isinstance(number, Number) else (type(number), number)


def _has_number(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return any(map(_has_number, value))
    return isinstance(value, Number)


def _plain(recording: Recording, value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(recording, item) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)([_plain(recording, item) for item in value])
    return recording.pin(value) if isinstance(value, Number) else value


def replaced(structure: Any, path: Place, by: Any) -> Any:
    """A description by `structure.flatten` with something else at a path."""
    if not path:
        return by
    i, *rest = path
    assert isinstance(i, int)
    return (*structure[:i], replaced(structure[i], tuple(rest), by), *structure[i + 1 :])
