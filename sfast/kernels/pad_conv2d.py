"""Convolution of an image with zeros around it, more of them on one side than on the other, without writing that image.

Autoencoders halve an image by a convolution of stride 2 behind one row and one column of zeros. PyTorch fills a larger image
with zeros and copies into it; cuDNN takes the padding of each side as a number of its own.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from sfast.fallback import note
from sfast.kernels import nearby
from sfast.kernels.native_ops import native_conv2d_takes
from sfast.kernels.op import define


def pad_conv2d_reference(
    x: Tensor,
    pad: list[int],
    weight: Tensor,
    bias: Tensor,
    stride: list[int],
    dilation: list[int],
    groups: int,
) -> Tensor:
    """conv2d(pad(x), weight) + bias: x [N, C, H, W], pad [left, right, top, bottom] -> [N, K, P, Q]."""
    return F.conv2d(F.pad(x, pad, "constant", 0.0), weight, bias, stride, [0, 0], dilation, groups)


def _takes(
    x: Tensor, pad: list[int], weight: Tensor, bias: Tensor, stride: list[int], dilation: list[int], groups: int
) -> bool:
    return len(pad) == 4 and min(pad) >= 0 and native_conv2d_takes(x, weight, bias, None)


def _pad_conv2d(
    x: Tensor, pad: list[int], weight: Tensor, bias: Tensor, stride: list[int], dilation: list[int], groups: int
) -> Tensor:
    left, right, top, bottom = pad
    sides = [top, left, bottom, right]
    try:
        return nearby.conv2d(x, weight, bias, None, stride, sides, dilation, groups, "none")
    except RuntimeError as error:
        if not str(error).startswith("sfast_native"):
            raise
        note("convolutions with unequal padding", f"the image is padded first: {error}")
    return torch.ops.sfast.conv2d_bias(F.pad(x, pad), weight, bias, stride, [0, 0], dilation, groups)


define(
    "pad_conv2d(Tensor x, int[] pad, Tensor weight, Tensor bias, int[] stride, int[] dilation, int groups) -> Tensor",
    reference=pad_conv2d_reference,
    supports=_takes,
    launch=_pad_conv2d,
    fake=pad_conv2d_reference,
)
