"""An operation: a small function that does to both pair what a user might do, chosen by a random generator of its own.

Its generator is seeded for it alone, so that a sequence stays a sequence when others are left out of it; whatever it needs
(a loaded adapter, say) it looks for, and is content not to find.
"""

from __future__ import annotations

import dataclasses
import random
import re
from collections.abc import Callable

import torch

from tests.soak.pair import Pair

Run = Callable[[Pair, random.Random], str | None]

# What any operation may make sfast say, because of what operations before it have left behind.
ANYTIME = (
    r"different structures of arguments: new ones run eager|traces already, none of them|more like these"
    r"|which only a trace leaves out|weights are moved again and again|keep their memory format|cache folder"
)


@dataclasses.dataclass(frozen=True)
class Operation:
    """What it is called, what it does (and then says about it), how often, and what sfast may say.

    `same`: eager draws afterwards what it drew before, so that the same picture is what is expected.
    """

    name: str
    run: Run
    weight: float
    says: str
    devices: tuple[str, ...]
    same: bool


OPERATIONS: list[Operation] = []


def operation(
    weight: float = 1, says: str = "", devices: tuple[str, ...] = ("cpu", "cuda"), same: bool = False
) -> Callable[[Run], Run]:
    """Add a function to the list. `says` is a pattern for the lines that it may make sfast log."""

    def add(run: Run) -> Run:
        OPERATIONS.append(Operation(run.__name__, run, weight, says, devices, same))
        return run

    return add


def unexpected(done: Operation, lines: list[str]) -> list[str]:
    """Those of sfast's lines that the operation does not explain."""
    allowed = re.compile("|".join(filter(None, (ANYTIME, done.says))))
    return [line for line in lines if not allowed.search(line)]


@dataclasses.dataclass(frozen=True)
class Step:
    """One operation of a sequence; its text can be replayed."""

    name: str
    seed: int

    def __str__(self) -> str:
        return f"{self.name}:{self.seed}"

    @classmethod
    def parse(cls, text: str) -> Step:
        name, _, seed = text.partition(":")
        if name not in {known.name for known in OPERATIONS} or not seed.isdecimal():
            raise ValueError(f"a step is the name of an operation and its seed, like size:17, got {text!r}")
        return cls(name, int(seed))


def choose(count: int, seed: int, device: torch.device) -> list[Step]:
    """A random sequence for a device."""
    rng = random.Random(seed)
    possible = [known for known in OPERATIONS if device.type in known.devices]
    names, often = [known.name for known in possible], [known.weight for known in possible]
    return [Step(rng.choices(names, often)[0], rng.randrange(10**6)) for _ in range(count)]
