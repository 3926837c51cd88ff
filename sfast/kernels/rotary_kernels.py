"""The kernel of `rotary.py`: a program normalizes and rotates some heads of some tokens; heads share a row of the table."""

from __future__ import annotations

from sfast.kernels.overlap import wait_for_previous_kernel
from sfast.kernels.triton_or_none import tl, triton


@triton.jit(do_not_specialize=["Ta", "T", "H", "table_step", "eps_a", "eps_b"])
def rotate_heads(
    a: tl.tensor,
    b: tl.tensor,
    y: tl.tensor,
    weight_a: tl.tensor,
    weight_b: tl.tensor,
    cos_a: tl.tensor,
    sin_a: tl.tensor,
    cos_b: tl.tensor,
    sin_b: tl.tensor,
    Ta: tl.tensor,
    T: tl.tensor,
    H: tl.tensor,
    D: tl.tensor,
    a_batch: tl.tensor,
    a_token: tl.tensor,
    a_head: tl.tensor,
    b_batch: tl.tensor,
    b_token: tl.tensor,
    b_head: tl.tensor,
    table_batch_a: tl.tensor,
    table_token_a: tl.tensor,
    table_batch_b: tl.tensor,
    table_token_b: tl.tensor,
    table_step: tl.tensor,
    eps_a: tl.tensor,
    eps_b: tl.tensor,
    TOKENS: tl.constexpr,
    HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    NORM: tl.constexpr,
    TABLE: tl.constexpr,
    OVERLAP: tl.constexpr,
) -> None:
    """y [B, T, H, D]: of each sample a's Ta tokens, then b's; no program has tokens of both."""
    blocks_a, block, batch = tl.cdiv(Ta, TOKENS), tl.program_id(0), tl.program_id(2).to(tl.int64)
    is_a = block < blocks_a
    own = tl.where(is_a, block, block - blocks_a) * TOKENS + tl.arange(0, TOKENS)  # places in the tokens' own tensor
    live = own < tl.where(is_a, Ta, T - Ta)
    token = own + tl.where(is_a, 0, Ta)
    own = own.to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    lane = tl.arange(0, WIDTH)
    mask = live[:, None, None] & (head < H)[None, :, None] & (lane < D)[None, None, :]
    source = (
        tl.where(is_a, a + batch * a_batch, b + batch * b_batch) + (own * tl.where(is_a, a_token, b_token))[:, None]
    )
    source += (head * tl.where(is_a, a_head, b_head))[None, :]

    wait_for_previous_kernel(OVERLAP)
    x = tl.load(source[:, :, None] + lane[None, None, :], mask=mask, other=0).to(tl.float32)  # [TOKENS, HEADS, WIDTH]

    if TABLE != "none":
        row = tl.where(is_a, batch * table_batch_a, batch * table_batch_b)
        row += own * tl.where(is_a, table_token_a, table_token_b)
        cos_row, sin_row = tl.where(is_a, cos_a, cos_b) + row[:, None], tl.where(is_a, sin_a, sin_b) + row[:, None]
        if TABLE == "pairs":
            pair = tl.arange(0, WIDTH // 2)[None, :]
            known = live[:, None] & (pair * 2 < D)
            cos = tl.load(cos_row + pair * table_step, mask=known, other=0)
            sin = tl.load(sin_row + pair * table_step, mask=known, other=0)
            cos_odd, sin_odd = cos, sin
        else:
            known = live[:, None] & (lane < D)[None, :]
            cosines = tl.load(cos_row + lane[None, :], mask=known, other=0)
            if TABLE == "complex":  # cosines and sines alternate
                cos, sin = tl.split(tl.reshape(cosines, [TOKENS, WIDTH // 2, 2]))
                cos_odd, sin_odd = cos, sin
            else:
                cos, cos_odd = tl.split(tl.reshape(cosines, [TOKENS, WIDTH // 2, 2]))
                sines = tl.load(sin_row + lane[None, :], mask=known, other=0)
                sin, sin_odd = tl.split(tl.reshape(sines, [TOKENS, WIDTH // 2, 2]))

    if NORM == "head":
        weight = tl.load(tl.where(is_a, weight_a, weight_b) + lane, mask=lane < D, other=0).to(tl.float32)
        eps = tl.where(is_a, eps_a, eps_b)
        x = x * tl.rsqrt(tl.sum(x * x, axis=2) / D + eps)[:, :, None] * weight[None, None, :]
    elif NORM == "token":  # the program has all heads, of a alone
        there = (head < H)[:, None] & (lane < D)[None, :]
        weight = tl.load(weight_a + (head * D)[:, None] + lane[None, :], mask=there, other=0).to(tl.float32)
        squares = tl.sum(tl.sum(x * x, axis=2), axis=1)
        x = x * tl.rsqrt(squares / (H * D) + eps_a)[:, None, None] * weight[None, :, :]

    if TABLE != "none":
        real, imaginary = tl.split(tl.reshape(x, [TOKENS, HEADS, WIDTH // 2, 2]))
        turned = tl.join(
            real * cos[:, None, :] - imaginary * sin[:, None, :],
            imaginary * cos_odd[:, None, :] + real * sin_odd[:, None, :],
        )
        x = tl.reshape(turned, [TOKENS, HEADS, WIDTH])

    to = y + ((batch * T + token)[:, None] * H + head[None, :])[:, :, None] * D + lane[None, None, :]
    tl.store(to, x.to(y.dtype.element_ty), mask=mask)
