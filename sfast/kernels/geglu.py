"""GEGLU: the gate in the product's own epilogue, or one product for both halves and one kernel behind it that gates.

Eager runs GELU and a multiplication as two kernels, and rounds between them. In the native operator's own kernel neither the
product nor the gate ever reach memory; it measures that against a product and a second pass. Elsewhere the product comes from
a library, and the kernel here reads both halves once, gates in fp32 registers, and writes only the result. Where no product
is before it, but a convolution say, the halves of any tensor are gated so.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from sfast.kernels import nearby
from sfast.kernels.linear import fastest_linear, has_even_rows
from sfast.kernels.native_ops import native_linear_takes, own_kernels_run_on
from sfast.kernels.op import define
from sfast.kernels.overlap import launch_options, wait_for_previous_kernel
from sfast.kernels.triton_or_none import tl, triton, triton_takes

ROWS, COLUMNS = 4, 256  # of a tile


def linear_geglu_reference(x: Tensor, weight: Tensor, bias: Tensor | None, approximate: str) -> Tensor:
    """h * gelu(gate) for [h, gate] = x @ weightᵀ + bias: x [..., K], weight [2D, K], bias [2D] -> [..., D]."""
    h, gate = F.linear(x, weight, bias).chunk(2, dim=-1)
    return h * F.gelu(gate, approximate=approximate)


def _linear_geglu(x: Tensor, weight: Tensor, bias: Tensor | None, approximate: str) -> Tensor:
    if _native_takes(x, weight, bias):
        return nearby.linear(x, weight, bias, None, "geglu_tanh" if approximate == "tanh" else "geglu")
    return gate_with_gelu(fastest_linear(x, weight, bias), approximate)


def _native_takes(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    operands = has_even_rows(x) and has_even_rows(weight) and weight.shape[0] % 16 == 0
    return operands and own_kernels_run_on(x) and native_linear_takes(x, weight, bias)


def gate_with_gelu(product: Tensor, approximate: str) -> Tensor:
    """h * gelu(gate) for product [..., 2D] = [h, gate], contiguous -> [..., D]."""
    width = product.shape[-1] // 2
    return _gated(product, width, int(approximate == "tanh"))


def _gated(product: Tensor, width: int, activation: int) -> Tensor:
    y = product.new_empty((*product.shape[:-1], width))
    rows = y.numel() // width
    _gate[triton.cdiv(rows, ROWS), triton.cdiv(width, COLUMNS)](
        product,
        y,
        rows,
        width,
        activation,
        ROWS=ROWS,
        COLUMNS=COLUMNS,
        **launch_options(product.device),
        num_warps=4,
    )
    return y


@triton.jit(do_not_specialize=["rows", "activation"])
def _gate(
    product: tl.tensor,
    y: tl.tensor,
    rows: tl.tensor,
    width: tl.tensor,
    activation: tl.tensor,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    OVERLAP: tl.constexpr,
) -> None:
    """A tile [ROWS, COLUMNS] of y; `activation` 0 is GELU, 1 is GELU with tanh, 2 is SiLU."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    mask = (row < rows)[:, None] & (column < width)[None, :]
    source = product + row[:, None] * (2 * width) + column[None, :]

    wait_for_previous_kernel(OVERLAP)
    h = tl.load(source, mask=mask, other=0).to(tl.float32)
    gate = tl.load(source + width, mask=mask, other=0).to(tl.float32)
    if activation == 2:
        activated = gate * tl.sigmoid(gate)
    elif activation == 1:
        # 0.5 (1 + tanh(u)) = sigmoid(2u), u = sqrt(2/pi) (gate + 0.044715 gate³)
        activated = gate * tl.sigmoid(1.5957691216057308 * (gate + 0.044715 * gate * gate * gate))
    else:
        activated = gate * (0.5 + 0.5 * tl.erf(gate * 0.7071067811865476))
    tl.store(y + row[:, None] * width + column[None, :], (h * activated).to(y.dtype.element_ty), mask=mask)


def _takes(x: Tensor, weight: Tensor, bias: Tensor | None, approximate: str) -> bool:
    if x.numel() == 0 or weight.dim() != 2 or approximate not in ("none", "tanh"):
        return False
    if weight.shape[0] % 2 or weight.shape[0] == 0 or weight.shape[1] != x.shape[-1]:
        return False
    if not all(p is None or (p.dtype == x.dtype and p.device == x.device) for p in (weight, bias)):
        return False
    return triton_takes(x) or _native_takes(x, weight, bias)


def silu_gate_reference(x: Tensor, dim: int) -> Tensor:
    """h * silu(gate) for the two halves [h, gate] of x along `dim`."""
    h, gate = x.chunk(2, dim)
    return h * F.silu(gate)


def _halves_last(x: Tensor, dim: int) -> Tensor:
    """x with the dimension that is halved as its last."""
    return x.movedim(dim, -1)


def _silu_gate(x: Tensor, dim: int) -> Tensor:
    rows = _halves_last(x, dim)
    return _gated(rows, rows.shape[-1] // 2, 2).movedim(-1, dim)


def _takes_halves(x: Tensor, dim: int) -> bool:
    if x.numel() == 0 or not triton_takes(x) or not -x.dim() <= dim < x.dim() or x.shape[dim] % 2:
        return False
    return _halves_last(x, dim).is_contiguous()


def _half_product(x: Tensor, weight: Tensor, *rest: object) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0] // 2))


define(
    "linear_geglu(Tensor x, Tensor weight, Tensor? bias, str approximate) -> Tensor",
    reference=linear_geglu_reference,
    supports=_takes,
    launch=_linear_geglu,
    fake=_half_product,
)
define(
    "silu_gate(Tensor x, int dim) -> Tensor",
    reference=silu_gate_reference,
    supports=_takes_halves,
    launch=_silu_gate,
    fake=silu_gate_reference,
)
