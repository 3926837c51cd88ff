"""Attention for shapes that general kernels are slow at; each function says which shapes it is for.

All take query [B, H, T, D], key and value [B, H, N, D] of one dtype, with any strides of the first three, and return
[B, H, T, D] as a view of a dense [B, T, H, D]: the layout that the reshape behind an attention reads without a copy.
"""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor

from sfast.kernels.attention_kernels import exponentials, few_keys
from sfast.kernels.overlap import launch_options
from sfast.kernels.triton_or_none import triton, triton_takes

LOG2_E = 1 / math.log(2)
FEW = 256  # keys at most
KEY_BYTES = 64 << 10  # of all keys of one head, rounded up; values take as much, and queries
WIDE = 256  # head sizes above it have no fast kernel in PyTorch
SCORES_BYTES = 64 << 20  # of fp32 scores that exist at one time
WEIGHTS_BYTES = 128 << 20  # of their exponentials
WHOLE_ROW = 16384  # elements of a row that one program can keep


def takes_few_keys(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether `attend_to_few_keys` can run: at most 256 keys, and heads so small that all of them fit into a program."""
    if not _takes(query, key, value) or key.shape[2] > FEW:
        return False
    tile = triton.next_power_of_2(query.shape[3]) * sum(_two_tiles(key.shape[2]))
    return tile * query.element_size() <= KEY_BYTES


def attend_to_few_keys(query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
    """Cross-attention to a prompt, and self-attention of a video's frames: a program keeps all keys, and loops over nothing.

    For the frames, which are few, there are very many programs: one warp each is enough, and runs at the speed of memory.
    """
    B, H, T, D = query.shape
    N = key.shape[2]
    out = query.new_empty(B, T, H, D)
    first, rest = _two_tiles(N)
    head = max(16, triton.next_power_of_2(D))
    if T <= 32:
        rows = 16 if T <= 16 else 32
        warps = max(1, min(4, head * max(rows, first) // 4096))
    else:
        rows, warps = (128, 8) if head == 128 else (64, 4)
    unit, strides = _strides(query, key, value)
    few_keys[triton.cdiv(T, rows) * B * H,](
        *(query, key, value, out),
        *(H, T, N),
        *strides,
        _scale(query, scale) * LOG2_E,
        *(D, head, rows, first, rest, unit),
        **launch_options(query.device),
        num_warps=warps,
    )
    return out.transpose(1, 2)


def takes_wide(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether `attend_wide` can run and may pay: heads wider than 256, and few of them."""
    return _takes(query, key, value) and query.shape[3] > WIDE and query.shape[0] * query.shape[1] <= 64


def attend_wide(query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
    """A VAE's one wide head: two matrix products and a softmax, for as many queries at a time as memory allows.

    An accumulator of 512 columns leaves a fused kernel no room for tiles that reuse what they load; matrix products have
    that room, and what they write and read between them costs less. Scores stay fp32, as in a fused kernel.
    """
    B, H, T, D = query.shape
    N = key.shape[2]
    out = query.new_empty(B, T, H, D)
    weight_rows = _rows(T, WEIGHTS_BYTES // (N * query.element_size()))
    score_rows = _rows(weight_rows, SCORES_BYTES // (N * 4))
    weights, totals = query.new_empty(weight_rows, N), query.new_empty(weight_rows, 1, dtype=torch.float32)
    for batch, head in itertools.product(range(B), range(H)):
        q, k, v = query[batch, head], key[batch, head], value[batch, head]
        for start in range(0, T, weight_rows):
            rows = min(weight_rows, T - start)
            for first in range(0, rows, score_rows):
                some = slice(first, min(first + score_rows, rows))
                scores = _product(q[start:][some], k.T)
                _exponentials(scores, weights[some], totals[some], _scale(query, scale))
            summed = _product(weights[:rows], v)
            torch.div(summed, totals[:rows], out=out[batch, start : start + rows, head])
    return out.transpose(1, 2)


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a [R, K] times b [K, C] in fp32; partial sums in half precision would not be safe, nor accurate enough in bf16."""
    if a.dtype == torch.float32 or not a.is_cuda:
        return a.float() @ b.float()
    return torch.mm(a, b, out_dtype=torch.float32)


def _exponentials(scores: Tensor, weights: Tensor, totals: Tensor, scale: float) -> None:
    R, N = scores.shape
    block = min(WHOLE_ROW, triton.next_power_of_2(N))
    exponentials[R,](
        *(scores, weights, totals, N, scale * LOG2_E),
        *(block, block >= N),
        **launch_options(scores.device),
        num_warps=max(4, min(16, block // 1024)),
    )


def _rows(rows: int, fitting: int) -> int:
    """`rows` in equal parts of at most `fitting`, each a multiple of 128."""
    parts = triton.cdiv(rows, max(128, fitting))
    return min(rows, triton.cdiv(triton.cdiv(rows, parts), 128) * 128)


def _two_tiles(keys: int) -> tuple[int, int]:
    """Two powers of two, or one and 0, of at least 16, whose sum holds `keys` and is as small as possible."""
    whole = max(16, triton.next_power_of_2(keys))
    half = whole // 2
    if half < 16 or keys <= half:
        return whole, 0
    rest = max(16, triton.next_power_of_2(keys - half))
    return (half, rest) if rest < half else (whole, 0)


def _strides(*tensors: Tensor) -> tuple[int, list[int]]:
    """Strides of the first three axes in units of (the first result) 8 elements, if all are multiples of it, or of 1."""
    strides = [stride for tensor in tensors for stride in tensor.stride()[:3]]
    unit = 1 if any(stride % 8 for stride in strides) else 8
    return unit, [stride // unit for stride in strides]


def _scale(query: Tensor, scale: float | None) -> float:
    return query.shape[3] ** -0.5 if scale is None else scale


def _takes(query: Tensor, key: Tensor, value: Tensor) -> bool:
    return (
        triton_takes(query)
        and query.dim() == key.dim() == value.dim() == 4
        and query.dtype == key.dtype == value.dtype
        and query.device == key.device == value.device
        and key.shape == value.shape
        and key.shape[:2] == query.shape[:2]
        and key.shape[3] == query.shape[3]
        and query.numel() > 0
        and key.numel() > 0
        and query.stride(3) == key.stride(3) == value.stride(3) == 1
        and query.shape[0] * query.shape[1] * query.shape[2] < 2**31
    )
