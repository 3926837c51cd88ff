"""Convolution over the frames of a video, filter [T, 1, 1], by the fused kernels for images, without a copy.

In channels-last memory [N, F, H, W, C] the rows and columns of a frame are one axis of pixels, so that this is a convolution
with a filter [T, 1] over an image of F x (H W). Eager adds the bias in a kernel of its own: on an H200 that takes almost as
long as the convolution does.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sfast.kernels import nearby
from sfast.kernels.native_ops import native_conv2d_takes
from sfast.kernels.op import define

# x [N, C, F, H, W], weight [K, C / groups, T, R, S], bias [K], residual like the result -> [N, K, F', H', W'].


def conv3d_bias_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
) -> Tensor:
    """conv3d(x, weight) + bias."""
    return F.conv3d(x, weight, bias, stride, padding, dilation, groups)


def conv3d_add_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
) -> Tensor:
    """conv3d(x, weight) + bias + residual."""
    return F.conv3d(x, weight, bias, stride, padding, dilation, groups) + residual


def _is_over_frames(x: Tensor, weight: Tensor, stride: list[int], padding: list[int]) -> bool:
    """Whether rows and columns are left alone, and lie in memory as one axis of pixels."""
    return (
        x.dim() == weight.dim() == 5
        and weight.shape[3:].numel() == 1
        and len(stride) == len(padding) == 3
        and stride[1:] == [1, 1]
        and padding[1:] == [0, 0]
        and x.is_contiguous(memory_format=torch.channels_last_3d)
    )


def _frames(x: Tensor, weight: Tensor, stride: list[int], padding: list[int], dilation: list[int]) -> int:
    """How many frames the result has."""
    return (x.shape[2] + 2 * padding[0] - dilation[0] * (weight.shape[2] - 1) - 1) // stride[0] + 1


def _image(video: Tensor) -> Tensor:
    """[N, C, F, H, W] -> [N, C, F, H * W], a view of channels-last memory; of a filter as well."""
    return video.flatten(3)


def _define_conv3d(name: str, reference: Callable[..., Tensor], adds: bool) -> None:
    """Register one member of the family; its arguments follow from what it fuses."""
    arguments = "Tensor? bias, Tensor residual, " if adds else "Tensor bias, "

    def supports(x: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any) -> bool:
        residual, (stride, padding, dilation, _) = (rest[0], rest[1:]) if adds else (None, rest)
        if not _is_over_frames(x, weight, stride, padding) or not native_conv2d_takes(
            _image(x), _image(weight), bias, residual
        ):
            return False
        frames = _frames(x, weight, stride, padding, dilation)
        return residual is None or residual.shape == (x.shape[0], weight.shape[0], frames, *x.shape[3:])

    def launch(x: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any) -> Tensor:
        residual, (stride, padding, dilation, groups) = (_image(rest[0]), rest[1:]) if adds else (None, rest)
        geometry = [stride[0], 1], [padding[0], 0], [dilation[0], 1], groups
        image = nearby.conv2d(_image(x), _image(weight), bias, residual, *geometry, "none")
        return image.unflatten(3, x.shape[3:])

    define(
        f"{name}(Tensor x, Tensor weight, {arguments}"
        "int[] stride, int[] padding, int[] dilation, int groups) -> Tensor",
        reference=reference,
        supports=supports,
        launch=launch,
        fake=reference,
    )


_define_conv3d("conv3d_bias", conv3d_bias_reference, adds=False)
_define_conv3d("conv3d_add", conv3d_add_reference, adds=True)
