"""The native attention's numbers against fp64, at odd shapes and strides, on a Hopper GPU."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sfast import native

pytestmark = pytest.mark.gpu

HEAD_SIZES = (40, 64, 80, 128, 160)
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


def check(attention, query: Tensor, key: Tensor, value: Tensor, scale: float | None = None) -> Tensor:
    """The op's error against fp64 is at most 1.2 times that of PyTorch's own attention; returns the op's result.

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
    allowed = 1.2 + 5 / reference.numel() ** 0.5
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


@pytest.mark.parametrize("keys", [64, 77, 300])
def test_large_scores_and_a_given_scale(attention, keys):
    query, key, value = heads(2, 3, 200, keys, 64)
    check(attention, query * 30, key, value)  # one weight in each row is nearly 1
    check(attention, query, key, value, scale=0.003)
    key[:, :, keys // 2 :] *= 50  # maxima that grow and grow from block to block
    check(attention, query, key, value)


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


def test_what_is_not_supported_raises(attention):
    query, key, value = heads(1, 2, 16, 16, 64)
    with pytest.raises(RuntimeError, match="sfast_native::attention: the head size must be"):
        attention(query[..., :48], key[..., :48], value[..., :48], 0.125)
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
