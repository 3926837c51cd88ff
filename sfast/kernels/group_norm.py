"""GroupNorm, with the per-channel shift before it and the SiLU after it, at the speed of memory.

A group is large (a megabyte at the end of a VAE) and there are few of them, so one program for each leaves most of the GPU
idle. Here every group is split over many programs, and memory is read in the order in which it lies, channels-last or not:

1. *moments*: each program takes a block of rows and writes mean and M2 (the sum of squared deviations) of its part of each
   group. Sums run over x - pilot, where the pilot is taken from the same rows, so nothing cancels however far the data is
   from zero: |pilot - mean| is at most sqrt(rows) standard deviations of those very rows.
2. *apply*: each program first merges the parts of its groups by Chan's formula, then normalizes its block of rows.
   It walks backwards, because the end of x is what the L2 cache still holds.

Many parts (at VAE sizes) are merged by a kernel of their own in between. Where a group is small, one program keeps it in
registers and one launch does everything. Arithmetic is fp32 throughout, rounded once, when y is stored.

The formula for merging: Chan, Golub, LeVeque, "Algorithms for computing the sample variance" (1983).
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from sfast.kernels.op import define
from sfast.kernels.triton_or_none import tl, triton, triton_takes

ELEMENTS = 4096  # of a tile
WARPS = 4  # of a tile
PER_WARP = 1024  # elements that a warp keeps of a whole group
PROGRAMS = 8  # for each multiprocessor
MAX_CHANNELS = 4096  # of a channels-last tile
MAX_PARTS = 64  # that apply merges by itself
IN_REGISTERS = 16384  # elements of a group that one program can keep
SILU, SHIFT, WEIGHT, BIAS = 1, 2, 4, 8  # bits of `flags`; a run-time value, so that all variants share one compilation


def group_norm_reference(x: Tensor, num_groups: int, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """group_norm(x): x [N, C, *], weight [C], bias [C] -> [N, C, *]."""
    return F.group_norm(x, num_groups, weight, bias, eps)


def group_norm_silu_reference(
    x: Tensor, num_groups: int, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor:
    """silu(group_norm(x)): x [N, C, *], weight [C], bias [C] -> [N, C, *]."""
    return F.silu(F.group_norm(x, num_groups, weight, bias, eps))


def add_group_norm_silu_reference(
    x: Tensor, shift: Tensor, num_groups: int, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor:
    """silu(group_norm(x + shift)): x [N, C, *], shift [N, C, 1, 1] (or any that broadcasts) -> [N, C, *]."""
    return F.silu(F.group_norm(x + shift, num_groups, weight, bias, eps))


def _group_norm(x: Tensor, num_groups: int, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    return _launch(x, None, num_groups, weight, bias, eps, 0)


def _group_norm_silu(x: Tensor, num_groups: int, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    return _launch(x, None, num_groups, weight, bias, eps, SILU)


def _add_group_norm_silu(
    x: Tensor, shift: Tensor, num_groups: int, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor:
    per_channel = shift.dim() == x.dim() and shift.shape[0] in (1, x.shape[0]) and shift.shape[1] == x.shape[1]
    if per_channel and shift.shape[2:].numel() == 1:
        return _launch(x, shift, num_groups, weight, bias, eps, SILU | SHIFT)
    return _launch(x + shift, None, num_groups, weight, bias, eps, SILU)


def _launch(
    x: Tensor, shift: Tensor | None, G: int, weight: Tensor | None, bias: Tensor | None, eps: float, flags: int
) -> Tensor:
    N, C = x.shape[:2]
    S = x.shape[2:].numel()
    channels_last = S == 1 or (C > 1 and x.movedim(1, -1).is_contiguous())
    if not channels_last or C // G > MAX_CHANNELS:
        x, channels_last = x.contiguous(), False
    y = torch.empty_like(x)
    flags |= (WEIGHT if weight is not None else 0) | (BIAS if bias is not None else 0)
    weight = x if weight is None else weight.contiguous()
    bias = x if bias is None else bias.contiguous()
    shift = x if shift is None else shift.expand(N, *shift.shape[1:]).reshape(N, C).contiguous()
    launch = _launch_channels_last if channels_last else _launch_contiguous
    launch(x, shift, weight, bias, y, N, S, C, G, eps, flags)
    return y


# ---- channels-last: x is [N, S, C] in memory -----------------------------------------------------------------------


class Tiling(NamedTuple):
    """How a channels-last tensor is cut: a tile is [ROWS, CHANNELS], and `groups` whole groups lie side by side in it."""

    groups: int  # K: groups of a tile
    blocks: int  # tiles side by side that make a row
    ROWS: int
    CHANNELS: int  # a power of two, at least K * C/G
    GROUPS: int  # a power of two, at least K
    ALIGNMENT: int  # elements; 8 lets every access be 16 bytes wide


@functools.cache
def _tiling(C: int, G: int) -> Tiling:
    per_group = C // G
    CHANNELS = max(128, triton.next_power_of_2(per_group))
    most = min(CHANNELS // per_group, G, 32)
    aligned = [k for k in range(most, 0, -1) if k * per_group % 8 == 0]
    groups = aligned[0] if aligned else most
    return Tiling(
        groups=groups,
        blocks=triton.cdiv(G, groups),
        ROWS=max(1, ELEMENTS // CHANNELS),
        CHANNELS=CHANNELS,
        GROUPS=16 if groups <= 16 else 32,
        ALIGNMENT=8 if aligned and C % 8 == 0 else 1,
    )


def _launch_channels_last(
    x: Tensor,
    shift: Tensor,
    weight: Tensor,
    bias: Tensor,
    y: Tensor,
    N: int,
    S: int,
    C: int,
    G: int,
    eps: float,
    flags: int,
) -> None:
    ROWS, CHANNELS = triton.next_power_of_2(S), triton.next_power_of_2(C // G)
    if ROWS * CHANNELS <= IN_REGISTERS:
        warps = max(1, min(16, ROWS * CHANNELS // PER_WARP))
        _whole_group_channels_last[G, N](
            x, shift, weight, bias, y, S, C, G, eps, flags, ROWS=ROWS, CHANNELS=CHANNELS, num_warps=warps
        )
        return
    tile = _tiling(C, G)
    part_rows = _part_length(S, tile.ROWS, N * tile.blocks, x.device)
    parts = triton.cdiv(S, part_rows)
    moments = x.new_empty(2, N, G, parts, dtype=torch.float32)
    shape = {"ROWS": tile.ROWS, "CHANNELS": tile.CHANNELS, "GROUPS": tile.GROUPS, "ALIGNMENT": tile.ALIGNMENT}
    _moments_channels_last[parts, tile.blocks, N](
        x, shift, moments, N, S, C, G, tile.groups, part_rows, parts, flags, **shape, num_warps=WARPS
    )
    if parts > MAX_PARTS:
        moments, part_rows, parts = _merge(moments, S, C // G, part_rows)
    rows = tile.ROWS * _tiles_per_program(S, tile.ROWS, N * tile.blocks, x.device)
    _apply_channels_last[triton.cdiv(S, rows), tile.blocks, N](
        x,
        shift,
        weight,
        bias,
        y,
        moments,
        N,
        S,
        C,
        G,
        tile.groups,
        part_rows,
        parts,
        rows,
        eps,
        flags,
        **shape,
        PARTS=1 if parts == 1 else MAX_PARTS,
        num_warps=WARPS,
    )


@triton.jit(do_not_specialize=["S", "G", "flags"])
def _whole_group_channels_last(
    x: tl.tensor,
    shift: tl.tensor,
    weight: tl.tensor,
    bias: tl.tensor,
    y: tl.tensor,
    S: tl.tensor,
    C: tl.tensor,
    G: tl.tensor,
    eps: tl.tensor,
    flags: tl.tensor,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
) -> None:
    """One group of one sample stays in registers: [S, C/G]."""
    group, n = tl.program_id(0), tl.program_id(1).to(tl.int64)
    per_group = C // G
    row, lane = tl.arange(0, ROWS), tl.arange(0, CHANNELS)
    channel = group * per_group + lane
    live = lane < per_group
    mask = (row < S)[:, None] & live[None, :]
    offset = n * S * C + row[:, None] * C + channel[None, :]

    v = tl.load(x + offset, mask=mask, other=0).to(tl.float32)
    v += tl.load(shift + n * C + channel, mask=lane < per_group * (flags >> 1 & 1), other=0).to(tl.float32)[None, :]
    count = (S * per_group).to(tl.float32)
    mean = tl.sum(tl.sum(tl.where(mask, v, 0), axis=1), axis=0) / count
    v -= mean
    variance = tl.sum(tl.sum(tl.where(mask, v * v, 0), axis=1), axis=0) / count

    weighted = flags >> 2 & 1
    w = tl.load(weight + channel, mask=lane < per_group * weighted, other=0).to(tl.float32) + (1 - weighted)
    b = tl.load(bias + channel, mask=lane < per_group * (flags >> 3 & 1), other=0).to(tl.float32)
    v = v * (w * tl.rsqrt(variance + eps))[None, :] + b[None, :]
    if flags & 1 != 0:
        v = v * tl.sigmoid(v)
    tl.store(y + offset, v.to(y.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["N", "S", "G", "groups", "part_rows", "parts", "flags"])
def _moments_channels_last(
    x: tl.tensor,
    shift: tl.tensor,
    moments: tl.tensor,
    N: tl.tensor,
    S: tl.tensor,
    C: tl.tensor,
    G: tl.tensor,
    groups: tl.tensor,
    part_rows: tl.tensor,
    parts: tl.tensor,
    flags: tl.tensor,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
    GROUPS: tl.constexpr,
    ALIGNMENT: tl.constexpr,
) -> None:
    """Mean and M2 of one part of `groups` groups: part_rows rows of x into moments[2, N, G, parts]."""
    part, block, n = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    per_group = C // G
    first = tl.multiple_of(block * groups * per_group, ALIGNMENT)
    width = tl.multiple_of(tl.minimum(groups * per_group, C - first), ALIGNMENT)
    row, lane = tl.arange(0, ROWS), tl.arange(0, CHANNELS)
    live = lane < width
    rows = tl.minimum(part_rows, S - part * part_rows)
    start = x + (n * S + part * part_rows) * C + first
    offset = row[:, None] * C + lane[None, :]

    pilot = tl.load(start + lane, mask=live, other=0).to(tl.float32)
    s1 = tl.zeros([ROWS, CHANNELS], tl.float32)
    s2 = tl.zeros([ROWS, CHANNELS], tl.float32)
    for done in range(0, rows, ROWS):
        here = (row < rows - done)[:, None]
        d = tl.load(start + offset, mask=here & live[None, :], other=0).to(tl.float32) - pilot[None, :]
        d = tl.where(here, d, 0)
        s1 += d
        s2 += d * d
        start += ROWS * C

    count = rows.to(tl.float32)
    sum1 = tl.sum(s1, axis=0)
    mean = pilot + sum1 / count  # of each channel
    m2 = tl.sum(s2, axis=0) - sum1 * sum1 / count
    mean += tl.load(shift + n * C + first + lane, mask=lane < width * (flags >> 1 & 1), other=0).to(tl.float32)

    group = tl.arange(0, GROUPS)
    member = (group[:, None] == (lane // per_group)[None, :]) & live[None, :]  # [GROUPS, CHANNELS]
    group_mean = tl.sum(tl.where(member, mean[None, :], 0), axis=1) / per_group
    gap = mean[None, :] - group_mean[:, None]
    group_m2 = tl.sum(tl.where(member, m2[None, :] + count * gap * gap, 0), axis=1)

    index = block * groups + group
    slot = (n * G + index) * parts + part
    mask = (group < groups) & (index < G)
    tl.store(moments + slot, group_mean, mask=mask)
    tl.store(moments + slot + N * G * parts, group_m2, mask=mask)


@triton.jit(do_not_specialize=["N", "S", "G", "groups", "part_rows", "parts", "rows", "flags"])
def _apply_channels_last(
    x: tl.tensor,
    shift: tl.tensor,
    weight: tl.tensor,
    bias: tl.tensor,
    y: tl.tensor,
    moments: tl.tensor,
    N: tl.tensor,
    S: tl.tensor,
    C: tl.tensor,
    G: tl.tensor,
    groups: tl.tensor,
    part_rows: tl.tensor,
    parts: tl.tensor,
    rows: tl.tensor,
    eps: tl.tensor,
    flags: tl.tensor,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
    GROUPS: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    PARTS: tl.constexpr,
) -> None:
    """Normalize `rows` rows of `groups` groups."""
    block, n = tl.program_id(1), tl.program_id(2).to(tl.int64)
    begin = (tl.num_programs(0) - 1 - tl.program_id(0)) * rows  # backwards: the last rows are still in the L2 cache
    per_group = C // G
    first = tl.multiple_of(block * groups * per_group, ALIGNMENT)
    width = tl.multiple_of(tl.minimum(groups * per_group, C - first), ALIGNMENT)
    row, lane = tl.arange(0, ROWS), tl.arange(0, CHANNELS)
    live = lane < width

    group, part = tl.arange(0, GROUPS), tl.arange(0, PARTS)
    index = block * groups + group
    valid = ((group < groups) & (index < G))[:, None] & (part < parts)[None, :]  # [GROUPS, PARTS]
    slot = (n * G + index)[:, None] * parts + part[None, :]
    part_mean = tl.load(moments + slot, mask=valid, other=0)
    part_m2 = tl.load(moments + slot + N * G * parts, mask=valid, other=0)
    share = tl.where(part < parts, tl.minimum(part_rows, S - part * part_rows), 0).to(tl.float32) / S
    group_mean = tl.sum(part_mean * share[None, :], axis=1)
    gap = part_mean - group_mean[:, None]
    variance = tl.sum(part_m2, axis=1) / per_group / S + tl.sum(gap * gap * share[None, :], axis=1)
    group_rstd = tl.rsqrt(variance + eps)

    member = group[:, None] == (lane // per_group)[None, :]  # [GROUPS, CHANNELS]
    center = tl.sum(tl.where(member, group_mean[:, None], 0), axis=0)
    scale = tl.sum(tl.where(member, group_rstd[:, None], 0), axis=0)
    channel = first + lane
    center -= tl.load(shift + n * C + channel, mask=lane < width * (flags >> 1 & 1), other=0).to(tl.float32)
    weighted = flags >> 2 & 1
    scale *= tl.load(weight + channel, mask=lane < width * weighted, other=0).to(tl.float32) + (1 - weighted)
    b = tl.load(bias + channel, mask=lane < width * (flags >> 3 & 1), other=0).to(tl.float32)

    start = (n * S + begin) * C + first
    offset = row[:, None] * C + lane[None, :]
    for done in range(0, tl.minimum(rows, S - begin), ROWS):
        mask = (row < S - begin - done)[:, None] & live[None, :]
        v = tl.load(x + start + offset, mask=mask, other=0).to(tl.float32)
        v = (v - center[None, :]) * scale[None, :] + b[None, :]
        if flags & 1 != 0:
            v = v * tl.sigmoid(v)
        tl.store(y + start + offset, v.to(y.dtype.element_ty), mask=mask)
        start += ROWS * C


# ---- contiguous: x is [N, G, C/G * S] in memory ----------------------------------------------------------------------


def _launch_contiguous(
    x: Tensor,
    shift: Tensor,
    weight: Tensor,
    bias: Tensor,
    y: Tensor,
    N: int,
    S: int,
    C: int,
    G: int,
    eps: float,
    flags: int,
) -> None:
    per_group = C // G
    length = per_group * S
    part_length = _part_length(length, ELEMENTS, N * G, x.device)
    parts = triton.cdiv(length, part_length)
    moments = x.new_empty(2, N, G, parts, dtype=torch.float32)
    _moments_contiguous[N * G, parts](
        x, shift, moments, S, C, G, part_length, flags, ELEMENTS=ELEMENTS, num_warps=WARPS
    )
    if parts > MAX_PARTS:
        moments, part_length, parts = _merge(moments, length, 1, part_length)
    POSITIONS = min(1024, triton.next_power_of_2(S))
    CHANNELS = min(ELEMENTS // POSITIONS, triton.next_power_of_2(per_group))
    _apply_contiguous[N * G, triton.cdiv(per_group, CHANNELS), triton.cdiv(S, POSITIONS)](
        x,
        shift,
        weight,
        bias,
        y,
        moments,
        S,
        C,
        G,
        part_length,
        parts,
        eps,
        flags,
        CHANNELS=CHANNELS,
        POSITIONS=POSITIONS,
        PARTS=1 if parts == 1 else MAX_PARTS,
        num_warps=WARPS,
    )


@triton.jit(do_not_specialize=["C", "G", "flags"])
def _moments_contiguous(
    x: tl.tensor,
    shift: tl.tensor,
    moments: tl.tensor,
    S: tl.tensor,
    C: tl.tensor,
    G: tl.tensor,
    part_length: tl.tensor,
    flags: tl.tensor,
    ELEMENTS: tl.constexpr,
) -> None:
    """Mean and M2 of one part of one group: part_length elements of x into moments[2, N, G, parts]."""
    which, part = tl.program_id(0).to(tl.int64), tl.program_id(1)  # which: n * G + group
    per_group = C // G
    total = per_group * S
    begin = part * part_length
    length = tl.minimum(part_length, total - begin)
    start = x + which * total + begin
    lane = tl.arange(0, ELEMENTS)
    shifts = shift + which * per_group
    shifted = flags >> 1 & 1

    v = tl.load(start + lane, mask=lane < length, other=0).to(tl.float32)
    v += tl.load(shifts + (begin + lane) // S, mask=lane < length * shifted, other=0).to(tl.float32)
    pilot = tl.sum(v, axis=0) / tl.minimum(length, ELEMENTS)
    s1 = tl.zeros([ELEMENTS], tl.float32)
    s2 = tl.zeros([ELEMENTS], tl.float32)
    for done in range(0, length, ELEMENTS):
        mask = lane < length - done
        v = tl.load(start + done + lane, mask=mask, other=0).to(tl.float32)
        if shifted != 0:
            v += tl.load(shifts + (begin + done + lane) // S, mask=mask, other=0).to(tl.float32)
        d = tl.where(mask, v - pilot, 0)
        s1 += d
        s2 += d * d

    count = length.to(tl.float32)
    sum1 = tl.sum(s1, axis=0)
    slot = which * tl.num_programs(1) + part
    tl.store(moments + slot, pilot + sum1 / count)
    tl.store(moments + slot + tl.num_programs(0) * tl.num_programs(1), tl.sum(s2, axis=0) - sum1 * sum1 / count)


@triton.jit(do_not_specialize=["C", "G", "part_length", "parts", "flags"])
def _apply_contiguous(
    x: tl.tensor,
    shift: tl.tensor,
    weight: tl.tensor,
    bias: tl.tensor,
    y: tl.tensor,
    moments: tl.tensor,
    S: tl.tensor,
    C: tl.tensor,
    G: tl.tensor,
    part_length: tl.tensor,
    parts: tl.tensor,
    eps: tl.tensor,
    flags: tl.tensor,
    CHANNELS: tl.constexpr,
    POSITIONS: tl.constexpr,
    PARTS: tl.constexpr,
) -> None:
    """Normalize a tile [CHANNELS, POSITIONS] of one group."""
    which = tl.program_id(0).to(tl.int64)
    per_group = C // G
    total = per_group * S
    part = tl.arange(0, PARTS)
    slot = which * parts + part
    part_mean = tl.load(moments + slot, mask=part < parts, other=0)
    part_m2 = tl.load(moments + slot + tl.num_programs(0) * parts, mask=part < parts, other=0)
    share = tl.where(part < parts, tl.minimum(part_length, total - part * part_length), 0).to(tl.float32) / total
    mean = tl.sum(part_mean * share, axis=0)
    gap = part_mean - mean
    rstd = tl.rsqrt(tl.sum(part_m2, axis=0) / total + tl.sum(gap * gap * share, axis=0) + eps)

    lane = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    position = tl.program_id(2) * POSITIONS + tl.arange(0, POSITIONS)
    live = lane < per_group
    mask = live[:, None] & (position < S)[None, :]
    shifts = tl.load(shift + which * per_group + lane, mask=lane < per_group * (flags >> 1 & 1), other=0).to(tl.float32)
    channel = (which % G) * per_group + lane
    weighted = flags >> 2 & 1
    w = tl.load(weight + channel, mask=lane < per_group * weighted, other=0).to(tl.float32) + (1 - weighted)
    b = tl.load(bias + channel, mask=lane < per_group * (flags >> 3 & 1), other=0).to(tl.float32)

    offset = which * total + lane[:, None] * S + position[None, :]
    v = tl.load(x + offset, mask=mask, other=0).to(tl.float32)
    v = (v - (mean - shifts)[:, None]) * (rstd * w)[:, None] + b[:, None]
    if flags & 1 != 0:
        v = v * tl.sigmoid(v)
    tl.store(y + offset, v.to(y.dtype.element_ty), mask=mask)


# ---- both --------------------------------------------------------------------------------------------------------


def _merge(moments: Tensor, length: int, multiplicity: int, part_length: int) -> tuple[Tensor, int, int]:
    """Merge the parts of every group into one: (moments [2, N, G, 1], its part length, 1)."""
    _, N, G, parts = moments.shape
    merged = moments.new_empty(2, N, G, 1)
    _merge_parts[(N * G,)](moments, merged, length, multiplicity, part_length, parts, PARTS=1024, num_warps=WARPS)
    return merged, length, 1


@triton.jit(do_not_specialize=["length", "multiplicity", "part_length", "parts"])
def _merge_parts(
    moments: tl.tensor,
    merged: tl.tensor,
    length: tl.tensor,
    multiplicity: tl.tensor,
    part_length: tl.tensor,
    parts: tl.tensor,
    PARTS: tl.constexpr,
) -> None:
    """Chan's formula over one group: moments[2, N, G, parts] -> merged[2, N, G, 1]; every element counts multiplicity times."""
    which = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, PARTS)
    plane = tl.num_programs(0) * parts
    mean = 0.0
    for done in range(0, parts, PARTS):
        part = done + lane
        share = tl.where(part < parts, tl.minimum(part_length, length - part * part_length), 0).to(tl.float32) / length
        mean += tl.sum(tl.load(moments + which * parts + part, mask=part < parts, other=0) * share, axis=0)
    m2 = 0.0
    for done in range(0, parts, PARTS):
        part = done + lane
        count = tl.where(part < parts, tl.minimum(part_length, length - part * part_length), 0).to(tl.float32)
        gap = tl.load(moments + which * parts + part, mask=part < parts, other=0) - mean
        part_m2 = tl.load(moments + plane + which * parts + part, mask=part < parts, other=0)
        m2 += tl.sum(part_m2 + gap * gap * (count * multiplicity), axis=0)
    tl.store(merged + which, mean)
    tl.store(merged + which + tl.num_programs(0), m2)


def _part_length(length: int, step: int, neighbours: int, device: torch.device) -> int:
    """How much of a group one moments program takes: a multiple of `step` that gives about 8 programs per multiprocessor."""
    parts = max(1, PROGRAMS * _multiprocessors(device) // neighbours)
    return triton.cdiv(triton.cdiv(length, parts), step) * step


def _tiles_per_program(rows: int, step: int, neighbours: int, device: torch.device) -> int:
    """How many tiles one apply program takes: one, unless that makes more than 16 programs per multiprocessor."""
    return max(1, min(8, triton.cdiv(rows, step) * neighbours // (2 * PROGRAMS * _multiprocessors(device))))


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def _takes(x: Tensor, G: int, weight: Tensor | None, bias: Tensor | None, eps: float) -> bool:
    if not triton_takes(x) or x.dim() < 2 or x.numel() == 0 or G < 1 or x.shape[1] % G:
        return False
    N, C = x.shape[:2]
    S = x.shape[2:].numel()
    fits = N < 65536 and N * G < 2**31 and S * C < 2**31 and C // G * S < 65535 * 1024
    return fits and all(
        p is None or (p.shape == (C,) and p.dtype == x.dtype and p.device == x.device) for p in (weight, bias)
    )


def _takes_shifted(x: Tensor, shift: Tensor, G: int, weight: Tensor | None, bias: Tensor | None, eps: float) -> bool:
    same = shift.dtype == x.dtype and shift.device == x.device and shift.dim() <= x.dim()
    return same and _takes(x, G, weight, bias, eps) and torch.broadcast_shapes(x.shape, shift.shape) == x.shape


def _like(x: Tensor, *rest: object) -> Tensor:
    return torch.empty_like(x)


def _like_sum(x: Tensor, shift: Tensor, *rest: object) -> Tensor:
    return torch.empty_like(x + shift)


define(
    "group_norm(Tensor x, int num_groups, Tensor? weight, Tensor? bias, float eps) -> Tensor",
    reference=group_norm_reference,
    supports=_takes,
    launch=_group_norm,
    fake=_like,
)
define(
    "group_norm_silu(Tensor x, int num_groups, Tensor? weight, Tensor? bias, float eps) -> Tensor",
    reference=group_norm_silu_reference,
    supports=_takes,
    launch=_group_norm_silu,
    fake=_like,
)
define(
    "add_group_norm_silu(Tensor x, Tensor shift, int num_groups, Tensor? weight, Tensor? bias, float eps) -> Tensor",
    reference=add_group_norm_silu_reference,
    supports=_takes_shifted,
    launch=_add_group_norm_silu,
    fake=_like_sum,
)
