"""RMSNorm in its spellings, and what queries and keys go through on their way to attention.

The norms and rotations come first, each from several spellings; the larger patterns are made of their operators. Models
convert to fp32 and back where they compute in half precision, so those patterns are traced once for each precision.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sfast.kernels import rotary
from sfast.rewrite import Fusion

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_TRITON, _NEEDS = ("enable_triton",), ("enable_triton", "enable_fused_rotary")
_EPS, _EPS_B = 1.25e-3, 1.5e-3
_HEADS, _WEIGHT = torch.randn(2, 3, 5, 8), torch.randn(8)
_COS, _TABLE = torch.randn(1, 3, 1, 8), torch.randn(3, 1, 4, dtype=torch.complex64)


def _by_shape(x: Tensor, normalized_shape: list[int], weight: Tensor, eps: float) -> Tensor:
    return F.rms_norm(x, normalized_shape, weight, eps)


def _rounded(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    variance = x.to(torch.float32).pow(2).mean(-1, keepdim=True)
    return (x * torch.rsqrt(variance + eps)).to(weight.dtype) * weight


def _widened(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = x.to(torch.float32)
    return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)


def _has_one_dimension(shape: Any) -> bool:
    return shape.node().kind() == "prim::Constant" and len(shape.toIValue()) == 1


def _is_given(weight: Any) -> bool:
    """Whether a factor is somebody's parameter, whatever its dtype: `1 + scale` is computed, and another for each sample."""
    while weight.node().kind() in ("aten::to", "aten::type_as", "aten::float"):
        weight = weight.node().inputsAt(0)
    return weight.node().kind() in ("prim::Param", "prim::Constant")


RMS_NORM = [
    Fusion(
        "rms_norm",
        _by_shape,
        (_HEADS, [8], _WEIGHT, _EPS),
        needs=_TRITON,
        only={"normalized_shape": _has_one_dimension},
        implied=("normalized_shape",),
    ),
    *(
        Fusion(
            "rms_norm", spelling, (_HEADS.to(dtype), _WEIGHT.to(dtype), _EPS), needs=_TRITON, only={"weight": _is_given}
        )
        for spelling in (_rounded, _widened)
        for dtype in _DTYPES
    ),
]

ROTARY = [
    *(Fusion("rotary", rotary.rotary_reference, (_HEADS.to(d), _COS, _COS + 1), needs=_NEEDS) for d in _DTYPES),
    *(Fusion("rotary_complex", rotary.rotary_complex_reference, (_HEADS.to(d), _TABLE), needs=_NEEDS) for d in _DTYPES),
    Fusion("rotary_pairs", rotary.rotary_pairs_reference, (_HEADS, _COS[..., ::2], _COS[..., 1::2] + 1), needs=_NEEDS),
]


def _norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    normalized: Tensor = torch.ops.sfast.rms_norm(x, weight, eps)
    return normalized


def _rms_norm_rotary(x: Tensor, weight: Tensor, eps: float, cos: Tensor, sin: Tensor) -> Any:
    return torch.ops.sfast.rotary(_norm(x, weight, eps), cos, sin)


def _rms_norm_rotary_complex(x: Tensor, weight: Tensor, eps: float, table: Tensor) -> Any:
    return torch.ops.sfast.rotary_complex(_norm(x, weight, eps), table)


def _rms_norm_heads_rotary_pairs(
    x: Tensor, weight: Tensor, eps: float, sizes: list[int], cos: Tensor, sin: Tensor
) -> Any:
    return torch.ops.sfast.rotary_pairs(_norm(x, weight, eps).unflatten(2, sizes), cos, sin)


def _rms_norm_heads_rotary_pairs_converted(
    x: Tensor, weight: Tensor, eps: float, sizes: list[int], cos: Tensor, sin: Tensor
) -> Any:
    heads = _norm(x, weight, eps).unflatten(2, sizes)
    return torch.ops.sfast.rotary_pairs(heads, cos, sin).type_as(heads)  # once more


def _cat_rms_norm(
    a: Tensor, weight_a: Tensor, eps_a: float, b: Tensor, weight_b: Tensor, eps_b: float, dim: int
) -> Tensor:
    return torch.cat([_norm(a, weight_a, eps_a), _norm(b, weight_b, eps_b)], dim)


def _cat_rms_norm_rotary(
    a: Tensor, weight_a: Tensor, eps_a: float, b: Tensor, weight_b: Tensor, eps_b: float, cos: Tensor, sin: Tensor
) -> Any:
    return torch.ops.sfast.rotary(_cat_rms_norm(a, weight_a, eps_a, b, weight_b, eps_b, 1), cos, sin)


def _cat_rms_norm_rotary_complex(
    a: Tensor,
    weight_a: Tensor,
    eps_a: float,
    table_a: Tensor,
    b: Tensor,
    weight_b: Tensor,
    eps_b: float,
    table_b: Tensor,
) -> Tensor:
    turned = _rms_norm_rotary_complex(a, weight_a, eps_a, table_a)
    return torch.cat([turned, _rms_norm_rotary_complex(b, weight_b, eps_b, table_b)], 1)


_A, _B = (_HEADS, _WEIGHT, _EPS), (_HEADS + 1, _WEIGHT + 1, _EPS_B)
_COS_BOTH = torch.randn(1, 6, 1, 8)

RMS_NORM_ROTARY = Fusion("rms_norm_rotary", _rms_norm_rotary, (*_A, _COS, _COS + 1), needs=_NEEDS)
RMS_NORM_ROTARY_COMPLEX = Fusion("rms_norm_rotary_complex", _rms_norm_rotary_complex, (*_A, _TABLE), needs=_NEEDS)
RMS_NORM_HEADS_ROTARY_PAIRS = [
    Fusion(
        "rms_norm_heads_rotary_pairs",
        spelling,
        (torch.randn(2, 3, 40), torch.randn(40), _EPS, [5, -1], _COS[..., ::2], _COS[..., 1::2] + 1),
        needs=_NEEDS,
    )
    for spelling in (_rms_norm_heads_rotary_pairs_converted, _rms_norm_heads_rotary_pairs)  # the longer first
]
CAT_RMS_NORM = Fusion("cat_rms_norm", _cat_rms_norm, (*_A, *_B, 2), needs=_NEEDS)
CAT_RMS_NORM_ROTARY = Fusion(
    "cat_rms_norm_rotary", _cat_rms_norm_rotary, (*_A, *_B, _COS_BOTH, _COS_BOTH + 1), needs=_NEEDS
)
CAT_RMS_NORM_ROTARY_COMPLEX = Fusion(
    "cat_rms_norm_rotary_complex", _cat_rms_norm_rotary_complex, (*_A, _TABLE, *_B, _TABLE + 1), needs=_NEEDS
)


def _is_third(dim: Any) -> bool:
    return bool(dim.node().kind() == "prim::Constant" and dim.toIValue() in (2, -2))


CAT_TOKENS = Fusion(
    "cat_tokens", rotary.cat_tokens_reference, (_HEADS, _HEADS + 1, 2), needs=_NEEDS, only={"dim": _is_third}
)
