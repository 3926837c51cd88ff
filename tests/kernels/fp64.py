"""How far a result is from fp64, and how far it may be."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sfast.kernels.triton_or_none import INTERPRETED

FLOOR = {torch.float32: 1e-6, torch.float16: 3e-4, torch.bfloat16: 2.4e-3}  # what one rounding costs, and a little more


def error(result: Tensor, exact: Tensor) -> float:
    """Relative error in the Euclidean norm; NaN where either is not finite."""
    return ((result.double() - exact).norm() / exact.norm()).item()


def assert_close_to_fp64(
    result: Tensor, reference: Callable[..., Any], *inputs: Any, part: int | None = None, floor: float | None = None
) -> None:
    """Check that `result` is no further from `reference` in fp64 than the reference itself is in the inputs' precision."""

    def run(*values: Any) -> Tensor:
        output = reference(*values)
        return output if part is None else output[part]

    exact = run(*[_widened(value) for value in inputs])
    eager = run(*inputs)
    assert result.shape == exact.shape
    assert result.dtype == eager.dtype
    allowed = max(1.2 * error(eager, exact), FLOOR[result.dtype] if floor is None else floor)
    if INTERPRETED and result.dtype == torch.bfloat16:
        allowed = 8e-3  # the interpreter truncates to bf16 where a GPU rounds
    assert error(result, exact) <= allowed


def _widened(value: Any) -> Any:
    """A tensor in fp64; one of indices is none of numbers."""
    return value.double() if isinstance(value, Tensor) and value.dtype != torch.int32 else value
