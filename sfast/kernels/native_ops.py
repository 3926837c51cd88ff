"""Which inputs go to the compiled operators of `sfast_native`: half precision on CUDA, in the layout tensor cores read.

The compiled library is optional; everything here answers no where it is missing.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

HALF = (torch.float16, torch.bfloat16)


def native_is_available() -> bool:
    """Whether `torch.ops.sfast_native` can be called."""
    try:
        from sfast import native  # loads the compiled library at the first question, not when kernels are imported
    except ImportError:
        return False
    return native.available()


def native_conv2d_takes(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None) -> bool:
    """Whether cuDNN's fused convolution can take these: fp16 or bf16 on one CUDA device, x channels-last [N, C, H, W]."""
    return (
        x.is_cuda
        and x.dtype in HALF
        and x.dim() == 4
        and x.numel() > 0
        and weight.shape[0] % 8 == 0  # cuDNN pads other widths with a kernel for each operand: slower than plain
        and x.is_contiguous(memory_format=torch.channels_last)
        and _agree(x, weight, bias, residual)
        and native_is_available()
    )


def native_linear_takes(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether cuBLASLt's fused product can take these: fp16 or bf16 on one CUDA device, x [..., K], weight [D, K]."""
    return (
        x.is_cuda
        and x.dtype in HALF
        and x.numel() > 0
        and weight.dim() == 2
        and weight.shape[0] % 8 == 0
        and weight.shape[1] % 8 == 0
        and _agree(x, weight, bias)
        and native_is_available()
    )


def native_group_norm_takes(x: Tensor, num_groups: int) -> bool:
    """Whether one launch of our own kernel can take it: fp16 or bf16 on CUDA, x [N, S, C] contiguous."""
    return (
        x.is_cuda
        and x.dtype in HALF
        and x.is_contiguous()
        and _has_group_norm()
        and bool(torch.ops.sfast_native.group_norm_takes(x, num_groups))
    )


@functools.cache
def _has_group_norm() -> bool:
    """Whether the compiled library is not older than its group norm."""
    return native_is_available() and hasattr(torch.ops.sfast_native, "group_norm_takes")


def own_kernels_run_on(x: Tensor) -> bool:
    """Whether `sfast_native.linear` has kernels of our own for x's GPU, and so takes every activation."""
    return x.is_cuda and native_is_available() and _own_kernels(x.device.index)


@functools.cache
def _own_kernels(device: int) -> bool:
    # a library built from older sources knows no such question
    return hasattr(torch.ops.sfast_native, "own_kernels") and bool(torch.ops.sfast_native.own_kernels(device))


def has_linear_cat(x: Tensor) -> bool:
    """Whether `sfast_native.linear_cat` runs on x's GPU."""
    return own_kernels_run_on(x) and hasattr(torch.ops.sfast_native, "linear_cat")


def has_linear_swiglu(x: Tensor) -> bool:
    """Whether `sfast_native.linear_swiglu` runs on x's GPU."""
    return own_kernels_run_on(x) and hasattr(torch.ops.sfast_native, "linear_swiglu")


def _agree(x: Tensor, *others: Tensor | None) -> bool:
    return all(other is None or (other.dtype == x.dtype and other.device == x.device) for other in others)
