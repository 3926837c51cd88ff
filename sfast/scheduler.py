"""A scheduler reads the timestep on the host, so that the GPU need not wait for it.

A pipeline keeps its timesteps on the GPU. Schedulers that look a timestep up in a table, or ask whether it is below zero
(DDIM, DDPM, PNDM, LCM, ...), wait three times a step until the GPU has computed everything before; then the GPU waits
until the next step has been launched. So timesteps are set as tensors whose values the host knows, too (`mirrored.py`), and
a scheduler that is called with one gets the host's. The numbers are the same; a factor that a scheduler computes from one is
not rounded to half precision before it is multiplied with the latents.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from typing import Any

import torch

from sfast.mirrored import Mirrored, mirror, on_host, plain
from sfast.override import can_override, override_method, restore_method

METHODS = (
    "scale_model_input",
    "step",
)  # what a pipeline calls with a timestep; those of flow matching have the second alone
SET = "set_timesteps"


class Follower:
    """Sees to it that a pipeline's scheduler reads timesteps on the host, also when it is another one than before."""

    def __init__(self, pipe: Any) -> None:
        try:
            self.pipe: Callable[[], Any] = weakref.ref(pipe)
        except TypeError:  # a stand-in for a pipeline, whose scheduler is its own affair
            self.pipe = lambda: None
        self._scheduler: Any = None

    def look(self) -> None:
        """To be called often: before a scheduler's first step."""
        scheduler = getattr(self.pipe(), "scheduler", None)
        if scheduler is not self._scheduler:
            self.leave()
            self._scheduler = scheduler
        follow(scheduler, self._others_compile)  # again, if another pipeline that shares it has been restored

    def leave(self) -> None:
        """The scheduler seen last is as it was."""
        leave(self._scheduler)
        self._scheduler = None

    def _others_compile(self) -> bool:
        """Whether a component is compiled by torch, which takes nothing but plain tensors."""
        parts = getattr(self.pipe(), "components", {}).values()
        return any(
            getattr(part, name, None) is not None for part in parts for name in ("_orig_mod", "_compiled_call_impl")
        )


def follow(scheduler: Any, others_compile: Callable[[], bool] = lambda: False) -> None:
    """Have a scheduler's methods called with timesteps on the host; twice is once."""
    methods = [name for name in METHODS if hasattr(type(scheduler), name)]
    if "step" not in methods or not all(can_override(scheduler, name) for name in methods):
        return  # no scheduler of diffusers' kind, or done already, or somebody else's method is there

    def with_host(method: Any, *args: Any, **kwargs: Any) -> Any:
        given = [arg for arg in (*args, *kwargs.values()) if isinstance(arg, Mirrored) and arg.fresh()]
        versions = [arg.host._version for arg in given]
        result = method(*map(on_host, args), **{name: on_host(arg) for name, arg in kwargs.items()})
        for arg, version in zip(given, versions, strict=True):
            if arg.host._version != version:  # it writes to its timestep, which is the loop's, too
                arg.plain.copy_(arg.host)
        return result

    for name in methods:
        override_method(scheduler, name, with_host)
    if can_override(scheduler, SET):
        override_method(scheduler, SET, functools.partial(_set, others_compile))


def leave(scheduler: Any) -> None:
    """Undo `follow`."""
    for name in (*METHODS, SET):
        restore_method(scheduler, name)
    if isinstance(times := getattr(scheduler, "__dict__", {}).get("timesteps"), Mirrored):
        scheduler.timesteps = times.plain


def _set(others_compile: Callable[[], bool], method: Any, *args: Any, **kwargs: Any) -> Any:
    """Have the timesteps known to the host, once for each loop."""
    result, scheduler = method(*map(plain, args), **kwargs), method.__self__
    times = vars(scheduler).get("timesteps")
    if isinstance(times, torch.Tensor) and not isinstance(times, Mirrored) and _is_away(times) and not others_compile():
        with torch.inference_mode(False), torch.no_grad():
            times = times.clone() if times.is_inference() else times  # those do not count how often they are written to
            scheduler.timesteps = mirror(times, times.cpu())
    return result


def _is_away(times: torch.Tensor) -> bool:
    return times.is_cuda
