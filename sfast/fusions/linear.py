"""Linear layers with the activation that follows; exact GELU stays exact and tanh stays tanh."""

import torch

from sfast.kernels.geglu import linear_geglu_reference
from sfast.kernels.linear_activation import linear_gelu_reference, linear_silu_reference
from sfast.rewrite import Fusion

_X, _WEIGHT, _BIAS = torch.randn(2, 3, 6), torch.randn(10, 6), torch.randn(10)
_NEEDS = ("enable_fused_linear_geglu",)

LINEAR_GEGLU = Fusion("linear_geglu", linear_geglu_reference, (_X, _WEIGHT, _BIAS, "tanh"), needs=_NEEDS)
LINEAR_GELU = Fusion("linear_gelu", linear_gelu_reference, (_X, _WEIGHT, _BIAS, "tanh"), needs=_NEEDS)
LINEAR_SILU = Fusion("linear_silu", linear_silu_reference, (_X, _WEIGHT, _BIAS), needs=_NEEDS)
