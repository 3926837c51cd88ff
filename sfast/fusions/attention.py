"""Scaled dot product attention without dropout and causality: by the fastest kernel, or by xformers where asked for."""

from typing import Any

import torch

from sfast.kernels.attention import attention_reference, masked_attention_reference
from sfast.kernels.cross_attention import cross_attention_reference
from sfast.kernels.xformers_attention import xformers_attention_reference
from sfast.rewrite import Fusion

_QUERY, _KEY = torch.randn(2, 3, 5, 8), torch.randn(2, 3, 7, 8)
_ATTENTION = (_QUERY, _KEY, _KEY + 1, 0.375)  # the last is scale, which may be None as well

XFORMERS_ATTENTION = Fusion("xformers_attention", xformers_attention_reference, _ATTENTION, needs=("enable_xformers",))
ATTENTION = Fusion("attention", attention_reference, _ATTENTION, needs=("enable_fused_attention",))
MASKED_ATTENTION = Fusion(
    "masked_attention",
    masked_attention_reference,
    (*_ATTENTION[:3], torch.zeros(2, 1, 1, 7), 0.375),
    needs=("enable_fused_attention", "enable_native"),
)


def _is_projected_once(x: Any) -> bool:
    """Whether one linear layer alone reads a value: of self-attention three do, which are better merged."""
    readers = [use.user.kind() for use in x.uses()]
    return sum(kind in ("aten::linear", "sfast::linear") for kind in readers) == 1


_X, _PROJECTION, _JOIN = torch.randn(2, 5, 14), torch.randn(24, 14), torch.randn(14, 24)

CROSS_ATTENTION = Fusion(
    "cross_attention",
    cross_attention_reference,
    (_X, _PROJECTION, _PROJECTION[:, 0], [2, 5, 3, 8], _KEY, _KEY + 1, 0.375, [2, 5, 24], _JOIN, _JOIN[:, 0]),
    needs=("enable_fused_attention", "enable_fused_linears", "enable_native"),
    only={"x": _is_projected_once},
)
