"""Group normalization, with the SiLU behind it and the per-channel shift (a time embedding) before it."""

import torch

from sfast.kernels.group_norm import add_group_norm_silu_reference, group_norm_reference, group_norm_silu_reference
from sfast.rewrite import Fusion

_X, _SHIFT = torch.randn(2, 26, 3, 5), torch.randn(2, 26, 1, 1)
_NORM = (13, torch.randn(26), torch.randn(26), 1.25e-3)  # num_groups, weight, bias, eps

GROUP_NORM = Fusion("group_norm", group_norm_reference, (_X, *_NORM), needs=("enable_triton",))
GROUP_NORM_SILU = Fusion("group_norm_silu", group_norm_silu_reference, (_X, *_NORM), needs=("enable_triton",))
ADD_GROUP_NORM_SILU = Fusion(
    "add_group_norm_silu", add_group_norm_silu_reference, (_X, _SHIFT, *_NORM), needs=("enable_triton",)
)
