"""GroupNorm against fp64: layouts, group sizes, large means, NaN, and what it must leave to the reference."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sfast import fallback
from sfast.kernels import group_norm, nearby
from sfast.kernels.group_norm import add_group_norm_silu_reference, group_norm_reference, group_norm_silu_reference
from tests.kernels.fp64 import assert_close_to_fp64

ops = torch.ops.sfast

# N, C, *spatial and G: group sizes of 10, 20, 40, 1 and 3 channels, groups kept whole and groups that are split
SHAPES = [
    ((2, 20, 5, 7), 2),
    ((1, 40, 31, 37), 4),
    ((3, 40, 9, 11), 2),
    ((1, 80, 33, 13), 2),
    ((2, 7, 6, 5), 7),
    ((1, 96, 7, 11), 32),
    ((1, 6, 65, 67), 1),
    ((2, 6, 3, 4, 5), 2),
    ((2, 12, 9), 3),
    ((3, 8), 2),
]


def make(
    shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, last: bool, mean: float = 0.5, std: float = 1.0
):
    x = (torch.randn(shape) * std + mean).to(device, dtype)
    if last and x.dim() > 2:
        x = x.movedim(1, -1).contiguous().movedim(-1, 1)
    weight, bias = (torch.randn(shape[1]).to(device, dtype) for _ in range(2))
    return x, weight, bias


@pytest.mark.parametrize("last", [True, False], ids=["channels-last", "contiguous"])
@pytest.mark.parametrize(("shape", "groups"), SHAPES, ids=str)
def test_group_norm_silu(shape, groups, last, device, runs_kernel) -> None:
    x, weight, bias = make(shape, torch.float32, device, last)
    if runs_kernel:
        assert group_norm._takes(x, groups, weight, bias, 1e-5)
    result = ops.group_norm_silu(x, groups, weight, bias, 1e-5)
    assert_close_to_fp64(result, group_norm_silu_reference, x, groups, weight, bias, 1e-5)
    if runs_kernel:
        assert result.stride() == x.stride()


@pytest.mark.parametrize("last", [True, False], ids=["channels-last", "contiguous"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision(dtype, last, device) -> None:
    for shape, groups in [((1, 40, 31, 37), 4), ((2, 20, 5, 7), 2)]:
        x, weight, bias = make(shape, dtype, device, last)
        shift = torch.randn(shape[0], shape[1], 1, 1).to(device, dtype)
        inputs = (x, shift, groups, weight, bias, 1e-5)
        assert_close_to_fp64(ops.add_group_norm_silu(*inputs), add_group_norm_silu_reference, *inputs)


@pytest.mark.parametrize("last", [True, False], ids=["channels-last", "contiguous"])
@pytest.mark.parametrize("shift_shape", [(2, 20, 1, 1), (1, 20, 1, 1), (20, 1, 1), (2, 20, 9, 11), (1,)], ids=str)
def test_shift(shift_shape, last, device) -> None:
    x, weight, bias = make((2, 20, 9, 11), torch.float32, device, last)
    inputs = (x, 3 * torch.randn(shift_shape, device=device), 2, weight, bias, 1e-5)
    assert_close_to_fp64(ops.add_group_norm_silu(*inputs), add_group_norm_silu_reference, *inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("last", [True, False], ids=["channels-last", "contiguous"])
def test_a_small_group_at_a_further_shape(last, dtype, device, runs_kernel, monkeypatch) -> None:
    for known in ("_compiled", "_avoided"):
        monkeypatch.setattr(group_norm, known, set())
    for shape in [(1, 20, 31, 37), (2, 20, 9, 11), (2, 20, 9, 11)]:
        x, weight, bias = make(shape, dtype, device, last)
        inputs = (x, torch.randn(shape[0], 20, 1, 1).to(device, dtype), 2, weight, bias, 1e-5)
        with nearby.borrowing(device, wanted=shape[0] == 2):
            assert_close_to_fp64(ops.add_group_norm_silu(*inputs), add_group_norm_silu_reference, *inputs)
    assert len(group_norm._avoided) == len(group_norm._compiled) == int(runs_kernel)


def test_a_shift_where_there_are_channels_alone(device) -> None:
    x, weight, bias = make((3, 20), torch.float32, device, False)
    for shift in (torch.randn_like(x), torch.randn(20, device=device)):
        inputs = (x, shift, 2, weight, bias, 1e-5)
        assert_close_to_fp64(ops.add_group_norm_silu(*inputs), add_group_norm_silu_reference, *inputs)
    assert fallback.noted() == []


@pytest.mark.parametrize("size", [(9, 11), (64, 80)], ids=["whole groups", "tiles"])
def test_a_shift_that_is_part_of_a_wider_row(size, device) -> None:
    x, weight, bias = make((3, 20, *size), torch.float32, device, True)
    shift = torch.randn(3, 70, device=device)[:, 25:45, None, None]
    inputs = (x, shift, 2, weight, bias, 1e-5)
    assert_close_to_fp64(ops.add_group_norm_silu(*inputs), add_group_norm_silu_reference, *inputs)


@pytest.mark.parametrize("order", ["N T H W C", "N C T H W", "N T C H W"])
@pytest.mark.parametrize("frames", [3, 1])
def test_a_shift_for_each_frame_of_a_video(frames, order, device, runs_kernel) -> None:
    sizes = {"N": 2, "T": 3, "C": 20, "H": 7, "W": 13}
    memory = torch.randn([sizes[axis] for axis in order.split()], device=device) + 0.5
    x = memory.permute([order.split().index(axis) for axis in "NCTHW"])
    weight, bias = torch.randn(20, device=device), torch.randn(20, device=device)
    inputs = (x, 3 * torch.randn(2, 20, frames, 1, 1, device=device), 2, weight, bias, 1e-5)
    result = ops.add_group_norm_silu(*inputs)
    assert_close_to_fp64(result, add_group_norm_silu_reference, *inputs)
    if runs_kernel:
        assert result.stride() == x.stride()


def test_a_shift_that_enlarges_x_is_added_by_the_reference(device) -> None:
    x, shift = torch.randn(2, 4, 1, 1, device=device), torch.randn(2, 4, 3, 3, device=device)
    inputs = (x, shift, 2, None, None, 1e-5)
    assert torch.equal(ops.add_group_norm_silu(*inputs), add_group_norm_silu_reference(*inputs))


@pytest.mark.parametrize("last", [True, False], ids=["channels-last", "contiguous"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_large_mean_does_not_cancel(dtype, last, device, runs_kernel) -> None:
    for shape, groups in [((1, 20, 31, 37), 2), ((2, 6, 9, 5), 2)]:
        x, weight, bias = make(shape, dtype, device, last, mean=100, std=0.1)
        inputs = (x, groups, weight, bias, 1e-5)
        if runs_kernel:  # fp32 knows the mean to 6e-8 of itself, which is 6e-5 of the standard deviation
            floor = 1.5e-4 if dtype == torch.float32 else None
            assert_close_to_fp64(ops.group_norm(*inputs), group_norm_reference, *inputs, floor=floor)


def test_a_pilot_far_from_the_mean_does_not_cancel(device) -> None:
    x, weight, bias = make((1, 20, 31, 37), torch.float32, device, True)
    x[:, :, 0, 0] = 1000
    inputs = (x, 2, weight, bias, 1e-5)
    assert_close_to_fp64(ops.group_norm(*inputs), group_norm_reference, *inputs, floor=1e-5)


@pytest.mark.parametrize("last", [True, False], ids=["channels-last", "contiguous"])
def test_many_parts_are_merged(last, device, monkeypatch) -> None:
    monkeypatch.setattr(group_norm, "_part_rows", lambda S, ROWS, *rest: ROWS)
    x, weight, bias = make((1, 12, 70, 31), torch.float32, device, last, mean=3)
    shift = torch.randn(1, 12, 1, 1, device=device)
    inputs = (x, shift, 1, weight, bias, 1e-5)
    assert_close_to_fp64(ops.add_group_norm_silu(*inputs), add_group_norm_silu_reference, *inputs)


@pytest.mark.parametrize("last", [True, False], ids=["channels-last", "contiguous"])
def test_weight_and_bias_are_optional(last, device) -> None:
    x, weight, bias = make((1, 20, 31, 37), torch.float32, device, last)
    for parameters in [(None, None), (weight, None), (None, bias)]:
        inputs = (x, 2, *parameters, 1e-3)
        assert_close_to_fp64(ops.group_norm(*inputs), group_norm_reference, *inputs)


@pytest.mark.parametrize("last", [True, False], ids=["channels-last", "contiguous"])
@pytest.mark.parametrize("size", [5, 41], ids=["whole", "split"])
@pytest.mark.parametrize("poison", [float("nan"), float("inf")], ids=str)
def test_nan_spoils_its_own_group_and_no_other(poison, size, last, device) -> None:
    x, weight, bias = make((2, 40, size, size), torch.float32, device, last)
    x[1, 13, 2, 3] = poison
    result = ops.group_norm(x, 4, weight, bias, 1e-5)
    spoilt = torch.zeros_like(x, dtype=torch.bool)
    spoilt[1, 10:20] = True
    assert torch.equal(result.isnan(), spoilt)


@pytest.mark.parametrize("shape", [(2, 20, 1, 1), (2, 20, 1, 9), (2, 20, 9, 1), (1, 1, 3, 4)], ids=str)
def test_shapes_whose_layout_is_ambiguous(shape, device) -> None:
    for x in (
        torch.randn(shape, device=device),
        torch.randn(shape, device=device).to(memory_format=torch.channels_last),
    ):
        inputs = (x, 1, None, None, 1e-5)
        assert_close_to_fp64(ops.group_norm(*inputs), group_norm_reference, *inputs)


def test_views_that_are_not_dense(device) -> None:
    wide = torch.randn(2, 40, 9, 22, device=device)
    frames = torch.randn(2, 3, 20, 4, 5, device=device).permute(0, 2, 1, 3, 4)  # [N, C, T, H, W] in memory order N T C
    pixels = wide[:, ::2, 0, 0], wide[:, :20, :1, :1], wide[:1, :, :1, :1].expand(2, 40, 1, 1)
    expanded = wide[:, :, :1].expand(2, 40, 6, 22)
    for x in (wide[:, ::2], wide[..., ::2], wide.permute(0, 1, 3, 2), expanded, frames, *pixels):
        inputs = (x, 2, None, None, 1e-5)
        assert_close_to_fp64(ops.group_norm_silu(*inputs), group_norm_silu_reference, *inputs)


@pytest.mark.parametrize("shape", [(0, 8, 4, 4), (2, 8, 0, 4)], ids=str)
def test_empty(shape, device) -> None:
    assert ops.group_norm(torch.randn(shape, device=device), 2, None, None, 1e-5).shape == shape


def test_what_the_reference_refuses_is_refused(device) -> None:
    with pytest.raises(RuntimeError, match="divisible"):
        ops.group_norm(torch.randn(2, 10, 4, 4, device=device), 3, None, None, 1e-5)


def test_mixed_precision_is_left_to_the_reference(device) -> None:
    x, weight, bias = make((1, 8, 4, 4), torch.bfloat16, device, True)
    assert not group_norm._takes(x, 2, weight.float(), bias.float(), 1e-5)
    assert not group_norm._takes(x.double(), 2, None, None, 1e-5)


def test_fake_tensors_keep_the_layout(device) -> None:
    x, weight, bias = make((2, 20, 5, 7), torch.float32, device, True)
    torch.library.opcheck(
        ops.group_norm.default, (x, 2, weight, bias, 1e-5), test_utils=("test_schema", "test_faketensor")
    )


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["group_norm", "group_norm_silu"])
def test_captured_on_another_stream(name) -> None:
    device = torch.device("cuda", 0)
    x, weight, bias = make((2, 320, 64, 64), torch.float16, device, True)
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    call = getattr(ops, name)
    with torch.inference_mode(), torch.cuda.stream(stream):
        call(x, 32, weight, bias, 1e-5)
        stream.synchronize()
        with torch.cuda.graph(graph, stream=stream):
            result = call(x, 32, weight, bias, 1e-5)
        x.copy_(torch.randn_like(x))
        graph.replay()
        stream.synchronize()
        expected: Tensor = call(x, 32, weight, bias, 1e-5)
        stream.synchronize()
    assert torch.equal(result, expected)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(2, 320, 64, 64), (2, 2560, 8, 8), (2, 960, 32, 32), (1, 128, 512, 512)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_at_the_sizes_of_a_pipeline(shape, dtype) -> None:
    x, weight, bias = make(shape, dtype, torch.device("cuda", 0), True)
    inputs = (x, 32, weight, bias, 1e-5)
    assert_close_to_fp64(ops.group_norm_silu(*inputs), group_norm_silu_reference, *inputs)


CLUSTERS = [
    ((2, 320, 64, 64), 32),
    ((2, 960, 33, 31), 32),
    ((1, 40, 31, 37), 4),
    ((3, 96, 7, 11), 32),
    ((5, 1280, 9, 7), 32),
    ((1, 512, 64, 63), 32),
    ((2, 2560, 8, 8), 32),
    ((2, 64, 5, 5), 1),
    ((1, 128, 16, 16), 1),
    ((2, 24, 1, 1), 3),
    ((2, 80, 3, 9, 7), 8),
]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("shape", "groups"), CLUSTERS, ids=str)
def test_groups_kept_by_clusters(shape, groups, dtype, monkeypatch) -> None:
    monkeypatch.setattr(group_norm, "IN_REGISTERS", 0)
    device = torch.device("cuda", 0)
    for mean, std in [(0.5, 1.0), (60.0, 0.5)]:
        x, weight, bias = make(shape, dtype, device, True, mean=mean, std=std)
        rows = x.movedim(1, -1).reshape(shape[0], -1, shape[1])
        if not group_norm.native_group_norm_takes(rows, groups):
            pytest.skip("needs native ops with kernels of our own, and a GPU with clusters")
        wide = torch.randn(shape[0], 3 * shape[1]).to(device, dtype)
        shift = wide[:, shape[1] : 2 * shape[1]].reshape(*shape[:2], *[1] * (len(shape) - 2))
        for parameters in [(weight, bias), (None, bias), (weight, None), (None, None)]:
            inputs = (x, groups, *parameters, 1e-5)
            assert_close_to_fp64(ops.group_norm(*inputs), group_norm_reference, *inputs)
            assert_close_to_fp64(ops.group_norm_silu(*inputs), group_norm_silu_reference, *inputs)
            shifted = (x, shift, *inputs[1:])
            result = ops.add_group_norm_silu(*shifted)
            assert_close_to_fp64(result, add_group_norm_silu_reference, *shifted)
            assert result.movedim(1, -1).is_contiguous()
    x[0, 0, ..., 0] = float("nan")
    spoilt = torch.zeros_like(x, dtype=torch.bool)
    spoilt[0, : shape[1] // groups] = True
    assert torch.equal(ops.group_norm(x, groups, weight, bias, 1e-5).isnan(), spoilt)


@pytest.mark.gpu
def test_what_no_cluster_keeps() -> None:
    device = torch.device("cuda", 0)
    for shape, groups in [((1, 128, 1024, 1024), 32), ((2, 42, 8, 8), 2), ((1, 512, 4, 4), 1)]:
        rows = torch.empty(shape[0], shape[2] * shape[3], shape[1], dtype=torch.float16, device=device)
        assert not group_norm.native_group_norm_takes(rows, groups)
    assert not group_norm.native_group_norm_takes(torch.empty(1, 64, 64, device=device), 2)
