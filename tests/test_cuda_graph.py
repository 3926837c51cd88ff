"""Captured graphs: replay gives eager's result, results are safe to keep, memory stays within its budget."""

import gc
import logging
import threading
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sfast
from sfast import CompilationConfig
from sfast.cuda_graph import GraphPool, OverBudget

pytestmark = pytest.mark.gpu


class Net(nn.Module):
    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, width, 3, padding=1)
        self.norm = nn.GroupNorm(8, width)
        self.out = nn.Conv2d(width, 4, 3, padding=1)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.out(F.silu(self.norm(self.conv(x)))) + t.to(x.dtype)


@pytest.fixture
def net() -> Net:
    return Net().eval().requires_grad_(False).cuda().half()


def agree(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=2e-2, atol=2e-2)


def eager(net: nn.Module, *args: Tensor) -> Tensor:
    result: Tensor = type(net).forward(net, *args)
    return result


def data(batch: int = 2, size: int = 16, t: float = 1.0) -> tuple[Tensor, Tensor]:
    return torch.randn(batch, 4, size, size, device="cuda", dtype=torch.float16), torch.tensor(t)


def test_one_graph_for_each_shape_and_one_trace(net: Net) -> None:
    sfast.compile(net)
    for round_ in range(3):
        for size in (16, 24, 9):
            x, t = data(size=size, t=float(round_))  # t stays on the CPU, as schedulers keep it
            agree(net(x, t), eager(net, x, t))
    report = sfast.report(net)
    assert (report.traces, report.graphs, report.fallbacks) == (1, 3, [])
    assert report.graph_memory > 0


def test_results_are_safe_to_keep(net: Net) -> None:
    sfast.compile(net)
    inputs = [data() for _ in range(4)]
    kept = [net(*args) for args in inputs]
    for result, args in zip(kept, inputs, strict=True):
        agree(result, eager(net, *args))


def test_edited_moved_and_replaced_weights(net: Net) -> None:
    sfast.compile(net)
    x, t = data()
    net(x, t)
    net.conv.weight.mul_(2)  # read by the captured kernels
    agree(net(x, t), eager(net, x, t))
    net.conv.weight.data = torch.randn_like(net.conv.weight)  # elsewhere: captured again
    agree(net(x, t), eager(net, x, t))
    net.conv.weight = nn.Parameter(torch.randn_like(net.conv.weight), requires_grad=False)
    agree(net(x, t), eager(net, x, t))
    net.cpu()
    net.cuda()
    agree(net(x, t), eager(net, x, t))
    report = sfast.report(net)
    assert (report.traces, report.graphs) == (1, 1)


def test_restore_bit_for_bit_with_strides(net: Net) -> None:
    before = {name: (t.clone(), t.stride()) for name, t in net.state_dict().items()}
    sfast.compile(net)
    net(*data())
    assert net.conv.weight.is_contiguous(memory_format=torch.channels_last)
    sfast.restore(net)
    for name, tensor in net.state_dict().items():
        assert torch.equal(tensor, before[name][0]) and tensor.stride() == before[name][1]
    assert sfast.report(net).graph_memory == 0


def test_two_streams_and_two_threads(net: Net) -> None:
    sfast.compile(net)
    inputs = [data(size=size) for size in (16, 24, 32, 16)]
    expected = [eager(net, *args) for args in inputs]
    for args in inputs:
        net(*args)
    torch.cuda.synchronize()
    results: dict[int, list[Tensor]] = {}

    def work(i: int) -> None:
        with torch.no_grad(), torch.cuda.stream(torch.cuda.Stream()):
            results[i] = [net(*inputs[i]) for _ in range(50)]
            torch.cuda.current_stream().synchronize()

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(inputs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i, outputs in results.items():
        for output in outputs:
            agree(output, expected[i])


def test_least_recently_used_graphs_are_dropped_under_the_budget() -> None:
    pool = GraphPool(torch.device("cuda", torch.cuda.current_device()))

    def function(tensors: list[Tensor]) -> list[Tensor]:
        return [(tensors[0] * 2).sin()]

    a, b, c = (torch.randn(n, device="cuda") for n in (2**20, 2**21, 2**23))
    first, second = pool.capture(function, [a], budget=2**34), pool.capture(function, [b])
    assert torch.equal(first([a])[0], (a * 2).sin())
    used = pool.memory()
    assert used >= 4 * 2**20
    third = pool.capture(function, [c], budget=used + 88 * 2**20)
    assert second.graph is None and third.graph is not None  # the first was used after the second
    assert torch.equal(third([c])[0], (c * 2).sin())
    assert pool.memory() <= used + 88 * 2**20
    with pytest.raises(OverBudget, match="graph_memory_budget"):
        pool.capture(function, [c], budget=1000)
    assert pool.memory() == 0


@pytest.mark.parametrize("inference", [False, True])
def test_many_inputs_and_results_of_several_dtypes(inference: bool) -> None:
    pool = GraphPool(torch.device("cuda", torch.cuda.current_device()))

    def draw() -> list[Tensor]:
        tensors = [torch.randn(2, 3 + i, 5, 7, device="cuda", dtype=torch.float16) for i in range(5)]
        tensors[1] = tensors[1].contiguous(memory_format=torch.channels_last)
        tensors[2] = tensors[2].transpose(1, 3)
        return [*tensors, torch.randn(4, device="cuda"), torch.randint(9, (3,), device="cuda")]

    def function(tensors: list[Tensor]) -> list[Tensor]:
        return [*[tensor * 2 for tensor in tensors], tensors[0].expand(2, *tensors[0].shape) + 1]

    runner = pool.capture(function, draw())
    with torch.inference_mode(inference):
        inputs = [draw() for _ in range(3)]
        results = [runner(tensors) for tensors in inputs]
        for tensors, result in zip(inputs, results, strict=True):
            assert result is not None
            for mine, expected in zip(result, function(tensors), strict=True):
                assert torch.equal(mine, expected) and mine.stride() == expected.stride()


def test_memory_returns_with_the_module() -> None:
    torch.cuda.empty_cache()
    net = sfast.compile(Net(256).eval().requires_grad_(False).cuda().half())
    net(*data(size=64))
    assert sfast.report(net).graph_memory > 2**20
    pool = next(plan.runner.pool for plan in net.forward.plans.values())
    reserved = torch.cuda.memory_reserved()
    del net
    gc.collect()
    torch.cuda.empty_cache()
    assert pool.memory() == 0
    assert torch.cuda.memory_reserved() <= reserved - 2**20


@pytest.mark.parametrize("shared", [False, True])
def test_a_capture_that_breaks_off_leaves_nothing_behind(shared: bool) -> None:
    pool = GraphPool(torch.device("cuda", torch.cuda.current_device()))
    x = torch.randn(4, device="cuda")
    calls: list[int] = []
    seen: set[tuple[int, ...]] = set()  # the pools of failed captures

    def breaks(tensors: list[Tensor]) -> list[Tensor]:
        calls.append(1)
        seen.add(tuple(pool.handle))
        if len(calls) == 2:  # the first call only warms up
            torch.cuda.current_stream().synchronize()  # what a capture does not allow
        return [tensors[0] + torch.randn_like(tensors[0])]

    earlier = pool.capture(lambda tensors: [tensors[0] * 3], [x], budget=2**30) if shared else None
    for _ in range(2):
        calls.clear()
        with pytest.raises(RuntimeError, match="captur"):
            pool.capture(breaks, [x], budget=2**30)
        torch.randn(3, device="cuda")  # the generator is not left in the middle of the capture
    runner = pool.capture(lambda tensors: [tensors[0] * 2], [x])
    torch.testing.assert_close(runner([x])[0], x * 2)
    torch.randn(3, pin_memory=True)  # nor is the allocator of pinned memory
    used = pool.memory()
    assert used > 0
    if earlier is not None:
        assert torch.equal(earlier([x])[0], x * 3)
        pool.drop(earlier)
        assert 0 < pool.memory() < used
    pool.drop(runner)
    assert pool.memory() == 0
    gc.collect()
    torch.cuda.empty_cache()
    handles = {tuple(s["segment_pool_id"]) for s in torch.cuda.memory_snapshot()}
    assert handles.isdisjoint(seen)  # all of it is the driver's again


def test_a_budget_too_small_runs_without_a_graph_loudly(net: Net, caplog: pytest.LogCaptureFixture) -> None:
    sfast.compile(net, CompilationConfig(graph_memory_budget=1))
    x, t = data()
    with caplog.at_level(logging.WARNING, "sfast"):
        for _ in range(3):
            agree(net(x, t), eager(net, x, t))
    assert sfast.report(net).graphs == 0
    assert [r.message for r in caplog.records if "2x4x16x16, scalar: OverBudget" in r.message] != []
    assert len(caplog.records) == 1
    other = sfast.compile(Net().eval().requires_grad_(False).cuda().half())  # one budget is not everybody's
    agree(other(x, t), eager(other, x, t))
    assert sfast.report(other).graphs == 1


def test_a_failed_capture_runs_without_a_graph_loudly(caplog: pytest.LogCaptureFixture) -> None:
    class Waits(Net):
        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            return super().forward(x, t) + torch.nonzero(x.reshape(-1) > 0).shape[0] * 0  # waits for the GPU

    net = sfast.compile(Waits().eval().requires_grad_(False).cuda().half())
    x, t = data()
    with caplog.at_level(logging.WARNING, "sfast"):
        for _ in range(3):
            agree(net(x, t), eager(net, x, t))
    assert "without a CUDA graph" in caplog.text
    other = sfast.compile(Net().eval().requires_grad_(False).cuda().half())  # the next capture is not disturbed
    agree(other(x, t), eager(other, x, t))
    assert sfast.report(other).graphs == 1


def test_without_jit_the_eager_module_is_captured(net: Net) -> None:
    sfast.compile(net, CompilationConfig(enable_jit=False))
    for t in (1.0, 2.0):
        x, step = data(t=t)
        agree(net(x, step), eager(net, x, step))
    report = sfast.report(net)
    assert (report.graphs, report.fusions, report.fallbacks) == (1, {}, [])


def test_inference_mode_then_ordinary_calls(net: Net) -> None:
    sfast.compile(net)
    x, t = data()
    with torch.inference_mode():
        first = net(x, t)
    agree(net(x + 1, t), eager(net, x + 1, t))
    agree(first, eager(net, x, t))


def test_result_is_as_lossless_as_eager() -> None:
    net: Any = Net(320).eval().requires_grad_(False).cuda().double()
    x, t = torch.randn(2, 4, 64, 64, device="cuda", dtype=torch.float64), torch.tensor(1.0)
    reference = net(x, t)
    net.half()
    mine = sfast.compile(net)
    errors = [
        (result.double() - reference).norm() / reference.norm()
        for result in (mine(x.half(), t), eager(net, x.half(), t))
    ]
    assert errors[0] <= 1.2 * errors[1]
