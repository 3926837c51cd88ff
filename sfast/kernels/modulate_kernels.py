"""The kernel of `modulate.py`: a program keeps some rows in registers from the residual to the modulated norm.

What makes it fast is that nothing waits twice: everything a row needs (itself, gate, scale, shift, weights) is asked for
before the first sum over the row, and a row is taken in pieces whose sizes are powers of two, as 3072 is three times 1024,
so that few lanes are idle and each holds little.
"""

from __future__ import annotations

from sfast.kernels.overlap import wait_for_previous_kernel
from sfast.kernels.triton_or_none import tl, triton

# Bits of FLAGS: what there is.
ADD, GATE, NORM_Y, TOTAL, NORM, RMS, WEIGHT, BIAS, SCALE, ONE, SHIFT, MORE, RUNS, TWICE = (
    1 << bit for bit in range(14)
)


@triton.jit
def _load(
    rows: tl.tensor, live: tl.tensor, width: tl.tensor, lane: tl.tensor, PIECES: tl.constexpr, BLOCK: tl.constexpr
) -> tl.tensor:
    """Of each row whose address is in `rows` [ROWS, 1]: PIECES pieces [ROWS, BLOCK]."""
    pieces = ()
    for piece in tl.static_range(PIECES):
        at = (piece * BLOCK + lane)[None, :]
        pieces += (tl.load(rows + at, mask=live & (at < width), other=0),)  # type: ignore[assignment]
    return pieces


@triton.jit(do_not_specialize=["T", "blocks", "eps", "eps_y"])
def modulate_rows(
    x: tl.tensor,
    y: tl.tensor,
    weight_y: tl.tensor,
    gate: tl.tensor,
    weight: tl.tensor,
    bias: tl.tensor,
    scale: tl.tensor,
    shift: tl.tensor,
    gate_more: tl.tensor,
    scale_more: tl.tensor,
    shift_more: tl.tensor,
    run: tl.tensor,
    z: tl.tensor,
    gate_z: tl.tensor,
    out: tl.tensor,
    total: tl.tensor,
    T: tl.tensor,
    blocks: tl.tensor,
    width: tl.tensor,
    x_batch: tl.tensor,
    x_token: tl.tensor,
    y_batch: tl.tensor,
    y_token: tl.tensor,
    gate_batch: tl.tensor,
    gate_token: tl.tensor,
    scale_batch: tl.tensor,
    scale_token: tl.tensor,
    shift_batch: tl.tensor,
    shift_token: tl.tensor,
    gate_more_batch: tl.tensor,
    gate_more_token: tl.tensor,
    scale_more_batch: tl.tensor,
    scale_more_token: tl.tensor,
    shift_more_batch: tl.tensor,
    shift_more_token: tl.tensor,
    z_batch: tl.tensor,
    z_token: tl.tensor,
    gate_z_batch: tl.tensor,
    gate_z_token: tl.tensor,
    eps: tl.tensor,
    eps_y: tl.tensor,
    FLAGS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    PIECES: tl.constexpr,
    OVERLAP: tl.constexpr,
) -> None:
    """ROWS rows of one sample: of out and total [B, T, width]; a stride is 0 where something is the same for all."""
    sample = (tl.program_id(0) // blocks).to(tl.int64)
    token = (tl.program_id(0) % blocks * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    live, lane = token < T, tl.arange(0, BLOCK)
    to = (sample * T + token) * width

    wait_for_previous_kernel(OVERLAP)
    first, own = sample, token  # where a token's part of what is to be added stands
    if FLAGS & 4096 != 0:  # RUNS
        first, own = 0, tl.load(run + sample * T + token, mask=live, other=0).to(tl.int64)
    v = _load(x + sample * x_batch + token * x_token, live, width, lane, PIECES, BLOCK)
    if FLAGS & 1 != 0:  # ADD
        w = _load(y + sample * y_batch + token * y_token, live, width, lane, PIECES, BLOCK)
    if FLAGS & 8192 != 0:  # TWICE
        u = _load(z + sample * z_batch + token * z_token, live, width, lane, PIECES, BLOCK)
        g_z = _load(gate_z + sample * gate_z_batch + token * gate_z_token, live, width, lane, PIECES, BLOCK)
    if FLAGS & 2 != 0:  # GATE
        g = _load(gate + sample * gate_batch + token * gate_token, live, width, lane, PIECES, BLOCK)
        if FLAGS & 2048 != 0:  # MORE
            g_more = _load(
                gate_more + first * gate_more_batch + own * gate_more_token, live, width, lane, PIECES, BLOCK
            )
    if FLAGS & 64 != 0:  # WEIGHT
        factor = _load(weight + token * 0, live, width, lane, PIECES, BLOCK)
    if FLAGS & 128 != 0:  # BIAS
        term = _load(bias + token * 0, live, width, lane, PIECES, BLOCK)
    if FLAGS & 256 != 0:  # SCALE
        s = _load(scale + sample * scale_batch + token * scale_token, live, width, lane, PIECES, BLOCK)
        if FLAGS & 2048 != 0:
            s_more = _load(
                scale_more + first * scale_more_batch + own * scale_more_token, live, width, lane, PIECES, BLOCK
            )
    if FLAGS & 1024 != 0:  # SHIFT
        t = _load(shift + sample * shift_batch + token * shift_token, live, width, lane, PIECES, BLOCK)
        if FLAGS & 2048 != 0:
            t_more = _load(
                shift_more + first * shift_more_batch + own * shift_more_token, live, width, lane, PIECES, BLOCK
            )

    if FLAGS & 4 != 0:  # NORM_Y
        factor_y = _load(weight_y + token * 0, live, width, lane, PIECES, BLOCK)
        squares = tl.zeros([ROWS, BLOCK], tl.float32)
        for piece in tl.static_range(PIECES):
            squares += w[piece].to(tl.float32) * w[piece].to(tl.float32)
        spread = tl.rsqrt(tl.sum(squares, axis=1) / width + eps_y)[:, None]
    sums, totals = tl.zeros([ROWS, BLOCK], tl.float32), ()
    for piece in tl.static_range(PIECES):
        at = (piece * BLOCK + lane)[None, :]
        one = v[piece].to(tl.float32)
        if FLAGS & 1 != 0:
            other = w[piece].to(tl.float32)
            if FLAGS & 4 != 0:
                other = other * spread * factor_y[piece].to(tl.float32)
            if FLAGS & 2 != 0:
                gates = g[piece].to(tl.float32)
                if FLAGS & 2048 != 0:
                    gates += g_more[piece].to(tl.float32)
                other = other * gates
            one += other
        if FLAGS & 8192 != 0:
            one += u[piece].to(tl.float32) * g_z[piece].to(tl.float32)
        if FLAGS & 8 != 0:  # TOTAL
            tl.store(total + to + at, one.to(total.dtype.element_ty), mask=live & (at < width))
        sums += one
        totals += (one,)  # type: ignore[assignment]

    if FLAGS & 16 != 0:  # NORM
        mean = 0.0
        if FLAGS & 32 == 0:  # not RMS
            mean = (tl.sum(sums, axis=1) / width)[:, None]
        squares = tl.zeros([ROWS, BLOCK], tl.float32)
        for piece in tl.static_range(PIECES):
            inside = (piece * BLOCK + lane)[None, :] < width
            squares += tl.where(inside, (totals[piece] - mean) * (totals[piece] - mean), 0)
        spread = tl.rsqrt(tl.sum(squares, axis=1) / width + eps)[:, None]
    for piece in tl.static_range(PIECES):
        at = (piece * BLOCK + lane)[None, :]
        one = totals[piece]
        if FLAGS & 16 != 0:
            one = (one - mean) * spread
        if FLAGS & 64 != 0:
            one *= factor[piece].to(tl.float32)
        if FLAGS & 128 != 0:
            one += term[piece].to(tl.float32)
        if FLAGS & 256 != 0:
            scales = s[piece].to(tl.float32)
            if FLAGS & 2048 != 0:
                scales += s_more[piece].to(tl.float32)
            if FLAGS & 512 != 0:  # ONE
                scales += 1
            one *= scales
        if FLAGS & 1024 != 0:
            one += t[piece].to(tl.float32)
            if FLAGS & 2048 != 0:
                one += t_more[piece].to(tl.float32)
        tl.store(out + to + at, one.to(out.dtype.element_ty), mask=live & (at < width))
