"""Python numbers while a call is traced: what becomes of them, and tensors where they meet tensors.

A `Number` is no `float`, though `isinstance` says so: so C code, which reads a float without asking it, has to call
`__float__` (`math.exp`, `struct.pack`, `"%f" %`), which pins the number, or refuses it, which ends the trace. Functions of
PyTorch hand a number over to whoever listens, at any place among their arguments (`__torch_function__`).

Another thread that reads the module's attributes meanwhile must find floats. Where there may be one, a `Float` stands in
these places, which is one to C code, too; what is baked in by it comes out by comparison with eager at every value.
"""

from __future__ import annotations

import contextlib
import operator
import threading
from collections.abc import Callable, Hashable, Iterator, Mapping
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

Place = tuple[Hashable, ...]  # where a number stands: ("attribute", path) or ("argument", index, index, ...)
Values = Mapping[Place, float]
Question = tuple[Callable[[Values], float], str, Callable[[Values], float]]


class Pinned(Exception):
    """The computation depends on numbers in a way that only their values can say."""

    def __init__(self, places: set[Place]) -> None:
        super().__init__(f"numbers are baked in: {places}")
        self.places = places


class Number:
    """Passes for a float while Python is traced: `exact` is its value, and `tensor` makes the tensor [] that it is."""

    exact: float
    places: frozenset[Place]  # of the numbers that it is computed from
    value: Callable[[Values], float]  # what it is when these have other values
    tensor: Callable[[torch.dtype], torch.Tensor]
    recording: Recording
    __class__ = property(lambda self: float)  # what `isinstance` asks

    def __new__(cls, exact: float, **parts: Any) -> Number:
        made = cls._make(exact)
        made.__dict__.update(parts, exact=exact)
        return made

    @classmethod
    def _make(cls, exact: float) -> Number:
        return object.__new__(cls)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Where no recording looks first: in other threads, or where it stands too deep among the arguments."""
        return func(*_plain(args), **_plain(kwargs or {}))

    def __array__(self, *args: Any, **kwargs: Any) -> Any:
        import numpy

        return numpy.asarray(self.recording.pin(self), *args)

    def __bool__(self) -> bool:
        return bool(self.recording.ask(self, "ne", 0.0))

    @property
    def real(self) -> float:
        """As of every float."""
        return self.recording.pin(self)

    imag = 0.0

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
        if name == "truediv" and isinstance(b, Number):
            self.recording.ask(b, "ne", 0.0)  # Python raises where a tensor is infinite
        return self.recording.computed(exact, function, [a, b])

    return method


def _compare(name: str) -> Callable[[Number, Any], Any]:
    def method(self: Number, other: Any) -> Any:
        return self.recording.ask(self, name, other) if isinstance(other, (int, float)) else NotImplemented

    return method


def _pinned(name: str) -> Callable[..., Any]:
    def method(self: Number, *args: Any) -> Any:
        return getattr(self.recording.pin(self), name)(*map(_plain, args))

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
    if _method not in vars(Number) and callable(getattr(float, _method)) and not _method.startswith(("__get", "__new")):
        setattr(Number, _method, _pinned(_method))


class Float(Number, float):  # type: ignore[misc]
    """A number that is a float even to C code."""

    @classmethod
    def _make(cls, exact: float) -> Number:
        return float.__new__(cls, exact)


def exact_of(number: Any) -> Any:
    """The value of a number, whatever stands for it."""
    return number.exact if isinstance(number, Number) else number


class Recording(TorchFunctionMode):
    """Numbers in the places of some of a call's, what Python asks about them, and tensors where they meet tensors."""

    def __init__(self, places: list[Place], values: Values, shared: bool = False) -> None:
        """`shared`: other threads may read the module's attributes meanwhile."""
        super().__init__()
        self.shared = shared and any(place[0] == "attribute" for place in places)
        self.vector: torch.Tensor | None = None  # of the numbers' values, fp64 [places]: while tracing
        self.questions: dict[Hashable, tuple[Question, bool]] = {}
        self.pinned: set[Place] = set()
        self._thread = 0
        self._cast: dict[torch.dtype, torch.Tensor] = {}
        self.places = places
        self._numbers = {place: self._number(i, place, values[place]) for i, place in enumerate(places)}

    def __enter__(self) -> Recording:
        self._thread = threading.get_ident()
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
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

        kind = Float if self.shared and place[0] == "attribute" else Number
        made = kind(exact, recording=self, places=frozenset([place]), tensor=tensor)
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
        elif (
            name == "__setitem__"
            and isinstance(args[2], Number)
            and self._suits(args[0])
            and self._fits(args[2], args[0])
        ):
            return func(args[0], args[1], args[2].tensor(args[0].dtype))
        elif func is torch.tensor and (made := self._made_of(*args, **kwargs)) is not None:
            return made
        return func(*_plain(args), **_plain(kwargs))

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

    def _fits(self, number: Number, tensor: torch.Tensor) -> bool:
        """Whether PyTorch would take it for an element, and not raise an error."""
        largest = torch.finfo(tensor.dtype).max
        return self.ask(number, "le", largest) and self.ask(number, "ge", -largest)

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


def _plain(value: Any) -> Any:
    """Without numbers: they are given up."""
    if isinstance(value, Number):
        return value.recording.pin(value)
    if type(value) is dict:
        return {key: _plain(item) for key, item in value.items()}
    return type(value)([_plain(item) for item in value]) if type(value) in (list, tuple) else value


def replaced(structure: Any, path: Place, by: Any) -> Any:
    """A description by `structure.flatten` with something else at a path."""
    if not path:
        return by
    i, *rest = path
    assert isinstance(i, int)
    return (*structure[:i], replaced(structure[i], tuple(rest), by), *structure[i + 1 :])
