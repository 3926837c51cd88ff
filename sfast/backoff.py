"""Out of memory is no verdict: what there was no room for is tried again, ever more rarely, when more is free."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sfast.cuda_graph import GraphPool


class Backoff:
    """When to try again what there was no memory for: when more of it is free, ever more rarely, and not for ever."""

    TRIES = 5
    LONGEST = 1024  # calls between two looks
    MORE = 1.05  # times as much free memory as when it did not suffice

    def __init__(self) -> None:
        self.failures = 0
        self._looks = 0
        self._calls = 0  # until the next look
        self._free = 0

    def failed(self, pool: GraphPool | None, free: int | None = None) -> None:
        """It did not suffice, with so many bytes free, or with as many as now."""
        self.failures += 1
        self._free = free if free is not None else 0 if pool is None else pool.free()
        self._calls = 0 if self.failures == 1 else self._longer()

    def may_retry(self, pool: GraphPool | None) -> bool:
        """Whether this call should try; asked at each that could."""
        if self.failures == 0:
            return True
        if self.failures >= self.TRIES:
            return False
        self._calls -= 1
        if self._calls >= 0:
            return False
        if pool is None or pool.free() > self.MORE * self._free:
            return True
        self._calls = self._longer()
        return False

    def _longer(self) -> int:
        self._looks += 1
        return min(8 * 2**self._looks, self.LONGEST)
