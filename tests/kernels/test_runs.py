"""Runs of equal rows, products of counted rows, and modulations that read where a run's row stands, against fp64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sfast.kernels import linear_runs, modulate, runs
from sfast.kernels import modulate_references as references
from sfast.kernels.triton_or_none import INTERPRETED
from tests.kernels.fp64 import assert_close_to_fp64, error
from tests.kernels.interpreter import multiply_bfloat16

ops = torch.ops.sfast
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
LENGTHS = {"one": [70], "frames": [3, 35, 32], "each": [1] * 70}


def rows_of(lengths: list[int], width: int, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Rows [sum of lengths, width] in runs of these lengths, and the place of each row's run."""
    place = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)).to(device)
    return torch.randn(len(lengths), width, device=device).to(dtype)[place], place


@DTYPES
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=list(LENGTHS))
def test_rows_that_equal_the_one_before_them_are_a_run(lengths, dtype, device) -> None:
    x, place = rows_of(lengths, 300, device, dtype)
    first, run, count = ops.runs(x.view(2, 35, 300))
    assert first.shape == (2, 35, 300) and run.dtype == count.dtype == torch.int32
    assert count.tolist() == [len(lengths)] and run.tolist() == place.tolist()
    assert torch.equal(first.flatten(0, 1)[: len(lengths)], x[[0, *torch.tensor(lengths).cumsum(0).tolist()[:-1]]])
    assert torch.equal(runs.spread(first, run).flatten(0, 1), x)


def test_runs_are_of_bits(device, monkeypatch) -> None:
    monkeypatch.setattr(runs, "AT_ONCE", 4)
    x = torch.tensor([0.0, -0.0, -0.0, float("nan"), float("nan"), 1.0, 1.0, 0.0, 0.0], device=device)[:, None]
    _, run, count = ops.runs(x)
    assert run.tolist() == [0, 1, 1, 2, 2, 3, 3, 4, 4] and count.item() == 5
    assert ops.runs(x.expand(9, 3)[:, :2])[1].tolist() == run.tolist()
    x = x.expand(9, 700).contiguous()
    x[6, 699] = 2
    assert ops.runs(x)[1].tolist() == [0, 1, 1, 2, 2, 3, 4, 5, 5]


@DTYPES
@pytest.mark.parametrize(("rows", "count"), [(70, 1), (70, 66), (70, 70)])
def test_a_product_of_counted_rows(rows, count, dtype, device, runs_kernel, monkeypatch) -> None:
    if INTERPRETED:
        multiply_bfloat16(monkeypatch)
    x = torch.randn(2, rows // 2, 150, device=device).to(dtype)
    x.flatten(0, 1)[count:] = float("nan")  # nobody shall look at them
    weight, bias = torch.randn(90, 150, device=device).to(dtype) / 12, torch.randn(90, device=device).to(dtype)
    counted = torch.tensor([count], dtype=torch.int32, device=device)
    for silu, each, like in (
        (True, bias, None),
        (False, None, None),
        (False, bias, torch.zeros((), dtype=torch.bfloat16)),
    ):
        if like is not None and dtype == torch.float16:
            continue
        like = None if like is None else like.to(device)
        inputs = (x, weight, each, counted, silu, like)
        if runs_kernel:
            assert linear_runs._takes(*inputs)
        result = ops.linear_runs(*inputs)
        assert result.shape == (2, rows // 2, 90) and result.dtype == (dtype if like is None else like.dtype)
        known = result.flatten(0, 1)[:count]
        exact = F.linear(x.flatten(0, 1)[:count].double(), weight.double(), None if each is None else each.double())
        exact = F.silu(exact) if silu else exact
        allowed = max((1.2 if runs_kernel else 2.5) * error(exact.to(result.dtype), exact), 1e-6)  # it rounds twice
        if INTERPRETED and result.dtype == torch.bfloat16:
            allowed = 8e-3  # the interpreter truncates
        assert error(known, exact) <= allowed


def test_what_is_left_to_the_reference(device) -> None:
    x, weight = torch.randn(6, 8, device=device), torch.randn(4, 8, device=device)
    count, like = torch.ones(1, dtype=torch.int32, device=device), torch.zeros((), device=device)
    for inputs in (
        (x.double(), weight.double(), None, count, True, None),
        (x, weight.half(), None, count, True, None),
        (x, weight[:, :7], None, count, True, None),
        (x[:, ::2], weight[:, ::2].contiguous(), None, count, True, None),
        (x.half(), weight.half(), None, count, False, like),  # the sum is rounded before that
        (x, weight, None, count.long(), False, None),
    ):
        assert not linear_runs._takes(*inputs)
    plain = (x.double(), weight.double(), None, count, True, None)
    assert torch.equal(ops.linear_runs(*plain), linear_runs.linear_runs_reference(*plain))


def modulation(
    lengths: list[int], B: int, C: int, dtype: torch.dtype, device: torch.device
) -> tuple[list, list, Tensor]:
    """Tables, what is added to them for each run (elsewhere: NaN), and the run of each token."""
    tables = (0.5 * torch.randn(1, 1, 6, C, device=device)).chunk(6, 2)
    each = (0.5 * torch.randn(B, sum(lengths) // B, 6, C, device=device)).to(dtype)
    each.flatten(0, 1)[len(lengths) :] = float("nan")
    run = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)).int().to(device)
    return list(tables), list(each.chunk(6, 2)), run


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=list(LENGTHS))
def test_a_modulation_that_stands_once_for_each_run(lengths, dtype, device, runs_kernel) -> None:
    B, C = 2, 40
    x, y = (torch.randn(B, sum(lengths) // B, C, device=device).to(dtype) for _ in range(2))
    tables, each, run = modulation(lengths, B, C, dtype, device)
    norm = ([C], torch.randn(C, device=device), torch.randn(C, device=device), 1e-6)
    narrow = each[2].contiguous()  # spaced otherwise than the others
    two = (tables[1], each[1], tables[0], narrow)
    for name, parts, inputs in [
        ("layer_norm_modulate_runs", (None,), (x, *norm, *two, run)),
        ("gate_add_layer_norm_runs", (0, 1), (x, y, tables[2], each[5], *norm, run)),
        ("gate_add_layer_norm_modulate_runs", (0, 1), (x, y, tables[2], each[5], *norm, *two, run)),
    ]:
        if runs_kernel:
            assert modulate.takes(modulate.JOBS[name](*inputs))
        result = getattr(ops, name)(*inputs)
        reference = references.of_runs(getattr(references, f"{name.removesuffix('_runs')}_sums_reference"))
        for part in parts:
            assert_close_to_fp64(result if part is None else result[part], reference, *inputs, part=part)


def test_runs_that_do_not_fit_are_left_to_the_reference(device) -> None:
    x = torch.randn(2, 6, 8, device=device).bfloat16()
    tables, each, run = modulation([12], 2, 8, torch.bfloat16, device)
    norm, name = ([8], None, None, 1e-6), "layer_norm_modulate_runs"
    uneven = torch.randn(2, 7, 1, 8, device=device).bfloat16()[:, :6]
    shared = torch.randn(2, 1, 1, 8, device=device).bfloat16()  # for each sample
    for more, runs_ in ((each[1], run.long()), (uneven, run), (shared, run[:2])):
        inputs = (x, *norm, tables[1], more, tables[0], more, runs_)
        assert not modulate.takes(modulate.JOBS[name](*inputs))
        torch.testing.assert_close(
            ops.layer_norm_modulate_runs(*inputs),
            references.of_runs(references.layer_norm_modulate_sums_reference)(*inputs),
        )


def test_fake_tensors(device) -> None:
    x = torch.randn(2, 6, 8, device=device)
    tables, each, run = modulation([12], 2, 8, torch.float32, device)
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(ops.runs.default, (x,), test_utils=checks)
    count = torch.ones(1, dtype=torch.int32, device=device)
    inputs = (x, torch.randn(5, 8, device=device), None, count, True, x.bfloat16())
    torch.library.opcheck(ops.linear_runs.default, inputs, test_utils=checks)
    inputs = (x, [8], None, None, 1e-6, tables[1], each[1], tables[0], each[0], run)
    torch.library.opcheck(ops.layer_norm_modulate_runs.default, inputs, test_utils=checks)
