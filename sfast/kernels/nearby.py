"""At a new shape, the kernels that were fastest at the nearest known one, instead of measuring all of them again.

Choosing measures two dozen kernels for each convolution and matrix product: about 25 ms each, a second or two for a UNet,
well spent at a first call and too much at every further size. What is fastest hardly changes between 1024×1024 and
1152×896, so a shape after the first borrows. Where the nearest known size is far away, as much is measured as fits into a
slice of time. So with the kernels of attention (see choice.py), which are few. What was borrowed is not kept for later
processes: whoever begins with that shape measures it. A kernel that cannot compute the new shape, or fails, is not borrowed;
and a borrowed one is compared with eager like any other.
"""

from __future__ import annotations

import contextlib
import contextvars
import math
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from sfast import native
from sfast.fallback import logger

FAR = 4.0  # times as many rows or pixels, or fewer
SLICE = 0.15  # seconds of measuring at one new shape, where that is a choice

# Places, in a problem's row of integers, of those that differ between two sizes of one layer; and of the factors of its size.
_SIZES = {"conv2d": (1, 3, 4, 8, 9), "linear": (1, 4, 5)}
_FACTORS = {"conv2d": (1, 8, 9), "linear": (1, 4)}
_DTYPES = {"conv2d": {torch.float16: 2, torch.bfloat16: 9}, "linear": {torch.float16: 2, torch.bfloat16: 14}}
_EPILOGUES = ("none", "relu", "gelu_tanh", "gelu", "silu", "geglu", "geglu_tanh", "swiglu")

_active: contextvars.ContextVar[Nearby | None] = contextvars.ContextVar("sfast_nearby", default=None)


@contextlib.contextmanager
def borrowing(device: torch.device, wanted: bool = True) -> Iterator[None]:
    """While this lasts, convolutions and products of sizes not met before borrow the kernels of sizes that were."""
    if not wanted:
        yield
        return
    nearby = Nearby(device, native.measured(device) if device.type == "cuda" else {})
    token = _active.set(nearby)
    try:
        yield
    finally:
        _active.reset(token)
        logger.debug("kernels: %d borrowed, %d measured in %.3f s", nearby.borrowed, nearby.measured, nearby.spent)


def is_borrowing() -> bool:
    """Whether this is a shape after the first, at which kernels that are there already are preferred."""
    return _active.get() is not None


def answer(known: dict[int, str], size: int) -> str | None:
    """What to borrow of the answers known for other sizes; None outside of `borrowing`, and where to measure."""
    if _active.get() is None or not known:
        return None
    distance, found = min((abs(math.log(other / size)), found) for other, found in known.items())
    return None if distance > math.log(FAR) else found


def conv2d(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, *geometry: Any) -> Tensor:
    """`sfast_native.conv2d`; the rest is stride, padding, dilation, groups and activation."""
    arguments = x, weight, bias, residual, *geometry
    nearby = _active.get()
    if nearby is None:
        return _native(torch.ops.sfast_native.conv2d, arguments)
    return nearby.run(torch.ops.sfast_native.conv2d, "conv2d", conv2d_problem(*arguments), arguments)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, activation: str) -> Tensor:
    """`sfast_native.linear`."""
    arguments = x, weight, bias, residual, activation
    nearby = _active.get()
    if nearby is None:
        return _native(torch.ops.sfast_native.linear, arguments)
    return nearby.run(torch.ops.sfast_native.linear, "linear", linear_problem(*arguments), arguments)


def linear_cat(a: Tensor, b: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`sfast_native.linear_cat`."""
    arguments = a, b, weight, bias
    nearby = _active.get()
    if nearby is None:
        return _native(torch.ops.sfast_native.linear_cat, arguments)
    problem = linear_problem(a, weight, bias, None, "none", b)
    return nearby.run(torch.ops.sfast_native.linear_cat, "linear", problem, arguments)


def linear_swiglu(
    x: Tensor, weight: Tensor, bias: Tensor | None, gate_weight: Tensor, gate_bias: Tensor | None
) -> Tensor:
    """`sfast_native.linear_swiglu`."""
    arguments = x, weight, bias, gate_weight, gate_bias
    nearby = _active.get()
    if nearby is None:
        return _native(torch.ops.sfast_native.linear_swiglu, arguments)
    problem = linear_problem(x, weight, bias, None, "swiglu")
    return nearby.run(torch.ops.sfast_native.linear_swiglu, "linear", problem, arguments)


def _native(op: Any, arguments: tuple[Any, ...]) -> Tensor:
    result: Tensor = op(*arguments)
    return result


class Nearby:
    """What was measured at other sizes, by layer."""

    def __init__(self, device: torch.device, measured: dict[str, str]) -> None:
        self.device = device
        self.borrowed = self.measured = 0
        self.spent = 0.0  # seconds of measuring
        self._met: set[str] = set()
        self._layers: dict[tuple[Any, ...], list[tuple[int, str]]] = {}  # layer -> (size, recipe) of each size
        for problem, recipe in measured.items():
            op, *numbers = problem.split(" ")
            if op in _SIZES:
                self._met.add(problem)
                layer, size = _layer_and_size(op, list(map(int, numbers)))
                self._layers.setdefault(layer, []).append((size, recipe))

    def run(self, op: Any, kind: str, numbers: list[int], arguments: tuple[Any, ...]) -> Tensor:
        """`op(*arguments)`, a problem of this kind, by a borrowed kernel where that is worth it."""
        problem = " ".join((kind, *map(str, numbers)))
        recipe = None if problem in self._met else self._recipe(kind, numbers)
        measures = problem not in self._met and recipe is None
        self._met.add(problem)
        if recipe is not None:
            self.borrowed += 1
            native.borrow(self.device, problem, recipe)
        started = time.perf_counter()
        result = _native(op, arguments)
        if measures:
            self.measured += 1
            self.spent += time.perf_counter() - started
        return result

    def _recipe(self, op: str, numbers: list[int]) -> str | None:
        """What to borrow; None to measure."""
        layer, size = _layer_and_size(op, numbers)
        known = self._layers.get(layer)
        if not known:
            return None
        distance, recipe = min((abs(math.log(other / size)), recipe) for other, recipe in known)
        return None if distance > math.log(FAR) and self.spent < SLICE else recipe


def _layer_and_size(op: str, numbers: list[int]) -> tuple[tuple[Any, ...], int]:
    rest = [number for place, number in enumerate(numbers) if place not in _SIZES[op]]
    return (op, *rest), math.prod(numbers[place] for place in _FACTORS[op])


# The problems as the native library numbers them: `ConvProblem::key` and `MatmulProblem::key`, without the device.


def conv2d_problem(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    activation: str,
) -> list[int]:
    """x [N, C, H, W], weight [K, C / groups, R, S]; padding one, two or four integers: top, left, bottom, right."""
    before = [padding[0], padding[1 % len(padding)]]
    behind = [padding[2], padding[3]] if len(padding) == 4 else before
    strides, dilations = ([numbers[0], numbers[-1]] for numbers in (stride, dilation))
    size = [
        (x.shape[2 + d] + before[d] + behind[d] - dilations[d] * (weight.shape[2 + d] - 1) - 1) // strides[d] + 1
        for d in (0, 1)
    ]
    numbers = [_DTYPES["conv2d"][x.dtype], *x.shape, weight.shape[0], *weight.shape[2:], *size]
    numbers += [*strides, *before, *dilations, groups, bias is not None, residual is not None, activation == "relu"]
    return list(map(int, numbers))


def linear_problem(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    activation: str,
    beside: Tensor | None = None,
) -> list[int]:
    """x [..., K], weight [D, K], residual [..., D]; of GEGLU the result is half as wide. With x [..., A] and `beside`
    [..., B], K is A + B.
    """
    columns = weight.shape[0] // (2 if activation.startswith("geglu") else 1)
    spacing = [_row_stride(x), _row_stride(weight)]
    width = x.shape[-1]
    batches, gap = _samples(x)
    rows = x.numel() // width // batches
    numbers = [_DTYPES["linear"][x.dtype], rows, columns, width, batches, gap, *spacing]
    numbers += [bias is not None, residual is not None, 0 if residual is None else _row_stride(residual)]
    second = [0, 0] if beside is None else [beside.shape[-1], _row_stride(beside)]
    return list(map(int, [*numbers, _EPILOGUES.index(activation), *second]))


def _samples(tensor: Tensor) -> tuple[int, int]:
    """How many matrices of evenly spaced rows, and the elements from one to the next; all rows as one are (1, 0)."""
    rows, spacing = 1, tensor.shape[-1]
    batches, gap = 1, 0
    for size, stride in zip(reversed(tensor.shape[:-1]), reversed(tensor.stride()[:-1]), strict=True):
        if size == 1:
            continue
        if rows == 1:
            spacing = stride
        if batches > 1 or stride != rows * spacing:
            batches, gap = batches * size, gap or stride
        else:
            rows *= size
    return batches, gap


def _row_stride(tensor: Tensor) -> int:
    """Elements from one row of the last dimension to the next, of one matrix of them."""
    for size, stride in zip(reversed(tensor.shape[:-1]), reversed(tensor.stride()[:-1]), strict=True):
        if size != 1:
            return stride
    return tensor.shape[-1]
