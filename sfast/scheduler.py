"""A scheduler reads the timestep on the host, so that the GPU need not wait for it.

A pipeline keeps its timesteps on the GPU. Schedulers that look a timestep up in a table, or ask whether it is below zero
(DDIM, DDPM, PNDM, LCM, ...), wait three times a step until the GPU has computed everything before; then the GPU waits
until the next step has been launched. But the timestep is an element of `scheduler.timesteps`, and where it lies there
says which: one copy of all of them, made before the first step, answers every question after it. The numbers are the same; a
factor that a scheduler computes from one is not rounded to half precision before it is multiplied with the latents.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch

from sfast.instead import is_free, put, take_back

METHODS = ("scale_model_input", "step")  # what a pipeline calls with a timestep, the first before a loop's first step
SET = "set_timesteps"


class Timesteps:
    """A scheduler's timesteps on the host, read once for each loop."""

    def __init__(self, scheduler: Any) -> None:
        self.scheduler = scheduler
        self._known: torch.Tensor | None = None  # what was copied
        self._version = 0
        self._on_host = torch.empty(0)

    def on_host(self, value: Any) -> Any:
        """A timestep, as an element of a copy in the host's memory; whatever else it is, as it is."""
        times = getattr(self.scheduler, "timesteps", None)
        if not isinstance(times, torch.Tensor) or times.dim() != 1 or times.is_cpu or not times.numel():
            return value
        if times.is_inference():
            return value  # somebody may have written to them, and nobody would know
        place = place_in(times, value)
        if place is None:
            return value
        version = times._version
        if times is not self._known or version != self._version:
            self._on_host = times.cpu()
            self._known, self._version = times, version
        return self._on_host[place]


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
        follow(scheduler)  # again, if another pipeline that shares it has been restored

    def leave(self) -> None:
        """The scheduler seen last is as it was."""
        leave(self._scheduler)
        self._scheduler = None


def follow(scheduler: Any) -> None:
    """Have a scheduler's methods called with timesteps on the host; twice is once."""
    if not all(is_free(scheduler, name) for name in METHODS):
        return  # no scheduler of diffusers' kind, or done already, or somebody else's method is there
    look = Timesteps(scheduler).on_host

    def on_host(method: Any, *args: Any, **kwargs: Any) -> Any:
        return method(*[look(arg) for arg in args], **{name: look(arg) for name, arg in kwargs.items()})

    for name in METHODS:
        put(scheduler, name, on_host)
    if is_free(scheduler, SET):
        put(scheduler, SET, _set)


def leave(scheduler: Any) -> None:
    """Undo `follow`."""
    for name in (*METHODS, SET):
        take_back(scheduler, name)


def _set(method: Any, *args: Any, **kwargs: Any) -> Any:
    """Timesteps that count how often they are written to, which tensors made in inference mode do not."""
    result, scheduler = method(*args, **kwargs), method.__self__
    times = vars(scheduler).get("timesteps")
    if isinstance(times, torch.Tensor) and times.is_inference():
        with torch.inference_mode(False), torch.no_grad():
            scheduler.timesteps = times.clone()
    return result


def place_in(times: torch.Tensor, value: Any) -> int | None:
    """Which element of the vector `times` a tensor without dimensions is, by where it lies; None if it is none."""
    if not isinstance(value, torch.Tensor) or value.dim() != 0:
        return None
    if value.device != times.device or value.dtype != times.dtype or not times.stride(0):
        return None
    place, rest = divmod(value.data_ptr() - times.data_ptr(), times.element_size() * times.stride(0))
    return place if not rest and 0 <= place < times.numel() else None
