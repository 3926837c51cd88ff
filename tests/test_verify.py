"""The comparison with eager: what counts as equal, what as wrong."""

import math

import pytest
import torch

from sfast.verify import relative_error, tolerance


def test_relative_error_is_a_ratio_of_norms() -> None:
    expected = torch.tensor([3.0, 4.0])
    assert relative_error(expected + torch.tensor([0.05, 0.0]), expected) == pytest.approx(0.01)
    assert relative_error(expected, expected) == 0


def test_infinities_must_agree() -> None:
    expected = torch.tensor([1.0, -math.inf, math.nan])
    assert relative_error(expected.clone(), expected) == 0
    assert relative_error(torch.tensor([1.0, -math.inf, 0.0]), expected) == math.inf
    assert relative_error(torch.tensor([math.nan, -math.inf, math.nan]), expected) == math.inf


def test_zeros_and_integers_are_exact() -> None:
    assert relative_error(torch.zeros(3), torch.zeros(3)) == 0
    assert relative_error(torch.full((3,), 1e-9), torch.zeros(3)) == math.inf
    assert relative_error(torch.tensor([1, 2]), torch.tensor([1, 2])) == 0
    assert relative_error(torch.tensor([1, 3]), torch.tensor([1, 2])) == math.inf


def test_complex_numbers_may_be_rounded_too() -> None:
    expected = torch.tensor([3 + 4j, 0j])
    assert relative_error(expected * 1.1, expected.conj().conj()) == pytest.approx(0.1)
    assert tolerance(expected) == tolerance(expected.real) > 0


def test_half_precision_is_compared_in_fp32() -> None:
    expected = torch.full((10_000,), 60_000.0, dtype=torch.float16)  # its norm is above fp16's range
    assert relative_error(expected, expected) == 0
    assert relative_error(expected * 0.5, expected) == pytest.approx(0.5)


def test_lower_precision_may_differ_more() -> None:
    limits = [
        tolerance(torch.ones(1, dtype=dtype)) for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16)
    ]
    assert limits == sorted(limits) and limits[-1] < 0.1
    assert tolerance(torch.ones(1, dtype=torch.int64)) == 0


def test_under_autocast_the_precision_is_that_of_autocast() -> None:
    single = torch.ones(1)
    alone = tolerance(single)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert tolerance(single) == tolerance(torch.ones(1, dtype=torch.bfloat16)) > alone
        assert tolerance(torch.ones(1, dtype=torch.int64)) == 0
    assert tolerance(single) == alone
