"""GroupNorm, with the per-channel shift before it and the SiLU after it, at the speed of memory.

A group is large (megabytes at the end of a VAE) and there are few of them, so one program for each leaves most of a GPU
idle. Here the work is cut without regard to groups, into tiles that lie in memory order, channels-last or not:

1. *moments*: each program takes some rows of some channels and writes mean and M2 (the sum of squared deviations) of every
   channel. It sums x - pilot, where the pilot is its own first row: however far the data is from zero nothing cancels,
   because a pilot is never more than sqrt(rows) standard deviations from the mean of the rows it belongs to.
2. *merge*: one program for each group merges these by Chan's formula and writes center, scale and offset of its channels.
3. *apply*: one read, one write, `(x - center) * scale + offset`, and SiLU. It walks backwards, because the end of x is what
   the L2 cache still holds.

The shift moves a channel's mean and nothing else, so it costs no pass of its own. Where a group is small, one program keeps
it in registers and a single launch does everything. Where it is too large for that, but not for the shared memory of a
cluster, our native kernel does the same (csrc/group_norm.cu), on GPUs with clusters. Arithmetic is fp32 throughout and
rounded once, when y is stored.

The first of these is compiled for each size of a group's rows, to a power of two, the others for any. So a shape after the
first, that would need another compilation of the first, takes the others: a few microseconds instead of tenths of a second.

The formula for merging: Chan, Golub, LeVeque, "Algorithms for computing the sample variance" (1983).
"""

from __future__ import annotations

import functools
from collections.abc import Hashable
from typing import NamedTuple, TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor

from sfast.kernels import nearby
from sfast.kernels.group_norm_kernels import BIAS, SHIFT, SILU, WEIGHT, apply, merge, moments, whole_group
from sfast.kernels.native_ops import native_group_norm_takes
from sfast.kernels.op import define
from sfast.kernels.overlap import launch_options
from sfast.kernels.precompile import is_rehearsing
from sfast.kernels.triton_or_none import triton, triton_takes

IN_REGISTERS = 16384  # elements of a group that one program keeps; twice as many would fit, but compile for seconds
FEWEST_ROWS = 64  # that it is compiled for: the masked rows of smaller groups cost less than another compilation
LARGE = 1 << 24  # elements of x from which on throughput counts for more than latency

Variant = tuple[Hashable, ...]  # what kernels are compiled for

_compiled: set[Variant] = set()
_avoided: set[Variant] = set()  # at a shape after the first


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
    rest = shift.shape[2:] if x.dim() != 5 else shift.shape[3:]  # a video may have one shift for each frame
    if shift.dim() == x.dim() > 2 and shift.shape[1] == x.shape[1] and rest.numel() == 1:
        return _launch(x, shift, num_groups, weight, bias, eps, SILU | SHIFT)
    return _launch(x + shift, None, num_groups, weight, bias, eps, SILU)


def _launch(
    x: Tensor, shift: Tensor | None, G: int, weight: Tensor | None, bias: Tensor | None, eps: float, flags: int
) -> Tensor:
    N, C = x.shape[:2]
    x, view = _view(x, 1 if shift is None else shift.shape[2:].numel())
    T, S = view.frames, x.shape[2:].numel() // view.frames
    PER_GROUP = C // G
    CHANNELS = triton.next_power_of_2(PER_GROUP)
    ROWS = max(triton.next_power_of_2(S), min(FEWEST_ROWS, IN_REGISTERS // CHANNELS))
    tile, per_multiprocessor = _tile(view.channel_stride == 1, x.numel())
    rows = x.movedim(1, -1).reshape(N, S, C) if T == 1 and view.channel_stride == 1 else None
    whole = T == 1 and ROWS * CHANNELS <= IN_REGISTERS and _keeps_whole(x, view, rows, G, ROWS, tile)
    if not whole and _goes_in_clusters(rows, G):
        return _in_clusters(rows, shift, G, weight, bias, eps, flags).view(N, *x.shape[2:], C).movedim(-1, 1)
    y = torch.empty_like(x)
    flags |= (WEIGHT if weight is not None else 0) | (BIAS if bias is not None else 0)
    weight = x if weight is None else weight.contiguous()
    bias = x if bias is None else bias.contiguous()
    shift, shift_stride = _rows(x, None if shift is None else shift.flatten(2).expand(N, C, T).transpose(1, 2))
    options = launch_options(x.device)

    if whole:
        shape = {"PER_GROUP": PER_GROUP, "ROWS": ROWS, "CHANNELS": CHANNELS}
        warps = max(1, min(16, ROWS * CHANNELS // 512))
        strides = view.row_stride, view.channel_stride, shift_stride
        whole_group[G, N](x, y, shift, weight, bias, S, C, *strides, eps, flags, **shape, **options, num_warps=warps)
        return y

    _compiled.add(_variant(x, view, *tile.values()))
    blocks = triton.cdiv(C, tile["CHANNELS"])
    programs = per_multiprocessor * _multiprocessors(x.device)
    part_rows = _part_rows(S, tile["ROWS"], N * T * blocks, programs)
    parts = triton.cdiv(S, part_rows)
    partial = x.new_empty(2, N, T * parts, C, dtype=torch.float32)
    table = x.new_empty(3, N, T, C, dtype=torch.float32)
    moments[blocks * T * parts, N](x, partial, S, C, *view, part_rows, parts, **tile, **options)
    sizes = {"ENTRIES": 1024, "CHANNELS": 128}
    numbers = S, C, T, part_rows, parts, shift_stride, eps, flags
    merge[G, N](partial, table, shift, weight, bias, *numbers, **sizes, **options)
    rows = tile["ROWS"] * _tiles_per_program(S, tile["ROWS"], N * T * blocks, x.device)
    pieces = triton.cdiv(S, rows)
    apply[blocks * T * pieces, N](x, y, table, S, C, *view, rows, pieces, flags, **tile, **options)
    return y


def _keeps_whole(x: Tensor, view: View, rows: Tensor | None, G: int, ROWS: int, tile: dict[str, int]) -> bool:
    """Whether one program is to keep a group: unless that needs a compilation, and at a shape after the first."""
    variant = _variant(x, view, x.shape[1] // G, ROWS)
    if variant in _compiled:
        return True
    avoids = nearby.is_borrowing() or (variant in _avoided and not is_rehearsing())  # there may be no graph
    if avoids and (_variant(x, view, *tile.values()) in _compiled or _goes_in_clusters(rows, G)):
        _avoided.add(variant)
        return False
    _compiled.add(variant)
    return True


def _variant(x: Tensor, view: View, *constants: int) -> Variant:
    return x.dtype, x.device, view.channel_stride == 1, *constants


def _goes_in_clusters(rows: Tensor | None, G: int) -> TypeGuard[Tensor]:
    return rows is not None and native_group_norm_takes(rows, G)


def _in_clusters(
    rows: Tensor, shift: Tensor | None, G: int, weight: Tensor | None, bias: Tensor | None, eps: float, flags: int
) -> Tensor:
    """rows [N, S, C] normalized by the native kernel."""
    shift = None if shift is None else shift.flatten(1).expand(rows.shape[0], rows.shape[2])
    if shift is not None and shift.stride(1) != 1:
        shift = shift.contiguous()
    weight, bias = (None if p is None else p.contiguous() for p in (weight, bias))
    return torch.ops.sfast_native.group_norm(rows, shift, G, weight, bias, eps, bool(flags & SILU))


def _rows(x: Tensor, shift: Tensor | None) -> tuple[Tensor, int]:
    """A shift [N, T, C] whose samples are dense, and the stride from one to the next: a slice of a wider row will do."""
    if shift is None:
        return x, 0  # not read
    if shift.shape[1] > 1 or shift.stride(2) != 1:
        shift = shift.contiguous()
    return shift, shift.stride(0)


class View(NamedTuple):
    """How a dense x lies in memory: samples of `frames` frames of S rows of C channels; strides in elements."""

    frames: int  # T; one, unless a shift differs between frames or they do not follow upon each other
    frame_stride: int
    row_stride: int
    channel_stride: int


def _view(x: Tensor, frames: int) -> tuple[Tensor, View]:
    """(x, made contiguous if it is neither channels-last, nor contiguous, nor a video in the order N T C H W; its view)."""
    C, S = x.shape[1], x.shape[2:].numel()
    if (S == 1 or C > 1) and x.movedim(1, -1).is_contiguous():
        return x, View(frames, S // frames * C, C, 1)
    if x.dim() == 5 and not x.is_contiguous() and x.transpose(1, 2).is_contiguous():
        rows = x.shape[3:].numel()
        return x, View(x.shape[2], C * rows, 1, rows)
    return x.contiguous(), View(frames, S // frames, 1, S)


def _tile(channels_last: bool, elements: int) -> tuple[dict[str, int], int]:
    """(the tile, how many programs for each multiprocessor make moments fastest), as measured on an H200."""
    if not channels_last:
        return {"ROWS": 256, "CHANNELS": 16, "num_warps": 4}, 4
    if elements < LARGE:
        return {"ROWS": 64, "CHANNELS": 32, "num_warps": 2}, 4
    return {"ROWS": 64, "CHANNELS": 64, "num_warps": 4}, 2


def _part_rows(S: int, ROWS: int, neighbours: int, programs: int) -> int:
    """How many rows one moments program takes: a multiple of ROWS that makes about `programs` programs."""
    parts = max(1, programs // neighbours)
    return triton.cdiv(triton.cdiv(S, parts), ROWS) * ROWS


def _tiles_per_program(S: int, ROWS: int, neighbours: int, device: torch.device) -> int:
    """How many tiles one apply program takes: one, until there are many programs for each multiprocessor."""
    return max(1, min(8, triton.cdiv(S, ROWS) * neighbours // (16 * _multiprocessors(device))))


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def _takes(x: Tensor, G: int, weight: Tensor | None, bias: Tensor | None, eps: float) -> bool:
    if not triton_takes(x) or x.dim() < 2 or x.numel() == 0 or G < 1 or x.shape[1] % G:
        return False
    N, C = x.shape[:2]
    fits = N < 65536 and x.shape[1:].numel() < 2**31  # a grid's second axis; offsets inside a sample
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
