"""Linear, then GELU or SiLU, without a second copy of the activations.

tanh-GELU is an epilogue of cuBLASLt, so there the activation costs nothing (`sfast_native.linear`). It has no epilogue for
exact GELU or SiLU: the native operator's own kernel has, where it runs. Elsewhere those are applied in place, to a product
that nobody else has seen: PyTorch's own elementwise kernels already run at the speed of memory.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from sfast.kernels import nearby
from sfast.kernels.linear import has_even_rows
from sfast.kernels.native_ops import native_linear_takes, own_kernels_run_on
from sfast.kernels.op import define


def linear_gelu_reference(x: Tensor, weight: Tensor, bias: Tensor | None, approximate: str) -> Tensor:
    """gelu(x @ weightᵀ + bias): x [..., K], weight [D, K], bias [D] -> [..., D]."""
    return F.gelu(F.linear(x, weight, bias), approximate=approximate)


def linear_silu_reference(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """silu(x @ weightᵀ + bias): x [..., K], weight [D, K], bias [D] -> [..., D]."""
    return F.silu(F.linear(x, weight, bias))


def _linear_gelu(x: Tensor, weight: Tensor, bias: Tensor | None, approximate: str) -> Tensor:
    if (approximate == "tanh" or own_kernels_run_on(x)) and _native_takes(x, weight, bias):
        name = "gelu_tanh" if approximate == "tanh" else "gelu"
        return nearby.linear(x, weight, bias, None, name)
    return torch.ops.aten.gelu_(F.linear(x, weight, bias), approximate=approximate)


def _linear_silu(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if own_kernels_run_on(x) and _native_takes(x, weight, bias):
        return nearby.linear(x, weight, bias, None, "silu")
    return F.silu(F.linear(x, weight, bias), inplace=True)


def _native_takes(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    return has_even_rows(x) and has_even_rows(weight) and native_linear_takes(x, weight, bias)


def _takes_linear(x: Tensor, *rest: object) -> bool:
    return x.is_floating_point()


def _product_shape(x: Tensor, weight: Tensor, *rest: object) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


define(
    "linear_gelu(Tensor x, Tensor weight, Tensor? bias, str approximate) -> Tensor",
    reference=linear_gelu_reference,
    supports=_takes_linear,
    launch=_linear_gelu,
    fake=_product_shape,
)
define(
    "linear_silu(Tensor x, Tensor weight, Tensor? bias) -> Tensor",
    reference=linear_silu_reference,
    supports=_takes_linear,
    launch=_linear_silu,
    fake=_product_shape,
)
