"""Whatever fails, eager's picture is drawn and one line says what happened.

Faults are put into the real code paths: into a kernel's launch, a capture, the memory of the GPU (without one, graphs are
those of `tests/graphs.py`).
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sfast
from sfast import CompilationConfig
from sfast.backoff import Backoff
from sfast.cuda_graph import make_room
from sfast.trace import Trace
from tests.faults import HOISTING, TEXT_TO_IMAGE, Kernel, Net, Said, agree, data, draw, draws, net, pipe, right, said
from tests.graphs import CPU, OUT_OF_MEMORY, Pool, pool
from tests.tiny import Pipeline

__all__ = ["net", "pipe", "pool", "right", "said"]  # fixtures

# Kernels.


def refuse(*args: Any, **kwargs: Any) -> Any:
    raise RuntimeError("PassManager::run failed\nand what the compiler says besides")


def test_a_triton_kernel_that_cannot_be_compiled(
    pipe: Pipeline, right: Tensor, said: Said, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sfast.kernels.group_norm.triton_takes", lambda x: True)
    for kernel in ("moments", "merge", "apply", "whole_group"):
        monkeypatch.setattr(f"sfast.kernels.group_norm.{kernel}", Kernel(refuse))
    draws(sfast.compile(pipe), right)
    lines = said()
    assert len(lines) == len({line.split(" for ")[0] for line in lines})
    assert {line.split(" for ")[1] for line in lines} == {
        "torch.float32 on cpu: runs as plain PyTorch: RuntimeError: PassManager::run failed"
    }
    assert ("kernel group_norm_silu for torch.float32 on cpu", lines[0].partition("cpu: ")[2]) in sfast.report(
        pipe
    ).fallbacks
    assert sfast.report(pipe).fusions["group_norm_silu"] > 0


def test_a_convolution_without_a_plan(
    pipe: Pipeline, right: Tensor, said: Said, monkeypatch: pytest.MonkeyPatch
) -> None:
    failures = ["conv2d x [1,16,8,8]: no kernel", "conv2d x [1,16,8,8]: every kernel failed"]

    def native(*args: Any) -> Any:
        raise RuntimeError(f"sfast_native: {failures[0] if len(args[1]) > 16 else failures[1]}")

    monkeypatch.setattr("sfast.kernels.conv2d.native_conv2d_takes", lambda *args: True)
    monkeypatch.setattr("sfast.kernels.nearby.conv2d", native)
    draws(sfast.compile(pipe), right)
    lines = said()
    assert {line.partition("RuntimeError: ")[2] for line in lines} == {f"sfast_native: {why}" for why in failures}
    assert all(line.startswith("kernel conv2d_") and "runs as plain PyTorch" in line for line in lines)


def test_a_kernel_that_computes_wrong_is_caught_and_used_no_more(
    pipe: Pipeline, right: Tensor, said: Said, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(x: Tensor, y: Tensor, *rest: Any, **options: Any) -> None:
        y.copy_(x * 0.9)

    monkeypatch.setattr("sfast.kernels.group_norm.triton_takes", lambda x: True)
    monkeypatch.setattr("sfast.kernels.group_norm.whole_group", Kernel(wrong))
    monkeypatch.setattr("sfast.kernels.group_norm.moments", Kernel(lambda *args, **options: None))
    monkeypatch.setattr("sfast.kernels.group_norm.merge", Kernel(lambda *args, **options: None))
    monkeypatch.setattr("sfast.kernels.group_norm.apply", Kernel(wrong))
    draws(sfast.compile(pipe), right)
    lines = said()
    assert len(lines) == 2  # UNet and decoder
    assert all("runs without fusions at " in line and "with them, relative error" in line for line in lines)
    assert "group_norm_silu" not in sfast.report(pipe).fusions
    larger = draw(TEXT_TO_IMAGE.build(), 32)
    assert (draw(pipe, 32) - larger).abs().max() < 1e-4
    assert said() == []  # what was right before is tried first


def test_a_kernel_that_is_wrong_at_one_shape_alone(net: Net, said: Said, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Trace.run

    def wrong_at_seven(self: Trace, weights: list[Tensor], tensors: list[Tensor]) -> list[Tensor]:
        results = run(self, weights, tensors)
        return [result * 1.01 if self.fusions and result.shape[-1] == 7 else result for result in results]

    monkeypatch.setattr(Trace, "run", wrong_at_seven)
    sfast.compile(net, CompilationConfig())
    for side in (6, 7, 8, 7, 6):
        agree(net, side)
    (line,) = said()
    assert line.startswith("Net: runs without fusions at 2x4x7x7, 2x6: with them, relative error 0.01 against eager")
    assert sfast.report(net).fusions  # at the others it is fused


@pytest.mark.parametrize("shape", [(1, 3, 1, 2), (3, 3, 2, 5), (0, 3, 4, 4)])
def test_a_shape_that_no_kernel_supports(shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch, said: Said) -> None:
    net = nn.Sequential(nn.Conv2d(3, 5, 1), nn.GroupNorm(5, 5, eps=1e-3), nn.SiLU(), nn.Conv2d(5, 3, 3, padding=1))
    sfast.compile(net.eval().requires_grad_(False))
    for _ in range(3):
        x = torch.randn(shape)
        torch.testing.assert_close(net(x), nn.Sequential.forward(net, x))
    assert sfast.report(net).traces == 1 and said() == []


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(1, 3, 1, 2), (3, 3, 2, 5), (0, 3, 4, 4)])
def test_on_a_gpu_a_shape_that_no_kernel_supports(shape: tuple[int, ...]) -> None:
    net = nn.Sequential(nn.Conv2d(3, 5, 1), nn.GroupNorm(5, 5, eps=1e-3), nn.SiLU(), nn.Conv2d(5, 3, 3, padding=1))
    sfast.compile(net.cuda().half().eval().requires_grad_(False))
    for _ in range(3):
        x = torch.randn(shape, device="cuda", dtype=torch.float16)
        torch.testing.assert_close(net(x), nn.Sequential.forward(net, x), rtol=2e-2, atol=2e-2)


@pytest.mark.gpu
def test_on_a_gpu_a_recipe_that_makes_no_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    from sfast import native

    if not native.available():
        pytest.skip(str(native.why_not()))
    recipes = iter(["cuDNN 99999", "cublasLt 1 2 3", "hopper 7x7", "nonsense", "cuDNN x", ""] * 99)
    monkeypatch.setattr("sfast.kernels.nearby.Nearby._recipe", lambda self, op, numbers: next(recipes))
    net = sfast.compile(Net(64).cuda().half().eval().requires_grad_(False))
    for side in (16, 24, 40):
        agree(net, side)
    assert sfast.report(net).traces == 1


# Capture.


def test_a_capture_that_fails(pipe: Pipeline, right: Tensor, pool: Pool, said: Said) -> None:
    def waits() -> None:
        raise RuntimeError("operation not permitted when stream is capturing")

    pool.before_capture = waits
    draws(sfast.compile(pipe), right)
    lines = said()
    assert {line.partition(":")[0] for line in lines} == {"unet", "vae.decoder", "text_encoder"}
    why = "RuntimeError: operation not permitted when stream is capturing"
    assert all(" runs without a CUDA graph at " in line and line.endswith(why) for line in lines)
    assert sfast.report(pipe).graphs == 0
    pool.before_capture = lambda: None
    captures = pool.captures
    draws(pipe, right)
    assert pool.captures == captures  # it would fail again


def test_a_capture_that_fails_where_the_call_is_parted(pool: Pool, net: Net, said: Said) -> None:
    failures = iter([None, None, RuntimeError("the body cannot be captured")])

    def fails() -> None:
        if (error := next(failures, None)) is not None:
            raise error

    pool.before_capture = fails
    agree(net, calls=5)
    assert said() == ["Net: nothing is hoisted at 2x4x6x6, 2x6: RuntimeError: the body cannot be captured"]
    assert sfast.report(net).graphs == 1


# Memory.


def out_of_memory(*args: Any, **kwargs: Any) -> Any:
    raise torch.OutOfMemoryError(OUT_OF_MEMORY)


def test_out_of_memory_while_it_is_traced(
    pipe: Pipeline, right: Tensor, said: Said, monkeypatch: pytest.MonkeyPatch
) -> None:
    sfast.compile(pipe)
    with monkeypatch.context() as short:
        short.setattr("sfast.prepare.trace", out_of_memory)
        draws(pipe, right, 1)
    lines = said()
    assert len(lines) == 3  # UNet, decoder, text encoder
    assert all(", until there is more memory: OutOfMemoryError: CUDA out of memory" in line for line in lines)
    assert sfast.report(pipe).traces == 0
    draws(pipe, right, 9)
    assert sfast.report(pipe).traces == 3


def test_out_of_memory_while_it_is_traced_is_not_tried_for_ever(net: Net, monkeypatch: pytest.MonkeyPatch) -> None:
    tries = []
    monkeypatch.setattr("sfast.prepare.trace", lambda *args: tries.append(1) or out_of_memory())
    agree(net, calls=400)
    assert 3 <= len(tries) <= Backoff.TRIES


def test_a_graph_that_there_is_no_memory_for(pool: Pool, net: Net, said: Said) -> None:
    pool.used_by_others = pool.size
    agree(net, calls=40)
    (line,) = said()
    assert line == f"Net: runs without a CUDA graph at 2x4x6x6, 2x6: OutOfMemoryError: {OUT_OF_MEMORY}"
    assert sfast.report(net).graphs == 0 and pool.captures == 1  # nothing has changed: it would fail again
    pool.used_by_others = 0
    agree(net, calls=40)
    report = sfast.report(net)
    assert report.graphs == 2 and len(report.fallbacks) == 1


def test_a_graph_that_there_is_never_memory_for_is_not_tried_for_ever(pool: Pool, net: Net, said: Said) -> None:
    pool.before_capture = out_of_memory
    for _ in range(20):
        pool.size *= 2  # there seems to be more every time
        agree(net, calls=40)
    assert 3 <= pool.captures <= Backoff.TRIES and sfast.report(net).graphs == 0
    assert len(said()) == 1


def test_older_graphs_make_room_for_a_new_one(pool: Pool, net: Net, said: Said) -> None:
    sfast.compile(net, CompilationConfig(graph_memory_budget=2**40))  # so only the memory itself is a limit
    agree(net, 7)
    pool.size = pool.memory() + 10
    agree(net, 6)
    assert said() == ["CUDA graphs: memory of cpu ran out: all were dropped, until more of it is free"]
    report = sfast.report(net)
    assert (report.graphs, pool.runners()[0].inputs[0].shape[-1], pool.captures) == (1, 6, 3)
    agree(net, 7)
    assert sfast.report(net).graphs == 1  # it would drive the other one out


def test_out_of_memory_in_a_replay_drops_the_graphs_and_the_step_goes_on(pool: Pool, net: Net, said: Said) -> None:
    agree(net)
    assert sfast.report(net).graphs == 2
    pool.used_by_others = pool.size // 2
    pool.before_results = out_of_memory
    agree(net, calls=1)
    assert sfast.report(net).graphs == 0 and pool.memory() == 0
    assert said() == ["CUDA graphs: memory of cpu ran out: all were dropped, until more of it is free"]
    pool.before_results = lambda: None
    captures = pool.captures
    agree(net, calls=40)
    assert pool.captures == captures and sfast.report(net).graphs == 0  # as little as before
    pool.used_by_others = 0
    agree(net, calls=40)
    assert sfast.report(net).graphs == 2 and said() == []


def test_graphs_return_after_a_short_want_of_memory_and_not_for_ever(pool: Pool, net: Net, said: Said) -> None:
    """As where another module's step needs, for a moment, what the graphs hold."""
    agree(net)
    returned = []
    for _ in range(12):
        pool.used_by_others = pool.size - pool.memory()
        make_room(CPU)
        pool.used_by_others = pool.size // 2
        agree(net, calls=30)
        returned.append(sfast.report(net).graphs > 0)
    assert returned[0] and not returned[-1] and 2 <= sum(returned) < 12
    assert len(said()) == 1


def test_eager_gets_the_memory_of_the_graphs(pool: Pool, net: Net, said: Said, monkeypatch: pytest.MonkeyPatch) -> None:
    agree(net)
    forward, calls = Net.forward, []

    def needs_all(self: Net, x: Tensor, prompt: Tensor) -> Tensor:
        calls.append(pool.memory())
        return out_of_memory() if pool.memory() else forward(self, x, prompt)

    x, prompt = data(9)
    expected = forward(net, x, prompt)
    net.forward.eager = lambda *args: needs_all(net, *args)
    with torch.no_grad():
        torch.testing.assert_close(net(x, prompt), expected)
    assert calls[0] > 0 and calls[1] == 0
    assert said() == ["CUDA graphs: memory of cpu ran out: all were dropped, until more of it is free"]


def test_out_of_memory_operator_by_operator_runs_eager(
    pool: Pool, net: Net, said: Said, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool.used_by_others = pool.size
    agree(net)
    monkeypatch.setattr(Trace, "run", out_of_memory)
    agree(net)
    lines = said()
    assert lines[-1] == f"Net: ran eager at 2x4x6x6, 2x6: OutOfMemoryError: {OUT_OF_MEMORY}"


@pytest.mark.gpu
@torch.no_grad()
def test_on_a_gpu_near_the_end_of_its_memory_a_step_runs_without_a_graph(said: Said) -> None:
    config = CompilationConfig(graph_memory_budget=2**40)  # so only the memory itself is a limit
    net = sfast.compile(Net(256).cuda().half().eval().requires_grad_(False), config)
    inputs = {side: data(side, "cuda", torch.float16) for side in (512, 480)}
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    right = {side: Net.forward(net, *given) for side, given in inputs.items()}
    needed = torch.cuda.max_memory_allocated() - before
    torch.cuda.empty_cache()
    # Enough for a step and not for two: a graph at one size leaves no room for a step at the other.
    ballast = torch.empty(int(torch.cuda.mem_get_info()[0] - 1.6 * needed - 2**29), dtype=torch.uint8, device="cuda")
    for side in (512, 480) * 3:
        assert (net(*inputs[side]) - right[side]).norm() <= 2e-2 * right[side].norm(), side
    assert all("memory" in line for line in said())
    del ballast
    torch.cuda.empty_cache()
    for side in (512, 480) * 40:
        assert (net(*inputs[side]) - right[side]).norm() <= 2e-2 * right[side].norm(), side
    assert sfast.report(net).graphs > 0


@pytest.mark.gpu
def test_on_a_gpu_a_graph_is_captured_once_there_is_memory(said: Said, monkeypatch: pytest.MonkeyPatch) -> None:
    net = sfast.compile(Net(256).cuda().half().eval().requires_grad_(False), HOISTING)
    agree(net, 16)
    component = net.forward
    pool = next(iter(component.plans.values())).pool
    with monkeypatch.context() as short:
        short.setattr(pool, "_results", out_of_memory)
        agree(net, 16, calls=2)
    assert sfast.report(net).graphs == 0 and pool.memory() == 0
    (line,) = said()
    assert line.startswith("CUDA graphs: memory of cuda:") and "ran out: all were dropped" in line
    monkeypatch.setattr(pool, "free", lambda: 2**60)  # much more than before
    agree(net, 16, calls=40)
    assert sfast.report(net).graphs == 2


# Copies.


def test_a_shallow_copy_is_not_the_original(net: Net) -> None:
    agree(net)
    other = copy.copy(net)
    assert sfast.report(other).components == [] and sfast.report(net).components == ["Net"]
    x, prompt = data()
    other.norm = nn.Identity()  # the two share their submodules; a plain attribute is the copy's own
    other.__class__ = type("Doubled", (Net,), {"forward": lambda self, x, prompt: 2 * Net.forward(self, x, prompt)})
    with torch.no_grad():
        torch.testing.assert_close(other(x, prompt), 2 * Net.forward(net, x, prompt))
        torch.testing.assert_close(net(x, prompt), Net.forward(net, x, prompt))
