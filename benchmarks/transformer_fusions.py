"""The rows of `fusions.py` for diffusion transformers, at the shapes that FLUX, SD3.5, Qwen-Image, Wan and Z-Image have."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sfast.kernels import (
    conv2d_depthwise,
    geglu,
    linear_attention,
    linear_cat,
    linear_rounded,
    linear_runs,
    linear_swiglu,
    rms_norm,
    rotary,
    runs,
)
from sfast.kernels import modulate_references as references


class Case(NamedTuple):
    """One row: `op(*inputs)` against `reference(*inputs)`, where `inputs` makes a fresh set."""

    name: str
    shape: str
    op: Callable[..., Tensor]
    reference: Callable[..., Tensor]
    inputs: Callable[[], tuple]
    moved: int  # elements that must be read or written at least once
    flops: int


# B, T, C of a modulated norm: FLUX's image, text and both, SD3.5 with guidance, Qwen-Image, Wan (modulated in fp32)
ROWS = [(1, 4096, 3072), (1, 512, 3072), (1, 4608, 3072), (2, 4096, 1536), (1, 6889, 3072)]
# B, tokens of the text and of the image, H, D: FLUX, SD3.5, Qwen-Image, Z-Image (text and image are one), Wan
HEADS = [(1, 512, 4096, 24, 128), (2, 333, 4096, 24, 64), (1, 128, 6889, 24, 128), (1, 0, 4192, 30, 128)]

VIDEO = (9680, 3072)  # T, C of Wan 2.2 5B, 41 frames at 1280x704


def transformer_cases(randn: Callable[..., Tensor]) -> Iterator[Case]:
    """Modulated norms, gated residuals, heads on their way to attention, and a projection of two tensors."""
    yield from row_cases(randn)
    yield from wide_cases(randn)
    yield from run_cases(randn)
    yield from head_cases(randn)
    ops = torch.ops.sfast

    def image() -> tuple:
        return randn(2, 11200, 32, 32), 1

    yield from sana_cases(randn)
    yield Case("silu_gate", "2x11200x32x32", ops.silu_gate, geglu.silu_gate_reference, image, 3 * 11200 * 32 * 32, 0)
    for T, K, D in [(4192, 3840, 10240), (2048, 2304, 9216)]:

        def gated(T: int = T, K: int = K, D: int = D) -> tuple:
            gate_weight, weight = (randn(D, K, std=K**-0.5) for _ in range(2))
            return randn(1, T, K), gate_weight, None, weight, None

        moved, flops = T * (K + D) + 2 * D * K, 4 * T * D * K
        reference = linear_swiglu.linear_swiglu_reference
        yield Case("linear_swiglu", f"{T}x{K}->{D}", ops.linear_swiglu, reference, gated, moved, flops)
    for T, A, B, D in [(4608, 3072, 12288, 3072), (1536, 3072, 12288, 3072)]:

        def pair(T: int = T, A: int = A, B: int = B, D: int = D) -> tuple:
            return randn(1, T, A), randn(1, T, B), 2, randn(D, A + B, std=(A + B) ** -0.5), randn(D)

        moved, flops = T * (A + B + D) + D * (A + B), 2 * T * (A + B) * D
        reference = linear_cat.linear_cat_reference
        yield Case("linear_cat", f"{T}x{A}+{B}->{D}", ops.linear_cat, reference, pair, moved, flops)
    T, A, D = 9680, 3072, 3072

    def wide() -> tuple:
        return randn(1, T, A).float(), randn(D, A, std=A**-0.5).float(), randn(D).float(), randn(1)

    reference, moved = linear_rounded.linear_rounded_reference, 2 * T * A + T * D
    yield Case("linear_rounded", f"{T}x{A}->{D}", ops.linear_rounded, reference, wide, moved, 2 * T * A * D)


def sana_cases(randn: Callable[..., Tensor]) -> Iterator[Case]:
    """A depthwise convolution with its gate, and attention without a softmax."""
    ops, (N, C, H) = torch.ops.sfast, (2, 11200, 32)

    def image() -> tuple:
        x = randn(N, C, H, H).to(memory_format=torch.channels_last)
        return x, randn(C, 1, 3, 3, std=1 / 3), randn(C), [1, 1], [1, 1], [1, 1], C

    reference = conv2d_depthwise.conv2d_silu_gate_reference
    yield Case(
        "conv2d_silu_gate", f"{N}x{C}x{H}x{H}", ops.conv2d_silu_gate, reference, image, 3 * N * C * H * H // 2, 0
    )
    for B, T, heads, D in [(2, 1024, 70, 32), (2, 4096, 70, 32)]:

        def merged(B: int = B, T: int = T, heads: int = heads, D: int = D) -> tuple:
            return *randn(B, T, 3 * heads * D).chunk(3, -1), [heads, -1], 1e-15

        attention, moved = linear_attention.linear_attention_reference, 4 * B * T * heads * D
        yield Case("linear_attention", f"{B}x{T}x{heads}x{D}", ops.linear_attention, attention, merged, moved, 0)


def row_cases(randn: Callable[..., Tensor]) -> Iterator[Case]:
    """Rows of a block, gates and modulations as parts of one product."""
    ops = torch.ops.sfast
    for B, T, C in ROWS:
        shape, elements = f"{B}x{T}x{C}", B * T * C

        def parts(B: int = B, C: int = C) -> tuple[Tensor, ...]:
            return randn(B, 1, 6 * C, std=0.3).chunk(6, -1)[:3]

        def norm(B: int = B, T: int = T, C: int = C, parts: Callable[[], tuple] = parts) -> tuple:
            return randn(B, T, C), [C], None, None, 1e-6, *parts()[:2]

        def gated(B: int = B, T: int = T, C: int = C, parts: Callable[[], tuple] = parts) -> tuple:
            gate, *modulation = parts()
            return randn(B, T, C), randn(B, T, C), gate, [C], None, None, 1e-6, *modulation

        def sum_(B: int = B, T: int = T, C: int = C, parts: Callable[[], tuple] = parts) -> tuple:
            return randn(B, T, C), randn(B, T, C), parts()[0]

        def scaled(B: int = B, T: int = T, C: int = C, parts: Callable[[], tuple] = parts) -> tuple:
            gate, scale, _ = parts()
            return randn(B, T, C), randn(B, T, C), randn(C), 1e-5, gate, randn(C), 1e-5, scale

        reference = references.layer_norm_modulate_reference
        yield Case("layer_norm_modulate", shape, ops.layer_norm_modulate, reference, norm, 2 * elements, 0)
        name, joined = "gate_add_layer_norm_modulate", references.gate_add_layer_norm_modulate_reference
        yield Case(name, shape, ops.gate_add_layer_norm_modulate, joined, gated, 4 * elements, 0)
        if B > 1:  # a block of two attentions, with guidance

            def twice(gated: Callable[[], tuple] = gated, sum_: Callable[[], tuple] = sum_) -> tuple:
                return *gated()[:3], *sum_()[1:], *gated()[3:]

            name, joined = (
                f"gate_add_twice{name.removeprefix('gate_add')}",
                references.gate_add_twice_layer_norm_modulate_reference,
            )
            yield Case(name, shape, ops.gate_add_twice_layer_norm_modulate, joined, twice, 5 * elements, 0)
        yield Case("gate_add", shape, ops.gate_add, references.gate_add_reference, sum_, 3 * elements, 0)
        name, both = "gate_rms_norm_add_rms_norm_scale", references.gate_rms_norm_add_rms_norm_scale_reference
        yield Case(name, shape, ops.gate_rms_norm_add_rms_norm_scale, both, scaled, 4 * elements, 0)
        name, both = "gate_rms_norm_add_rms_norm_modulate", references.gate_rms_norm_add_rms_norm_modulate_reference
        yield Case(name, shape, ops.gate_rms_norm_add_rms_norm_modulate, both, scaled, 4 * elements, 0)


def wide_cases(randn: Callable[..., Tensor]) -> Iterator[Case]:
    """A video whose every token has a modulation of its own, in fp32."""
    ops, (T, C) = torch.ops.sfast, VIDEO

    def gated() -> tuple:
        gate, scale, shift = randn(1, T, 6 * C, std=0.3).float().view(1, T, 6, C).unbind(2)[:3]
        return randn(1, T, C), randn(1, T, C), gate, [C], None, None, 1e-6, scale, shift

    name, reference = "gate_add_layer_norm_modulate_wide", references.gate_add_layer_norm_modulate_wide_reference
    yield Case(name, f"1x{T}x{C}", ops.gate_add_layer_norm_modulate_wide, reference, gated, 10 * T * C, 0)

    def summed() -> tuple:
        table = randn(1, 1, 6 * C, std=0.3).float().view(1, 1, 6, C).chunk(6, 2)
        each = randn(1, T, 6 * C, std=0.3).view(1, T, 6, C).chunk(6, 2)
        modulation = (table[1], each[1], table[0], each[0])
        return randn(1, T, C), randn(1, T, C), table[2], each[2], [C], None, None, 1e-6, *modulation

    name, reference = "gate_add_layer_norm_modulate_sums", references.gate_add_layer_norm_modulate_sums_reference
    yield Case(name, f"1x{T}x{C}", ops.gate_add_layer_norm_modulate_sums, reference, summed, 7 * T * C, 0)

    def rows() -> tuple:
        return randn(1, T, 3 * C).split(C, -1)[0], randn(C), 1e-6

    yield Case("rms_norm", f"1x{T}x{C}", ops.rms_norm, rms_norm.rms_norm_reference, rows, 2 * T * C, 0)

    def turned() -> tuple:
        table = randn(1, T, 128).float().view(1, T, 1, 128)
        return randn(1, T, 24 * 128).view(1, T, 24, 128), table.cos()[..., ::2], table.sin()[..., 1::2]

    def normed() -> tuple:
        _, cos, sin = turned()
        return *rows(), [24, -1], cos, sin

    both = rotary.rms_norm_heads_rotary_pairs_reference
    yield Case(
        "rms_norm_heads_rotary_pairs", f"1x{T}x24x128", ops.rms_norm_heads_rotary_pairs, both, normed, 2 * T * C, 0
    )
    reference = rotary.rotary_pairs_reference
    yield Case("rotary_pairs", f"1x{T}x24x128", ops.rotary_pairs, reference, turned, 2 * T * C, 0)


def run_cases(randn: Callable[..., Tensor]) -> Iterator[Case]:
    """A video of a first frame that is given and ten that are drawn: the rows of an embedding are two runs."""
    ops, K, (T, C) = torch.ops.sfast, 256, VIDEO
    first = T // 11

    def embedded() -> tuple:
        given, drawn = randn(1, 2, K).float().chunk(2, 1)
        return (torch.cat([given.expand(1, first, K), drawn.expand(1, T - first, K)], 1),)

    def spread(x: Tensor) -> Tensor:
        rows, run, _ = ops.runs(x)
        return runs.spread(rows, run)

    yield Case("runs", f"1x{T}x{K}", spread, lambda x: x.clone(), embedded, 2 * T * K, 0)
    for D, wide in ((C, True), (6 * C, False)):

        def factors(D: int = D, wide: bool = wide) -> tuple:
            x, weight, bias = randn(1, T, C), randn(D, C, std=C**-0.5), randn(D)
            count = torch.full((1,), 2, dtype=torch.int32, device=x.device)
            factors = [each.float() for each in (x, weight, bias)] if wide else [x, weight, bias]
            return *factors, count, False, x[0, 0] if wide else None

        def some(*inputs: Any) -> Tensor:
            return ops.linear_runs(*inputs)[:, :2]

        def all_(*inputs: Any) -> Tensor:
            return linear_runs.linear_runs_reference(*inputs)[:, :2]

        yield Case("linear_runs", f"2 of {T}x{C}->{D}", some, all_, factors, D * C * (2 if wide else 1), 0)

    def modulated() -> tuple:
        table = randn(1, 1, 6 * C, std=0.3).float().view(1, 1, 6, C).chunk(6, 2)
        each = randn(1, T, 6 * C, std=0.3).view(1, T, 6, C).chunk(6, 2)
        run = (torch.arange(T, device=each[0].device) >= first).int()
        modulation = (table[1], each[1], table[0], each[0], run)
        return randn(1, T, C), randn(1, T, C), table[2], each[2], [C], None, None, 1e-6, *modulation

    name, reference = "gate_add_layer_norm_modulate_runs", references.gate_add_layer_norm_modulate_sums_reference
    yield Case(
        name,
        f"1x{T}x{C}",
        ops.gate_add_layer_norm_modulate_runs,
        references.of_runs(reference),
        modulated,
        4 * T * C,
        0,
    )


def head_cases(randn: Callable[..., Tensor]) -> Iterator[Case]:
    """Heads as a merged projection leaves them."""
    ops = torch.ops.sfast
    for B, text, image, H, D in HEADS:
        T, shape = text + image, f"{B}x{text}+{image}x{H}x{D}"

        def heads(tokens: int, B: int = B, H: int = H, D: int = D) -> Tensor:
            return randn(B, tokens, 3 * H * D)[..., : H * D].view(B, tokens, H, D)

        def table(T: int = T, D: int = D) -> tuple[Tensor, Tensor]:
            angle = randn(1, T, D).float().view(1, T, 1, D)
            return angle.cos(), angle.sin()

        def one(T: int = T, D: int = D, heads: Callable = heads, table: Callable = table) -> tuple:
            return heads(T), randn(D), 1e-6, *table()

        moved = 2 * B * T * H * D
        reference = rotary.rms_norm_rotary_reference
        yield Case("rms_norm_rotary", shape, ops.rms_norm_rotary, reference, one, moved, 0)

        def complex_(T: int = T, D: int = D, heads: Callable = heads, table: Callable = table) -> tuple:
            cos, sin = table()
            return heads(T), randn(D), 1e-6, torch.complex(cos, sin)[0, ..., ::2].contiguous()

        as_complex = rotary.rms_norm_rotary_complex_reference
        yield Case("rms_norm_rotary_complex", shape, ops.rms_norm_rotary_complex, as_complex, complex_, moved, 0)
        if not text:
            continue

        def two(D: int = D, text: int = text, image: int = image, heads: Callable = heads) -> tuple:
            return heads(text), randn(D), 1e-6, heads(image), randn(D), 1e-6

        def turned(two: Callable = two, table: Callable = table) -> tuple:
            return *two(), *table()

        def transposed(two: Callable = two) -> tuple:
            a, weight_a, eps_a, b, weight_b, eps_b = two()
            return a.transpose(1, 2), weight_a, eps_a, b.transpose(1, 2), weight_b, eps_b, 2

        def values(two: Callable = two) -> tuple:
            a, _, _, b, _, _ = two()
            return a.transpose(1, 2), b.transpose(1, 2), 2

        def each(text: int = text, two: Callable = two, complex_: Callable = complex_) -> tuple:
            (*first, b, weight_b, eps_b), table = two(), complex_()[3]
            return *first, table[:text], b, weight_b, eps_b, table[text:]

        name, twice = "cat_rms_norm_rotary_complex", rotary.cat_rms_norm_rotary_complex_reference
        yield Case(name, shape, ops.cat_rms_norm_rotary_complex, twice, each, moved, 0)
        rotated = rotary.cat_rms_norm_rotary_reference
        yield Case("cat_rms_norm_rotary", shape, ops.cat_rms_norm_rotary, rotated, turned, moved, 0)
        joined = rotary.cat_rms_norm_reference
        yield Case("cat_rms_norm", shape, ops.cat_rms_norm, joined, transposed, moved, 0)
        yield Case("cat_tokens", shape, ops.cat_tokens, rotary.cat_tokens_reference, values, moved, 0)
