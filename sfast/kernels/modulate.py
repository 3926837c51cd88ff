"""What lies between the matrix products of a diffusion transformer, in one pass: gate, residual, norm, scale and shift.

A block adds its gated result to the residual, normalizes the sum, scales and shifts it as the timestep says: eager runs a
kernel for each, which read and write all activations again. Here a row is read once, where it lies, stays in registers (in
fp32, which rounds once and not five times), and is written twice: as the sum, which is the next residual, and modulated.

Operators are named for what they do, in its order. *wide* ones keep gate, scale, shift and the norm in fp32 as the model
does. *sums* is for video models of which each token has a timestep of its own: gate, scale and shift are a table plus
something for every token, sums which would be more to write and to read than anything else, and here need never exist. Of
*runs*, what there is for every token is the same for many, and read where it stands once (see `runs.py`).
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sfast.kernels import modulate_kernels as bits
from sfast.kernels import modulate_references as references
from sfast.kernels.op import define
from sfast.kernels.overlap import launch_options
from sfast.kernels.triton_or_none import triton, triton_takes

MAX_WIDTH = 16384  # elements of a row that fit into one program's registers
MOST_PIECES = 5  # of a row; more would be compiled for longer than they run faster
MOST_IDLE = 1 / 6  # of the lanes, where that can be had
WARP = 256  # elements that a warp reads at once, 16 bytes a lane

# x, y, z [B, T, C] or [T, C]; gates, scale, shift broadcast to x: [B, 1, C] mostly; weight, bias [C]. Of sums: gate, scale,
# shift [1, 1, 1, C], and gate_more, scale_more, shift_more [B, T, 1, C]; of runs, those in the order of `run` [B T].

# ------------------------------------------------------------------------------------------------------------ the launch


class Job(NamedTuple):
    """total = x + gate * norm_y(y) + gate_z * z; out = norm(total) * scale + shift; each part only where it is given."""

    x: Tensor
    y: Tensor | None = None
    gate: Tensor | None = None
    gate_more: Tensor | None = None  # to be added to gate, as others to scale and shift
    z: Tensor | None = None
    gate_z: Tensor | None = None
    weight_y: Tensor | None = None  # of an RMSNorm of y
    eps_y: float = 0.0
    normalized_shape: list[int] | None = None  # of a LayerNorm
    weight: Tensor | None = None
    bias: Tensor | None = None
    eps: float = 0.0
    scale: Tensor | None = None
    scale_more: Tensor | None = None
    shift: Tensor | None = None
    shift_more: Tensor | None = None
    run: Tensor | None = None  # of each token: the row, of those that are to be added, that is its
    one: bool = False  # scale by 1 + scale
    rms: bool = False  # an RMSNorm instead of a LayerNorm
    wide: bool = False  # parameters, gate, scale and shift may be fp32

    @property
    def more(self) -> tuple[Tensor | None, ...]:
        return self.gate_more, self.scale_more, self.shift_more

    @property
    def normalizes(self) -> bool:
        return self.rms or self.normalized_shape is not None


def process(job: Job) -> tuple[Tensor, Tensor]:
    """(out, total); where there is no norm the two are one."""
    x, y, z = _as_samples(job.x), *(None if each is None else _as_samples(each) for each in (job.y, job.z))
    B, T, width = x.shape
    out = x.new_empty(job.x.shape)
    total = x.new_empty(job.x.shape) if y is not None and job.normalizes else out
    given = {
        bits.ADD: y is not None,
        bits.GATE: job.gate is not None,
        bits.NORM_Y: job.weight_y is not None,
        bits.TOTAL: total is not out,
        bits.NORM: job.normalizes,
        bits.RMS: job.rms,
        bits.WEIGHT: job.weight is not None,
        bits.BIAS: job.bias is not None,
        bits.SCALE: job.scale is not None,
        bits.ONE: job.one,
        bits.SHIFT: job.shift is not None,
        bits.MORE: any(part is not None for part in job.more),
        bits.RUNS: job.run is not None,
        bits.TWICE: z is not None,
    }
    block, pieces = tile(width)
    rows = max(1, WARP // block)
    many = given[bits.NORM_Y] or given[bits.MORE] or given[bits.TWICE]
    held = WARP // 2 if many else WARP  # elements of each part, by a warp
    blocks = triton.cdiv(T, rows)
    bits.modulate_rows[(B * blocks,)](
        x,
        x if y is None else y,
        *(x if part is None else part for part in (job.weight_y, job.gate, job.weight, job.bias, job.scale, job.shift)),
        *(x if part is None else part for part in (*job.more, job.run, z, job.gate_z)),
        out,
        total,
        T,
        blocks,
        width,
        *x.stride()[:2],
        *((0, 0) if y is None else y.stride()[:2]),
        *(stride for part in (job.gate, job.scale, job.shift, *job.more) for stride in _strides(part, job.x)),
        *((0, 0) if z is None else z.stride()[:2]),
        *_strides(job.gate_z, job.x),
        job.eps,
        job.eps_y,
        FLAGS=sum(bit for bit, is_given in given.items() if is_given),
        ROWS=rows,
        BLOCK=block,
        PIECES=pieces,
        **launch_options(x.device),
        num_warps=max(1, block // held),
    )
    return out, total


def tile(width: int) -> tuple[int, int]:
    """Into how many pieces of which size, a power of two, a row is cut: small ones, but few, and few idle lanes."""
    cuts = [(block, triton.cdiv(width, block)) for block in map((1).__lshift__, range(4, 15))]
    cuts = [cut for cut in cuts if cut[1] <= MOST_PIECES]
    least = min(block * pieces for block, pieces in cuts)
    return next(cut for cut in cuts if cut[0] * cut[1] <= max(least, width * (1 + MOST_IDLE)))


def _as_samples(x: Tensor) -> Tensor:
    """x as [B, T, C] with rows that have no gaps."""
    if x.dim() == 3 and x.stride(2) == 1:
        return x
    if x.dim() == 2 and x.stride(1) == 1:
        return x[None]
    return x.contiguous() if x.dim() == 3 else x.reshape(1, -1, x.shape[-1]).contiguous()


def _strides(part: Tensor | None, x: Tensor) -> tuple[int, int]:
    """Of what broadcasts to x [B, T, C]: the strides of samples and tokens."""
    if part is None:
        return 0, 0
    sample, token = ([0, 0] + [step if size > 1 else 0 for size, step in zip(part.shape, part.stride(), strict=True)])[
        -3:-1
    ]
    return (sample if x.dim() == 3 else 0), token


def takes(job: Job) -> bool:
    """Whether the kernel can do it."""
    x = job.x
    if not triton_takes(x) or x.numel() == 0 or x.numel() // x.shape[-1] >= 2**31 or x.shape[-1] > MAX_WIDTH:
        return False
    if job.normalized_shape is not None and list(job.normalized_shape) != [x.shape[-1]]:
        return False
    if any(each is not None and (each.shape != x.shape or not _alike(each, x)) for each in (job.y, job.z)):
        return False
    for part in (job.weight_y, job.weight, job.bias):
        if part is not None and not (part.shape == x.shape[-1:] and part.stride(0) == 1 and _alike(part, x, job.wide)):
            return False
    rows = [part for part in (job.gate, job.gate_z, job.scale, job.shift, *job.more) if part is not None]
    if not all(_broadcasts(part, x) and _alike(part, x, job.wide) for part in rows):
        return False
    more = [part for part in job.more if part is not None]
    return len({part.dtype for part in more}) <= 1 and (job.run is None or _has_runs(job.run, more, x))


def _has_runs(run: Tensor, more: list[Tensor], x: Tensor) -> bool:
    """Whether x [B, T, C] has a run for each token, and what there is for the runs is evenly spaced."""
    if x.dim() != 3 or any(part.dim() != 3 for part in more):
        return False
    B, T = x.shape[:2]
    told = run.dtype == torch.int32 and run.is_contiguous() and run.device == x.device and run.numel() == B * T
    return told and all(
        part.shape[:2] == x.shape[:2] and (B == 1 or (T > 1 and part.stride(0) == T * part.stride(1))) for part in more
    )


def _alike(part: Tensor, x: Tensor, wide: bool = False) -> bool:
    return (part.dtype == x.dtype or (wide and part.dtype == torch.float32)) and part.device == x.device


def _broadcasts(part: Tensor, x: Tensor) -> bool:
    """Whether `part` says the same for every token, or something for each: in whole rows of C."""
    if x.dim() not in (2, 3) or part.dim() > x.dim() or part.dim() == 0:
        return False
    if part.shape[-1] != x.shape[-1] or part.stride(-1) != 1:
        return False
    return all(size in (1, full) for size, full in zip(part.shape[-2::-1], x.shape[-2::-1], strict=False))


# --------------------------------------------------------------------------------------------------------- the operators

JOBS: dict[str, Callable[..., Job]] = {}  # what each operator does with its arguments


def _define(signature: str, reference: Callable[..., Any] | None = None, **how: bool) -> None:
    """Register an operator whose arguments are a job's parts, by their names; `how` they are meant."""
    name, _, rest = signature.partition("(")
    reference = reference or getattr(references, f"{name}_reference")
    parts = re.findall(r"(\w+)(?:,|$)", rest.removesuffix(")"))
    two = re.search("add_(layer|rms|twice_layer)_norm", name) is not None

    def job(*args: Any) -> Job:
        given: dict[str, Any] = dict(zip(parts, args, strict=True)) | how
        if any(part.endswith("_more") for part in parts):
            for part in {"gate", "scale", "shift", "gate_more", "scale_more", "shift_more"}.intersection(parts):
                given[part] = given[part].squeeze(2)
        elif "gate" in given and "weight_y" not in given and given["y"].shape != given["x"].shape:
            given["y"], given["gate"] = given["gate"], given["y"]  # which factor is the gate, their shapes alone say
        return Job(**given)

    def launch(*args: Any) -> Any:
        results = process(job(*args))
        return results if two else results[0]

    def fake(*args: Any) -> Any:
        results = reference(*args)
        return tuple(r.new_empty(r.shape) for r in results) if two else results.new_empty(results.shape)

    JOBS[name] = job
    schema = f"{signature} -> {'(Tensor, Tensor)' if two else 'Tensor'}"
    define(schema, reference, lambda *args: takes(job(*args)), launch, fake)


_X, _Y, _GATE, _MORE = "Tensor x", "Tensor x, Tensor y", "Tensor x, Tensor y, Tensor gate", "Tensor gate_more"
_Z = "Tensor z, Tensor gate_z"
_NORM = "int[] normalized_shape, Tensor? weight, Tensor? bias, float eps"
_SHIFT, _SUMS = "Tensor scale, Tensor shift", "Tensor scale, Tensor scale_more, Tensor shift, Tensor shift_more"
_RMS_Y, _RMS = f"{_Y}, Tensor weight_y, float eps_y, Tensor gate", "Tensor weight, float eps, Tensor scale"

_define(f"gate_add({_GATE})")
_define(f"gate_add_wide({_GATE})", wide=True)
_define(f"layer_norm_wide({_X}, {_NORM})", wide=True)
_define(f"gate_add_layer_norm_wide({_GATE}, {_NORM})", wide=True)
_define(f"layer_norm_modulate({_X}, {_NORM}, {_SHIFT})", one=True)
_define(f"add_layer_norm_modulate({_Y}, {_NORM}, {_SHIFT})", one=True)
_define(f"gate_add_layer_norm_modulate({_GATE}, {_NORM}, {_SHIFT})", one=True)
_define(f"gate_add_twice_layer_norm_modulate({_GATE}, {_Z}, {_NORM}, {_SHIFT})", one=True)
_define(f"layer_norm_modulate_wide({_X}, {_NORM}, {_SHIFT})", one=True, wide=True)
_define(f"gate_add_layer_norm_modulate_wide({_GATE}, {_NORM}, {_SHIFT})", one=True, wide=True)
for _name, _arguments in (
    ("layer_norm_modulate", f"{_X}, {_NORM}, {_SUMS}"),
    ("gate_add_layer_norm", f"{_GATE}, {_MORE}, {_NORM}"),
    ("gate_add_layer_norm_modulate", f"{_GATE}, {_MORE}, {_NORM}, {_SUMS}"),
):
    _reference = getattr(references, f"{_name}_sums_reference")
    _define(f"{_name}_sums({_arguments})", one=True, wide=True)
    _define(f"{_name}_runs({_arguments}, Tensor run)", references.of_runs(_reference), one=True, wide=True)
_define(f"rms_norm_scale({_X}, {_RMS})", rms=True)
_define(f"rms_norm_modulate({_X}, {_RMS})", rms=True, one=True)
_define(f"gate_rms_norm_add({_RMS_Y})")
_define(f"gate_rms_norm_add_rms_norm_scale({_RMS_Y}, {_RMS})", rms=True)
_define(f"gate_rms_norm_add_rms_norm_modulate({_RMS_Y}, {_RMS})", rms=True, one=True)
