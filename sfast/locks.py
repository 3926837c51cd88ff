"""Whose turn it is: of each module's compiled calls, and of what changes the module as a whole, one runs at a time.

A call looks at the module, and then runs for as long as it takes; an exchange of adapters in the middle of that would be
neither the set of before nor that of after. Who needs several turns takes all or none, so that nobody waits for somebody
who waits.
"""

from __future__ import annotations

import contextlib
import threading
import time
import weakref
from collections.abc import Iterable, Iterator

import torch

_turns: weakref.WeakKeyDictionary[torch.nn.Module, threading.RLock] = weakref.WeakKeyDictionary()
_lock = threading.Lock()

PATIENCE = 0.01  # seconds until all turns are tried again


def lock_of(module: torch.nn.Module) -> threading.RLock:
    """A module's turn: the same one for as long as it lives, compiled again or not."""
    with _lock:
        return _turns.setdefault(module, threading.RLock())


@contextlib.contextmanager
def locks_of(modules: Iterable[torch.nn.Module]) -> Iterator[None]:
    """The turns of those modules that have any."""
    with _lock:
        wanted = [turn for module in modules if (turn := _turns.get(module)) is not None]
    with contextlib.ExitStack() as taken:
        while not all(taken.enter_context(_try(turn)) for turn in wanted):
            taken.close()
            time.sleep(PATIENCE)
        yield


@contextlib.contextmanager
def _try(turn: threading.RLock) -> Iterator[bool]:
    got = turn.acquire(blocking=False)
    try:
        yield got
    finally:
        if got:
            turn.release()
