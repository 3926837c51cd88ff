"""Convolution over the frames of a video, filter [T, 1, 1], by the fused kernels for images, without a copy.

In channels-last memory [N, F, H, W, C] the rows and columns of a frame are one axis of pixels, so that this is a convolution
with a filter [T, 1] over an image of F x (H W). Eager adds the bias in a kernel of its own: on an H200 that takes almost as
long as the convolution does.

Where filters do not overlap, as in the embedding of a video's patches, a convolution is a linear layer of patches, whose
bias costs nothing, and whose result lies as the tokens that it is taken for: eager changes its layout twice.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sfast.kernels import nearby
from sfast.kernels.linear import fastest_linear
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


def _takes_patches(
    x: Tensor, weight: Tensor, bias: Tensor, stride: list[int], padding: list[int], dilation: list[int], groups: int
) -> bool:
    """Whether each element of x [N, C, F, H, W] is read by one place of the filter alone."""
    if x.dim() != 5 or weight.dim() != 5 or x.numel() == 0 or groups != 1:
        return False
    size = list(weight.shape[2:])
    apart = list(stride) == size and not any(padding) and all(step == 1 for step in dilation)
    whole = all(length % part == 0 for length, part in zip(x.shape[2:], size, strict=True))
    in_order = weight.is_contiguous() or weight.is_contiguous(memory_format=torch.channels_last_3d)
    alike = x.is_floating_point() and all(each.dtype == x.dtype and each.device == x.device for each in (weight, bias))
    return apart and whole and in_order and alike and size != [1, 1, 1]


def _multiply_patches(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """conv3d of patches, in channels-last memory."""
    N, C, *sizes = x.shape
    pieces = [part for length, size in zip(sizes, weight.shape[2:], strict=True) for part in (length // size, size)]
    order = (1, 3, 5, 7) if weight.is_contiguous() else (3, 5, 7, 1)
    patches = x.reshape(N, C, *pieces).permute(0, 2, 4, 6, *order).flatten(4)
    matrix = weight if weight.is_contiguous() else weight.permute(0, 2, 3, 4, 1)
    return fastest_linear(patches, matrix.flatten(1), bias).permute(0, 4, 1, 2, 3)


def _define_conv3d(name: str, reference: Callable[..., Tensor], adds: bool) -> None:
    """Register one member of the family; its arguments follow from what it fuses."""
    arguments = "Tensor? bias, Tensor residual, " if adds else "Tensor bias, "

    def supports(x: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any) -> bool:
        residual, (stride, padding, dilation, _) = (rest[0], rest[1:]) if adds else (None, rest)
        if bias is not None and not adds and _takes_patches(x, weight, bias, *rest):
            return True
        if not _is_over_frames(x, weight, stride, padding) or not native_conv2d_takes(
            _image(x), _image(weight), bias, residual
        ):
            return False
        frames = _frames(x, weight, stride, padding, dilation)
        return residual is None or residual.shape == (x.shape[0], weight.shape[0], frames, *x.shape[3:])

    def launch(x: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any) -> Tensor:
        if bias is not None and not adds and _takes_patches(x, weight, bias, *rest):
            return _multiply_patches(x, weight, bias)
        residual, (stride, padding, dilation, groups) = (_image(rest[0]), rest[1:]) if adds else (None, rest)
        geometry = [stride[0], 1], [padding[0], 0], [dilation[0], 1], groups
        image = nearby.conv2d(_image(x), _image(weight), bias, residual, *geometry, "none")
        return image.unflatten(3, x.shape[3:])

    def fake(x: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any) -> Tensor:
        result = reference(x, weight, bias, *rest)
        patches = bias is not None and not adds and _takes_patches(x, weight, bias, *rest)
        return result.new_empty(result.shape).to(memory_format=torch.channels_last_3d) if patches else result

    define(
        f"{name}(Tensor x, Tensor weight, {arguments}"
        "int[] stride, int[] padding, int[] dilation, int groups) -> Tensor",
        reference=reference,
        supports=supports,
        launch=launch,
        fake=fake,
    )


_define_conv3d("conv3d_bias", conv3d_bias_reference, adds=False)
_define_conv3d("conv3d_add", conv3d_add_reference, adds=True)
