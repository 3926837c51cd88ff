"""Convolutions from or to few channels against fp64: odd sizes, layouts, margins between programs, and what is refused."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from sfast.kernels import conv2d_few
from sfast.kernels.triton_or_none import INTERPRETED
from tests.kernels.fp64 import assert_close_to_fp64

DTYPES = [torch.float16] if INTERPRETED else [torch.float16, torch.bfloat16]  # the interpreter cannot multiply bf16


@pytest.fixture(autouse=True)
def only_where_kernels_run(device) -> None:
    if device.type == "cpu" and not INTERPRETED:
        pytest.skip("these have no reference of their own")


def make(shape, K: int, filter: tuple[int, int], device, dtype) -> tuple[torch.Tensor, ...]:
    x = torch.randn(shape).to(device, dtype, memory_format=torch.channels_last)
    weight = torch.randn(K, shape[1], *filter).to(device, dtype, memory_format=torch.channels_last)
    return x, weight / (weight[0].numel() ** 0.5), torch.randn(K).to(device, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("shape", "K", "filter", "stride", "padding"),
    [
        ((2, 4, 9, 11), 72, (3, 3), [1, 1], [1, 1]),
        ((1, 8, 5, 7), 16, (3, 3), [2, 1], [0, 2]),
        ((1, 3, 17, 5), 40, (3, 3), [1, 1], [1, 1]),
        ((2, 4, 8, 8), 130, (1, 1), [1, 1], [0, 0]),
        ((1, 5, 6, 9), 24, (2, 4), [2, 2], [1, 3]),
    ],
    ids=str,
)
def test_few_in(shape, K, filter, stride, padding, dtype, device) -> None:
    x, weight, bias = make(shape, K, filter, device, dtype)
    spread = torch.randn(shape[0], shape[1], shape[2], 2 * shape[3]).to(device, dtype)[..., ::2]
    for image, offset in [(x, bias), (x, None), (x.contiguous(), bias), (spread, bias)]:
        geometry = stride, padding, [1, 1], 1
        assert conv2d_few.few_in_takes(image, weight, offset, *geometry)
        result = conv2d_few.few_in(image, weight, offset, stride, padding)
        assert_close_to_fp64(result, F.conv2d, image, weight, offset, *geometry)
        assert result.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("shape", "K"),
    [((2, 32, 9, 11), 4), ((1, 80, 19, 127), 3), ((1, 64, 33, 253), 1), ((1, 128, 1, 1), 8), ((1, 40, 16, 126), 5)],
    ids=str,
)
def test_few_out(shape, K, dtype, device) -> None:
    x, weight, bias = make(shape, K, (3, 3), device, dtype)
    for weights, offset in [(weight, bias), (weight, None), (weight.contiguous(), bias)]:
        geometry = [1, 1], [1, 1], [1, 1], 1
        assert conv2d_few.few_out_takes(x, weights, offset, *geometry)
        result = conv2d_few.few_out(x, weights, offset)
        assert_close_to_fp64(result, F.conv2d, x, weights, offset, *geometry)
        assert result.is_contiguous(memory_format=torch.channels_last)


def test_nan_reaches_its_neighbours_and_no_others(device) -> None:
    x, weight, bias = make((1, 32, 40, 140), 3, (3, 3), device, torch.float16)
    x[0, 5, 16, 126] = float("nan")
    result = conv2d_few.few_out(x, weight, bias)
    spoilt = result.isnan().any(1)[0].nonzero()
    assert spoilt.amin(0).tolist() == [15, 125] and spoilt.amax(0).tolist() == [17, 127] and len(spoilt) == 9


def test_what_is_refused(device) -> None:
    one = [1, 1]
    x, weight, bias = make((1, 4, 9, 11), 16, (3, 3), device, torch.float16)
    assert not conv2d_few.few_in_takes(x, weight, bias, one, one, [2, 2], 1)
    assert not conv2d_few.few_in_takes(x, weight, bias, one, one, one, 2)
    assert not conv2d_few.few_in_takes(x.float(), weight.float(), bias.float(), one, one, one, 1)
    assert not conv2d_few.few_in_takes(x, weight.contiguous(), bias, one, one, one, 1)
    assert not conv2d_few.few_in_takes(x, weight, bias.float(), one, one, one, 1)
    x, weight, bias = make((1, 32, 9, 11), 4, (3, 3), device, torch.float16)
    assert not conv2d_few.few_out_takes(x.contiguous(), weight, bias, one, one, one, 1)
    assert not conv2d_few.few_out_takes(x, weight, bias, [2, 2], one, one, 1)
    assert not conv2d_few.few_out_takes(x, weight, bias, one, [0, 0], one, 1)
    x, weight, bias = make((1, 130, 9, 11), 4, (3, 3), device, torch.float16)
    assert not conv2d_few.few_out_takes(x, weight, bias, one, one, one, 1)


def test_the_fused_convolution_comes_here(device, monkeypatch) -> None:
    called = []
    for name in ("few_in", "few_out"):
        kernel = getattr(conv2d_few, name)
        monkeypatch.setattr(
            conv2d_few, name, lambda *args, kernel=kernel, name=name: called.append(name) or kernel(*args)
        )
    one = [1, 1]
    for shape, K in [((1, 4, 9, 11), 24), ((1, 32, 9, 11), 3)]:
        inputs = (*make(shape, K, (3, 3), device, torch.float16), one, one, one, 1)
        assert_close_to_fp64(torch.ops.sfast.conv2d_bias(*inputs), conv2d_few.conv2d_few_reference, *inputs)
    assert called == ["few_in", "few_out"]
