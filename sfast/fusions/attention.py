"""Scaled dot product attention by xformers, where it is asked for."""

import torch

from sfast.kernels.attention import xformers_attention_reference
from sfast.rewrite import Fusion

_QUERY, _KEY = torch.randn(2, 3, 5, 8), torch.randn(2, 3, 7, 8)

XFORMERS_ATTENTION = Fusion(
    "xformers_attention", xformers_attention_reference, (_QUERY, _KEY, _KEY + 1), needs=("enable_xformers",)
)
