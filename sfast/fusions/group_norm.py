"""Group normalization, with the SiLU behind it and the per-channel shift (a time embedding) before it."""

from typing import Any

import torch

from sfast.kernels.group_norm import add_group_norm_silu_reference, group_norm_reference, group_norm_silu_reference
from sfast.normalize import is_constant
from sfast.rewrite import Fusion

_VIEWS = ("aten::permute", "aten::transpose", "aten::expand", "aten::slice", "aten::select", "aten::unsqueeze")


def is_spread(value: Any) -> bool:
    """Whether a value of a graph was given dimensions of size 1 to be added over: an embedding, and no image."""
    node = value.node()
    while node.kind() in _VIEWS:
        if node.kind() == "aten::unsqueeze":
            return True
        node = node.inputsAt(0).node()
    if node.kind() not in ("aten::view", "aten::reshape"):
        return False
    sizes = node.inputsAt(1)
    known = sizes.toIValue() if is_constant(sizes) else [size.toIValue() for size in sizes.node().inputs()]
    return isinstance(known, list) and known[-1:] == [1]


_X, _SHIFT = torch.randn(2, 26, 3, 5), torch.randn(2, 26, 1, 1)
_NORM = (13, torch.randn(26), torch.randn(26), 1.25e-3)  # num_groups, weight, bias, eps

GROUP_NORM = Fusion("group_norm", group_norm_reference, (_X, *_NORM), needs=("enable_triton",))
GROUP_NORM_SILU = Fusion("group_norm_silu", group_norm_silu_reference, (_X, *_NORM), needs=("enable_triton",))
ADD_GROUP_NORM_SILU = Fusion(
    "add_group_norm_silu",
    add_group_norm_silu_reference,
    (_X, _SHIFT, *_NORM),
    needs=("enable_triton",),
    only={"shift": is_spread},  # a residual goes into the epilogue of its convolution
)
