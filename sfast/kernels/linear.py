"""Linear layers with bias and residual in the product's epilogue, by the algorithm of cuBLASLt that was measured fastest.

PyTorch takes cuBLASLt's first guess, and adds a residual in a kernel of its own, which reads two tensors and writes a third
that the product has just had in registers. Transformer blocks add one behind each of their parts. Around a transformer the
residual is an image: in channels-last memory its pixels are the rows of the product, and no element has to move.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from sfast.kernels import nearby
from sfast.kernels.native_ops import native_linear_takes
from sfast.kernels.op import define


def linear_reference(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x @ weightᵀ + bias: x [..., K], weight [D, K], bias [D] -> [..., D]."""
    return F.linear(x, weight, bias)


def linear_add_reference(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor) -> Tensor:
    """x @ weightᵀ + bias + residual: x [..., K], weight [D, K], bias [D], residual [..., D] -> [..., D]."""
    return F.linear(x, weight, bias) + residual


def linear_image_add_reference(
    x: Tensor, weight: Tensor, bias: Tensor | None, size: list[int], residual: Tensor
) -> Tensor:
    """(x @ weightᵀ + bias) as an image, plus residual: x [N, H * W, K], size [N, H, W, D], residual and result [N, D, H, W]."""
    return F.linear(x, weight, bias).reshape(size).permute(0, 3, 1, 2) + residual


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return nearby.linear(_matrices(x), weight, bias, None, "none")


def _linear_add(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor) -> Tensor:
    return nearby.linear(_matrices(x), weight, bias, residual, "none")


def _matrices(x: Tensor) -> Tensor:
    """x as one product can read it: PyTorch would copy all that has gaps, too."""
    return x if has_even_rows(x) or has_even_rows_in_samples(x) else x.contiguous()


def _linear_image_add(x: Tensor, weight: Tensor, bias: Tensor | None, size: list[int], residual: Tensor) -> Tensor:
    rows = residual.permute(0, 2, 3, 1).reshape(*x.shape[:-1], weight.shape[0])
    image = nearby.linear(_matrices(x), weight, bias, rows, "none")
    return image.view(residual.shape[0], *residual.shape[2:], residual.shape[1]).permute(0, 3, 1, 2)


def fastest_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x @ weightᵀ + bias, by the native operator where it can."""
    return _linear(x, weight, bias) if _takes(x, weight, bias) else F.linear(x, weight, bias)


def has_even_rows(x: Tensor) -> bool:
    """Whether x [..., K] is one matrix to cuBLASLt: contiguous rows, evenly spaced, each on a boundary of 16 bytes."""
    if x.data_ptr() % 16 or (x.stride(-1) != 1 and x.shape[-1] != 1):
        return False
    rows, spacing = 1, x.shape[-1]
    for size, stride in zip(reversed(x.shape[:-1]), reversed(x.stride()[:-1]), strict=True):
        if size == 1:
            continue
        if rows == 1:
            spacing = stride
        if stride != rows * spacing or spacing < x.shape[-1]:
            return False
        rows *= size
    return rows == 1 or spacing % 8 == 0


def has_even_rows_in_samples(x: Tensor) -> bool:
    """Whether x [B, T, K] is a matrix for each sample, as taking some tokens of each leaves it: a batch to cuBLASLt."""
    if x.dim() != 3 or x.numel() == 0 or x.stride(0) % 8 or x.stride(0) <= x.shape[1] * x.stride(1):
        return False
    return has_even_rows(x[0])


def _takes(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    some_tokens = x.dim() == 3 and x.stride(2) == 1 and not x.is_contiguous()
    operands = (some_tokens or has_even_rows(x)) and has_even_rows(weight) and (bias is None or has_even_rows(bias))
    return operands and native_linear_takes(x, weight, bias)


def _takes_residual(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor) -> bool:
    alike = residual.dtype == x.dtype and residual.device == x.device
    fits = residual.shape == (*x.shape[:-1], weight.shape[0])
    return alike and fits and has_even_rows(residual) and _takes(x, weight, bias)


def _takes_image(x: Tensor, weight: Tensor, bias: Tensor | None, size: list[int], residual: Tensor) -> bool:
    if x.dim() != 3 or residual.dim() != 4 or not residual.is_contiguous(memory_format=torch.channels_last):
        return False
    N, D, H, W = residual.shape
    image = [known if wanted == -1 else wanted for known, wanted in zip((N, H, W, D), size, strict=True)]
    if image != [N, H, W, D] or x.shape[:2] != (N, H * W) or weight.shape[0] != D:
        return False
    alike = residual.dtype == x.dtype and residual.device == x.device and residual.data_ptr() % 16 == 0
    return alike and _takes(x, weight, bias)


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


define(
    "linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor",
    reference=linear_reference,
    supports=_takes,
    launch=_linear,
    fake=_product,
)
define(
    "linear_add(Tensor x, Tensor weight, Tensor? bias, Tensor residual) -> Tensor",
    reference=linear_add_reference,
    supports=_takes_residual,
    launch=_linear_add,
    fake=linear_add_reference,
)
define(
    "linear_image_add(Tensor x, Tensor weight, Tensor? bias, int[] size, Tensor residual) -> Tensor",
    reference=linear_image_add_reference,
    supports=_takes_image,
    launch=_linear_image_add,
    fake=linear_image_add_reference,
)
