"""Triton kernels for the attentions that general kernels are slow at: to few keys, and of heads that are too wide.

Each reads its operands once, through whatever strides they have (in units of UNIT elements, so that the compiler knows how
wide a load may be), and keeps scores in fp32. Exponentials are base 2, for which GPUs have an instruction; `scale` arrives
multiplied by log2(e). A row whose scores are NaN, or all -inf, becomes NaN, as in PyTorch.
"""

from __future__ import annotations

from sfast.kernels.overlap import wait_for_previous_kernel
from sfast.kernels.triton_or_none import tl, triton


@triton.jit(do_not_specialize=["H", "T", "N"])
def few_keys(
    query: tl.tensor,
    key: tl.tensor,
    value: tl.tensor,
    out: tl.tensor,
    H: tl.tensor,
    T: tl.tensor,
    N: tl.tensor,
    q_batch: tl.tensor,
    q_head: tl.tensor,
    q_token: tl.tensor,
    k_batch: tl.tensor,
    k_head: tl.tensor,
    k_token: tl.tensor,
    v_batch: tl.tensor,
    v_head: tl.tensor,
    v_token: tl.tensor,
    scale: tl.tensor,
    D: tl.constexpr,
    HEAD: tl.constexpr,
    ROWS: tl.constexpr,
    FIRST: tl.constexpr,
    REST: tl.constexpr,
    UNIT: tl.constexpr,
    OVERLAP: tl.constexpr,
) -> None:
    """ROWS queries of one head against all N <= FIRST + REST keys at once: no loop, no running maximum.

    There are two tiles of keys, because sizes are powers of two: 77 keys are 64 + 16, and not 128. HEAD is D, rounded up.
    out is [B, T, H, D], dense.
    """
    blocks = tl.cdiv(T, ROWS)
    pair = tl.program_id(0) // blocks
    batch, head = (pair // H).to(tl.int64), (pair % H).to(tl.int64)
    rows = (tl.program_id(0) % blocks) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, HEAD)
    inside = (columns < D)[None, :]
    first, rest = tl.arange(0, FIRST).to(tl.int64), FIRST + tl.arange(0, max(REST, 1)).to(tl.int64)
    mine = (rows < T)[:, None] & inside  # [ROWS, HEAD]
    q = query + (batch * q_batch + head * q_head + rows.to(tl.int64) * q_token)[:, None] * UNIT + columns[None, :]
    key += (batch * k_batch + head * k_head) * UNIT
    value += (batch * v_batch + head * v_head) * UNIT
    wait_for_previous_kernel(OVERLAP)

    q = tl.load(q, mask=mine, other=0)
    there = (first < N)[:, None] & inside  # [FIRST, HEAD]
    k = tl.load(key + (first * k_token)[:, None] * UNIT + columns[None, :], mask=there, other=0)
    v = tl.load(value + (first * v_token)[:, None] * UNIT + columns[None, :], mask=there, other=0)
    scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
    scores = tl.where((first < N)[None, :], scores, float("-inf"))  # [ROWS, FIRST]
    highest = tl.max(scores, 1)
    if REST > 0:
        there = (rest < N)[:, None] & inside  # [REST, HEAD]
        more_k = tl.load(key + (rest * k_token)[:, None] * UNIT + columns[None, :], mask=there, other=0)
        more_v = tl.load(value + (rest * v_token)[:, None] * UNIT + columns[None, :], mask=there, other=0)
        more_scores = tl.dot(q, tl.trans(more_k), input_precision="ieee") * scale
        more_scores = tl.where((rest < N)[None, :], more_scores, float("-inf"))  # [ROWS, REST]
        highest = tl.maximum(highest, tl.max(more_scores, 1))
    weights = tl.exp2(scores - highest[:, None])
    total = tl.sum(weights, 1)
    result = tl.dot(weights.to(v.dtype), v, input_precision="ieee")
    if REST > 0:
        more_weights = tl.exp2(more_scores - highest[:, None])
        total += tl.sum(more_weights, 1)
        result = tl.dot(more_weights.to(v.dtype), more_v, result, input_precision="ieee")
    result = result / total[:, None]
    places = ((batch * T + rows)[:, None] * H + head) * D + columns[None, :]
    tl.store(out + places, result.to(out.dtype.element_ty), mask=mine)


@triton.jit
def exponentials(
    scores: tl.tensor,
    weights: tl.tensor,
    totals: tl.tensor,
    N: tl.tensor,
    scale: tl.tensor,
    BLOCK: tl.constexpr,
    WHOLE: tl.constexpr,
    OVERLAP: tl.constexpr,
) -> None:
    """A softmax's numerators [R, N] and denominators [R] from fp32 scores [R, N]; WHOLE if BLOCK holds a row: read once."""
    row = tl.program_id(0).to(tl.int64)
    scores += row * N
    weights += row * N
    columns = tl.arange(0, BLOCK)
    wait_for_previous_kernel(OVERLAP)
    if WHOLE:
        x = tl.load(scores + columns, mask=columns < N, other=0)
        x = tl.where(columns < N, x * scale, float("-inf"))
        x = tl.exp2(x - tl.max(x, 0))
        tl.store(weights + columns, x.to(weights.dtype.element_ty), mask=columns < N)
        tl.store(totals + row, tl.sum(x, 0))
    else:
        highest = tl.full([BLOCK], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK], tl.float32)
        for start in range(0, N, BLOCK):
            x = tl.load(scores + start + columns, mask=start + columns < N, other=0)
            highest = tl.maximum(highest, tl.where(start + columns < N, x * scale, float("-inf")))
        most = tl.max(highest, 0)
        for start in range(0, N, BLOCK):
            x = tl.load(scores + start + columns, mask=start + columns < N, other=0)
            x = tl.exp2(tl.where(start + columns < N, x * scale, float("-inf")) - most)
            total += x
            tl.store(weights + start + columns, x.to(weights.dtype.element_ty), mask=start + columns < N)
        tl.store(totals + row, tl.sum(total, 0))
