"""Python numbers that change from call to call (strengths of a ControlNet or IP-Adapter, FreeU's factors) as inputs of a trace.

A trace bakes numbers in, so each new value of one would cost a new trace. Here a number that has changed once is traced as
an input: while the module's Python runs, a `Number` stands where the number stood, in the arguments or in an attribute.
Where it meets a tensor, an element of one more input takes its place in the graph, computed with as eager computes with
a Python number. Where Python decides by it (`if scale == 0`), the decision is noted: the trace serves every value for which
all of them turn out the same. Everything else that happens to it (it becomes a size, or an argument that no tensor can
stand for) pins it: then there is a trace for each of its values, as if nobody had looked.

As a plain float a `Number` is not a number (NaN): what reads it past its methods, as C code does, ruins the result, and
the check against eager refuses the trace, instead of a value being baked in without a word.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
import operator
import threading
from collections.abc import Callable, Hashable, Iterator, Mapping
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

MAX_KNOWN = 1024  # settings of numbers whose tensors are kept
MAX_FAMILIES = 256
CHECKS = 3  # values that each trace is compared with eager at, before the next ones are believed

Place = tuple[Hashable, ...]  # where a number stands: ("attribute", path) or ("argument", index, index, ...)
Values = Mapping[Place, float]
Question = tuple[Callable[[Values], float], str, Callable[[Values], float]]


class Pinned(Exception):
    """The computation depends on numbers in a way that only their values can say."""

    def __init__(self, places: set[Place]) -> None:
        super().__init__(f"numbers are baked in: {places}")
        self.places = places


# --------------------------------------------------------------------------------------------------------- while tracing


class Number(float):
    """A float while Python is traced: `exact` is its value, and `tensor` makes the 0-dimensional tensor that it is."""

    exact: float
    places: frozenset[Place]  # of the numbers that it is computed from
    value: Callable[[Values], float]  # what it is when these have other values
    tensor: Callable[[torch.dtype], torch.Tensor]
    recording: Recording

    def __new__(cls, exact: float, **parts: Any) -> Number:
        made = super().__new__(cls, math.nan)
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


class Recording(TorchFunctionMode):
    """Numbers in the places of some of a call's, what Python asks about them, and tensors where they meet tensors."""

    def __init__(self, places: list[Place], values: Values) -> None:
        super().__init__()
        self.vector: torch.Tensor | None = None  # of the numbers' values, fp64 [places]: while tracing
        self.questions: dict[Hashable, tuple[Question, bool]] = {}
        self.pinned: set[Place] = set()
        self._thread = 0
        self._cast: dict[torch.dtype, torch.Tensor] = {}
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
                structure = _replaced(structure, place[1:], ("plain", Number, number))
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


# ------------------------------------------------------------------------------------------------------ between the calls


@dataclasses.dataclass(eq=False)
class Variant:
    """One way of Python through the module, for all values of some numbers that lead there."""

    name: int
    places: list[Place]
    questions: dict[Hashable, tuple[Question, bool]] = dataclasses.field(default_factory=dict)
    checks: int = 0  # how many values it was compared with eager at

    def serves(self, values: Values) -> bool:
        """Whether Python would decide everything by these values as it did."""
        try:
            return all(
                bool(getattr(operator, name)(left(values), right(values))) == answer
                for (left, name, right), answer in self.questions.values()
            )
        except ArithmeticError:
            return False


@dataclasses.dataclass(frozen=True, eq=False)
class Given:
    """A call's numbers, taken out of its signature."""

    variant: Variant
    structure: Hashable  # of the call, without them
    key: Hashable  # of the module's state, without them
    tensor: torch.Tensor  # fp64 [places]
    values: Values
    family: _Family

    def record(self) -> Recording:
        """For a trace in which they are inputs."""
        return Recording(self.variant.places, self.values)


@dataclasses.dataclass(eq=False)
class _Family:
    """Signatures that differ in nothing but numbers."""

    first: Values
    changing: set[Place] = dataclasses.field(default_factory=set)
    pinned: set[Place] = dataclasses.field(default_factory=set)
    variants: dict[Hashable, list[Variant]] = dataclasses.field(default_factory=dict)


class Numbers:
    """Which numbers of a module's calls are inputs of its traces."""

    def __init__(self) -> None:
        self._families: dict[Hashable, _Family] = {}
        self._known: dict[Hashable, Given] = {}
        self._names = itertools.count()

    def forget(self) -> None:
        """The module computes something else now."""
        self._families.clear()
        self._known.clear()

    def known(self, signature: Hashable) -> Given | None:
        """What `find` has found before."""
        return self._known.get(signature) if self._known else None

    def find(
        self,
        signature: tuple[Hashable, ...],
        attributes: Mapping[str, float],
        key_without: Callable[[frozenset[str]], Hashable],
        device: torch.device,
    ) -> Given | None:
        """The numbers of a call that are inputs, because they have had other values; None where there are none.

        Args:
            signature: the call's structure, kinds of tensors, the state's key, and more.
            attributes: the module's own numbers, by their paths.
            key_without: the state's key without the attributes at some paths.
        """
        structure, kinds, _, *rest = signature
        values: dict[Place, float] = {("argument", *path): value for path, value in _numbers_in(structure)}
        values.update({("attribute", path): value for path, value in attributes.items()})
        if not values:
            return None
        everything = frozenset(values)
        if len(self._families) >= MAX_FAMILIES:
            del self._families[next(iter(self._families))]
        family = self._families.setdefault(
            (*_without(structure, key_without, everything), kinds, *rest), _Family(values)
        )
        changed = {place for place, value in values.items() if not _is_same(value, family.first[place])}
        new = changed - family.changing - family.pinned
        names = set(map(_name, new))
        family.changing |= {p for p in everything - family.pinned if names and _name(p) in names}
        places = sorted(family.changing - family.pinned, key=repr)
        if not changed or not places:
            return None
        erased, key = _without(structure, key_without, frozenset(places))
        variants = family.variants.setdefault((erased, key, tuple(places)), [])
        variant = next((each for each in variants if each.serves(values)), None)
        if variant is None:
            variant = Variant(next(self._names), places)
        with torch.inference_mode():  # such tensors have no version: nobody takes them for a prompt that stays
            tensor = torch.tensor([values[place] for place in places], dtype=torch.float64, device=device)
        return Given(variant, (erased, variant.name), key, tensor, values, family)

    def keep(self, signature: Hashable, given: Given, recording: Recording | None = None) -> None:
        """What was found, and perhaps traced, has proved right."""
        variant = given.variant
        if recording is not None and not recording.questions.keys() <= variant.questions.keys():
            variant.questions.update(recording.questions)
            self._known = {key: each for key, each in self._known.items() if each.variant is not variant}
        key = given.structure[0], given.key, tuple(variant.places)  # type: ignore[index]
        variants = given.family.variants.setdefault(key, [])
        if variant not in variants:
            variants.append(variant)
        if len(self._known) >= MAX_KNOWN:
            del self._known[next(iter(self._known))]
        self._known[signature] = given

    def pin(self, given: Given, places: set[Place] | None = None) -> None:
        """From now on there is a trace for each value at these places, or at all that were given."""
        family = given.family
        family.pinned |= set(given.variant.places) if places is None else places
        for variants in family.variants.values():
            if given.variant in variants:
                variants.remove(given.variant)
        self._known = {key: each for key, each in self._known.items() if each.variant is not given.variant}


def _without(
    structure: Any, key_without: Callable[[frozenset[str]], Hashable], places: frozenset[Place]
) -> tuple[Hashable, Hashable]:
    for place in places:
        if place[0] == "argument":
            structure = _replaced(structure, place[1:], ("number",))
    return structure, key_without(frozenset([str(place[1]) for place in places if place[0] == "attribute"]))


def _numbers_in(structure: Any, path: Place = ()) -> Iterator[tuple[Place, float]]:
    """Paths and values of the floats in a description by `structure.flatten`; no `int`, which may be a size, and no `bool`."""
    if not isinstance(structure, tuple):
        return
    if structure[:1] == ("plain",):
        if structure[1] is float:
            yield path, structure[2]
        return
    for i, part in enumerate(structure):
        yield from _numbers_in(part, (*path, i))


def _replaced(structure: Any, path: Place, by: Any) -> Any:
    if not path:
        return by
    i, *rest = path
    assert isinstance(i, int)
    return (*structure[:i], _replaced(structure[i], tuple(rest), by), *structure[i + 1 :])


def _is_same(a: float, b: float) -> bool:
    return a == b or (math.isnan(a) and math.isnan(b))


def _name(place: Place) -> Hashable:
    """The same for places that are set together: the strengths of all layers, say."""
    if place[0] == "argument":
        return place
    return tuple([part for part in str(place[1]).split(".") if not part.isdigit()][-2:])
