"""RMSNorm over the last dimension: of the rows of a transformer, or of each head where a projection left it.

Written out, as models do, it is six kernels and two copies in fp32. It mostly becomes a part of something larger: see
`rotary.py` and `modulate.py`, whose kernels do it here.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from sfast.kernels import modulate, rotary
from sfast.kernels.op import define


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x²) + eps) * weight: x [..., C], weight [C]."""
    return F.rms_norm(x, weight.shape, weight, eps)


def _heads(x: Tensor, weight: Tensor, eps: float) -> rotary.Job | None:
    """x as heads, [B, T, H, D] or [B, H, T, D], which need not be dense."""
    if x.dim() != 4 or x.is_contiguous():
        return None
    turned = x.stride(1) < x.stride(2)
    return rotary.Job(rotary.Heads(x.transpose(1, 2) if turned else x, weight, eps), turned=turned)


def _rows(x: Tensor, weight: Tensor, eps: float) -> modulate.Job:
    return modulate.Job(x, weight=weight, eps=eps, rms=True)


def _takes(x: Tensor, weight: Tensor, eps: float) -> bool:
    return rotary.takes(_heads(x, weight, eps)) or modulate.takes(_rows(x, weight, eps))


def _launch(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    heads = _heads(x, weight, eps)
    if heads is not None and rotary.takes(heads):
        return rotary.process(heads)
    return modulate.process(_rows(x, weight, eps))[0]


def _fake(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    heads = _heads(x, weight, eps)
    dense = x.new_empty(x.shape if heads is None else heads.first.x.shape)
    return dense.transpose(1, 2) if heads is not None and heads.turned else dense


define(
    "rms_norm(Tensor x, Tensor weight, float eps) -> Tensor",
    reference=rms_norm_reference,
    supports=_takes,
    launch=_launch,
    fake=_fake,
)
