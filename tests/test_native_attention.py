"""The native attention's numbers against fp64, at odd shapes and strides, on a Hopper GPU."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sfast import native

pytestmark = pytest.mark.gpu

ROUNDED = (
    1.5  # where one weight of a row is nearly all: PyTorch has it as 1, and here it may be rounded as the others are
)
HEAD_SIZES = (8, 40, 56, 64, 72, 80, 96, 112, 128, 136, 160)
# batch, heads, queries, keys: what models have, and what fits no tile
SHAPES = [
    (2, 3, 1024, 1024),
    (1, 5, 333, 517),
    (2, 2, 65, 129),
    (1, 2, 3000, 300),
    (3, 2, 64, 64),
    (2, 3, 200, 77),
    (1, 40, 700, 1),
    (2, 2, 130, 81),
    (1, 1, 1, 1000),
    (1, 1, 70, 128),
]


@pytest.fixture
def attention():
    if not native.available() or not hasattr(torch.ops.sfast_native, "attention"):
        pytest.skip(f"the native attention is not available: {native.why_not()}")
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("the native attention is for compute capability 9.0")
    try:
        torch.ops.sfast_native.attention(*heads(1, 1, 8, 8, 64), 0.125)
    except RuntimeError as error:
        pytest.skip(str(error))
    return torch.ops.sfast_native.attention


def heads(
    b: int, h: int, queries: int, keys: int, d: int, dtype: torch.dtype = torch.float16
) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value [B, H, T, D] as models make them: views of [B, T, H, D]."""
    q = torch.randn(b, queries, h, d, device="cuda").to(dtype)
    k, v = torch.randn(2, b, keys, h, d, device="cuda").to(dtype)
    return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)


def exact(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    scores = query.double() @ key.double().transpose(-1, -2) * scale
    return scores.softmax(-1) @ value.double()


def error(result: Tensor, reference: Tensor) -> float:
    return ((result.double() - reference).norm() / reference.norm()).item()


def check(
    attention, query: Tensor, key: Tensor, value: Tensor, scale: float | None = None, allowed: float = 1.2
) -> Tensor:
    """The op's error against fp64 is at most `allowed` times that of PyTorch's own attention; returns the op's result.

    A result of few numbers is allowed more: there it is chance which of the two rounds better.
    """
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    reference = exact(query, key, value, scale)
    torchs = F.scaled_dot_product_attention(query, key, value, scale=scale)
    torch.full_like(torchs, float("nan"))  # left where the allocator will place the result
    result = attention(query, key, value, scale)
    assert result.shape == query.shape
    assert result.dtype == query.dtype
    assert result.transpose(1, 2).is_contiguous()
    allowed += 5 / reference.numel() ** 0.5
    assert error(result, reference) <= allowed * error(torchs, reference)
    return result


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("d", HEAD_SIZES)
def test_every_shape(attention, d, shape, dtype):
    check(attention, *heads(*shape, d, dtype))


@pytest.mark.parametrize("d", HEAD_SIZES)
def test_more_tiles_than_processors(attention, d):
    check(attention, *heads(2, 24, 1100, 400, d))
    check(attention, *heads(2, 24, 1100, 77, d))
    check(
        attention, *heads(2, 16, 4096, 150, d)
    )  # what whole rounds of tiles leave is a unit of rows for each processor
    check(attention, *heads(1, 30, 4192, 150, d))


@pytest.mark.parametrize("keys", [64, 77, 300])
def test_large_scores_and_a_given_scale(attention, keys):
    query, key, value = heads(2, 3, 200, keys, 64)
    check(attention, query * 30, key, value)
    check(attention, query, key, value, scale=0.003)
    key[:, :, keys // 2 :] *= 50  # maxima that grow and grow from block to block
    check(attention, query, key, value)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("d", [40, 64, 72, 128, 160])
def test_scores_that_outgrow_what_the_first_block_has_seen(attention, d, dtype):
    query, key, value = heads(2, 3, 200, 700, d, dtype)
    for factor in (4, 12, 25, 50, 300):  # exponentials of the blocks to come: too large for fp16, for bf16, for fp32
        grown = key.clone()
        grown[:, :, 300:500] *= factor
        check(attention, query, grown, value, allowed=ROUNDED)
        grown[:, :, 17] *= factor
        check(attention, query, grown, value, allowed=ROUNDED)


@pytest.mark.parametrize("tokens", [96, 512])
def test_strides(attention, tokens):
    packed = torch.randn(2, tokens, 3, 4, 80, device="cuda", dtype=torch.float16)
    check(attention, *packed.permute(2, 0, 3, 1, 4))
    check(attention, *torch.randn(3, 2, 4, tokens, 80, device="cuda", dtype=torch.float16))
    padded = torch.randn(3, 2, tokens + 3, 4, 88, device="cuda", dtype=torch.float16)
    check(attention, *padded[:, :, 2:-1, :, 8:].transpose(2, 3))


def test_keys_that_do_not_exist_are_not_read(attention):
    query, key, value = heads(1, 2, 100, 160, 64)
    expected = attention(query, key[:, :, :130].contiguous(), value[:, :, :130].contiguous(), 0.125)
    key[:, :, 130:], value[:, :, 130:] = float("nan"), float("inf")
    assert torch.equal(attention(query, key[:, :, :130], value[:, :, :130], 0.125), expected)


@pytest.mark.parametrize("keys", [50, 500])
def test_nan_is_passed_on(attention, keys):
    query, key, value = heads(1, 1, 100, keys, 64)
    query[0, 0, 7, 3] = float("nan")
    result = attention(query, key, value, 0.125)
    assert result[0, 0, 7].isnan().all()
    assert result[0, 0, 8:].isfinite().all()


def test_replayed_from_a_graph_behind_other_kernels(attention):
    query, key, value = heads(2, 8, 300, 300, 64)
    attention(query, key, value, 0.125)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        x = query
        for _ in range(4):
            x = attention(x * 2, key, value, 0.125)
            x = attention(x + query, key[:, :, :77], value[:, :, :77], 0.125)
    query.normal_()
    graph.replay()
    expected = query
    for _ in range(4):
        expected = attention(expected * 2, key, value, 0.125)
        torch.cuda.synchronize()
        expected = attention(expected + query, key[:, :, :77], value[:, :, :77], 0.125)
        torch.cuda.synchronize()
    assert torch.equal(x, expected)


def check_masked(attention, query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> None:
    """Rows without any key are 0; the others no further from fp64 than PyTorch's, with room for another order of sums."""
    scale = query.shape[-1] ** -0.5
    added = mask.double()
    if mask.dtype == torch.bool:
        added = torch.zeros_like(added).masked_fill(~mask, float("-inf"))
    scores = query.double() @ key.double().transpose(-1, -2) * scale + added
    empty = (added == float("-inf")).all(-1, keepdim=True)
    reference = scores.softmax(-1).masked_fill(empty, 0) @ value.double()
    dense = mask.expand(*query.shape[:2], 1, -1).contiguous()  # PyTorch's kernels do not take every alignment
    torchs = F.scaled_dot_product_attention(query, key, value, attn_mask=dense)
    torch.full_like(torchs, float("nan"))
    result = attention(query, key, value, scale, mask.expand(*query.shape[:2], 1, -1))
    assert (result * empty).count_nonzero() == 0
    assert result.isfinite().all()
    if empty.all():
        return
    if not empty.any():
        assert error(result, reference) <= 1.3 * error(torchs, reference)  # 1.28 at heads of 160
    assert error(result, reference) <= (6e-3 if query.dtype == torch.bfloat16 else 8e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(2, 3, 700, 300), (3, 2, 333, 77), (2, 2, 130, 1), (1, 24, 1100, 513)], ids=str)
@pytest.mark.parametrize("d", [40, 64, 72, 112, 128, 160])
def test_masks(attention, d, shape, dtype):
    b, h, _, keys = shape
    query, key, value = heads(*shape, d, dtype)
    counts = torch.arange(keys, device="cuda") < torch.randint(1, keys + 1, (b, 1, 1, 1), device="cuda")
    check_masked(attention, query, key, value, counts)
    check_masked(attention, query, key, value, counts.flip(3))  # the first blocks, too, may have none
    check_masked(attention, query, key, value, (1 - counts.to(dtype)) * -10000)
    check_masked(attention, query, key, value, torch.randn(b, h, 1, keys, device="cuda").to(dtype) * 3)
    every_other = torch.full((1, 1, 1, 2 * keys), float("-inf"), device="cuda", dtype=dtype)
    every_other[..., 1 - keys % 2 :: 2] = 0.5
    check_masked(attention, query, key, value, every_other[..., 1 : keys + 1])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_rows_without_keys_and_the_least_of_numbers(attention, dtype):
    query, key, value = heads(3, 2, 200, 290, 64, dtype)
    counts = torch.ones(3, 1, 1, 290, device="cuda", dtype=torch.bool)
    counts[1], counts[2, ..., 3:] = False, False
    check_masked(attention, query, key, value, counts)
    least = torch.zeros_like(counts, dtype=dtype).masked_fill(~counts, torch.finfo(dtype).min)
    least[1] = 0
    check_masked(attention, query, key, value, least)
    all_least = torch.full((1, 1, 1, 290), torch.finfo(torch.bfloat16).min, device="cuda", dtype=torch.bfloat16)
    mean = attention(*(each.bfloat16() for each in (query, key, value)), 0.125, all_least.expand(3, 2, 1, -1))
    assert error(mean, value.double().mean(2, keepdim=True).expand_as(mean)) < 2e-2, "the same for all is no mask"


def test_what_is_not_supported_raises(attention):
    query, key, value = heads(1, 2, 16, 16, 64)
    with pytest.raises(RuntimeError, match="sfast_native::attention: the head size must be"):
        attention(query[..., :44], key[..., :44], value[..., :44], 0.125)
    with pytest.raises(RuntimeError, match="sfast_native::attention: x must be float16 or bfloat16"):
        attention(query.float(), key.float(), value.float(), 0.125)
    with pytest.raises(RuntimeError, match="sfast_native::attention: key must be contiguous in its last dimension"):
        attention(query, key.transpose(2, 3).contiguous().transpose(2, 3), value, 0.125)
    with pytest.raises(RuntimeError, match="sfast_native::attention: there must be a value"):
        attention(query, key, value[:, :, :8], 0.125)
    with pytest.raises(RuntimeError, match="sfast_native::attention: scale must be positive"):
        attention(query, key, value, 0.0)
    with pytest.raises(RuntimeError, match="sfast_native::attention: too many heads"):
        attention(*heads(70000, 1, 8, 8, 40), 1.0)
    torch.zeros(1, device="cuda").add_(1)  # PyTorch finds no error of ours behind its own kernel
