"""Whether a call comes out of the very loop that the call before came from: one of diffusers', with nobody else's code in it.

Between two steps of such a loop only diffusers and peft can have changed the adapters, and by their own calls. So the many
hundred tensors of adapters, which anybody else may write to, are looked at once for each loop.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Mapping
from types import FrameType
from typing import Any

# How the names of their files' modules begin; the last are pipelines of the community.
PIPELINES = ("diffusers.pipelines.", "diffusers.modular_pipelines.", "diffusers_modules.")
DEPTH = 32  # of the calls between a pipeline and this file: some fifteen are our own, and of `Module.__call__`
BAR = "progress_bar"  # which every loop of diffusers makes for itself, and which ends with it
CALLBACKS = ("callback_on_step_end", "callback")
_TELLING = (BAR, "self", *CALLBACKS)
_REFERENCES = (
    3  # to a frame's copy: its own, ours, and the question's; another one is of somebody who called `locals()`
)


class Caller:
    """Knows the loop of the last call."""

    def __init__(self) -> None:
        self._bar: Any = _nothing
        self._others = False
        self.loops = 0  # how many there have been; each call that comes from nowhere known counts as one

    def again(self) -> bool:
        """Whether it is the same one, and nobody else's code is in it."""
        names = _names(sys._getframe(1))
        bar = names.get(BAR)
        same = bar is not None and self._bar() is bar
        if not same:
            self.loops += 1
            self._bar, self._others = _reference_to(bar), _has_others(names)
        return same and not self._others


def _reference_to(bar: Any) -> Any:
    try:
        return _nothing if bar is None else weakref.ref(bar)
    except TypeError:  # somebody's own kind of bar, of which nothing is known afterwards
        return _nothing


def _names(frame: FrameType | None) -> Mapping[str, Any]:
    """What the innermost function of a pipeline that is at work knows by the names that tell."""
    for _ in range(DEPTH):
        if frame is None:
            break
        if str(frame.f_globals.get("__name__", "")).startswith(PIPELINES):
            known = frame.f_locals
            names = {name: known[name] for name in _TELLING if name in known}
            # Before Python 3.13 that is a copy, which stays with the frame: it would keep the last step's tensors alive.
            if isinstance(known, dict) and sys.getrefcount(known) <= _REFERENCES:
                known.clear()
            return names
        frame = frame.f_back
    return {}


def _has_others(names: Mapping[str, Any]) -> bool:
    """Whether somebody else's code runs in a pipeline's loop: a callback, a scheduler or pipeline of their own."""
    pipe = names.get("self")
    theirs = [type(each).__module__ for each in (pipe, getattr(pipe, "scheduler", None))]
    return any(names.get(name) is not None for name in CALLBACKS) or not all(
        name.startswith("diffusers.") for name in theirs
    )


def _nothing() -> None:
    return None
