"""The kernels of GroupNorm: `whole_group` alone, or `moments`, `merge` and `apply` one after the other.

They see x [N, C, *] as samples of T frames of S rows of C channels, with a stride for each, so that one source serves every
layout; T is 1 except in videos. Which of the two strides of a tile is 1 decides how Triton spreads it over threads.
"""

from __future__ import annotations

from sfast.kernels.overlap import wait_for_previous_kernel
from sfast.kernels.triton_or_none import tl, triton

SILU, SHIFT, WEIGHT, BIAS = 1, 2, 4, 8  # bits of `flags`; a run-time value, so that all variants share one compilation


@triton.jit
def silu(v: tl.tensor) -> tl.tensor:
    """v / (1 + exp(-v)), by a reciprocal square root: an instruction, where a division is six."""
    root = tl.rsqrt(1 + tl.exp(-v))
    return v * root * root


@triton.jit(do_not_specialize=["S", "shift_stride", "flags"])
def whole_group(
    x: tl.tensor,
    y: tl.tensor,
    shift: tl.tensor,
    weight: tl.tensor,
    bias: tl.tensor,
    S: tl.tensor,
    C: tl.tensor,
    row_stride: tl.tensor,
    channel_stride: tl.tensor,
    shift_stride: tl.tensor,
    eps: tl.tensor,
    flags: tl.tensor,
    PER_GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
    OVERLAP: tl.constexpr,
) -> None:
    """One group of one sample, [S, C/G], stays in registers. PER_GROUP is a constant so that loads can be wide."""
    group, n = tl.program_id(0), tl.program_id(1).to(tl.int64)
    row, lane = tl.arange(0, ROWS), tl.arange(0, CHANNELS)
    live = lane < PER_GROUP
    mask = (row < S)[:, None] & live[None, :]
    channel = group * PER_GROUP + lane
    offset = row[:, None] * row_stride + channel[None, :] * channel_stride
    wait_for_previous_kernel(OVERLAP)
    v = tl.load(x + n * S * C + offset, mask=mask, other=0).to(tl.float32)
    shifted, weighted, biased = flags >> 1 & 1, flags >> 2 & 1, flags >> 3 & 1
    v += tl.load(shift + n * shift_stride + channel, mask=lane < PER_GROUP * shifted, other=0).to(tl.float32)[None, :]
    w = tl.load(weight + channel, mask=lane < PER_GROUP * weighted, other=0).to(tl.float32) + (1 - weighted)
    b = tl.load(bias + channel, mask=lane < PER_GROUP * biased, other=0).to(tl.float32)

    count = (S * PER_GROUP).to(tl.float32)
    v -= tl.sum(tl.where(mask, v, 0)) / count
    variance = tl.sum(tl.where(mask, v * v, 0)) / count
    v = v * (w * tl.rsqrt(variance + eps))[None, :] + b[None, :]
    if flags & 1 != 0:
        v = silu(v)
    tl.store(y + n * S * C + offset, v.to(y.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["S", "T", "part_rows", "parts"])
def moments(
    x: tl.tensor,
    moments: tl.tensor,
    S: tl.tensor,
    C: tl.tensor,
    T: tl.tensor,
    frame_stride: tl.tensor,
    row_stride: tl.tensor,
    channel_stride: tl.tensor,
    part_rows: tl.tensor,
    parts: tl.tensor,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
    OVERLAP: tl.constexpr,
) -> None:
    """Mean and M2 of every channel over part_rows rows of x, into moments [2, N, T * parts, C]."""
    blocks = tl.cdiv(C, CHANNELS)
    block, part, n = tl.program_id(0) % blocks, tl.program_id(0) // blocks, tl.program_id(1).to(tl.int64)
    frame, begin = part // parts, part % parts * part_rows
    row, channel = tl.arange(0, ROWS), block * CHANNELS + tl.arange(0, CHANNELS)
    live = channel < C
    rows = tl.minimum(part_rows, S - begin)
    start = x + n * T * S * C + frame.to(tl.int64) * frame_stride + begin.to(tl.int64) * row_stride
    offset = row[:, None] * row_stride + channel[None, :] * channel_stride

    wait_for_previous_kernel(OVERLAP)
    pilot = tl.load(start + channel * channel_stride, mask=live, other=0).to(tl.float32)
    s1 = tl.zeros([ROWS, CHANNELS], tl.float32)
    s2 = tl.zeros([ROWS, CHANNELS], tl.float32)
    for done in tl.range(0, rows, ROWS, num_stages=3):
        mask = (row < rows - done)[:, None] & live[None, :]
        d = tl.where(mask, tl.load(start + offset, mask=mask, other=0).to(tl.float32) - pilot[None, :], 0)
        s1 += d
        s2 += d * d
        start += ROWS * row_stride

    count = rows.to(tl.float32)
    sum1, sum2 = tl.sum(s1, axis=0), tl.sum(s2, axis=0)
    to = moments + (n * T * parts + part) * C + channel
    tl.store(to, pilot + sum1 / count, mask=live)
    tl.store(to + tl.num_programs(1) * T * parts * C, sum2 - sum1 * sum1 / count, mask=live)


@triton.jit(do_not_specialize=["S", "T", "part_rows", "parts", "shift_stride", "flags"])
def merge(
    moments: tl.tensor,
    table: tl.tensor,
    shift: tl.tensor,
    weight: tl.tensor,
    bias: tl.tensor,
    S: tl.tensor,
    C: tl.tensor,
    T: tl.tensor,
    part_rows: tl.tensor,
    parts: tl.tensor,
    shift_stride: tl.tensor,
    eps: tl.tensor,
    flags: tl.tensor,
    ENTRIES: tl.constexpr,
    CHANNELS: tl.constexpr,
    OVERLAP: tl.constexpr,
) -> None:
    """Chan's formula over one group of moments [2, N, T * parts, C]; center, scale, offset go to table [3, N, T, C]."""
    group, n = tl.program_id(0), tl.program_id(1).to(tl.int64)
    per_group = C // tl.num_programs(0)
    first = group * per_group  # of the group's channels
    means = moments + n * T * parts * C + first
    m2s = means + tl.num_programs(1) * T * parts * C
    shifts = shift + n * shift_stride + first
    shifted, weighted, biased = flags >> 1 & 1, flags >> 2 & 1, flags >> 3 & 1
    entry, lane = tl.arange(0, ENTRIES), tl.arange(0, CHANNELS)
    entries = T * parts * per_group
    total = S.to(tl.float32) * T * per_group
    wait_for_previous_kernel(OVERLAP)

    w = tl.load(weight + first + lane, mask=lane < per_group * weighted, other=0).to(tl.float32)
    b = tl.load(bias + first + lane, mask=lane < per_group * biased, other=0).to(tl.float32)
    s = tl.load(shifts + lane, mask=lane < per_group * shifted, other=0).to(tl.float32)
    pilot = tl.load(means)
    excess = tl.zeros([ENTRIES], tl.float32)
    m2 = tl.zeros([ENTRIES], tl.float32)
    for done in range(0, entries, ENTRIES):
        part, c = (done + entry) // per_group, (done + entry) % per_group
        mask = done + entry < entries
        count = tl.minimum(part_rows, S - part % parts * part_rows).to(tl.float32)
        mean = tl.load(means + part * C + c, mask=mask, other=0)
        m2 += tl.load(m2s + part * C + c, mask=mask, other=0)
        mean += tl.load(shifts + part // parts * C + c, mask=done + entry < entries * shifted, other=0).to(tl.float32)
        excess += tl.where(mask, (mean - pilot) * count, 0)
    center = pilot + tl.sum(excess, axis=0) / total

    for done in range(0, entries, ENTRIES):
        part, c = (done + entry) // per_group, (done + entry) % per_group
        mask = done + entry < entries
        count = tl.minimum(part_rows, S - part % parts * part_rows).to(tl.float32)
        gap = tl.load(means + part * C + c, mask=mask, other=0) - center
        gap += tl.load(shifts + part // parts * C + c, mask=done + entry < entries * shifted, other=0).to(tl.float32)
        m2 += tl.where(mask, gap * gap * count, 0)
    rstd = tl.rsqrt(tl.sum(m2, axis=0) / total + eps)

    plane = tl.num_programs(1) * T * C
    for done in range(0, per_group, CHANNELS):
        c = done + lane
        live = c < per_group
        if done > 0:
            w = tl.load(weight + first + c, mask=c < per_group * weighted, other=0).to(tl.float32)
            b = tl.load(bias + first + c, mask=c < per_group * biased, other=0).to(tl.float32)
        for frame in range(T):
            if done + frame > 0:
                s = tl.load(shifts + frame * C + c, mask=c < per_group * shifted, other=0).to(tl.float32)
            to = table + (n * T + frame) * C + first + c
            tl.store(to, center - s, mask=live)
            tl.store(to + plane, rstd * (w + (1 - weighted)), mask=live)
            tl.store(to + 2 * plane, b, mask=live)


@triton.jit(do_not_specialize=["S", "T", "rows", "pieces", "flags"])
def apply(
    x: tl.tensor,
    y: tl.tensor,
    table: tl.tensor,
    S: tl.tensor,
    C: tl.tensor,
    T: tl.tensor,
    frame_stride: tl.tensor,
    row_stride: tl.tensor,
    channel_stride: tl.tensor,
    rows: tl.tensor,
    pieces: tl.tensor,
    flags: tl.tensor,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
    OVERLAP: tl.constexpr,
) -> None:
    """y = (x - center) * scale + offset for `rows` rows, and SiLU."""
    blocks = tl.cdiv(C, CHANNELS)
    which = tl.num_programs(0) - 1 - tl.program_id(0)  # backwards: the last rows are still in the L2 cache
    N = tl.num_programs(1)
    n = (N - 1 - tl.program_id(1)).to(tl.int64)
    block, piece = which % blocks, which // blocks
    frame, begin = piece // pieces, piece % pieces * rows
    row, channel = tl.arange(0, ROWS), block * CHANNELS + tl.arange(0, CHANNELS)
    live = channel < C
    entry = table + (n * T + frame) * C + channel
    wait_for_previous_kernel(OVERLAP)
    center = tl.load(entry, mask=live, other=0)[None, :]
    scale = tl.load(entry + N * T * C, mask=live, other=0)[None, :]
    b = tl.load(entry + 2 * N * T * C, mask=live, other=0)[None, :]

    start = n * T * S * C + frame.to(tl.int64) * frame_stride + begin.to(tl.int64) * row_stride
    offset = row[:, None] * row_stride + channel[None, :] * channel_stride
    left = tl.minimum(rows, S - begin)
    ahead = tl.load(x + start + offset, mask=(row < left)[:, None] & live[None, :], other=0)
    for done in range(0, left, ROWS):  # the next tile is on its way while this one is computed
        v = ahead.to(tl.float32)
        mask = (row < left - done - ROWS)[:, None] & live[None, :]
        ahead = tl.load(x + start + ROWS * row_stride + offset, mask=mask, other=0)
        v = (v - center) * scale + b
        if flags & 1 != 0:
            v = silu(v)
        mask = (row < left - done)[:, None] & live[None, :]
        tl.store(y + start + offset, v.to(y.dtype.element_ty), mask=mask)
        start += ROWS * row_stride
