"""Concatenation of two tensors along their channels."""

import torch

from sfast.kernels.cat_channels import cat_channels_reference
from sfast.rewrite import Fusion

_A, _B = torch.randn(1, 2, 3, 4), torch.randn(1, 5, 3, 4)

CAT_CHANNELS = Fusion(
    "cat_channels", cat_channels_reference, (_A, _B), needs=("enable_triton", "enable_memory_kernels")
)
