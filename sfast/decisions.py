"""Ways that Python takes through a model by what is *in* a tensor: part of the key, and not of the trace alone.

`if mask.all()`, `lengths.tolist()`: a trace bakes in what was decided. Which values were asked for is traced, too, as
results beside the model's own, and becomes a small function of its own, the guard. Before each later call it computes the
values anew, and a call goes to the trace that was made with the same ones. What a guard reads (a prompt's mask) is mostly
the very same tensor from step to step, and then nothing is computed and no GPU is waited for.

A decision that hangs on the model's own computation, or on random numbers, has no such guard: there is no trace then.
"""

from __future__ import annotations

import dataclasses
import re
import weakref
from collections import Counter
from collections.abc import Callable, Hashable
from typing import Any

import torch

from sfast.fallback import is_out_of_memory

MAX_GUARDS = 4  # of one signature: different questions about values
MAX_ANSWERS = 24  # of one signature: a trace for each length of a prompt
SMALL = 2**14  # elements, of tensors on the host that are compared
MAX_PROMPTS = 4  # whose answers are remembered: guidance calls with two or three in turn
MAX_NUMBERS = 3  # where they are no integers: times and noise change at every call, a guidance scale does not
USES = 3  # of each answer on average: then there may be more of them, since they do not change from call to call


class Untraceable(RuntimeError):
    """The module does what no trace can repeat, at any shape."""


class DecidesByValue(Untraceable):
    """The module takes a Python decision from the values of a tensor, which no trace can repeat."""


@dataclasses.dataclass(eq=False)
class Guard:
    """Computes what Python asked for while a call was traced: on the host.

    It is asked at calls that go other ways, where its questions need not make sense. An index out of bounds is an
    exception there, but on a GPU the end of the process.
    """

    compute: Callable[[list[torch.Tensor], list[torch.Tensor]], list[torch.Tensor]]
    weights: list[int]  # places in the weight list of those it reads
    tensors: list[int]  # places among the call's tensors of those it reads
    text: str  # equal texts compute the same
    where: str  # the model's line that asked first
    numbers: bool  # whether it asked for numbers with a fraction
    _known: list[tuple[list[_Seen], Hashable]] = dataclasses.field(default_factory=list)

    def values(self, weights: list[torch.Tensor], tensors: list[torch.Tensor], loop: int) -> Hashable:
        """The values that decide; None where they cannot be computed, as on another way than the traced one.

        `loop` is another one for each loop that calls come from.
        """
        read = [tensors[i] for i in self.tensors] + [weights[i] for i in self.weights]
        for known, values in self._known:
            if all([seen.is_still(tensor, loop) for seen, tensor in zip(known, read, strict=True)]):
                return values
        try:
            answers = self.compute(_on_the_host(weights, self.weights), _on_the_host(tensors, self.tensors))
            values = tuple([(tuple(t.shape), *t.flatten().tolist()) for t in answers])
        except RuntimeError as error:
            if is_out_of_memory(error):
                raise
            values = None
        self._known = [([_Seen(tensor, loop) for tensor in read], values), *self._known[: MAX_PROMPTS - 1]]
        return values


class _Seen:
    """A tensor and what was in it.

    What is written through `tensor.data` or NumPy has no version. So a small tensor on the host is compared, and of all
    others nothing is known in another loop, or outside of any, where each call is one: the guard waits for them as eager does.
    """

    def __init__(self, tensor: torch.Tensor, loop: int) -> None:
        self._ref: weakref.ref[torch.Tensor] = weakref.ref(tensor)
        self._version = -1 if tensor.is_inference() else tensor._version
        self._loop = loop
        small = tensor.is_cpu and tensor.numel() <= SMALL
        self._copy = tensor.detach().clone() if small else None

    def is_still(self, tensor: torch.Tensor, loop: int) -> bool:
        """Whether it is the same one with the same in it."""
        known = self._ref()
        if known is None or known is not tensor or known.is_inference() or known._version != self._version:
            return False
        if self._copy is None:
            return self._loop == loop
        with torch._C.DisableTorchFunction():
            return torch.equal(self._copy, tensor)


def _on_the_host(tensors: list[torch.Tensor], places: list[int]) -> list[torch.Tensor]:
    """A list of tensors with those at `places` on the host."""
    moved = list(tensors)
    for place in places:
        moved[place] = tensors[place].cpu()
    return moved


# Of the weight list and a call's tensors; and the places in these of those that it reads.
Function = tuple[Callable[[list[torch.Tensor], list[torch.Tensor]], list[torch.Tensor]], list[int], list[int]]


@dataclasses.dataclass(eq=False)
class Sizes:
    """What Python asked of sizes while a call was traced, and was told."""

    answers: list[Any]
    # Makes a function of tensors without memory; only where it is wanted, since that takes a tenth of a trace's time.
    make: Callable[[], Function] | None  # None where it is not worth it
    _made: Function | None = None

    def fit(self, weights: list[torch.Tensor], tensors: list[torch.Tensor]) -> bool | None:
        """Whether Python is told the same at the shapes of another call; None where it takes more than sizes to tell."""
        if self.make is not None:
            self._made, self.make = self.make(), None  # what it was made of goes
        if self._made is None:
            return None
        compute, *places = self._made
        own, given = [list(x) for x in (weights, tensors)]
        for known, read in zip((own, given), places, strict=True):
            for i in read:
                known[i] = torch.empty_like(known[i], device="meta")
        try:
            answers = compute(own, given)
            return all(answer.tolist() == known for answer, known in zip(answers, self.answers, strict=True))
        except RuntimeError as error:  # what was traced does not go together at these shapes
            unknown = re.search(r"\bmeta\b|not implemented", str(error), re.IGNORECASE)
            return None if unknown else False


class Decisions:
    """What a component knows about the decisions of its module, for each signature."""

    def __init__(self) -> None:
        self._guards: dict[Hashable, list[Guard]] = {}
        self._answers: dict[Hashable, set[Hashable]] = {}
        self._uses: Counter[Hashable] = Counter()  # of answers that were known

    def taken(
        self, signature: Hashable, weights: list[torch.Tensor], tensors: list[torch.Tensor], loop: Callable[[], int]
    ) -> Hashable:
        """What Python will decide at a call, as far as it is known what it asks; `loop` tells which one it comes from."""
        guards = self._guards.get(signature) if self._guards else None
        if not guards:
            return ()
        answers = tuple([guard.values(weights, tensors, loop()) for guard in guards])
        self._uses[signature] += answers in self._answers[signature]
        return answers

    def learn(
        self,
        signature: tuple[Hashable, ...],
        guard: Guard,
        weights: list[torch.Tensor],
        tensors: list[torch.Tensor],
        loop: Callable[[], int],
    ) -> None:
        """At a call of `signature`, which ends with all that was `taken`, Python has asked for what `guard` computes.

        Raises:
            DecidesByValue: it asks for other values again and again, or for what the host cannot compute.
        """
        *key, answers = signature
        signature = tuple(key)
        if guard.values(weights, tensors, loop()) is None:  # though this is the traced way: all ways would look alike
            self._guards.pop(signature, None)
            raise DecidesByValue(f"it decides in Python by values that the host cannot compute, {guard.where}")
        guards = self._guards.setdefault(signature, [])
        seen = self._answers.setdefault(signature, set())
        seen.add(answers)
        if all(known.text != guard.text for known in guards):
            guards.append(guard)
        many = len(seen) > (MAX_NUMBERS if guard.numbers else MAX_ANSWERS)
        if len(guards) > MAX_GUARDS or (many and self._uses[signature] < USES * len(seen)):
            del self._guards[signature]
            raise DecidesByValue(f"it decides in Python by values that change from call to call, {guard.where}")

    def keep(self, kinds: set[tuple[Hashable, ...]]) -> None:
        """Of no other signatures is anything traced any more."""
        for known in (self._guards, self._answers, self._uses):
            for kind in known.keys() - kinds:
                del known[kind]

    def forget(self) -> None:
        """The module is another one."""
        self._guards.clear()
        self._answers.clear()
        self._uses.clear()


# ------------------------------------------------------------------------------------------------ noticed while tracing

_SHAPE_READERS = frozenset(("aten::size", "aten::sym_size", "aten::numel", "aten::dim"))
_SIZED_BY_VALUE = frozenset(
    f"aten::{name}"
    for name in (
        *("nonzero", "nonzero_numpy", "argwhere", "masked_select", "bincount", "repeat_interleave", "arange"),
        *("unique", "unique_dim", "_unique", "_unique2", "unique_consecutive"),
    )
)
# What a guard is too dear for.
_HEAVY = frozenset(
    f"aten::{name}"
    for name in (
        *("linear", "matmul", "mm", "bmm", "addmm", "baddbmm", "einsum", "_convolution", "conv1d", "conv2d", "conv3d"),
        *("scaled_dot_product_attention", "layer_norm", "group_norm", "rms_norm"),
    )
)


def depends_on_values(value: Any, harmless: set[tuple[int, bool]]) -> str | None:
    """Whether a traced value is computed from the contents of an input, and not from sizes alone; "" if so.

    Otherwise None, or, where no guard could compute it, why: it takes random numbers, or much of the model.
    Values that depend on sizes alone are remembered in `harmless`, so that all questions about a graph go through it once.
    """
    seen: set[tuple[int, bool]] = set()
    pending = [(value, False)]
    found = False
    while pending:
        value, for_size = pending.pop()
        key = (value.unique(), for_size)
        if key in seen or key in harmless:
            continue
        seen.add(key)
        node = value.node()
        kind = node.kind()
        if kind == "prim::Constant":
            continue
        if not for_size:
            if node.isNondeterministic() and kind != "aten::dropout":
                return "which is random"
            if kind in _HEAVY:
                return "which it has computed itself"
            found = found or kind == "prim::Param"
        for_size = kind in _SHAPE_READERS or (for_size and not _is_sized_by_value(node))
        # Not `node.inputs()`: the end of such an iterator is a C++ exception, and costs more than all the rest here.
        pending += [(node.inputsAt(i), for_size) for i in range(node.inputsSize())]
    if found:
        return ""
    harmless |= seen
    return None


def _is_sized_by_value(node: Any) -> bool:
    """Whether the size of an operator's result depends on what is in its inputs: of `nonzero`, or of `x[mask]`."""
    if node.kind() == "aten::where":
        return bool(node.inputsSize() == 1)
    if node.kind() == "aten::repeat_interleave" and str(node.inputsAt(1).type()) == "int":
        # With four inputs as many repeats of each; with two the repeats, and the size of the result.
        return bool(node.inputsSize() < 4)
    if node.kind() != "aten::index":
        return node.kind() in _SIZED_BY_VALUE
    indices = node.inputsAt(1).node()
    kinds = [value.type() for value in indices.inputs() if value.type().kind() == "TensorType"]
    return any(kind.dtype() in (torch.bool, torch.uint8) for kind in kinds)
