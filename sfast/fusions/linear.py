"""Linear layers with what follows: an activation (exact GELU stays exact and tanh stays tanh), a residual, or nothing."""

import torch

from sfast.kernels.geglu import linear_geglu_reference, silu_gate_reference
from sfast.kernels.linear import linear_add_reference, linear_image_add_reference, linear_reference
from sfast.kernels.linear_activation import linear_gelu_reference, linear_silu_reference
from sfast.kernels.linear_cat import linear_cat_reference
from sfast.kernels.linear_rounded import linear_rounded_reference
from sfast.kernels.linear_swiglu import linear_swiglu_reference
from sfast.rewrite import Fusion

_X, _WEIGHT, _BIAS = torch.randn(2, 3, 6), torch.randn(10, 6), torch.randn(10)
_NEEDS = ("enable_fused_linear_geglu",)

LINEAR_GEGLU = Fusion("linear_geglu", linear_geglu_reference, (_X, _WEIGHT, _BIAS, "tanh"), needs=_NEEDS)
LINEAR_GELU = Fusion("linear_gelu", linear_gelu_reference, (_X, _WEIGHT, _BIAS, "tanh"), needs=_NEEDS)
LINEAR_SILU = Fusion("linear_silu", linear_silu_reference, (_X, _WEIGHT, _BIAS), needs=_NEEDS)
LINEAR_SWIGLU = Fusion(
    "linear_swiglu", linear_swiglu_reference, (_X, _WEIGHT, _BIAS, _WEIGHT + 1, _BIAS + 1), needs=_NEEDS
)

_NATIVE = ("enable_fused_linears", "enable_native")
_RESIDUAL, _IMAGE, _SIZE = torch.randn(2, 3, 10), torch.randn(2, 10, 3, 1), [2, 3, 1, 10]

LINEAR = Fusion("linear", linear_reference, (_X, _WEIGHT, _BIAS), needs=_NATIVE)
LINEAR_ADD = Fusion("linear_add", linear_add_reference, (_X, _WEIGHT, _BIAS, _RESIDUAL), needs=_NATIVE)
LINEAR_IMAGE_ADD = Fusion(
    "linear_image_add", linear_image_add_reference, (_X, _WEIGHT, _BIAS, _SIZE, _IMAGE), needs=_NATIVE
)
LINEAR_ROUNDED = Fusion(
    "linear_rounded", linear_rounded_reference, (_X, _WEIGHT, _BIAS, _RESIDUAL.half()), needs=_NATIVE
)
LINEAR_CAT = Fusion(
    "linear_cat", linear_cat_reference, (_X[..., :4], _X[..., 4:], 2, _WEIGHT, _BIAS), needs=("enable_fused_linears",)
)
SILU_GATE = Fusion("silu_gate", silu_gate_reference, (torch.randn(2, 6, 3, 4), 3), needs=("enable_triton",))
