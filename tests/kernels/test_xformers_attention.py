"""xformers' attention: used in its own layout where it works, PyTorch's with one line where it is missing or fails."""

import logging
import sys
import types
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sfast import fallback
from sfast.kernels import op, xformers_attention


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    def forget() -> None:
        xformers_attention._memory_efficient_attention.cache_clear()
        op.enable_again()
        fallback.forget()

    forget()
    yield
    forget()


def _install(monkeypatch: pytest.MonkeyPatch, attend: Any) -> None:
    package, ops = types.ModuleType("xformers"), types.ModuleType("xformers.ops")
    package.ops, ops.memory_efficient_attention = ops, attend  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "xformers", package)
    monkeypatch.setitem(sys.modules, "xformers.ops", ops)


def _inputs() -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(2, 3, 5, 8), torch.randn(2, 3, 7, 8), torch.randn(2, 3, 7, 8)


def _runs_as_pytorch(caplog: pytest.LogCaptureFixture, line: str) -> None:
    inputs = _inputs()
    with caplog.at_level(logging.WARNING, "sfast"):
        for _ in range(2):
            torch.testing.assert_close(
                torch.ops.sfast.xformers_attention(*inputs, None), F.scaled_dot_product_attention(*inputs)
            )
    assert len(caplog.records) == 1
    assert line in caplog.text


def test_gets_tokens_before_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = []

    def attend(query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
        shapes.append((tuple(query.shape), tuple(key.shape), tuple(value.shape)))
        heads_first = (tensor.transpose(1, 2) for tensor in (query, key, value))
        return F.scaled_dot_product_attention(*heads_first, scale=scale).transpose(1, 2)

    _install(monkeypatch, attend)
    query, key, value = _inputs()
    result = torch.ops.sfast.xformers_attention(query, key, value, 0.3)
    torch.testing.assert_close(result, F.scaled_dot_product_attention(query, key, value, scale=0.3))
    assert shapes == [((2, 5, 3, 8), (2, 7, 3, 8), (2, 7, 3, 8))]


@pytest.mark.usefixtures("falls_back")
def test_missing_falls_back_with_one_line(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setitem(sys.modules, "xformers", None)
    _runs_as_pytorch(caplog, "xformers attention: runs as PyTorch's")


@pytest.mark.usefixtures("falls_back")
def test_failing_falls_back_with_one_line(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def attend(*args: Tensor, scale: float | None) -> Tensor:
        raise NotImplementedError("No operator found for this attention")

    _install(monkeypatch, attend)
    _runs_as_pytorch(caplog, "No operator found")
