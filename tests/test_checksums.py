"""Other values are told from those before, once for each picture and ahead of it; the kernel itself is in tests/kernels."""

from __future__ import annotations

import copy
import ctypes
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

import sfast
from sfast.checksums import Checksums
from sfast.component import component_of
from sfast.kernels import checksum
from tests import graphs

pool = graphs.pool


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The kernel, done by the CPU: it reads the addresses that it is given. A note for every launch."""
    launches: list[Any] = []

    def checksums(spans: Tensor) -> Tensor:
        launches.append("checksums")
        memory = [(ctypes.c_char * (checksum.WORD * n)).from_address(at) for at, n in zip(*spans.tolist(), strict=True)]
        return torch.tensor([checksum.reference(torch.frombuffer(each, dtype=torch.uint8)) for each in memory])

    monkeypatch.setattr(checksum, "runs_on", lambda device: True)
    monkeypatch.setattr(checksum, "checksums", checksums)
    return launches


def tensors() -> list[Tensor]:
    layout = torch.randn(4, 8, 3, 3).contiguous(memory_format=torch.channels_last)
    return [torch.randn(6, 5), layout, torch.randn(4, 6)[:, :3], torch.randn(3).half(), torch.randn(8).double()]


def test_what_the_kernel_takes_and_what_it_does_not(launched: list[Any]) -> None:
    some = tensors()
    sums = Checksums(some)
    before = sums.get()
    assert [type(each) for each in before] == [int, int, tuple, tuple, int]
    assert sums.get() == before
    assert launched == ["checksums"] * 2
    for place, tensor in enumerate(some):
        tensor.data.neg_()
        sums.start()
        now = sums.get()
        assert [a != b for a, b in zip(now, before, strict=True)] == [i == place for i in range(len(some))]
        before = now


def test_a_kernel_that_fails_in_between(launched: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    some = tensors()
    sums = Checksums(some)
    before = sums.get()
    monkeypatch.setattr(checksum, "checksums", lambda spans: None)
    sums.start()
    now = sums.get()
    assert all(a != b for a, b in zip(now, before, strict=True) if type(b) is int)  # taken for changed, once
    assert sums.get() == now
    some[0].data.neg_()
    assert sums.get() != now


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x).relu()


def adapted() -> nn.Module:
    torch.manual_seed(0)
    module = Layer()
    peft.inject_adapter_in_model(peft.LoraConfig(r=4, target_modules=["a"], init_lora_weights=False), module)
    return module.eval().requires_grad_(False)


@torch.no_grad()
def test_uncounted_edits_are_looked_for_ahead_of_the_first_step_of_a_picture(
    launched: list[Any], pool: graphs.Pool
) -> None:
    eager = adapted()
    compiled = sfast.compile(copy.deepcopy(eager))
    component = component_of(compiled)
    assert component is not None
    pool.before_results = lambda: launched.append("replay")
    x = torch.randn(3, 16)

    def check(*expected: str) -> None:
        launched.clear()
        torch.testing.assert_close(compiled(x), eager(x))
        assert launched == list(expected)

    compiled(x)
    check("replay")
    component.pictures._own += 1
    check("checksums", "replay")
    check("replay")
    for factor in (lambda m: m.a.lora_A["default"].weight, lambda m: m.a.base_layer.weight):
        for module in (eager, compiled):
            factor(module).data.neg_()  # of which nothing counts
        component.pictures._own += 1
        check("checksums", "replay", "checksums", "replay")  # the first replay is thrown away
        check("replay")
    for module in (eager, compiled):
        module.a.lora_B["default"].weight.mul_(2)  # counted: seen at once, and nothing is launched ahead
        module.a.lora_A["default"].weight.data = module.a.lora_A["default"].weight.data.clone()
    component.pictures._own += 1
    check("replay", "checksums", "replay")
    component.pictures._own += 1
    check("checksums", "replay")
    report = sfast.report(compiled)
    assert (report.traces, report.graphs) == (1, 1)
