"""GroupNorm, with the per-channel shift before it and the SiLU after it, at the speed of memory."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from sfast.kernels.op import define


def group_norm_reference(
    x: Tensor, num_groups: int, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor:
    """group_norm(x): x [N, C, *], weight [C], bias [C] -> [N, C, *]."""
    return F.group_norm(x, num_groups, weight, bias, eps)


def group_norm_silu_reference(
    x: Tensor, num_groups: int, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor:
    """silu(group_norm(x)): x [N, C, *], weight [C], bias [C] -> [N, C, *]."""
    return F.silu(F.group_norm(x, num_groups, weight, bias, eps))


def add_group_norm_silu_reference(
    x: Tensor, shift: Tensor, num_groups: int, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor:
    """silu(group_norm(x + shift)): x [N, C, *], shift [N, C, 1, 1] (or any that broadcasts) -> [N, C, *]."""
    return F.silu(F.group_norm(x + shift, num_groups, weight, bias, eps))


def _no(*args: object) -> bool:
    return False


define(
    "group_norm(Tensor x, int num_groups, Tensor? weight, Tensor? bias, float eps) -> Tensor",
    reference=group_norm_reference, supports=_no, launch=_no, fake=lambda x, *rest: torch.empty_like(x),
)
define(
    "group_norm_silu(Tensor x, int num_groups, Tensor? weight, Tensor? bias, float eps) -> Tensor",
    reference=group_norm_silu_reference, supports=_no, launch=_no, fake=lambda x, *rest: torch.empty_like(x),
)
define(
    "add_group_norm_silu(Tensor x, Tensor shift, int num_groups, Tensor? weight, Tensor? bias, float eps) -> Tensor",
    reference=add_group_norm_silu_reference, supports=_no, launch=_no, fake=lambda x, shift, *rest: torch.empty_like(x + shift),
)
