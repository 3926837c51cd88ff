"""The kernel of `rotary.py`: a program normalizes and rotates some heads of one token, which share a row of the table."""

from __future__ import annotations

from sfast.kernels.overlap import wait_for_previous_kernel
from sfast.kernels.triton_or_none import tl, triton


@triton.jit(
    do_not_specialize=[
        *("Ta", "T", "H", "table_step", "eps_a", "eps_b"),
    ]
)
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
    HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    NORM: tl.constexpr,
    TABLE: tl.constexpr,
    OVERLAP: tl.constexpr,
) -> None:
    """y [B, T, H, D]: of each sample a's Ta tokens, then b's."""
    token, batch = tl.program_id(0), tl.program_id(2).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    lane = tl.arange(0, WIDTH)
    is_a = token < Ta
    own = tl.where(is_a, token, token - Ta).to(tl.int64)  # place of the token in its own tensor
    mask = (head < H)[:, None] & (lane < D)[None, :]
    source = tl.where(is_a, a + batch * a_batch + own * a_token, b + batch * b_batch + own * b_token)
    step = tl.where(is_a, a_head, b_head)

    wait_for_previous_kernel(OVERLAP)
    x = tl.load(source + head[:, None] * step + lane[None, :], mask=mask, other=0).to(tl.float32)

    if NORM:
        weight = tl.load(tl.where(is_a, weight_a, weight_b) + lane, mask=lane < D, other=0).to(tl.float32)
        eps = tl.where(is_a, eps_a, eps_b)
        x = x * tl.rsqrt(tl.sum(x * x, axis=1) / D + eps)[:, None] * weight[None, :]

    if TABLE != "none":
        row = tl.where(is_a, batch * table_batch_a + own * table_token_a, batch * table_batch_b + own * table_token_b)
        cos_row, sin_row = tl.where(is_a, cos_a, cos_b) + row, tl.where(is_a, sin_a, sin_b) + row
        if TABLE == "pairs":
            pair = tl.arange(0, WIDTH // 2)
            cos = tl.load(cos_row + pair * table_step, mask=pair * 2 < D, other=0)
            sin = tl.load(sin_row + pair * table_step, mask=pair * 2 < D, other=0)
            cos_odd, sin_odd = cos, sin
        elif TABLE == "complex":  # cosines and sines alternate
            cos, sin = tl.split(tl.reshape(tl.load(cos_row + lane, mask=lane < D, other=0), [WIDTH // 2, 2]))
            cos_odd, sin_odd = cos, sin
        else:
            cos, cos_odd = tl.split(tl.reshape(tl.load(cos_row + lane, mask=lane < D, other=0), [WIDTH // 2, 2]))
            sin, sin_odd = tl.split(tl.reshape(tl.load(sin_row + lane, mask=lane < D, other=0), [WIDTH // 2, 2]))
        real, imaginary = tl.split(tl.reshape(x, [HEADS, WIDTH // 2, 2]))
        turned = tl.join(
            real * cos[None, :] - imaginary * sin[None, :], imaginary * cos_odd[None, :] + real * sin_odd[None, :]
        )
        x = tl.reshape(turned, [HEADS, WIDTH])

    y_row = (batch * T + token) * H + head
    tl.store(y + y_row[:, None] * D + lane[None, :], x.to(y.dtype.element_ty), mask=mask)
