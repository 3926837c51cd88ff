"""Convolution with what follows it (bias, residual, activation) in one cuDNN kernel instead of up to four.

Each elementwise operator after a convolution reads and writes the whole output again: 1.2 to 1.5 ms of an SDXL step on an
H200. cuDNN's graph API does them in the epilogue (`sfast_native.conv2d`); without the native library the reference runs.
Where there are too few channels for it, `conv2d_few` has kernels of its own. Convolutions of groups are measured: cuDNN's
engines for them are between the fastest and twenty times slower than PyTorch's choice, and than `conv2d_depthwise`'s kernel.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sfast.kernels import choice, conv2d_depthwise, conv2d_few, nearby
from sfast.kernels.native_ops import native_conv2d_takes, own_kernels_run_on
from sfast.kernels.op import define

# All of these: x [N, C, H, W], weight [K, C / groups, R, S], bias [K], residual [N, K, P, Q] -> [N, K, P, Q].


def conv2d_bias_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
) -> Tensor:
    """conv2d(x, weight) + bias."""
    return F.conv2d(x, weight, bias, stride, padding, dilation, groups)


def conv2d_add_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
) -> Tensor:
    """conv2d(x, weight) + bias + residual."""
    return F.conv2d(x, weight, bias, stride, padding, dilation, groups) + residual


def conv2d_silu_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
) -> Tensor:
    """silu(conv2d(x, weight) + bias)."""
    return F.silu(F.conv2d(x, weight, bias, stride, padding, dilation, groups))


def conv2d_relu_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
) -> Tensor:
    """relu(conv2d(x, weight) + bias)."""
    return F.relu(F.conv2d(x, weight, bias, stride, padding, dilation, groups))


def conv2d_add_silu_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
) -> Tensor:
    """silu(conv2d(x, weight) + bias + residual)."""
    return F.silu(F.conv2d(x, weight, bias, stride, padding, dilation, groups) + residual)


def conv2d_add_relu_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
) -> Tensor:
    """relu(conv2d(x, weight) + bias + residual)."""
    return F.relu(F.conv2d(x, weight, bias, stride, padding, dilation, groups) + residual)


def _output_shape(x: Tensor, weight: Tensor, stride: list[int], padding: list[int], dilation: list[int]) -> list[int]:
    """[N, K, P, Q] of the convolution."""
    sizes = [
        (x.shape[2 + i] + 2 * padding[i] - dilation[i] * (weight.shape[2 + i] - 1) - 1) // stride[i] + 1 for i in (0, 1)
    ]
    return [x.shape[0], weight.shape[0], *sizes]


def _define_conv2d(name: str, reference: Callable[..., Tensor], activation: str) -> None:
    """Register one member of the family; its arguments follow from what it fuses."""
    adds = name.startswith("conv2d_add")
    bias_type = "Tensor" if name == "conv2d_bias" else "Tensor?"
    residual_argument = "Tensor residual, " if adds else ""

    def supports(x: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any) -> bool:
        if name == "conv2d_bias" and any(each.takes(x, weight, bias, *rest) for each in (conv2d_few, conv2d_depthwise)):
            return True
        return native_takes(x, weight, bias, *rest)

    def native_takes(x: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any) -> bool:
        residual, geometry = (rest[0], rest[1:]) if adds else (None, rest)
        if not native_conv2d_takes(x, weight, bias, residual):
            return False
        return residual is None or list(residual.shape) == _output_shape(x, weight, *geometry[:3])

    def launch(x: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any) -> Tensor:
        if name == "conv2d_bias" and conv2d_few.takes(x, weight, bias, *rest):
            return torch.ops.sfast.conv2d_few(x, weight, bias, *rest)
        if name == "conv2d_silu" and _is_product(x, weight, *rest) and own_kernels_run_on(x):
            question, layer = conv2d_depthwise.ask(name, x, weight, bias, *rest)
            return choice.fastest(
                question, {"native": native, "product": _multiply}, x, weight, bias, *rest, layer=layer
            )
        if rest[-1] == 1:
            return native(x, weight, bias, *rest)
        ways: dict[str, choice.Way] = {"PyTorch's": reference}  # of groups
        if native_takes(x, weight, bias, *rest):
            ways["native"] = native
        if name == "conv2d_bias" and conv2d_depthwise.takes(x, weight, bias, *rest):
            ways["depthwise"] = conv2d_depthwise.convolve
        question, layer = conv2d_depthwise.ask(name, x, weight, bias, *rest[-4:])
        return choice.fastest(question, ways, x, weight, bias, *rest, layer=layer)

    def native(x: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any) -> Tensor:
        residual, geometry = (rest[0], rest[1:]) if adds else (None, rest)
        return nearby.conv2d(x, weight, bias, residual, *geometry, activation)

    define(
        f"{name}(Tensor x, Tensor weight, {bias_type} bias, {residual_argument}"
        "int[] stride, int[] padding, int[] dilation, int groups) -> Tensor",
        reference=reference,
        supports=supports,
        launch=launch,
        fake=reference,
    )


def _is_product(
    x: Tensor, weight: Tensor, stride: list[int], padding: list[int], dilation: list[int], groups: int
) -> bool:
    """Whether a convolution multiplies every pixel, and no neighbours, with one matrix."""
    return groups == 1 and list(weight.shape[2:]) == [1, 1] and stride == [1, 1] and padding == [0, 0]


def _multiply(x: Tensor, weight: Tensor, bias: Tensor | None, *geometry: Any) -> Tensor:
    """silu of what `_is_product` says yes to, as a linear layer of pixels: its kernels have an epilogue for SiLU."""
    product: Tensor = torch.ops.sfast.linear_silu(x.movedim(1, -1), weight.flatten(1), bias)
    return product.movedim(-1, 1)


_define_conv2d("conv2d_bias", conv2d_bias_reference, "none")
_define_conv2d("conv2d_add", conv2d_add_reference, "none")
_define_conv2d("conv2d_silu", conv2d_silu_reference, "silu")
_define_conv2d("conv2d_relu", conv2d_relu_reference, "relu")
_define_conv2d("conv2d_add_silu", conv2d_add_silu_reference, "silu")
_define_conv2d("conv2d_add_relu", conv2d_add_relu_reference, "relu")
