"""The kernel of `modulate.py`: a program keeps some rows in registers from the residual to the modulated norm."""

from __future__ import annotations

from sfast.kernels.overlap import wait_for_previous_kernel
from sfast.kernels.triton_or_none import tl, triton

# Bits of `flags`; a run-time value, so that all variants share one compilation.
ADD, GATE, NORM_Y, TOTAL, NORM, RMS, WEIGHT, BIAS, SCALE, ONE, SHIFT, MORE = (1 << bit for bit in range(12))


@triton.jit(
    do_not_specialize=[
        *("rows", "T", "flags", "eps", "eps_y", "gate_batch", "gate_token", "scale_batch", "scale_token"),
        *("shift_batch", "shift_token", "more_batch", "more_token"),
    ]
)
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
    out: tl.tensor,
    total: tl.tensor,
    rows: tl.tensor,
    T: tl.tensor,
    width: tl.tensor,
    gate_batch: tl.tensor,
    gate_token: tl.tensor,
    scale_batch: tl.tensor,
    scale_token: tl.tensor,
    shift_batch: tl.tensor,
    shift_token: tl.tensor,
    more_batch: tl.tensor,
    more_token: tl.tensor,
    eps: tl.tensor,
    eps_y: tl.tensor,
    flags: tl.tensor,
    UNIT: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    OVERLAP: tl.constexpr,
) -> None:
    """ROWS rows of `width`; strides of what broadcasts are 0 where it does, and come in units of UNIT."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    batch, token = (row // T).to(tl.int64)[:, None], (row % T).to(tl.int64)[:, None]
    lane = tl.arange(0, WIDTH)
    live = lane < width
    mask = (row < rows)[:, None] & live[None, :]
    offset = row.to(tl.int64)[:, None] * width + lane[None, :]
    more = (batch * more_batch + token * more_token) * UNIT + lane[None, :]
    has_more = mask & (lane < width * (flags >> 11 & 1))[None, :]

    wait_for_previous_kernel(OVERLAP)
    v = tl.load(x + offset, mask=mask, other=0).to(tl.float32)
    if flags & 1 != 0:  # ADD
        w = tl.load(y + offset, mask=mask, other=0).to(tl.float32)
        if flags & 4 != 0:  # NORM_Y
            spread = tl.rsqrt(tl.sum(w * w, axis=1) / width + eps_y)
            w = w * spread[:, None] * tl.load(weight_y + lane, mask=live, other=0).to(tl.float32)[None, :]
        if flags & 2 != 0:  # GATE
            g = gate + (batch * gate_batch + token * gate_token) * UNIT + lane[None, :]
            g_more = tl.load(gate_more + more, mask=has_more, other=0).to(tl.float32)
            w = w * (tl.load(g, mask=mask, other=0).to(tl.float32) + g_more)
        v += w
    if flags & 8 != 0:  # TOTAL
        tl.store(total + offset, v.to(total.dtype.element_ty), mask=mask)
    if flags & 16 != 0:  # NORM
        mean = tl.sum(v, axis=1) / width * (1 - (flags >> 5 & 1))  # RMS: as if it were 0
        v = tl.where(live[None, :], v - mean[:, None], 0)
        v = v * tl.rsqrt(tl.sum(v * v, axis=1) / width + eps)[:, None]
        weighted = flags >> 6 & 1
        factor = tl.load(weight + lane, mask=lane < width * weighted, other=0).to(tl.float32) + (1 - weighted)
        term = tl.load(bias + lane, mask=lane < width * (flags >> 7 & 1), other=0).to(tl.float32)
        v = v * factor[None, :] + term[None, :]
    if flags & 256 != 0:  # SCALE, and ONE
        s = scale + (batch * scale_batch + token * scale_token) * UNIT + lane[None, :]
        s_more = tl.load(scale_more + more, mask=has_more, other=0).to(tl.float32)
        v = v * (tl.load(s, mask=mask, other=0).to(tl.float32) + s_more + (flags >> 9 & 1))
    if flags & 1024 != 0:  # SHIFT
        s = shift + (batch * shift_batch + token * shift_token) * UNIT + lane[None, :]
        s_more = tl.load(shift_more + more, mask=has_more, other=0).to(tl.float32)
        v = v + tl.load(s, mask=mask, other=0).to(tl.float32) + s_more
    tl.store(out + offset, v.to(out.dtype.element_ty), mask=mask)
