"""What the tests of faults share: a pipeline and its eager picture, a small net in a loop, and every line of the log."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sfast
from sfast import CompilationConfig
from sfast.kernels import choice, op
from tests.tiny import TINY, Pipeline

TEXT_TO_IMAGE = TINY["text-to-image"]

Said = Callable[[], list[str]]


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture) -> Iterator[Said]:
    """What was logged since the last time somebody asked, of kernels too; nothing is left unasked for."""
    heard = 0

    def lines() -> list[str]:
        nonlocal heard
        messages = [record.getMessage() for record in caplog.records if record.name == "sfast"]
        new, heard = messages[heard:], len(messages)
        return new

    with caplog.at_level(logging.WARNING, "sfast"):
        yield lines
    assert lines() == []


def draw(pipe: Pipeline, size: int = 16) -> Tensor:
    return TEXT_TO_IMAGE.draw(pipe, size, steps=2)


@pytest.fixture(scope="module")
def right() -> Tensor:
    """Eager's picture."""
    return draw(TEXT_TO_IMAGE.build())


@pytest.fixture
def pipe() -> Iterator[Pipeline]:
    op.enable_again()
    choice.forget()
    yield TEXT_TO_IMAGE.build()
    op.enable_again()
    choice.forget()


def draws(pipe: Pipeline, right: Tensor, times: int = 2) -> None:
    for _ in range(times):
        assert (draw(pipe) - right).abs().max() < 1e-4


class Net(nn.Module):
    """Fused operators, merged linear layers, and a prompt to hoist."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, width, 3, padding=1)
        self.norm = nn.GroupNorm(2, width)
        self.keys, self.values = nn.Linear(6, width), nn.Linear(6, width)
        self.out = nn.Conv2d(width, 4, 3, padding=1)

    def forward(self, x: Tensor, prompt: Tensor) -> Tensor:
        shift = F.silu(self.keys(prompt)) + self.values(prompt)
        return self.out(F.silu(self.norm(self.conv(x)) + shift[:, :, None, None]))


HOISTING = CompilationConfig(enable_hoisting=True)


@pytest.fixture
def net() -> Net:
    return sfast.compile(Net().eval().requires_grad_(False), HOISTING)


def data(side: int = 6, device: str = "cpu", dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    return torch.randn(2, 4, side, side).to(device, dtype), torch.randn(2, 6).to(device, dtype)


@torch.no_grad()
def agree(net: Net, side: int = 6, calls: int = 3) -> None:
    """Some steps of a loop, compared with eager."""
    weight = net.conv.weight
    x, prompt = data(side, weight.device.type, weight.dtype)
    limit = 1e-5 if weight.dtype is torch.float32 else 2e-2
    for i in range(calls):
        right = Net.forward(net, x + i, prompt)
        assert (net(x + i, prompt) - right).norm() <= limit * right.norm()


class Kernel:
    """In the place of a Triton kernel: `kernel[grid](...)` does something else."""

    def __init__(self, launch: Callable[..., Any]) -> None:
        self.launch = launch

    def __getitem__(self, grid: Any) -> Callable[..., Any]:
        return self.launch
