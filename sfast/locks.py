"""One lock for each module: of its compiled calls, and of what changes the module as a whole, one runs at a time.

A call looks at the module, and then runs for as long as it takes; an exchange of adapters in the middle of that would be
neither the set of before nor that of after. Who needs several locks takes all or none: it holds nothing while it waits, so
nobody waits for somebody who waits. Calls follow each other so closely that a lock is hardly ever seen free: whoever wants
to change something stands in a queue, and new calls give way to it.
"""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Iterable, Iterator

import torch

# Those of CPython's C code: no interruption comes between taking one with `with` and being sure to release it.
_locks: weakref.WeakKeyDictionary[torch.nn.Module, threading.RLock] = weakref.WeakKeyDictionary()
_mutex = threading.Lock()  # of both tables here

COURTESY = 1.0  # seconds that others give way for at most: what is waited for may be waiting for them, by other means


class _Waiter:
    """Somebody who wants several locks, until he has them."""

    def __init__(self, wanted: list[threading.RLock]) -> None:
        self.wanted = wanted
        self.served = threading.Event()

    def gives_way_to(self, other: _Waiter) -> bool:
        return any(lock in other.wanted for lock in self.wanted)


_queue: tuple[weakref.ref[_Waiter], ...] = ()  # first come, first served; replaced, never changed


def lock_of(module: torch.nn.Module) -> threading.RLock:
    """A module's lock: the same one for as long as it lives, compiled again or not."""
    with _mutex:
        return _locks.setdefault(module, threading.RLock())


def give_way(lock: threading.RLock) -> None:
    """To be called by a thread that will take a lock again and again, before it does: others have waited for longer.

    But not in the middle of a call that they wait for the end of.
    """
    for ref in _queue:  # mostly empty
        waiter = ref()
        if waiter is not None and lock in waiter.wanted and not any(map(_is_mine, waiter.wanted)):
            waiter.served.wait(COURTESY)


def _is_mine(lock: threading.RLock) -> bool:
    """Whether this thread holds it; `threading.Condition` asks like this, too."""
    return bool(lock._is_owned())  # type: ignore[attr-defined]


@contextlib.contextmanager
def locks_of(modules: Iterable[torch.nn.Module]) -> Iterator[None]:
    """The locks of those modules that have any, all at once."""
    with _mutex:
        wanted = [lock for module in modules if (lock := _locks.get(module)) is not None]
    waiter = _Waiter(wanted)
    try:
        for earlier in _line_up(waiter):
            earlier.served.wait(COURTESY)
        with contextlib.ExitStack() as held:
            busy = _take(wanted, held)
            while busy is not None:
                held.close()
                busy = _take(sorted(wanted, key=lambda lock: lock is not busy), held)
            _leave(waiter)
            yield
    finally:
        _leave(waiter)


def _take(wanted: list[threading.RLock], held: contextlib.ExitStack) -> threading.RLock | None:
    """Wait for the first lock, holding none, and take the others if they are free; else the first one that is not."""
    for place, lock in enumerate(wanted):
        if not lock.acquire(blocking=place == 0):
            return lock
        held.callback(lock.release)
    return None


def _line_up(waiter: _Waiter) -> list[_Waiter]:
    """Join the queue; who stands there already and wants one of the same locks."""
    global _queue
    with _mutex:
        others = [other for ref in _queue if (other := ref()) is not None]
        _queue = *map(weakref.ref, others), weakref.ref(waiter)
    return [other for other in others if waiter.gives_way_to(other)]


def _leave(waiter: _Waiter) -> None:
    global _queue
    with _mutex:
        _queue = tuple([ref for ref in _queue if ref() not in (None, waiter)])
    waiter.served.set()
