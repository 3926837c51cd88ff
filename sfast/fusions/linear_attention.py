"""Linear attention, as models of half precision write it: in fp32, with ones below the values that sum up the keys."""

import torch

from sfast.kernels.linear_attention import linear_attention_reference
from sfast.rewrite import Fusion

_X = torch.randn(2, 7, 12)

LINEAR_ATTENTION = [  # the result is converted to a precision that stands in the graph
    Fusion(
        "linear_attention",
        linear_attention_reference,
        (_X.to(dtype), _X.to(dtype) + 1, _X.to(dtype) - 1, [3, 4], 1.25e-15),
        needs=("enable_triton", "enable_fused_attention"),
    )
    for dtype in (torch.bfloat16, torch.float16)
]
