"""Convolutions with bias, residual and activation in the kernel's epilogue."""

from typing import Any

import torch

from sfast.fusions.group_norm import is_spread
from sfast.kernels import conv2d, conv2d_depthwise, pad_conv2d
from sfast.rewrite import Fusion


def _is_image(value: Any) -> bool:
    return not is_spread(value)  # what is added to every pixel alike does not fit into an epilogue


_X, _WEIGHT, _BIAS = torch.randn(1, 6, 12, 14), torch.randn(4, 3, 1, 1), torch.randn(4)
_STRIDE, _PADDING, _DILATION, _GROUPS = [2, 3], [4, 5], [7, 8], 2
_PLACE = (_STRIDE, _PADDING, _DILATION, _GROUPS)
_RESIDUAL = torch.randn(1, 4, 10, 8)
_NEEDS = ("enable_cnn_optimization", "enable_native")
_ONLY = {"residual": _is_image}

CONV2D_BIAS = Fusion("conv2d_bias", conv2d.conv2d_bias_reference, (_X, _WEIGHT, _BIAS, *_PLACE), needs=_NEEDS)
CONV2D_SILU = Fusion("conv2d_silu", conv2d.conv2d_silu_reference, (_X, _WEIGHT, _BIAS, *_PLACE), needs=_NEEDS)
CONV2D_RELU = Fusion("conv2d_relu", conv2d.conv2d_relu_reference, (_X, _WEIGHT, _BIAS, *_PLACE), needs=_NEEDS)
CONV2D_ADD = Fusion(
    "conv2d_add", conv2d.conv2d_add_reference, (_X, _WEIGHT, _BIAS, _RESIDUAL, *_PLACE), needs=_NEEDS, only=_ONLY
)
CONV2D_ADD_SILU = Fusion(
    "conv2d_add_silu",
    conv2d.conv2d_add_silu_reference,
    (_X, _WEIGHT, _BIAS, _RESIDUAL, *_PLACE),
    needs=_NEEDS,
    only=_ONLY,
)
CONV2D_ADD_RELU = Fusion(
    "conv2d_add_relu",
    conv2d.conv2d_add_relu_reference,
    (_X, _WEIGHT, _BIAS, _RESIDUAL, *_PLACE),
    needs=_NEEDS,
    only=_ONLY,
)
PAD_CONV2D = Fusion(
    "pad_conv2d",
    pad_conv2d.pad_conv2d_reference,
    (_X, [11, 13, 15, 16], _WEIGHT, _BIAS, _STRIDE, _DILATION, _GROUPS),
    needs=_NEEDS,
)


def _are_many(groups: Any) -> bool:
    """Whether a convolution has groups; where it has none, cuDNN's product is faster on its own."""
    return bool(groups.node().kind() == "prim::Constant" and groups.toIValue() > 1)


CONV2D_SILU_GATE = Fusion(
    "conv2d_silu_gate",
    conv2d_depthwise.conv2d_silu_gate_reference,
    (_X, torch.randn(6, 2, 1, 1), torch.randn(6), _STRIDE, _PADDING, _DILATION, 3),
    needs=("enable_cnn_optimization", "enable_triton"),
    only={"groups": _are_many},
)
