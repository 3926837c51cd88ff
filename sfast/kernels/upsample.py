"""Nearest-neighbour upsampling at the speed of memory, in the layout that convolutions read.

PyTorch's kernel for channels-last moves one element for each thread and divides twice for it: a tenth of the bandwidth of
an H200. Here a program writes a tile of pixels by channels: a row of the source is found once for the tile, a column once
for each of its pixels, and the channels move as wide vectors. Nothing is computed, so the result equals PyTorch's bit for bit.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sfast.kernels.op import define
from sfast.kernels.overlap import launch_options, wait_for_previous_kernel
from sfast.kernels.triton_or_none import tl, triton, triton_takes


def upsample_nearest2d_reference(x: Tensor, output_size: list[int] | None, scale_factors: list[float] | None) -> Tensor:
    """Nearest neighbours of x [N, C, H, W], to `output_size` or by `scale_factors`, one of them None -> [N, C, P, Q]."""
    return torch._C._nn.upsample_nearest2d(x, output_size, scale_factors)


def _sizes(x: Tensor, output_size: list[int] | None, scale_factors: list[float] | None) -> tuple[int, int]:
    """[P, Q] of the result."""
    if output_size is not None:
        return output_size[0], output_size[1]
    assert scale_factors is not None
    return int(x.shape[2] * scale_factors[0]), int(x.shape[3] * scale_factors[1])


def _steps(sizes: list[int], wanted: tuple[int, int], scale_factors: list[float] | None) -> list[float]:
    """Source pixels for each pixel of the result, in both directions, as PyTorch takes them."""
    if scale_factors is not None:
        return [1 / scale for scale in scale_factors]
    return [size / new for size, new in zip(sizes, wanted, strict=True)]


def _upsample(x: Tensor, output_size: list[int] | None, scale_factors: list[float] | None) -> Tensor:
    N, C, H, W = x.shape
    P, Q = _sizes(x, output_size, scale_factors)
    last = x.is_contiguous(memory_format=torch.channels_last)
    layout = torch.channels_last if last else torch.contiguous_format
    y = torch.empty((N, C, P, Q), dtype=x.dtype, device=x.device, memory_format=layout)
    tile = {"PIXELS": 32, "CHANNELS": 128} if last else {"PIXELS": 256, "CHANNELS": 8}
    strides = [tensor.stride(dim) for tensor in (x, y) for dim in (0, 1, 2, 3)]
    steps = _steps([H, W], (P, Q), scale_factors)
    pieces = triton.cdiv(C, tile["CHANNELS"]) * triton.cdiv(Q, tile["PIXELS"])
    _upsample_tiles[pieces, P, N](x, y, C, H, W, Q, *strides, *steps, **tile, **launch_options(x.device), num_warps=4)
    return y


@triton.jit(do_not_specialize=["H", "W", "Q"])
def _upsample_tiles(
    x: tl.tensor,
    y: tl.tensor,
    C: tl.tensor,
    H: tl.tensor,
    W: tl.tensor,
    Q: tl.tensor,
    x_sample: tl.tensor,
    x_channel: tl.tensor,
    x_row: tl.tensor,
    x_pixel: tl.tensor,
    y_sample: tl.tensor,
    y_channel: tl.tensor,
    y_row: tl.tensor,
    y_pixel: tl.tensor,
    row_step: tl.tensor,
    pixel_step: tl.tensor,
    PIXELS: tl.constexpr,
    CHANNELS: tl.constexpr,
    OVERLAP: tl.constexpr,
) -> None:
    """PIXELS pixels of one row of y, CHANNELS of their channels. Steps are fp32, as in PyTorch, and so is what they give."""
    blocks = tl.cdiv(C, CHANNELS)
    block, piece = tl.program_id(0) % blocks, tl.program_id(0) // blocks
    row, n = tl.program_id(1), tl.program_id(2).to(tl.int64)
    pixel, channel = piece * PIXELS + tl.arange(0, PIXELS), block * CHANNELS + tl.arange(0, CHANNELS)
    source_row = tl.minimum((row.to(tl.float32) * row_step).to(tl.int32), H - 1).to(tl.int64)
    source = tl.minimum((pixel.to(tl.float32) * pixel_step).to(tl.int32), W - 1)
    mask = (pixel < Q)[:, None] & (channel < C)[None, :]
    read = x + n * x_sample + source_row * x_row + source[:, None] * x_pixel + channel[None, :] * x_channel
    write = y + n * y_sample + row.to(tl.int64) * y_row + pixel[:, None] * y_pixel + channel[None, :] * y_channel
    wait_for_previous_kernel(OVERLAP)
    tl.store(write, tl.load(read, mask=mask), mask=mask)


def _takes(x: Tensor, output_size: list[int] | None, scale_factors: list[float] | None) -> bool:
    if not triton_takes(x) or x.dim() != 4 or x.numel() == 0 or (output_size is None) == (scale_factors is None):
        return False
    if len(output_size or scale_factors or ()) != 2 or any(scale <= 0 for scale in scale_factors or ()):
        return False
    P, Q = _sizes(x, output_size, scale_factors)
    dense = x.is_contiguous() or x.is_contiguous(memory_format=torch.channels_last)
    fits = x.shape[0] < 65536 and 0 < P < 65536 and Q > 0  # axes of a grid
    return dense and fits and max(x.shape[1:].numel(), x.shape[1] * P * Q) < 2**31  # offsets inside a sample


define(
    "upsample_nearest2d(Tensor x, int[]? output_size, float[]? scale_factors) -> Tensor",
    reference=upsample_nearest2d_reference,
    supports=_takes,
    launch=_upsample,
    fake=upsample_nearest2d_reference,
)
