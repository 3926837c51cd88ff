"""Attention's own kernels against fp64 on odd shapes and strides, and the operator that chooses between all of them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sfast.kernels import attention, attention_triton, choice
from sfast.kernels.attention import attention_reference
from sfast.kernels.triton_or_none import INTERPRETED
from tests.kernels.fp64 import assert_close_to_fp64, error
from tests.kernels.interpreter import multiply_bfloat16

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
KERNELS = {
    "few keys": (attention_triton.takes_few_keys, attention_triton.attend_to_few_keys),
    "wide": (attention_triton.takes_wide, attention_triton.attend_wide),
}


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    if INTERPRETED:
        multiply_bfloat16(monkeypatch)
    monkeypatch.setenv("SFAST_CACHE_DIR", "")
    choice.forget()
    yield
    choice.forget()


def _inputs(
    B: int, H: int, T: int, N: int, D: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """As projections make them: [B, tokens, H, D], seen as [B, H, tokens, D]."""
    torch.manual_seed(T)
    query, key, value = (torch.randn(B, tokens, H, D).to(device, dtype).transpose(1, 2) for tokens in (T, N, N))
    return query, key, value


def _check(name: str, inputs: tuple[Tensor, ...], scale: float | None = None) -> None:
    takes, attend = KERNELS[name]
    assert takes(*inputs)

    def reference(*dense: Tensor) -> Tensor:  # which on a GPU does not take every stride
        return attention_reference(*(tensor.contiguous() for tensor in dense), scale)

    assert_close_to_fp64(attend(*inputs, scale), reference, *inputs)


@pytest.fixture
def kernel(runs_kernel: bool) -> None:
    if not runs_kernel:
        pytest.skip("needs a GPU or Triton's interpreter")


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("few keys", (2, 3, 130, 77, 40)),
        ("few keys", (1, 2, 33, 17, 80)),
        ("few keys", (1, 2, 7, 200, 48)),
        ("few keys", (1, 2, 9, 50, 160)),
        ("few keys", (2, 1, 65, 154, 24)),
        ("few keys", (1, 1, 1, 2, 5)),
        ("few keys", (5, 3, 14, 14, 64)),
        ("few keys", (3, 3, 24, 24, 40)),
        ("few keys", (5, 1, 19, 32, 120)),
        ("few keys", (9, 2, 1, 3, 7)),
        ("wide", (1, 1, 150, 130, 288)),
        ("wide", (2, 2, 10, 67, 260)),
    ],
    ids=str,
)
def test_kernels(name, shape, dtype, device) -> None:
    _check(name, _inputs(*shape, dtype, device))


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("scale", [0.0, 0.5, -0.3])
def test_any_scale(name, scale, device) -> None:
    inputs = _inputs(2, 2, 9, 20, 272 if name == "wide" else 24, torch.float16, device)
    exact = attention_reference(*(tensor.double() for tensor in inputs), scale)
    assert error(KERNELS[name][1](*inputs, scale), exact) <= 4e-4  # where PyTorch's kernels may well return NaN


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("name", KERNELS)
def test_any_strides(name, device) -> None:
    D = 272 if name == "wide" else 24
    packed = torch.randn(2, 20, 3, 2, D, device=device)  # [B, T, (q, k, v), H, D]: one product for all three
    _check(name, packed.permute(2, 0, 3, 1, 4).unbind(0))
    _check(name, torch.randn(3, 2, 2, 20, D, device=device).unbind(0))  # heads before tokens
    _check(name, torch.randn(3, 20, 2, 2, D + 3, device=device)[..., 1:-2].permute(0, 2, 3, 1, 4).unbind(0))
    shared = torch.randn(2, 1, 20, D, device=device).expand(2, 3, 20, D)  # all heads read the same
    _check(name, (shared, shared.flip(2), shared))


@pytest.mark.usefixtures("kernel")
def test_wide_heads_in_pieces(device, monkeypatch) -> None:
    inputs = _inputs(1, 2, 300, 70, 272, torch.float16, device)
    monkeypatch.setattr(attention_triton, "SCORES_BYTES", 128 * 70 * 4)
    monkeypatch.setattr(attention_triton, "WEIGHTS_BYTES", 256 * 70 * 2)
    monkeypatch.setattr(attention_triton, "WHOLE_ROW", 32)
    _check("wide", inputs)


@pytest.mark.usefixtures("kernel")
def test_weights_of_many_keys_do_not_vanish_and_sums_do_not_overflow(device) -> None:
    query, key, value = _inputs(1, 1, 4, 20000, 272, torch.float16, device)
    _check("wide", (query * 0, key, value + 100))  # each weight is 5e-5 of the sum; weights of 1 sum up to 2e6


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("what", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["query", "key", "value"])
def test_what_is_not_finite_spoils_no_other_pair(name, what, where, device) -> None:
    inputs = _inputs(3, 2, 5, 6, 272 if name == "wide" else 24, torch.float32, device)
    inputs[("query", "key", "value").index(where)][1, 1, 2, 3] = what
    spoilt = KERNELS[name][1](*inputs, None).isfinite().all(-1).all(-1).logical_not()
    assert spoilt.tolist() == [[False, False], [False, True], [False, False]]


def test_tiles_hold_all_keys_and_not_many_more() -> None:
    assert [attention_triton._two_tiles(n) for n in (1, 14, 77, 128, 154, 200)] == [
        (16, 0), (16, 0), (64, 16), (128, 0), (128, 32), (256, 0)
    ]  # fmt: skip
    for n in range(1, 257):
        assert n <= sum(attention_triton._two_tiles(n)) <= max(16, 2 * n)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(3, 2, 14, 8), (2, 1, 1, 5)], ids=str)
def test_one_key_is_the_value(shape, dtype, device) -> None:
    B, H, T, D = shape
    inputs = _inputs(B, H, T, 1, D, dtype, device)
    result = torch.ops.sfast.attention(*inputs, None)
    assert torch.equal(result, inputs[2].expand(B, H, T, D))
    torch.testing.assert_close(result, F.scaled_dot_product_attention(*inputs))  # fp32 rounds to TF32 on some GPUs
    assert result.transpose(1, 2).is_contiguous()
    result.add_(1)  # memory of its own


@pytest.mark.parametrize(
    "shape", [(2, 3, 40, 77, 24), (4, 2, 14, 14, 32), (1, 1, 20, 30, 264), (1, 2, 300, 300, 16)], ids=str
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_operator(shape, dtype, device) -> None:
    inputs = (*_inputs(*shape, dtype, device), 0.2)
    for _ in range(2):  # chooses, and has chosen
        assert_close_to_fp64(torch.ops.sfast.attention(*inputs), attention_reference, *inputs)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_masked_operator(dtype, device) -> None:
    B, H, T, N, D = 2, 3, 130, 77, 72
    query, key, value = _inputs(B, H, T, N, D, dtype, device)
    padded = torch.arange(N, device=device) < torch.tensor([40, 3], device=device)[:, None, None, None]  # [B, 1, 1, N]
    added = (1 - padded.to(dtype)) * -10000
    one_row = torch.randn(1, N, device=device, dtype=dtype)
    each = torch.randn(B, H, T, N, device=device, dtype=dtype)  # of each query: PyTorch's alone
    for mask in (padded, added, added.expand(B, H, 1, N), one_row, each, each[..., :1], added[0]):
        added_to = torch.zeros(mask.shape).masked_fill(~mask.cpu(), float("-inf")) if mask.dtype == torch.bool else mask
        scores = query.double() @ key.double().mT * 0.3 + added_to.to(device).double()
        for _ in range(2):
            result = torch.ops.sfast.masked_attention(query, key, value, mask, 0.3)
            assert error(result, scores.softmax(-1) @ value.double()) <= 5 * torch.finfo(dtype).eps
    assert not attention._supports_mask(query, key, value, each, 0.3)
    if device.type == "cuda" and attention._has_native(query.device):
        assert attention._supports_mask(query, key, value, one_row, 0.3)


def test_every_way_of_the_operator_is_right(device, monkeypatch) -> None:
    seen = []

    def run_all(question: str, ways: dict[str, choice.Way], *inputs: Any, layer: Any, under_load: bool) -> Tensor:
        for way in ways.values():
            assert_close_to_fp64(way(*inputs), attention_reference, *inputs)
        seen.append(list(ways))
        return ways["torch"](*inputs)

    monkeypatch.setattr(choice, "fastest", run_all)
    for D in (16, 40, 64, 72, 96, 128, 160, 256, 512):
        for T, N in ((14, 14), (130, 77), (300, 300)):
            torch.ops.sfast.attention(*_inputs(2, 2, T, N, D, torch.float16, device), None)
    if device.type == "cuda":
        assert len(seen) >= 20


def test_what_does_not_fit_is_left_to_pytorch() -> None:
    three = [torch.randn(2, 5, 8) for _ in range(3)]
    wide_values = [*(torch.randn(2, 2, 5, 8) for _ in range(2)), torch.randn(2, 2, 5, 12)]
    one_head = [torch.randn(2, 3, 5, 8), *(torch.randn(1, 3, 5, 8) for _ in range(2))]
    double = [torch.randn(2, 2, 5, 8, dtype=torch.float64) for _ in range(3)]
    for inputs in (three, wide_values, one_head, double):
        torch.testing.assert_close(torch.ops.sfast.attention(*inputs, None), F.scaled_dot_product_attention(*inputs))


def test_shapes_without_data() -> None:
    with torch.device("meta"):
        query, key, value = torch.empty(2, 3, 5, 8), torch.empty(2, 3, 7, 8), torch.empty(2, 3, 7, 12)
        assert torch.ops.sfast.attention(query, key, value, None).shape == (2, 3, 5, 12)
        assert torch.ops.sfast.attention(query[0], key[0], value[0], None).shape == (3, 5, 12)


@pytest.mark.gpu
def test_a_captured_call_uses_what_was_chosen_before() -> None:
    inputs = _inputs(2, 8, 256, 77, 64, torch.float16, torch.device("cuda", 0))
    expected = torch.ops.sfast.attention(*inputs, None)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        chosen = torch.ops.sfast.attention(*inputs, None)
        other = torch.ops.sfast.attention(*(tensor[:1] for tensor in inputs), None)  # never asked: the default
    graph.replay()
    assert torch.equal(chosen, expected)
    torch.testing.assert_close(other, expected[:1], rtol=2e-3, atol=2e-3)
    assert attention_reference(*inputs, None).shape == chosen.shape


def test_gpu_capability_decides_who_is_asked(monkeypatch) -> None:
    assert list(attention._ways(*_inputs(1, 1, 300, 300, 64, torch.float16, torch.device("cpu")))) == ["torch"]
