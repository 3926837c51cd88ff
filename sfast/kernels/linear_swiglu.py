"""SwiGLU: two linear layers of one input, the first through SiLU and then a gate of the second, in one operator.

Eager runs four kernels, of which the last two read and write nothing but activations. In the native operator's own kernel
both products meet in the registers; it measures that against two products and one pass over both, which is what runs
fastest where the products are large. Elsewhere the two elementwise steps are made in place.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from sfast.kernels import nearby
from sfast.kernels.linear import fastest_linear, has_even_rows
from sfast.kernels.native_ops import has_linear_swiglu, native_linear_takes
from sfast.kernels.op import define


def linear_swiglu_reference(
    x: Tensor, gate_weight: Tensor, gate_bias: Tensor | None, weight: Tensor, bias: Tensor | None
) -> Tensor:
    """silu(x @ gate_weightᵀ + gate_bias) * (x @ weightᵀ + bias): x [..., K], weights [D, K], biases [D] -> [..., D]."""
    return F.silu(F.linear(x, gate_weight, gate_bias)) * F.linear(x, weight, bias)


def _linear_swiglu(
    x: Tensor, gate_weight: Tensor, gate_bias: Tensor | None, weight: Tensor, bias: Tensor | None
) -> Tensor:
    if _native_takes(x, gate_weight, gate_bias, weight, bias):
        return nearby.linear_swiglu(x, weight, bias, gate_weight, gate_bias)
    gate = F.silu(fastest_linear(x, gate_weight, gate_bias), inplace=True)
    return gate.mul_(fastest_linear(x, weight, bias))


def _native_takes(
    x: Tensor, gate_weight: Tensor, gate_bias: Tensor | None, weight: Tensor, bias: Tensor | None
) -> bool:
    alike = (gate_bias is None) == (bias is None) and gate_weight.stride() == weight.stride()
    rows = all(map(has_even_rows, (x, weight, gate_weight)))
    biases = all(each is None or has_even_rows(each) for each in (bias, gate_bias))
    fits = native_linear_takes(x, weight, bias) and native_linear_takes(x, gate_weight, gate_bias)
    return alike and rows and biases and fits and has_linear_swiglu(x)


def _takes(x: Tensor, gate_weight: Tensor, gate_bias: Tensor | None, weight: Tensor, bias: Tensor | None) -> bool:
    alike = all(each is None or each.dtype == x.dtype for each in (gate_weight, gate_bias, weight, bias))
    return x.is_floating_point() and alike and gate_weight.shape == weight.shape


def _product(x: Tensor, gate_weight: Tensor, *rest: object) -> Tensor:
    return x.new_empty((*x.shape[:-1], gate_weight.shape[0]))


define(
    "linear_swiglu(Tensor x, Tensor gate_weight, Tensor? gate_bias, Tensor weight, Tensor? bias) -> Tensor",
    reference=linear_swiglu_reference,
    supports=_takes,
    launch=_linear_swiglu,
    fake=_product,
)
