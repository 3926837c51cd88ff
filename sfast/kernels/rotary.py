"""Queries and keys on their way to attention: norm of each head, rotation by position, text before image, in one pass.

Eager does it in a dozen kernels, half of them in fp32: RMSNorm, concatenation, two copies to fp32, a tensor of turned pairs,
two products, a sum, a copy back. In FLUX that is as much traffic as all its other small operators together. Here each head
is read once where the projection left it, and written once, between its neighbours, in the layout that attention reads.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from sfast.kernels.op import define
from sfast.kernels.overlap import launch_options
from sfast.kernels.rotary_kernels import rotate_heads
from sfast.kernels.triton_or_none import triton, triton_takes

NARROWEST, WIDEST = 16, 256  # heads
MOST_TOGETHER = 8192  # elements of all heads of a token, where they have one norm
HEADS = 8  # of a program's tile
MANY = 32  # heads, where a row of the table is rearranged before it can be used
ELEMENTS, WARPS = 2048, 4  # of the tile: as many tokens as make that up, or twice that of many heads

# x, a, b [B, T, H, D] with any strides of the first three, or [B, H, T, D], the same in another order: the tables, which have
# one row for all heads, tell which. weights [D]; cos, sin [.., D]; a complex table [.., D / 2] is cos + i sin of each pair.


def rotary_reference(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the pairs of neighbours in x by angles whose cosine and sine each of the two has."""
    real, imaginary = x.reshape(*x.shape[:-1], -1, 2).unbind(-1)
    turned = torch.stack([-imaginary, real], dim=-1).flatten(3)
    return (wide(x) * cos + wide(turned) * sin).to(x.dtype)


def rotary_complex_reference(x: Tensor, table: Tensor) -> Tensor:
    """Turn the pairs of neighbours in x, as complex numbers, by `table` [.., D / 2]."""
    pairs = torch.view_as_complex(wide(x).reshape(*x.shape[:-1], -1, 2))
    return torch.view_as_real(pairs * table).flatten(3).type_as(x)


def rotary_pairs_reference(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the pairs of neighbours in x: cos and sin [.., D / 2], one for each pair."""
    real, imaginary = x.unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack([real * cos - imaginary * sin, real * sin + imaginary * cos], dim=-1)
    return turned.flatten(-2).type_as(x)


def rms_norm_rotary_reference(x: Tensor, weight: Tensor, eps: float, cos: Tensor, sin: Tensor) -> Tensor:
    """rotary(rms_norm(x)), the norm over each head."""
    return rotary_reference(F.rms_norm(x, weight.shape, weight, eps), cos, sin)


def rms_norm_rotary_complex_reference(x: Tensor, weight: Tensor, eps: float, table: Tensor) -> Tensor:
    """rotary_complex(rms_norm(x)), the norm over each head."""
    return rotary_complex_reference(F.rms_norm(x, weight.shape, weight, eps), table)


def rms_norm_heads_rotary_pairs_reference(
    x: Tensor, weight: Tensor, eps: float, sizes: list[int], cos: Tensor, sin: Tensor
) -> Tensor:
    """rotary_pairs(rms_norm(x).unflatten(2, sizes)), the norm over all heads of a token: x [B, T, H D], weight [H D]."""
    return rotary_pairs_reference(F.rms_norm(x, weight.shape, weight, eps).unflatten(2, sizes), cos, sin)


def cat_tokens_reference(a: Tensor, b: Tensor, dim: int) -> Tensor:
    """b's tokens behind a's; `dim` is where the tokens are."""
    return torch.cat([a, b], dim)


def cat_rms_norm_reference(
    a: Tensor, weight_a: Tensor, eps_a: float, b: Tensor, weight_b: Tensor, eps_b: float, dim: int
) -> Tensor:
    """Normalize the heads of a and of b and put b's tokens behind a's; `dim` is where the tokens are."""
    return torch.cat(
        [F.rms_norm(a, weight_a.shape, weight_a, eps_a), F.rms_norm(b, weight_b.shape, weight_b, eps_b)], dim
    )


def cat_rms_norm_rotary_reference(
    a: Tensor, weight_a: Tensor, eps_a: float, b: Tensor, weight_b: Tensor, eps_b: float, cos: Tensor, sin: Tensor
) -> Tensor:
    """rotary(cat_rms_norm(a, b)) for a and b [B, T, H, D]: the tables are those of all tokens."""
    return rotary_reference(cat_rms_norm_reference(a, weight_a, eps_a, b, weight_b, eps_b, 1), cos, sin)


def cat_rms_norm_rotary_complex_reference(
    a: Tensor,
    weight_a: Tensor,
    eps_a: float,
    table_a: Tensor,
    b: Tensor,
    weight_b: Tensor,
    eps_b: float,
    table_b: Tensor,
) -> Tensor:
    """Normalize and rotate a and b [B, T, H, D], each by its own table, and put b's tokens behind a's."""
    turned = rms_norm_rotary_complex_reference(a, weight_a, eps_a, table_a)
    return torch.cat([turned, rms_norm_rotary_complex_reference(b, weight_b, eps_b, table_b)], 1)


def wide(x: Tensor) -> Tensor:
    """x in fp32, but in fp64 if it is that already."""
    return x if x.dtype == torch.float64 else x.float()


# ---------------------------------------------------------------------------------------------------------- the launches


class Table(NamedTuple):
    """Cosines and sines of a token's pairs of neighbours."""

    cos: Tensor  # [B or 1, T, 1, D], one for each of the two, or [.., D / 2]
    sin: Tensor
    kind: str  # "full" for [.., D], "pairs" for [.., D / 2], "complex" for [.., D / 2] of complex numbers without gaps


class Heads(NamedTuple):
    """[B, T, H, D] with any strides of the first three, and what is done to them."""

    x: Tensor
    weight: Tensor | None = None  # [D] of an RMSNorm over each head, or [H D] of one over all heads of a token
    eps: float = 0.0
    table: Table | None = None


class Job(NamedTuple):
    """The heads of `first`, behind them those of `second`; the result as [B, H, T, D] where `turned`."""

    first: Heads
    second: Heads | None = None
    turned: bool = False


def process(job: Job) -> Tensor:
    """What `job` says, in the memory of a dense [B, T, H, D]."""
    a, b = job.first, job.second or job.first
    B, Ta, H, D = a.x.shape
    T = Ta + (job.second.x.shape[1] if job.second else 0)
    y = a.x.new_empty(B, T, H, D)
    width, norm = triton.next_power_of_2(D), _norm(a)
    heads, elements = (MANY, 2 * ELEMENTS) if a.table and a.table.kind != "full" else (HEADS, ELEMENTS)
    heads = triton.next_power_of_2(H if norm == "token" else min(H, heads))
    tokens = max(1, elements // (heads * width))
    blocks = triton.cdiv(Ta, tokens) + triton.cdiv(T - Ta, tokens)
    rotate_heads[blocks, triton.cdiv(H, heads), B](
        *(a.x, b.x, y),
        *(each.x if each.weight is None else each.weight for each in (a, b)),
        *(part for each in (a, b) for part in (each.table[:2] if each.table else (each.x, each.x))),
        *(Ta, T, H, D),
        *(*a.x.stride()[:3], *b.x.stride()[:3]),
        *(stride for each in (a, b) for stride in _strides(each.table, B)),
        a.table.cos.stride(3) if a.table else 0,
        *(a.eps, b.eps),
        TOKENS=tokens,
        HEADS=heads,
        WIDTH=width,
        NORM=norm,
        TABLE=a.table.kind if a.table else "none",
        **launch_options(y.device),
        num_warps=WARPS,
    )
    return y.transpose(1, 2) if job.turned else y


def _norm(heads: Heads) -> str:
    """What an RMSNorm goes over: "none" without one, "head", or "token" for all of its heads."""
    if heads.weight is None:
        return "none"
    return "head" if heads.weight.shape[0] == heads.x.shape[3] else "token"


def _strides(table: Table | None, batch: int) -> tuple[int, int]:
    """Of a table's sample and token."""
    return (0, 0) if table is None else (table.cos.stride(0) if table.cos.shape[0] == batch else 0, table.cos.stride(1))


def takes(job: Job | None) -> bool:
    """Whether the kernel can do it."""
    if job is None or not triton_takes(job.first.x) or not _takes_heads(job.first):
        return False
    first, second = job.first, job.second
    if max(first.x.shape[0], first.x.shape[2] // HEADS) > 65535:
        return False
    if second is None:
        return True
    a, b = first.x, second.x
    alike = a.dtype == b.dtype and a.device == b.device and a.shape[0] == b.shape[0] and a.shape[2:] == b.shape[2:]
    kinds = [(each.table.kind, each.table.cos.stride(3)) if each.table else None for each in (first, second)]
    return alike and kinds[0] == kinds[1] and _takes_heads(second) and _norm(first) == _norm(second) != "token"


def _takes_heads(heads: Heads) -> bool:
    x, weight, table = heads.x, heads.weight, heads.table
    if x.dim() != 4 or x.numel() == 0 or x.shape[3] % 2 or x.shape[3] > WIDEST or x.stride(3) != 1:
        return False
    if weight is not None:
        whole = weight.shape[0] == x.shape[2] * x.shape[3] <= MOST_TOGETHER
        if weight.dim() != 1 or weight.stride(0) != 1 or not _alike(weight, x, x.dtype):
            return False
        if weight.shape != x.shape[3:] and not whole:
            return False
    if table is None:
        return True
    rows = (x.shape[1], 1, x.shape[3] // (1 if table.kind == "full" else 2))
    return all(
        _alike(part, x, torch.float32)
        and tuple(part.shape[1:]) == rows
        and part.shape[0] in (1, x.shape[0])
        and part.stride() == table.cos.stride()
        and (part.stride(3) == 1 or table.kind != "full")
        for part in (table.cos, table.sin)
    )


def _alike(tensor: Tensor, x: Tensor, dtype: torch.dtype) -> bool:
    return tensor.dtype == dtype and tensor.device == x.device


# --------------------------------------------------------------------------------------------------------- the operators


def _with_tables(x: Tensor, weight: Tensor | None, eps: float, cos: Tensor, sin: Tensor, kind: str) -> Job | None:
    """One tensor, and what is done to it."""
    if x.dim() != 4 or max(cos.dim(), sin.dim()) > 4 or cos.dim() == 0 or sin.dim() == 0:
        return None
    cos, sin = (part[(None,) * (4 - part.dim())] for part in (cos, sin))
    turned = cos.shape[2] != 1
    if turned:
        x, cos, sin = (tensor.transpose(1, 2) for tensor in (x, cos, sin))
    return Job(Heads(x, weight, eps, Table(cos, sin, kind)), turned=turned)


def _with_complex(x: Tensor, weight: Tensor | None, eps: float, table: Tensor) -> Job | None:
    if table.dtype != torch.complex64 or table.is_conj():
        return None
    parts = torch.view_as_real(table)
    return _with_tables(x, weight, eps, parts[..., 0], parts[..., 1], "complex" if table.stride(-1) == 1 else "pairs")


def _rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Job | None:
    return _with_tables(x, None, 0.0, cos, sin, "full")


def _rotary_pairs(x: Tensor, cos: Tensor, sin: Tensor) -> Job | None:
    return _with_tables(x, None, 0.0, cos, sin, "pairs")


def _rotary_complex(x: Tensor, table: Tensor) -> Job | None:
    return _with_complex(x, None, 0.0, table)


def _rms_norm_rotary(x: Tensor, weight: Tensor, eps: float, cos: Tensor, sin: Tensor) -> Job | None:
    return _with_tables(x, weight, eps, cos, sin, "full")


def _rms_norm_heads_rotary_pairs(
    x: Tensor, weight: Tensor, eps: float, sizes: list[int], cos: Tensor, sin: Tensor
) -> Job | None:
    if x.dim() != 3 or len(sizes) != 2:
        return None
    job = _with_tables(x.unflatten(2, sizes), weight, eps, cos, sin, "pairs")
    return None if job is None or job.turned else job


def cat_tokens(a: Tensor, b: Tensor, dim: int) -> Job | None:
    """The heads of values, which nothing is done to; None where they lie dense, which PyTorch copies as fast."""
    dense = a.is_contiguous() and b.is_contiguous()
    if dense or a.dim() != 4 or b.dim() != 4 or dim % 4 not in (1, 2) or a.shape[3] < NARROWEST:
        return None
    turned = dim % 4 == 2
    x, y = (each.transpose(1, 2) if turned else each for each in (a, b))
    return Job(Heads(x), Heads(y), turned)


def _cat_rms_norm(
    a: Tensor, weight_a: Tensor, eps_a: float, b: Tensor, weight_b: Tensor, eps_b: float, dim: int
) -> Job | None:
    if a.dim() != 4 or b.dim() != 4 or dim % 4 not in (1, 2):
        return None
    turned = dim % 4 == 2
    x, y = (each.transpose(1, 2) if turned else each for each in (a, b))
    return Job(Heads(x, weight_a, eps_a), Heads(y, weight_b, eps_b), turned)


def _cat_rms_norm_rotary(
    a: Tensor, weight_a: Tensor, eps_a: float, b: Tensor, weight_b: Tensor, eps_b: float, cos: Tensor, sin: Tensor
) -> Job | None:
    job = _with_tables(a, weight_a, eps_a, cos, sin, "full")
    if job is None or job.turned or job.first.table is None or b.dim() != 4:
        return None
    table, tokens = job.first.table, a.shape[1]
    if table.cos.shape[1] != tokens + b.shape[1] or table.sin.shape != table.cos.shape:
        return None
    tables = [table._replace(cos=table.cos[:, part], sin=table.sin[:, part]) for part in _halves(tokens)]
    return Job(job.first._replace(table=tables[0]), Heads(b, weight_b, eps_b, tables[1]))


def _halves(tokens: int) -> tuple[slice, slice]:
    return slice(None, tokens), slice(tokens, None)


def _cat_rms_norm_rotary_complex(
    a: Tensor,
    weight_a: Tensor,
    eps_a: float,
    table_a: Tensor,
    b: Tensor,
    weight_b: Tensor,
    eps_b: float,
    table_b: Tensor,
) -> Job | None:
    jobs = _with_complex(a, weight_a, eps_a, table_a), _with_complex(b, weight_b, eps_b, table_b)
    if jobs[0] is None or jobs[1] is None or jobs[0].turned or jobs[1].turned:
        return None
    return Job(jobs[0].first, jobs[1].first)


def _define(schema: str, reference: Callable[..., Tensor], job: Callable[..., Job | None]) -> None:
    def launch(*args: Any) -> Tensor:
        wanted = job(*args)
        assert wanted is not None, "`takes` has said yes"
        return process(wanted)

    def fake(*args: Any) -> Tensor:
        shape = reference(*args)
        wanted = job(*args)
        if wanted is None:
            return shape
        B, T, H, D = shape.transpose(1, 2).shape if wanted.turned else shape.shape
        dense = shape.new_empty(B, T, H, D)
        return dense.transpose(1, 2) if wanted.turned else dense

    define(schema, reference, lambda *args: takes(job(*args)), launch, fake)


_A, _B = (f"Tensor {each}, Tensor weight_{each}, float eps_{each}" for each in "ab")
_define("rotary(Tensor x, Tensor cos, Tensor sin) -> Tensor", rotary_reference, _rotary)
_define("rotary_pairs(Tensor x, Tensor cos, Tensor sin) -> Tensor", rotary_pairs_reference, _rotary_pairs)
_define("rotary_complex(Tensor x, Tensor table) -> Tensor", rotary_complex_reference, _rotary_complex)
_define(
    "rms_norm_rotary(Tensor x, Tensor weight, float eps, Tensor cos, Tensor sin) -> Tensor",
    rms_norm_rotary_reference,
    _rms_norm_rotary,
)
_define(
    "rms_norm_rotary_complex(Tensor x, Tensor weight, float eps, Tensor table) -> Tensor",
    rms_norm_rotary_complex_reference,
    _with_complex,
)
_define(
    "rms_norm_heads_rotary_pairs(Tensor x, Tensor weight, float eps, int[] sizes, Tensor cos, Tensor sin) -> Tensor",
    rms_norm_heads_rotary_pairs_reference,
    _rms_norm_heads_rotary_pairs,
)
_define("cat_tokens(Tensor a, Tensor b, int dim) -> Tensor", cat_tokens_reference, cat_tokens)
_define(f"cat_rms_norm({_A}, {_B}, int dim) -> Tensor", cat_rms_norm_reference, _cat_rms_norm)
_define(
    f"cat_rms_norm_rotary({_A}, {_B}, Tensor cos, Tensor sin) -> Tensor",
    cat_rms_norm_rotary_reference,
    _cat_rms_norm_rotary,
)
_define(
    f"cat_rms_norm_rotary_complex({_A}, Tensor table_a, {_B}, Tensor table_b) -> Tensor",
    cat_rms_norm_rotary_complex_reference,
    _cat_rms_norm_rotary_complex,
)
