"""Some ten thousand new objects at once, without Python looking through all objects there are in the middle of it.

Every few hundred new objects Python looks for garbage among the young ones, and after enough of that among all: with
PyTorch and diffusers loaded, that takes longer than exchanging hundreds of layers does.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator


@contextlib.contextmanager
def gc_paused() -> Iterator[None]:
    """Meanwhile, no garbage is looked for."""
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()
