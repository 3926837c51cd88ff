"""A linear layer over two tensors side by side, without putting them there: each meets its own columns of the weight.

Transformers whose attention and feed-forward run in parallel join the two before one projection out. The joined tensor is
the widest of the block, and joining it means to write and to read all of it once more. Our own kernel for matrix products
takes its operand from two places. Elsewhere two products, of which the second adds to the first, need only the result
twice. Whether that is faster than joining is measured for each shape.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from sfast.kernels import choice, nearby
from sfast.kernels.linear import fastest_linear, has_even_rows
from sfast.kernels.native_ops import HALF, has_linear_cat, native_linear_takes
from sfast.kernels.op import define

TOGETHER = 64  # columns that our own kernel takes at a time, of one tensor


def linear_cat_reference(a: Tensor, b: Tensor, dim: int, weight: Tensor, bias: Tensor | None) -> Tensor:
    """cat(a, b) @ weightᵀ + bias: a [..., A], b [..., B], `dim` the last, weight [D, A + B], bias [D] -> [..., D]."""
    return F.linear(torch.cat([a, b], dim), weight, bias)


def _joined(a: Tensor, b: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return fastest_linear(torch.cat([a, b], -1), weight, bias)


def apart(a: Tensor, b: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """cat(a, b) @ weightᵀ + bias, as two products."""
    first, second = weight.split([a.shape[-1], b.shape[-1]], dim=1)
    product = fastest_linear(a, first, bias)
    if has_even_rows(b) and has_even_rows(second) and native_linear_takes(b, second, None):
        return nearby.linear(b, second, None, product, "none")
    rows = product.view(-1, weight.shape[0])
    rows.addmm_(b.reshape(-1, b.shape[-1]), second.t())
    return product


def _from_two_places(a: Tensor, b: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return nearby.linear_cat(a, b, weight, bias)


def _native_takes(a: Tensor, b: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    operands = (a, b, weight) if bias is None else (a, b, weight, bias)
    widths = a.shape[-1] % TOGETHER == 0 and b.shape[-1] % 8 == 0 and weight.shape[0] % 8 == 0
    return widths and all(map(has_even_rows, operands)) and has_linear_cat(a)


def _linear_cat(a: Tensor, b: Tensor, dim: int, weight: Tensor, bias: Tensor | None) -> Tensor:
    shapes = "; ".join(f"{list(tensor.shape)} strided {list(tensor.stride())}" for tensor in (a, b, weight))
    question = f"linear_cat of {a.dtype}, {'no ' if bias is None else ''}bias: {shapes}"
    layer = "linear_cat", a.dtype, bias is None, weight.shape, weight.stride(), a.stride()[1:], b.stride()[1:]
    ways = {"joined": _joined}
    if _native_takes(a, b, weight, bias):
        ways["from two places"] = _from_two_places
    else:
        ways["apart"] = apart
    return choice.fastest(question, ways, a, b, weight, bias, layer=layer)


def _takes(a: Tensor, b: Tensor, dim: int, weight: Tensor, bias: Tensor | None) -> bool:
    return (
        a.is_cuda
        and a.dtype in HALF
        and fits(a, b, dim, weight, bias)
        and all(other is None or (other.dtype, other.device) == (a.dtype, a.device) for other in (b, weight, bias))
    )


def fits(a: Tensor, b: Tensor, dim: int, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether a and b lie side by side along their last dimension, in front of the weight."""
    beside = a.dim() == b.dim() >= 2 and a.shape[:-1] == b.shape[:-1] and dim % a.dim() == a.dim() - 1
    wide = weight.dim() == 2 and weight.shape[1] == a.shape[-1] + b.shape[-1]
    return beside and wide and a.numel() > 0 and b.numel() > 0


def _product(a: Tensor, b: Tensor, dim: int, weight: Tensor, bias: Tensor | None) -> Tensor:
    return a.new_empty((*a.shape[:-1], weight.shape[0]))


define(
    "linear_cat(Tensor a, Tensor b, int dim, Tensor weight, Tensor? bias) -> Tensor",
    reference=linear_cat_reference,
    supports=_takes,
    launch=_linear_cat,
    fake=_product,
)
