"""What ran slower than it could, and why: one log line each, kept for the report.

A fallback is never an error, but it must never be silent either. Everything in sfast that gives up on the fast way says so
here; the first time it is logged, every time after that it is only remembered.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Iterator

logger = logging.getLogger("sfast")

_lock = threading.Lock()
_noted: dict[tuple[str, str], None] = {}  # an ordered set


def note(what: str, why: str) -> None:
    """Log once that `what` (a component, a kernel, a feature) takes a slower way, and the reason."""
    with _lock:
        if (what, why) in _noted:
            return
        _noted[what, why] = None
    logger.warning("%s: %s", what, why)


@contextlib.contextmanager
def timed(what: str) -> Iterator[None]:
    """Log at level DEBUG how long a phase of the first call took."""
    start = time.perf_counter()
    try:
        yield
    finally:
        logger.debug("%s took %.3f s", what, time.perf_counter() - start)


def noted() -> list[tuple[str, str]]:
    """Every (what, why) of this process, oldest first."""
    with _lock:
        return list(_noted)


def forget() -> None:
    """Forget all notes, so that the next one is logged again."""
    with _lock:
        _noted.clear()


def reason(error: BaseException) -> str:
    """What an error says, in one line that begins with its type."""
    # TorchScript tells its story bottom up: the cause stands in the last line, but for where it was in Python.
    lines = [line.strip() for line in str(error).strip().partition("\nAt:\n")[0].splitlines() if line.strip()]
    line = (lines[-1] if "TorchScript" in lines[0] else lines[0]) if lines else ""
    return line if line.startswith(type(error).__name__) else f"{type(error).__name__}: {line}"
