"""A compiled pipeline that somebody keeps changing, held against fresh eager ones that got the same changes."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch

import sfast
from tests.tiny import TINY, Pipeline, Tensor, Tiny
from tests.tiny_transformers import IMAGES
from tests.tiny_video import VIDEO

KNOWN: dict[str, Tiny] = {**TINY, **IMAGES, **VIDEO}

# ||compiled - eager|| / ||eager|| of pictures and latents after a few steps in fp32: the order of summation differs, and
# kernels on a GPU may round products to TF32.
TOLERANCES = {"cpu": 2e-5, "cuda": 3e-3}
TOLERANCE = TOLERANCES["cpu"]
SAME = 1e-4  # by so much at most, relative to itself, eager differs from eager where nothing has changed

Change = Callable[[Pipeline], Any]


def relative_error(output: Tensor, expected: Tensor) -> float:
    return float((output.double() - expected.double()).norm() / expected.double().norm())


class Twin:
    """One compiled pipeline of `tests.tiny`, and what it must draw."""

    def __init__(
        self,
        name: str = "text-to-image",
        device: str = "cpu",
        make: Callable[[], Pipeline] | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.tiny, self.device, self.dtype = KNOWN[name], device, dtype
        self.tolerance = TOLERANCES[torch.device(device).type]
        self._make = make or self.tiny.build
        self.pipe = sfast.compile(self.fresh())
        self._eager: dict[int, tuple[Tensor, Tensor]] = {}  # what was drawn, by its id, and eager's picture of the same

    def fresh(self, *changes: Change) -> Pipeline:
        """An eager pipeline that knows nothing but these changes."""
        pipe = self._make()
        pipe.set_progress_bar_config(disable=True)
        pipe.to(self.device, self.dtype)
        for change in changes:
            change(pipe)
        return pipe

    def draw(self, pipe: Pipeline, **call: Any) -> Tensor:
        """Latents, always from the same seed; arguments are copied, so that each call gets them as they are now."""
        return self.tiny.draw(pipe, **copy.deepcopy({"output_type": "latent", **call})).cpu()

    def draws_as(self, *changes: Change, tolerance: float | None = None, **call: Any) -> Tensor:
        """What the compiled pipeline draws, after comparing it with a fresh eager one that got these changes."""
        expected = self.draw(self.fresh(*changes), **call)
        assert expected.std() > 0.01  # a constant picture would prove nothing
        drawn = self.draw(self.pipe, **call)
        assert drawn.shape == expected.shape
        error = relative_error(drawn, expected)
        assert error <= (tolerance or self.tolerance), f"relative error {error:.2g}"
        self._eager[id(drawn)] = drawn, expected
        return drawn

    def remember(self, drawn: Tensor, like: Tensor) -> None:
        """This picture is of the same as another one that `draws_as` has returned."""
        self._eager[id(drawn)] = drawn, self._eager[id(like)][1]

    def tells(self, a: Tensor, b: Tensor) -> bool:
        """Whether two pictures are different ones: then they must differ in the same way as eager's do.

        What counts is eager's own difference, and how much of it the compiled pipeline shows: all of it, but for rounding,
        which has no direction; nothing, where a change had no effect. So no device needs a threshold of its own.
        """
        right = self._eagers(a).double() - self._eagers(b).double()
        mine = a.double() - b.double()
        if right.norm() <= SAME * self._eagers(a).double().norm():
            return False
        shown = float((mine * right).sum() / right.square().sum())
        assert 0.5 < shown < 1.5, f"the compiled pictures show {shown:.0%} of the difference between eager's"
        return True

    def _eagers(self, drawn: Tensor) -> Tensor:
        return self._eager.get(id(drawn), (drawn, drawn))[1]

    def changed(self, *changes: Change, **call: Any) -> Tensor:
        """Apply changes to the compiled pipeline, too, and draw: `draws_as` for the first time they are made."""
        for change in changes:
            change(self.pipe)
        return self.draws_as(*changes, **call)

    def differ(self, a: Tensor, b: Tensor) -> bool:
        """Whether a change can be told from rounding."""
        return relative_error(a, b) > max(2e-3, 2 * self.tolerance)

    def traces(self) -> dict[str, int]:
        """How often each component that was called has been traced."""
        return traces(self.pipe)


def traces(pipe: Pipeline) -> dict[str, int]:
    return {name: count for name, count, *_ in sfast.report(pipe).rows if count}


BOTH = {"text_encoder": 1, "unet": 1}  # traces of what draws latents from a prompt
