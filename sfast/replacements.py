"""What takes a component's place in a compiled pipeline later is compiled, too: another ControlNet, UNet or encoder.

A pipeline does not tell when it is given another module; but its components are called again and again, and each time
takes a moment to look whether the pipeline still consists of the same ones.
"""

from __future__ import annotations

import operator
import threading
import weakref
from collections.abc import Callable
from typing import Any

import torch


class Replacements:
    """Looks for modules that a pipeline has not had before."""

    def __init__(self, pipe: Any, install: Callable[..., None]) -> None:
        try:
            self.pipe: Callable[[], Any] = weakref.ref(pipe)
        except TypeError:  # a stand-in for a pipeline
            self.pipe = lambda: None
        self._install = install  # called with the pipeline and whoever looked
        self._names = list(pipe.components)
        self._known: list[Callable[[], Any]] | None = None  # no module is kept alive
        self._lock = threading.Lock()
        self.look(None)

    def look(self, who: Any) -> None:
        """Install what is new, for `who` looks. To be called often."""
        pipe, known = self.pipe(), self._known
        if pipe is None:
            return
        now = [getattr(pipe, name, None) for name in self._names]
        now = [part if isinstance(part, torch.nn.Module) else None for part in now]
        if known is not None and all(map(operator.is_, now, [get() for get in known])):
            return
        with self._lock:
            self._known = [_nobody if part is None else weakref.ref(part) for part in now]
            if known is not None:
                self._install(pipe, who)

    def leave(self) -> None:
        """What the pipeline has at the next look is what it has always had."""
        self._known = None


def _nobody() -> None:
    return None
