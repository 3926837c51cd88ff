"""Nearest-neighbour upsampling, by factors or to a size."""

import torch

from sfast.kernels.upsample import upsample_nearest2d_reference
from sfast.rewrite import Fusion

UPSAMPLE_NEAREST2D = Fusion(
    "upsample_nearest2d",
    upsample_nearest2d_reference,
    (torch.randn(1, 2, 3, 4), [5, 7], None),
    needs=("enable_triton", "enable_memory_kernels"),
)
