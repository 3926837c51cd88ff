"""What lies between the matrix products of a diffusion transformer, in one pass: gate, residual, norm, scale and shift.

A block adds its gated result to the residual, normalizes the sum, scales and shifts it as the timestep says: eager runs a
kernel for each, which read and write all activations again. Here a row is read once, stays in registers (in fp32, which
rounds once and not five times), and is written twice: as the sum, which is the next residual, and modulated.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from sfast.kernels import modulate_kernels as bits
from sfast.kernels.op import define
from sfast.kernels.overlap import launch_options
from sfast.kernels.triton_or_none import triton, triton_takes

MAX_WIDTH = 16384  # elements of a row that fit into one program's registers
TILE = 4096  # elements that a program takes, where there are rows enough for
PROGRAMS = 1024

# x, y [B, T, C] or [T, C]; gate, scale, shift broadcast to x: [B, 1, C] mostly; weight, bias [C].


def layer_norm_modulate_reference(
    x: Tensor,
    normalized_shape: list[int],
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    scale: Tensor,
    shift: Tensor,
) -> Tensor:
    """layer_norm(x) * (1 + scale) + shift."""
    return F.layer_norm(x, normalized_shape, weight, bias, eps) * (1 + scale) + shift


def add_layer_norm_modulate_reference(
    x: Tensor,
    y: Tensor,
    normalized_shape: list[int],
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    scale: Tensor,
    shift: Tensor,
) -> tuple[Tensor, Tensor]:
    """(layer_norm(total) * (1 + scale) + shift, total) for total = x + y."""
    total = x + y
    return layer_norm_modulate_reference(total, normalized_shape, weight, bias, eps, scale, shift), total


def gate_add_layer_norm_modulate_reference(
    x: Tensor,
    y: Tensor,
    gate: Tensor,
    normalized_shape: list[int],
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    scale: Tensor,
    shift: Tensor,
) -> tuple[Tensor, Tensor]:
    """(layer_norm(total) * (1 + scale) + shift, total) for total = x + gate * y."""
    total = x + gate * y
    return layer_norm_modulate_reference(total, normalized_shape, weight, bias, eps, scale, shift), total


def layer_norm_wide_reference(
    x: Tensor, normalized_shape: list[int], weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor:
    """layer_norm(x) in fp32, rounded to x's precision: the parameters may be fp32."""
    return F.layer_norm(_wide(x), normalized_shape, weight, bias, eps).type_as(x)


def layer_norm_modulate_wide_reference(
    x: Tensor,
    normalized_shape: list[int],
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    scale: Tensor,
    shift: Tensor,
) -> Tensor:
    """layer_norm(x) * (1 + scale) + shift in fp32, rounded to x's precision."""
    return (F.layer_norm(_wide(x), normalized_shape, weight, bias, eps) * (1 + scale) + shift).type_as(x)


def gate_add_wide_reference(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    """x + y * gate in fp32, rounded to x's precision."""
    return (_wide(x) + y * gate).type_as(x)


def gate_add_layer_norm_wide_reference(
    x: Tensor,
    y: Tensor,
    gate: Tensor,
    normalized_shape: list[int],
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """(layer_norm(total), total) for total = x + y * gate, both in fp32 and rounded to x's precision."""
    total = gate_add_wide_reference(x, y, gate)
    return layer_norm_wide_reference(total, normalized_shape, weight, bias, eps), total


def gate_add_layer_norm_modulate_wide_reference(
    x: Tensor,
    y: Tensor,
    gate: Tensor,
    normalized_shape: list[int],
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    scale: Tensor,
    shift: Tensor,
) -> tuple[Tensor, Tensor]:
    """(layer_norm(total) * (1 + scale) + shift, total) for total = x + y * gate, in fp32 and rounded to x's precision."""
    total = gate_add_wide_reference(x, y, gate)
    return layer_norm_modulate_wide_reference(total, normalized_shape, weight, bias, eps, scale, shift), total


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def gate_add_reference(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    """x + gate * y."""
    return x + gate * y


def rms_norm_scale_reference(x: Tensor, weight: Tensor, eps: float, scale: Tensor) -> Tensor:
    """rms_norm(x) * scale."""
    return F.rms_norm(x, weight.shape, weight, eps) * scale


def gate_rms_norm_add_reference(x: Tensor, y: Tensor, weight_y: Tensor, eps_y: float, gate: Tensor) -> Tensor:
    """x + gate * rms_norm(y)."""
    return x + gate * F.rms_norm(y, weight_y.shape, weight_y, eps_y)


def gate_rms_norm_add_rms_norm_scale_reference(
    x: Tensor, y: Tensor, weight_y: Tensor, eps_y: float, gate: Tensor, weight: Tensor, eps: float, scale: Tensor
) -> tuple[Tensor, Tensor]:
    """(rms_norm(total) * scale, total) for total = x + gate * rms_norm(y)."""
    total = gate_rms_norm_add_reference(x, y, weight_y, eps_y, gate)
    return rms_norm_scale_reference(total, weight, eps, scale), total


class Job(NamedTuple):
    """total = x + gate * norm_y(y); out = norm(total) * scale + shift; each part only where it is given."""

    x: Tensor
    y: Tensor | None = None
    gate: Tensor | None = None
    weight_y: Tensor | None = None  # of an RMSNorm of y
    eps_y: float = 0.0
    shape: list[int] | None = None  # of a LayerNorm
    weight: Tensor | None = None
    bias: Tensor | None = None
    eps: float = 0.0
    scale: Tensor | None = None
    one: bool = False  # scale by 1 + scale
    shift: Tensor | None = None
    rms: bool = False  # an RMSNorm instead
    wide: bool = False  # parameters, gate, scale and shift may be fp32
    more: tuple[Tensor | None, Tensor | None, Tensor | None] = (
        None,
        None,
        None,
    )  # to be added to gate, scale and shift

    @property
    def normalizes(self) -> bool:
        return self.rms or self.shape is not None


def process(job: Job) -> tuple[Tensor, Tensor]:
    """(out, total); where there is no norm the two are one."""
    x = job.x.contiguous()
    width, rows = x.shape[-1], x.numel() // x.shape[-1]
    out = torch.empty_like(x)
    total = torch.empty_like(x) if job.y is not None and job.normalizes else out
    given = {
        bits.ADD: job.y is not None,
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
    }
    added = next((part for part in job.more if part is not None), None)
    strides = [stride for part in (job.gate, job.scale, job.shift, added) for stride in _strides(part, x)]
    UNIT = 1 if any(stride % 8 for stride in strides) else 8
    WIDTH = triton.next_power_of_2(width)
    ROWS = max(1, min(TILE // WIDTH, triton.next_power_of_2(rows // PROGRAMS)))
    bits.modulate_rows[(triton.cdiv(rows, ROWS),)](
        x,
        x if job.y is None else job.y.contiguous(),
        *(x if part is None else part for part in (job.weight_y, job.gate, job.weight, job.bias, job.scale, job.shift)),
        *(x if part is None else part for part in job.more),
        out,
        total,
        rows,
        x.shape[-2] if x.dim() > 1 else 1,
        width,
        *(stride // UNIT for stride in strides),
        job.eps,
        job.eps_y,
        sum(bit for bit, is_given in given.items() if is_given),
        UNIT=UNIT,
        ROWS=ROWS,
        WIDTH=WIDTH,
        **launch_options(x.device),
        num_warps=min(16, max(4, WIDTH // (256 if ROWS == 1 else 512))),
    )
    return out, total


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
    if job.shape is not None and list(job.shape) != [x.shape[-1]]:
        return False
    if job.y is not None and (job.y.shape != x.shape or not _alike(job.y, x)):
        return False
    for part in (job.weight_y, job.weight, job.bias):
        if part is not None and not (part.shape == x.shape[-1:] and part.stride(0) == 1 and _alike(part, x, job.wide)):
            return False
    rows = [part for part in (job.gate, job.scale, job.shift, *job.more) if part is not None]
    if not all(_broadcasts(part, x) and _alike(part, x, job.wide) for part in rows):
        return False
    return len({(_strides(part, x), part.dtype) for part in job.more if part is not None}) <= 1


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


def _layer_norm_modulate(
    x: Tensor,
    normalized_shape: list[int],
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    scale: Tensor,
    shift: Tensor,
) -> Job:
    return Job(x, shape=normalized_shape, weight=weight, bias=bias, eps=eps, scale=scale, one=True, shift=shift)


def _add_layer_norm_modulate(x: Tensor, y: Tensor, *rest: Any) -> Job:
    return _layer_norm_modulate(x, *rest)._replace(y=y)


def _gate_add_layer_norm_modulate(x: Tensor, y: Tensor, gate: Tensor, *rest: Any) -> Job:
    return _gated(_layer_norm_modulate(x, *rest), y, gate)


def _layer_norm_wide(
    x: Tensor, normalized_shape: list[int], weight: Tensor | None, bias: Tensor | None, eps: float
) -> Job:
    return Job(x, shape=normalized_shape, weight=weight, bias=bias, eps=eps, wide=True)


def _layer_norm_modulate_wide(x: Tensor, *rest: Any) -> Job:
    return _layer_norm_modulate(x, *rest)._replace(wide=True)


def _gate_add_layer_norm_wide(x: Tensor, y: Tensor, gate: Tensor, *rest: Any) -> Job:
    return _gated(_layer_norm_wide(x, *rest), y, gate)


def _gate_add_layer_norm_modulate_wide(x: Tensor, y: Tensor, gate: Tensor, *rest: Any) -> Job:
    return _gated(_layer_norm_modulate_wide(x, *rest), y, gate)


def _gate_add_wide(x: Tensor, y: Tensor, gate: Tensor) -> Job:
    return _gated(Job(x, wide=True), y, gate)


def _gate_add(x: Tensor, y: Tensor, gate: Tensor) -> Job:
    return _gated(Job(x), y, gate)


def _gated(job: Job, y: Tensor, gate: Tensor) -> Job:
    """Of a product nobody knows which factor is the gate, until their shapes are known."""
    return job._replace(y=y, gate=gate) if y.shape == job.x.shape else job._replace(y=gate, gate=y)


def _rms_norm_scale(x: Tensor, weight: Tensor, eps: float, scale: Tensor) -> Job:
    return Job(x, weight=weight, eps=eps, rms=True, scale=scale)


def _gate_rms_norm_add(x: Tensor, y: Tensor, weight_y: Tensor, eps_y: float, gate: Tensor) -> Job:
    return Job(x, y, gate, weight_y, eps_y)


def _gate_rms_norm_add_rms_norm_scale(
    x: Tensor, y: Tensor, weight_y: Tensor, eps_y: float, gate: Tensor, weight: Tensor, eps: float, scale: Tensor
) -> Job:
    return Job(x, y, gate, weight_y, eps_y, weight=weight, eps=eps, rms=True, scale=scale)


def define_job(schema: str, reference: Callable[..., Any], job: Callable[..., Job]) -> None:
    """Register an operator that does what `job` says of its arguments."""
    two = schema.endswith(")")

    def launch(*args: Any) -> Any:
        results = process(job(*args))
        return results if two else results[0]

    def fake(*args: Any) -> Any:
        results = reference(*args)
        return tuple(r.new_empty(r.shape) for r in results) if two else results.new_empty(results.shape)

    define(schema, reference, lambda *args: takes(job(*args)), launch, fake)


_PLAIN = "int[] normalized_shape, Tensor? weight, Tensor? bias, float eps"
_NORM = f"{_PLAIN}, Tensor scale, Tensor shift"
_RMS_Y = "Tensor x, Tensor y, Tensor weight_y, float eps_y, Tensor gate"
define_job(f"layer_norm_modulate(Tensor x, {_NORM}) -> Tensor", layer_norm_modulate_reference, _layer_norm_modulate)
define_job(
    f"add_layer_norm_modulate(Tensor x, Tensor y, {_NORM}) -> (Tensor, Tensor)",
    add_layer_norm_modulate_reference,
    _add_layer_norm_modulate,
)
define_job(
    f"gate_add_layer_norm_modulate(Tensor x, Tensor y, Tensor gate, {_NORM}) -> (Tensor, Tensor)",
    gate_add_layer_norm_modulate_reference,
    _gate_add_layer_norm_modulate,
)
define_job(f"layer_norm_wide(Tensor x, {_PLAIN}) -> Tensor", layer_norm_wide_reference, _layer_norm_wide)
define_job(
    f"layer_norm_modulate_wide(Tensor x, {_NORM}) -> Tensor",
    layer_norm_modulate_wide_reference,
    _layer_norm_modulate_wide,
)
define_job(
    f"gate_add_layer_norm_wide(Tensor x, Tensor y, Tensor gate, {_PLAIN}) -> (Tensor, Tensor)",
    gate_add_layer_norm_wide_reference,
    _gate_add_layer_norm_wide,
)
define_job(
    f"gate_add_layer_norm_modulate_wide(Tensor x, Tensor y, Tensor gate, {_NORM}) -> (Tensor, Tensor)",
    gate_add_layer_norm_modulate_wide_reference,
    _gate_add_layer_norm_modulate_wide,
)
define_job("gate_add_wide(Tensor x, Tensor y, Tensor gate) -> Tensor", gate_add_wide_reference, _gate_add_wide)
define_job("gate_add(Tensor x, Tensor y, Tensor gate) -> Tensor", gate_add_reference, _gate_add)
define_job(
    "rms_norm_scale(Tensor x, Tensor weight, float eps, Tensor scale) -> Tensor",
    rms_norm_scale_reference,
    _rms_norm_scale,
)
define_job(f"gate_rms_norm_add({_RMS_Y}) -> Tensor", gate_rms_norm_add_reference, _gate_rms_norm_add)
define_job(
    f"gate_rms_norm_add_rms_norm_scale({_RMS_Y}, Tensor weight, float eps, Tensor scale) -> (Tensor, Tensor)",
    gate_rms_norm_add_rms_norm_scale_reference,
    _gate_rms_norm_add_rms_norm_scale,
)
