"""Some ten thousand new objects at once, without Python looking through all objects there are in the middle of it.

Every few hundred new objects Python looks for garbage among the young ones, and after enough of that among all: with
PyTorch and diffusers loaded, that takes longer than exchanging hundreds of layers does. And while a graph is captured,
nobody's graphs and events may be destroyed.
"""

from __future__ import annotations

import contextlib
import gc
import threading
from collections.abc import Iterator

_lock = threading.Lock()
_pauses: set[object] = set()  # of all threads: the last that ends has garbage looked for again
_collects = True  # whether it was before the first began


@contextlib.contextmanager
def gc_paused() -> Iterator[None]:
    """Meanwhile, no garbage is looked for."""
    global _collects
    pause = object()
    try:
        with _lock:
            if not _pauses:
                _collects = gc.isenabled()
            _pauses.add(pause)
            gc.disable()
        yield
    finally:
        with _lock:
            _pauses.discard(pause)
            if not _pauses and _collects:
                gc.enable()
