"""Scaled dot product attention without mask, dropout and causality: by the fastest kernel, or by xformers where asked for."""

import torch

from sfast.kernels.attention import attention_reference
from sfast.kernels.xformers_attention import xformers_attention_reference
from sfast.rewrite import Fusion

_QUERY, _KEY = torch.randn(2, 3, 5, 8), torch.randn(2, 3, 7, 8)
_ATTENTION = (_QUERY, _KEY, _KEY + 1, 0.375)  # the last is scale, which may be None as well

XFORMERS_ATTENTION = Fusion("xformers_attention", xformers_attention_reference, _ATTENTION, needs=("enable_xformers",))
ATTENTION = Fusion("attention", attention_reference, _ATTENTION, needs=("enable_fused_attention",))
