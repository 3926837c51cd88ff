"""Channels-last kernels read and write 16 bytes at a time: compiled for sm90 here, without a GPU, and read as PTX.

A stride whose divisibility Triton is not told makes every access two bytes wide. Nothing else notices: the result is right,
at a fifth of the speed.
"""

from __future__ import annotations

import re
from typing import Any

import pytest

from sfast.kernels import (
    attention_kernels,
    blend,
    cat_channels,
    conv2d_depthwise,
    conv2d_few,
    geglu,
    group_norm_kernels,
    layer_norm,
    linear_attention,
    modulate_kernels,
    rotary_kernels,
    transpose_layer_norm,
    upsample,
)
from sfast.kernels.triton_or_none import INTERPRETED, MISSING

pytestmark = pytest.mark.skipif(INTERPRETED or MISSING is not None, reason="needs Triton's compiler")

N, C, S = 2, 320, 4096
HALF, FLOAT = "*fp16", "*fp32"
VIEW = {"T": 1, "frame_stride": S * C, "row_stride": C, "channel_stride": 1}
AFFINE = {"shift": HALF, "shift_stride": C, "weight": HALF, "bias": HALF, "eps": 1e-5, "flags": 1}


def ptx(kernel: Any, warps: int, **arguments: Any) -> str:
    """Compile a kernel as a launch with these arguments would: pointers aligned, integers specialized by value."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    signature, constants, attributes = {}, {}, {}
    for parameter in kernel.params:
        name, value = parameter.name, arguments[parameter.name]
        specialized = not parameter.do_not_specialize and not isinstance(value, float)
        if parameter.is_constexpr or (specialized and value == 1):
            signature[name], constants[parameter.num,] = "constexpr", value
            continue
        signature[name] = value if isinstance(value, str) else "fp32" if isinstance(value, float) else "i32"
        if specialized and (isinstance(value, str) or value % 16 == 0):
            attributes[parameter.num,] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constants, attributes)
    return compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": warps}).asm["ptx"]


def widths(code: str) -> set[int]:
    """Bytes of every access to global memory, asynchronous copies included."""
    plain = re.findall(r"\b(?:ld|st)\.global\S*?\.(?:v(\d)\.)?b(\d+)", code)
    return {int(count or 1) * int(bits) // 8 for count, bits in plain} | {
        int(size, 0) for size in re.findall(r"cp\.async\.c[ag]\.shared\.global \[[^]]*\], \[[^]]*\], (\w+)", code)
    }


def test_apply_of_group_norm() -> None:
    tile = {"ROWS": 64, "CHANNELS": 32, "OVERLAP": True}
    sizes = {"S": S, "C": C, "rows": 64, "pieces": S // 64, "flags": 1}
    code = ptx(group_norm_kernels.apply, 2, x=HALF, y=HALF, table=FLOAT, **VIEW, **sizes, **tile)
    assert widths(code) == {16}


def test_moments_of_group_norm() -> None:
    tile = {"ROWS": 64, "CHANNELS": 32, "OVERLAP": True}
    sizes = {"S": S, "C": C, "part_rows": 128, "parts": 32}
    code = ptx(group_norm_kernels.moments, 2, x=HALF, moments=FLOAT, **VIEW, **sizes, **tile)
    assert widths(code) == {16, 4}  # one number for each channel is written


@pytest.mark.parametrize(("per_group", "width"), [(40, 16), (20, 8), (10, 4)])
def test_whole_groups_of_group_norm(per_group, width) -> None:
    channels = 32 * per_group
    code = ptx(
        group_norm_kernels.whole_group,
        8,
        **{"x": HALF, "y": HALF, "S": 64, "C": channels, "row_stride": channels, "channel_stride": 1, **AFFINE},
        PER_GROUP=per_group,
        ROWS=64,
        CHANNELS=64,
        OVERLAP=False,
    )
    assert min(widths(code) - {2}) >= width  # two bytes: weight and bias, once for each group
    assert max(widths(code)) == width


def test_layer_norm() -> None:
    pointers = dict.fromkeys(["x", "residual", "weight", "bias", "y", "total"], HALF)
    sizes = {"rows": 8192, "every": 4, "width": C, "eps": 1e-5, "flags": 7, "ROWS": 8, "WIDTH": 512, "OVERLAP": True}
    assert widths(ptx(layer_norm._layer_norm_rows, 4, **pointers, **sizes)) == {16, 8}  # 8: weight and bias


@pytest.mark.parametrize(("width", "block", "pieces"), [(3072, 1024, 3), (2240, 512, 5), (320, 64, 5)])
def test_modulation(width, block, pieces) -> None:
    names = ["x", "y", "z", "weight_y", "gate", "gate_z", "weight", "bias", "scale", "shift", "out", "total"]
    pointers = dict.fromkeys([*names, "gate_more", "scale_more", "shift_more"], HALF) | {"run": "*i32"}
    strided = ("gate", "x", "y", "scale", "shift", "gate_more", "scale_more", "shift_more", "z", "gate_z")
    strides = {f"{name}_batch": 6 * S * width for name in strided}
    strides |= {f"{name}_token": n * width for n, name in enumerate(strided)}
    sizes = {"T": S, "blocks": S, "width": width, "eps": 1e-6, "eps_y": 1e-6, "FLAGS": 4095 - modulate_kernels.RMS}
    tile = {"ROWS": max(1, 256 // block), "BLOCK": block, "PIECES": pieces, "OVERLAP": True}
    assert widths(
        ptx(modulate_kernels.modulate_rows, max(1, block // 256), **pointers, **strides, **sizes, **tile)
    ) == {16}


def test_gate_of_geglu() -> None:
    sizes = {"rows": 8192, "width": 1280, "activation": 0, "ROWS": 4, "COLUMNS": 256, "OVERLAP": True}
    assert widths(ptx(geglu._gate, 4, product=HALF, y=HALF, **sizes)) == {16}


@pytest.mark.parametrize(("size", "head"), [(40, 64), (64, 64), (160, 256)])
def test_attention_to_few_keys(size, head) -> None:
    pointers = dict.fromkeys(["query", "key", "value", "out"], HALF)
    strides = {f"{operand}_{axis}": 5 * n for operand in "qkv" for n, axis in enumerate(("head", "token", "batch"), 1)}
    shape = {"H": 8, "T": 4096, "N": 77, "scale": 0.1, "D": size, "HEAD": head}
    tiles = {"ROWS": 64, "FIRST": 64, "REST": 16, "UNIT": 8, "OVERLAP": True}
    assert widths(ptx(attention_kernels.few_keys, 4, **pointers, **strides, **shape, **tiles)) == {16}


def test_exponentials_of_attention() -> None:
    pointers = {"scores": FLOAT, "weights": HALF, "totals": FLOAT}
    sizes = {"N": 16384, "scale": 0.1, "BLOCK": 16384, "WHOLE": True, "OVERLAP": True}
    assert widths(ptx(attention_kernels.exponentials, 16, **pointers, **sizes)) == {16, 4}  # 4: one total for each row


def test_upsampling() -> None:
    strides = {f"x_{name}": value for name, value in zip(("sample", "row", "pixel"), (S * C, 64 * C, C), strict=True)}
    strides |= {
        f"y_{name}": value for name, value in zip(("sample", "row", "pixel"), (4 * S * C, 128 * C, C), strict=True)
    }
    sizes = {"C": C, "H": 64, "W": 64, "Q": 128, "x_channel": 1, "y_channel": 1, "row_step": 0.5, "pixel_step": 0.5}
    tile = {"PIXELS": 32, "CHANNELS": 128, "OVERLAP": True}
    assert widths(ptx(upsample._upsample_tiles, 4, x=HALF, y=HALF, **strides, **sizes, **tile)) == {16}


def test_concatenation() -> None:
    tile = {"ROWS": 32, "CHANNELS": 64, "OVERLAP": True}
    assert widths(ptx(cat_channels._cat_tiles, 4, a=HALF, b=HALF, y=HALF, S=S, A=C, C=3 * C, **tile)) == {16}


def test_blending() -> None:
    pointers = dict.fromkeys(["x", "y", "residual", "alpha", "out"], HALF)
    strides = {"y_sample": 14 * S * C, "y_frame": C, "y_row": 14 * C, "sample_step": 14, "frame_step": 1}
    sizes = {"rows": 28 * S, "F": 14, "L": S, "C": C, "flags": 2, "ROWS": 64, "COLUMNS": 64, "OVERLAP": True}
    assert widths(ptx(blend._blend_rows, 4, **pointers, **strides, **sizes)) == {16, 2}  # 2: alpha, once for each row


def test_turned_layer_norm() -> None:
    pointers = dict.fromkeys(["x", "residual", "shift", "weight", "bias", "y", "turned", "total"], HALF)
    sizes = {"rows": 28 * S, "frames": 14, "L": S, "C": C, "eps": 1e-5, "flags": 7, "ROWS": 8, "WIDTH": 512}
    code = ptx(transpose_layer_norm._turn_rows, 4, **pointers, **sizes, OVERLAP=True)
    assert widths(code) == {16, 8}  # 8: weight and bias


def test_convolution_to_few_channels() -> None:
    pointers = dict.fromkeys(["x", "weight", "bias", "out"], HALF)
    strides = {"filter_stride": 9 * 128, "channel": 1, "line": 3 * 128, "column": 128, "biased": 3}
    sizes = {"H": 1024, "W": 1024, "C": 128, "strips": 17, "rows": 16, "K": 3, "SUMS": 16, "STRIP": 64, "CHANNELS": 128}
    code = ptx(conv2d_few._few_out, 4, **pointers, **strides, **sizes, OVERLAP=True)
    assert widths(code) == {16, 2}  # 2: taps, bias and result, which are few


def test_depthwise_convolution() -> None:
    pointers = dict.fromkeys(["x", "taps", "bias", "out"], HALF)
    sizes = {"H": 32, "W": 32, "P": 32, "Q": 32, "C": 11200, "strips": 4, "rows": 16, "padding_h": 1, "padding_w": 1}
    tile = {"GATES": True, "BIASED": True, "STRIP": 8, "CHANNELS": 64, "OVERLAP": True}
    assert widths(ptx(conv2d_depthwise._depthwise_walk, 4, **pointers, **sizes, **tile)) == {
        8
    }  # a lane's: all in flight


def test_linear_attention() -> None:
    sizes = {"D": 32, "WIDTH": 32, "OVERLAP": True}
    strides = {f"{name}_{axis}": n * 6720 for name in ("key", "value") for axis, n in (("batch", 1024), ("token", 1))}
    operands = {"key": HALF, "value": HALF, "matrices": FLOAT, "S": 1024, "tokens": 256, "TOKENS": 64}
    assert min(widths(ptx(linear_attention._sum_matrices, 4, **operands, **strides, **sizes)) - {4}) == 16  # 4: one row
    operands = {"query": HALF, "matrices": FLOAT, "out": HALF, "T": 1024, "pieces": 4, "eps": 1e-15, "QUERIES": 128}
    strides = {"query_batch": 1024 * 6720, "query_token": 6720}
    assert min(widths(ptx(linear_attention._multiply_queries, 4, **operands, **strides, **sizes)) - {4}) == 16


@pytest.mark.parametrize(("table", "tokens", "heads"), [("full", 2, 8), ("complex", 1, 32), ("none", 2, 8)])
def test_heads_on_their_way_to_attention(table, tokens, heads) -> None:
    pointers = dict.fromkeys(["a", "b", "y", "weight_a", "weight_b"], HALF)
    pointers |= dict.fromkeys(["cos_a", "sin_a", "cos_b", "sin_b"], FLOAT)
    sizes = {"Ta": 512, "T": 4608, "H": 24, "D": 128, "table_step": 1, "eps_a": 1e-6, "eps_b": 1e-6}
    strides = {f"{name}_{axis}": n * 3072 for name in "ab" for axis, n in (("batch", 512), ("token", 3), ("head", 1))}
    strides |= {f"table_{axis}_{name}": n for name in "ab" for axis, n in (("batch", 0), ("token", 128))}
    tile = {"TOKENS": tokens, "HEADS": heads, "WIDTH": 128, "NORM": "head", "TABLE": table, "OVERLAP": True}
    code = ptx(rotary_kernels.rotate_heads, 4, **pointers, **sizes, **strides, **tile)
    assert widths(code) - {2, 4, 8} == {16}  # less for the weight and the table, once for all heads
    assert re.findall(r"st\.global\S*?\.(?:v(\d)\.)?b(\d+)", code) == [("4", "32")] * (tokens * heads // 8)


def test_a_stride_that_says_nothing_is_noticed() -> None:
    tile = {"ROWS": 64, "CHANNELS": 32, "OVERLAP": True}
    odd = {**VIEW, "frame_stride": S * C + 1}
    sizes = {"S": S, "C": C, "rows": 64, "pieces": S // 64, "flags": 1}
    assert 2 in widths(ptx(group_norm_kernels.apply, 2, x=HALF, y=HALF, table=FLOAT, **odd, **sizes, **tile))
