"""Python numbers that change from call to call (strengths of a ControlNet or IP-Adapter, FreeU's factors) as inputs of a trace.

A trace bakes numbers in, so each new value of one would cost a new trace. Here a number that has changed once is traced as
an input: while the module's Python runs, a `Number` stands where the number stood, in the arguments or in an attribute
(`recording.py`). Where it meets a tensor, an element of one more input takes its place in the graph, computed with as eager
computes with a Python number. Where Python decides by it (`if scale == 0`), the decision is noted: the trace serves every
value for which all of them turn out the same. Everything else that happens to it (it becomes a size, or an argument that no
tensor can stand for) pins it: then there is a trace for each of its values, as if nobody had looked.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import operator
from collections.abc import Callable, Hashable, Iterator, Mapping
from typing import Any

import torch

from sfast.recording import Place, Question, Recording, Values, replaced

MAX_KNOWN = 1024  # settings of numbers whose tensors are kept
MAX_FAMILIES = 256  # of signatures
CHECKS = 3  # values that each trace is compared with eager at, before the next ones are believed


@dataclasses.dataclass(eq=False)
class Variant:
    """One way of Python through the module, for all values of some numbers that lead there."""

    name: int
    places: list[Place]
    questions: dict[Hashable, tuple[Question, bool]] = dataclasses.field(default_factory=dict)
    checks: int = 0  # how many values it was compared with eager at
    shared: bool = False  # traced while other threads could see the numbers: it is compared at every value

    def is_believed(self) -> bool:
        """Whether no value needs to be compared any more."""
        return self.checks >= CHECKS and not self.shared

    def serves(self, values: Values) -> bool:
        """Whether Python would decide everything by these values as it did."""
        return answers(self.questions, values)


def answers(questions: Mapping[Hashable, tuple[Question, bool]], values: Values) -> bool:
    """Whether the answers to some questions are the same for these values."""
    try:
        return all(
            bool(getattr(operator, name)(left(values), right(values))) == answer
            for (left, name, right), answer in questions.values()
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

    @property
    def first(self) -> tuple[Hashable, Values, torch.Tensor]:
        """The signature that such calls had first, the numbers that are baked in there, and their tensor."""
        values = [self.family.first[place] for place in self.variant.places]
        return self.family.signature, self.family.first, self.tensor.new_tensor(values)

    def record(self, shared: bool) -> Recording:
        """For a trace in which they are inputs; `shared` with other threads, which must find floats."""
        return Recording(self.variant.places, self.values, shared)


@dataclasses.dataclass(eq=False)
class _Family:
    """Signatures that differ in nothing but numbers."""

    signature: Hashable  # of the first, whose numbers are baked in
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
            (*_without(structure, key_without, everything), kinds, *rest), _Family(signature, values)
        )
        changed = {place for place, value in values.items() if not _is_same(value, family.first[place])}
        new = changed - family.changing - family.pinned
        names = set(map(_name, new))
        family.changing |= {p for p in everything - family.pinned if names and _name(p) in names}
        places = sorted(family.changing - family.pinned, key=repr)
        if not changed or not places:
            return None
        erased, key = _without(structure, key_without, frozenset(places))
        variants = family.variants.get((erased, key, tuple(places)), [])
        variant = next((each for each in variants if each.serves(values)), None)
        if variant is None:
            variant = Variant(next(self._names), places)
        with torch.inference_mode():  # such tensors have no version: nobody takes them for a prompt that stays
            tensor = torch.tensor([values[place] for place in places], dtype=torch.float64, device=device)
        return Given(variant, (erased, variant.name), key, tensor, values, family)

    def keep(self, signature: Hashable, given: Given, recording: Recording | None = None) -> None:
        """What was found, and perhaps traced, has proved right."""
        variant = given.variant
        variant.shared |= recording is not None and recording.shared
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

    def keep_only(self, structures: set[Hashable]) -> None:
        """There are traces of these structures alone: what is known of numbers in others goes."""
        for family in self._families.values():
            alive = {
                key: [each for each in variants if (key[0], each.name) in structures]  # type: ignore[index]
                for key, variants in family.variants.items()
            }
            family.variants = {key: variants for key, variants in alive.items() if variants}
        self._known = {key: each for key, each in self._known.items() if each.structure in structures}

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
            structure = replaced(structure, place[1:], ("number",))
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


def _is_same(a: float, b: float) -> bool:
    return a == b or (math.isnan(a) and math.isnan(b))


def _name(place: Place) -> Hashable:
    """The same for places that are set together: the strengths of all layers, say."""
    if place[0] == "argument":
        return place
    return tuple([part for part in str(place[1]).split(".") if not part.isdigit()][-2:])
