"""Attention without a softmax: keys and values become one small matrix for each head, by which each query is multiplied.

Eager computes it in fp32, on copies: three tensors are turned, converted and copied again for a batched product without
tensor cores, and the result is turned back. Here one kernel sums the matrices over pieces of the tokens, and a second reads
queries and writes results, each where it lies. Products of half-precision numbers are exact in TF32 and summed in fp32; the
matrices are fp32 and take three products of TF32, which are as exact.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from sfast.kernels.op import define
from sfast.kernels.overlap import launch_options, wait_for_previous_kernel
from sfast.kernels.triton_or_none import tl, triton, triton_takes

WIDEST = 64  # heads whose matrix fits into registers
TOKENS, QUERIES = 64, 128  # of the two kernels' tiles
PROGRAMS = 512  # that a large GPU wants at least
MOST_PIECES = 16  # whose sums each program of the second kernel adds up

# query [B, T, H D], key and value [B, S, H D]; `sizes` unflattens H D to [H, D]: one of the two may be -1.


def linear_attention_reference(query: Tensor, key: Tensor, value: Tensor, sizes: list[int], eps: float) -> Tensor:
    """relu(query) (relu(key)ᵀ value) / (relu(query) sum(relu(key)) + eps) for each head, in fp32, in the inputs' precision."""
    wide = torch.float64 if query.dtype == torch.float64 else torch.float32
    heads = F.relu(query.transpose(1, 2).unflatten(1, sizes)).to(wide)
    keys = F.relu(key.transpose(1, 2).unflatten(1, sizes).transpose(2, 3)).to(wide)
    values = F.pad(value.transpose(1, 2).unflatten(1, sizes).to(wide), (0, 0, 0, 1), mode="constant", value=1.0)
    sums = torch.matmul(torch.matmul(values, keys), heads)
    result = sums[:, :, :-1] / (sums[:, :, -1:] + eps)
    return result.flatten(1, 2).transpose(1, 2).to(query.dtype)


def _linear_attention(query: Tensor, key: Tensor, value: Tensor, sizes: list[int], eps: float) -> Tensor:
    (B, T, width), S = query.shape, key.shape[1]
    H = _heads(query, sizes)
    D = width // H
    pieces = min(triton.cdiv(S, TOKENS), MOST_PIECES, triton.cdiv(PROGRAMS, B * H))
    tokens = triton.cdiv(triton.cdiv(S, pieces), TOKENS) * TOKENS
    matrices = torch.empty((B, H, pieces, D + 1, D), dtype=torch.float32, device=query.device)
    out = query.new_empty(query.shape)
    shape = {"WIDTH": max(16, triton.next_power_of_2(D)), **launch_options(query.device)}
    _sum_matrices[H, pieces, B](
        key, value, matrices, S, tokens, D, *key.stride()[:2], *value.stride()[:2], TOKENS=TOKENS, **shape, num_warps=4
    )
    _multiply_queries[H, triton.cdiv(T, QUERIES), B](
        query, matrices, out, T, pieces, D, *query.stride()[:2], eps, QUERIES=QUERIES, **shape, num_warps=4
    )
    return out


@triton.jit(do_not_specialize=["S", "tokens"])
def _sum_matrices(
    key: tl.tensor,
    value: tl.tensor,
    matrices: tl.tensor,
    S: tl.tensor,
    tokens: tl.tensor,
    D: tl.tensor,
    key_batch: tl.tensor,
    key_token: tl.tensor,
    value_batch: tl.tensor,
    value_token: tl.tensor,
    TOKENS: tl.constexpr,
    WIDTH: tl.constexpr,
    OVERLAP: tl.constexpr,
) -> None:
    """Of one head and `tokens` tokens, into matrices [B, H, pieces, D + 1, D]: the sum of keyᵀ value, and that of key."""
    head, piece, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    lane, row = tl.arange(0, WIDTH), tl.arange(0, TOKENS)
    known = lane < D
    keys_at = key + batch * key_batch + head * D + lane[None, :]
    values_at = value + batch * value_batch + head * D + lane[None, :]
    seen = tl.zeros([TOKENS, WIDTH], tl.float32)
    matrix = tl.zeros([WIDTH, WIDTH], tl.float32)  # [D of key, D of value]

    wait_for_previous_kernel(OVERLAP)
    for first in range(piece * tokens, tl.minimum(S, (piece + 1) * tokens), TOKENS):
        token = (first + row).to(tl.int64)[:, None]
        live = (token < S) & known[None, :]
        keys = tl.maximum(tl.load(keys_at + token * key_token, mask=live, other=0).to(tl.float32), 0.0)
        values = tl.load(values_at + token * value_token, mask=live, other=0).to(tl.float32)
        matrix = tl.dot(tl.trans(keys), values, matrix, input_precision="tf32")  # of halves, whose bits all fit
        seen += keys
    to = matrices + ((batch * tl.num_programs(0) + head) * tl.num_programs(1) + piece) * (D + 1) * D
    tl.store(to + lane[:, None] * D + lane[None, :], matrix, mask=known[:, None] & known[None, :])
    tl.store(to + D * D + lane, tl.sum(seen, axis=0), mask=known)


@triton.jit(do_not_specialize=["T", "pieces", "eps"])
def _multiply_queries(
    query: tl.tensor,
    matrices: tl.tensor,
    out: tl.tensor,
    T: tl.tensor,
    pieces: tl.tensor,
    D: tl.tensor,
    query_batch: tl.tensor,
    query_token: tl.tensor,
    eps: tl.tensor,
    QUERIES: tl.constexpr,
    WIDTH: tl.constexpr,
    OVERLAP: tl.constexpr,
) -> None:
    """QUERIES rows of one head of out [B, T, H, D]."""
    head, batch, heads = tl.program_id(0), tl.program_id(2).to(tl.int64), tl.num_programs(0)
    lane = tl.arange(0, WIDTH)
    token = (tl.program_id(1) * QUERIES + tl.arange(0, QUERIES)).to(tl.int64)[:, None]
    known = lane < D
    live = (token < T) & known[None, :]
    matrix = tl.zeros([WIDTH, WIDTH], tl.float32)  # [D of key, D of value]
    keys = tl.zeros([WIDTH], tl.float32)

    wait_for_previous_kernel(OVERLAP)
    queries = tl.load(query + batch * query_batch + token * query_token + head * D + lane[None, :], mask=live, other=0)
    for piece in range(pieces):
        source = matrices + ((batch * heads + head) * pieces + piece) * (D + 1) * D
        square = known[:, None] & known[None, :]
        matrix += tl.load(source + lane[:, None] * D + lane[None, :], mask=square, other=0)
        keys += tl.load(source + D * D + lane, mask=known, other=0)
    queries = tl.maximum(queries.to(tl.float32), 0.0)
    weight = tl.sum(queries * keys[None, :], axis=1) + eps
    result = tl.dot(queries, matrix, input_precision="tf32x3") / weight[:, None]
    to = out + ((batch * T + token) * heads + head) * D + lane[None, :]
    tl.store(to, result.to(out.dtype.element_ty), mask=live)


def _heads(query: Tensor, sizes: list[int]) -> int:
    """How many heads `sizes` makes of query's last dimension; 0 if it does not fit."""
    if len(sizes) != 2 or query.dim() != 3:
        return 0
    H, D = sizes
    H = H if H > 0 else query.shape[2] // max(D, 1)
    return H if H > 0 and D in (-1, query.shape[2] // H) and query.shape[2] % H == 0 else 0


def _takes(query: Tensor, key: Tensor, value: Tensor, sizes: list[int], eps: float) -> bool:
    H = _heads(query, sizes)
    if H == 0 or query.shape[2] // H > WIDEST or query.numel() == 0 or key.numel() == 0:
        return False
    if query.dtype not in (torch.float16, torch.bfloat16) or query.shape[0] > 65535 or query.shape[1] > 65535 * QUERIES:
        return False
    if key.shape != value.shape or (key.shape[0], *key.shape[2:]) != (query.shape[0], query.shape[2]):
        return False
    if any(x.dtype != query.dtype or x.device != query.device or x.stride(2) != 1 for x in (query, key, value)):
        return False
    new = query.device.type != "cuda" or torch.cuda.get_device_capability(query.device) >= (8, 0)  # before, no TF32
    return new and triton_takes(query)


def _fake(query: Tensor, key: Tensor, value: Tensor, sizes: list[int], eps: float) -> Tensor:
    return query.new_empty(query.shape)


define(
    "linear_attention(Tensor query, Tensor key, Tensor value, int[] sizes, float eps) -> Tensor",
    reference=linear_attention_reference,
    supports=_takes,
    launch=_linear_attention,
    fake=_fake,
)
