"""A compiled pipeline that somebody keeps changing, held against a fresh eager one that got the same changes."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import sfast
from sfast.component import component_of
from sfast.components import find_components
from tests.tiny import TINY, Pipeline, Tensor

# ||compiled - eager|| / ||eager|| of pictures and latents after a few steps in fp32: the order of summation differs.
TOLERANCE = 2e-5

Change = Callable[[Pipeline], Any]


def relative_error(output: Tensor, expected: Tensor) -> float:
    return float((output.double() - expected.double()).norm() / expected.double().norm())


class Twin:
    """One compiled pipeline of `tests.tiny`, and what it must draw."""

    def __init__(self, name: str = "text-to-image", make: Callable[[], Pipeline] | None = None, **move: Any) -> None:
        self.tiny = TINY[name]
        self._make = make or self.tiny.build
        self._move = move  # what `pipe.to` takes, for tests that run on several devices
        self.pipe = sfast.compile(self.fresh())

    def fresh(self, *changes: Change) -> Pipeline:
        """An eager pipeline that knows nothing but these changes."""
        pipe = self._make()
        pipe.set_progress_bar_config(disable=True)
        if self._move:
            pipe.to(**self._move)
        for change in changes:
            change(pipe)
        return pipe

    def draw(self, pipe: Pipeline, **call: Any) -> Tensor:
        return self.tiny.draw(pipe, **{"output_type": "latent", **call}).cpu()

    def draws_as(self, *changes: Change, tolerance: float = TOLERANCE, **call: Any) -> Tensor:
        """Draw, compare with a fresh eager pipeline after these changes, and return the picture.

        A generator or callback among the arguments of the call is copied, so that both get it as it is now.
        """
        expected = self.draw(self.fresh(*changes), **copy.deepcopy(call))
        assert expected.std() > 0.01  # a constant picture would prove nothing
        drawn = self.draw(self.pipe, **copy.deepcopy(call))
        assert drawn.shape == expected.shape
        error = relative_error(drawn, expected)
        assert error <= tolerance, f"relative error {error:.2g}"
        return drawn

    def traces(self) -> dict[str, int]:
        """How often each component that was called has been traced."""
        return traces(self.pipe)

    def component(self, name: str) -> Any:
        return component_of(find_components(self.pipe)[name])


def traces(pipe: Pipeline) -> dict[str, int]:
    return {name: count for name, count, *_ in sfast.report(pipe).rows if count}


def differ(a: Tensor, b: Tensor) -> bool:
    """Whether a change can be told from rounding."""
    return relative_error(a, b) > 100 * TOLERANCE
