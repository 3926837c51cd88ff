"""What ran slower than it could, and why: one log line each, kept for the report.

A fallback is never an error, but it must never be silent either. Everything in sfast that gives up on the fast way says so
here; the first time it is logged, every time after that it is only remembered.
"""

from __future__ import annotations

import builtins
import contextlib
import functools
import inspect
import itertools
import logging
import re
import signal
import threading
import time
import types
from collections.abc import Iterator
from typing import Any

import torch

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
    if line.endswith(":") and line is not lines[-1]:  # a heading
        line = f"{line} {lines[lines.index(line) + 1]}"
    return line if line.startswith(type(error).__name__) else f"{type(error).__name__}: {line}"


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that the GPU's memory did not suffice: PyTorch, the driver and libraries say it differently."""
    return isinstance(error, torch.OutOfMemoryError) or any(words in str(error) for words in _OUT_OF_MEMORY)


_OUT_OF_MEMORY = ("out of memory", "ALLOC_FAILED", "sfast_native: no memory", "ALLOCATION_FAILED")


# What is no failure of ours: an exception that a signal handler raises, wherever we are at that moment.


def let_through(error: Exception) -> None:
    """Raise `error` again where a signal handler has raised it (a time limit, say): it is meant for whoever waits for it.

    Whoever takes exceptions for failures of what it tries asks here first. (KeyboardInterrupt and SystemExit are no
    `Exception`s, and go their way without.)
    """
    if not _passes(error):
        return
    if _passing.becomes_text:
        _passing.error = error
    raise error


@contextlib.contextmanager
def keeping_exceptions() -> Iterator[None]:
    """Around an interpreter that makes a RuntimeError, with a text, of whatever an operator in Python raises.

    What `let_through` has let through within comes out as it was.
    """
    before, _passing.becomes_text = _passing.becomes_text, True
    try:
        yield
    except RuntimeError as error:
        if _passing.error is not None:
            raise _passing.error from None
        if (told := _told_by_a_handler(str(error))) is not None:
            raise told from None
        raise
    finally:
        _passing.becomes_text, _passing.error = before, None


class _Passing(threading.local):
    becomes_text = False
    error: Exception | None = None


_passing = _Passing()
_PASSES = "_passes_sfast"  # set on an exception that was made anew


def _passes(error: BaseException) -> bool:
    if hasattr(error, _PASSES):
        return True
    traceback = error.__traceback__
    while traceback is not None:
        if _is_a_handlers(traceback.tb_frame):
            return True
        traceback = traceback.tb_next
    return False


def _is_a_handlers(frame: types.FrameType) -> bool:
    """Whether a function was called as signal handlers are: with the signal's number and a frame."""
    code = frame.f_code
    names = code.co_varnames[: code.co_argcount + bool(code.co_flags & inspect.CO_VARARGS)]
    given: list[object] = []
    for name in names:
        value = frame.f_locals.get(name)
        given += value if isinstance(value, tuple) else [value]
    return any(isinstance(a, int) and isinstance(b, types.FrameType) for a, b in itertools.pairwise(given))


def _told_by_a_handler(text: str) -> Exception | None:
    """The exception of a signal handler, made anew from a text that says where in Python it was raised."""
    cause, _, places = text.rpartition("\nRuntimeError: ")[2].partition("\n\nAt:\n")
    handlers = _handlers() if places else {}
    for line in places.splitlines():
        place = _PLACE.fullmatch(line.strip())
        if place is None or place.groups() not in handlers:
            continue
        name, _, message = cause.partition(": ")
        kind = handlers[place.groups()].get(name, getattr(builtins, name, None))
        error: Exception = RuntimeError(cause)
        if isinstance(kind, type) and issubclass(kind, Exception):
            with contextlib.suppress(TypeError):  # it wants more than a message
                error = kind(message)
        setattr(error, _PASSES, True)
        return error
    return None


_PLACE = re.compile(r"(.*)\(\d+\): (.*)")


def _handlers() -> dict[tuple[str, ...], dict[str, Any]]:
    """File and name of every signal handler in Python, and what it sees of its module."""
    found: dict[tuple[str, ...], dict[str, Any]] = {}
    for number in signal.valid_signals():
        handler: Any = signal.getsignal(number)
        while isinstance(handler, functools.partial):
            handler = handler.func
        if callable(handler) and not hasattr(handler, "__code__"):  # an object with `__call__`
            handler = type(handler).__call__
        if hasattr(handler, "__code__"):
            found[handler.__code__.co_filename, handler.__code__.co_name] = handler.__globals__
    return found
