"""Whatever fails, eager's picture is drawn and one line says what happened.

Faults are put into the real code paths: into a kernel's launch, a capture, the memory of the GPU (without one, graphs are
those of `tests/graphs.py`), the folder that choices are kept in. Interruptions come at any function call of a first call.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import logging
import multiprocessing
import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sfast
from sfast import CompilationConfig, fallback, triton_cache
from sfast.cuda_graph import Patience
from sfast.kernels import attention, choice, op
from sfast.trace import Trace
from tests.graphs import OUT_OF_MEMORY, Pool, pool
from tests.tiny import TINY, Pipeline

__all__ = ["pool"]

TEXT_TO_IMAGE = TINY["text-to-image"]
ROOT = Path(__file__).parent.parent
SFAST = str(Path(sfast.__file__).parent)

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
    op.wake()
    choice.forget()
    yield TEXT_TO_IMAGE.build()
    op.wake()
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


# Kernels.


class Kernel:
    """In the place of a Triton kernel: `kernel[grid](...)` does something else."""

    def __init__(self, launch: Callable[..., Any]) -> None:
        self.launch = launch

    def __getitem__(self, grid: Any) -> Callable[..., Any]:
        return self.launch


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
    assert sum(net.forward.fired().values()) > 0  # at the others it is fused


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
        short.setattr("sfast.component.trace", out_of_memory)
        draws(pipe, right, 1)
    lines = said()
    assert len(lines) == 3  # UNet, decoder, text encoder
    assert all(", until there is more memory: OutOfMemoryError: CUDA out of memory" in line for line in lines)
    assert sfast.report(pipe).traces == 0
    draws(pipe, right, 9)
    assert sfast.report(pipe).traces == 3


def test_out_of_memory_while_it_is_traced_is_not_tried_for_ever(net: Net, monkeypatch: pytest.MonkeyPatch) -> None:
    tries = []
    monkeypatch.setattr("sfast.component.trace", lambda *args: tries.append(1) or out_of_memory())
    agree(net, calls=400)
    assert 3 <= len(tries) <= Patience.TRIES


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
    assert 3 <= pool.captures <= Patience.TRIES and sfast.report(net).graphs == 0
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
    pool = next(iter(component._plans.values())).pool
    with monkeypatch.context() as short:
        short.setattr(pool, "_results", out_of_memory)
        agree(net, 16, calls=2)
    assert component.counts()[1] == 0 and pool.memory() == 0
    (line,) = said()
    assert line.startswith("CUDA graphs: memory of cuda:") and "ran out: all were dropped" in line
    monkeypatch.setattr(pool, "free", lambda: 2**60)  # much more than before
    agree(net, 16, calls=40)
    assert component.counts()[1] == 2


# Folders.


@pytest.fixture
def choosing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Attention that has a choice, also on a CPU; counts its measurements. They are kept in an empty folder."""
    measured: list[int] = []
    measure = choice._measure
    also = {"torch": attention.attention_reference, "also": attention.attention_reference}
    monkeypatch.setattr(attention, "_ways", lambda *args: also)
    monkeypatch.setattr(choice, "_measure", lambda *args: measured.append(1) or measure(*args))
    monkeypatch.setenv("SFAST_CACHE_DIR", str(tmp_path / "cache"))
    return measured


@pytest.mark.parametrize("what", ["truncated", "noise", "another way", "a folder", "unreadable"])
def test_corrupt_and_foreign_files_among_the_choices(
    pipe: Pipeline, right: Tensor, said: Said, choosing: list[int], tmp_path: Path, what: str
) -> None:
    draws(sfast.compile(pipe), right, 1)
    files = sorted((tmp_path / "cache" / "choices").iterdir())
    first = len(choosing)
    assert len(files) == first > 0 and said() == []
    for file in files:
        content = file.read_bytes()
        if what == "another way":  # of another version of sfast that calls it the same
            from sfast.disk_cache import _digest

            body = content.partition(b"\n")[2].rpartition(b"\n")[0] + b"\nfastest of all"
            content = f"sfast cache 1 {_digest(body)}\n".encode() + body
        file.unlink()
        if what == "a folder":
            file.mkdir()
        elif what == "unreadable":
            file.symlink_to(file.name)  # a loop
        else:
            file.write_bytes({"truncated": content[:-9], "noise": os.urandom(99)}.get(what, content))
    for again in (2, 3):
        choice.forget()
        sfast.restore(pipe)
        draws(sfast.compile(pipe), right, 1)
        repaired = what not in ("a folder",)  # which is left alone
        assert len(choosing) == (2 * first if repaired else again * first)
    lines = said()
    if what != "another way":
        assert any(line.startswith(f"cache folder: {files[0]} ") for line in lines), lines
    assert all(line.startswith("cache folder: ") for line in lines)


def _draw_in_a_process(results: Any) -> None:
    pipe = sfast.compile(TEXT_TO_IMAGE.build())
    results.put((draw(pipe).numpy(), fallback.noted()))


def test_two_processes_at_once(right: Tensor, choosing: list[int], tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    results = context.SimpleQueue()
    processes = [context.Process(target=_draw_in_a_process, args=(results,)) for _ in range(2)]
    for process in processes:
        process.start()
    for _ in processes:
        picture, noted = results.get()
        assert (torch.from_numpy(picture) - right).abs().max() < 1e-4
        assert noted == []
    for process in processes:
        process.join()
    names = [path.name for path in (tmp_path / "cache" / "choices").iterdir()]
    assert names and all(name.endswith(".txt") for name in names)


def test_a_home_that_is_read_only(
    pipe: Pipeline, right: Tensor, said: Said, choosing: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SFAST_CACHE_DIR", "/proc/self/sfast")
    draws(sfast.compile(pipe), right)
    (line,) = said()
    assert line.startswith("cache folder: nothing is kept for the next process: ") and line.endswith(
        "/proc/self/sfast/choices"
    )
    assert len(choosing) > 0


def test_triton_compiles_somewhere_else_where_its_cache_is_read_only(
    said: Said, monkeypatch: pytest.MonkeyPatch
) -> None:
    knobs = pytest.importorskip("triton.knobs")
    monkeypatch.setattr(knobs.cache, "dir", "/proc/self/triton")
    triton_cache.mend.cache_clear()
    triton_cache.place.cache_clear()
    try:
        for _ in range(2):
            assert triton_cache.mend()
        folder = Path(knobs.cache.dir)
        assert folder != Path("/proc/self/triton") and folder.is_dir() and triton_cache.is_writable(folder)
        folder.rmdir()
    finally:
        triton_cache.mend.cache_clear()
        triton_cache.place.cache_clear()
    why = "/proc/self/triton cannot be written to: kernels are compiled anew in every process"
    assert said() == [f"Triton's kernel cache: {why}"]


SCRIPT = """
import logging, sys, torch
lines = []
handler = logging.Handler()
handler.emit = lambda record: lines.append(record.getMessage())
logging.getLogger("sfast").addHandler(handler)
import sfast
from tests.test_faults import Net, agree
torch.manual_seed(0)
net = sfast.compile(Net(64).cuda().half().eval().requires_grad_(False), sfast.CompilationConfig(enable_hoisting=True))
for side in (32, 48, 33):
    agree(net, side)
print(*lines, sep="\\n")
"""


def start(**environment: str) -> subprocess.Popen[str]:
    """SCRIPT in a process of its own."""
    paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    inherited = {
        name: value for name, value in os.environ.items() if name not in ("TRITON_CACHE_DIR", "SFAST_CACHE_DIR")
    }
    return subprocess.Popen(
        [sys.executable, "-c", SCRIPT],
        cwd=ROOT,
        env={**inherited, "PYTHONPATH": paths, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def lines_of(process: subprocess.Popen[str]) -> list[str]:
    out, error = process.communicate(timeout=300)
    assert process.returncode == 0, error
    return out.splitlines()


@pytest.mark.gpu
def test_on_a_gpu_two_processes_at_once_and_a_read_only_home(tmp_path: Path) -> None:
    folders = {"TRITON_CACHE_DIR": str(tmp_path / "triton"), "SFAST_CACHE_DIR": str(tmp_path / "sfast")}
    together = [start(**folders), start(**folders)]
    assert [lines_of(process) for process in together] == [[""], [""]]
    assert lines_of(start(**folders)) == [""]
    lines = lines_of(start(HOME="/proc/self", TRITON_HOME="/proc/self", XDG_CACHE_HOME="/proc/self"))
    assert any(line.startswith("Triton's kernel cache: ") for line in lines)
    assert all("cache" in line for line in lines), lines


@pytest.mark.gpu
def test_on_a_gpu_an_assembler_that_fails(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    broken = tmp_path / "ptxas"
    version = "Cuda compilation tools, release 12.8, V12.8.93"
    broken.write_text(f'#!/bin/sh\ncase "$*" in *--version*) echo "{version}";; *) echo broken >&2; exit 255;; esac\n')
    broken.chmod(0o755)
    folders = {"TRITON_CACHE_DIR": str(tmp_path / "triton"), "SFAST_CACHE_DIR": str(tmp_path / "sfast")}
    lines = lines_of(start(TRITON_PTXAS_PATH=str(broken), SFAST_DISABLE_NATIVE="1", **folders))
    ours = [line for line in lines if "runs as plain PyTorch" in line]  # beside what Triton prints of the assembler
    assert ours and all(line.startswith("kernel ") for line in ours), lines


# Interruptions.


class TimeIsUp(Exception):
    """What a signal handler raises; it is not for us to judge."""


def _time_is_up(number: int, frame: FrameType | None) -> None:
    raise TimeIsUp("after some seconds")


class Interruption:
    """Ctrl-C, or a signal whose handler raises something ordinary, at the n-th call of a function of sfast from now on."""

    def __init__(self, at: int, ordinary: bool) -> None:
        self.left, self.ordinary = at, ordinary

    def __enter__(self) -> Interruption:
        sys.setprofile(self._profile)
        return self

    def __exit__(self, *exception: object) -> None:
        sys.setprofile(None)

    def _profile(self, frame: FrameType, event: str, argument: object) -> None:
        if event != "call" or not frame.f_code.co_filename.startswith(SFAST):
            return
        if frame.f_code.co_flags & inspect.CO_GENERATOR:  # perhaps it is being closed, where Python ignores exceptions
            return
        self.left -= 1
        if self.left == 0:
            sys.setprofile(None)
            if self.ordinary:
                signal.raise_signal(signal.SIGUSR1)
            else:
                raise KeyboardInterrupt


@pytest.fixture
def handler() -> Iterator[None]:
    before = signal.signal(signal.SIGUSR1, _time_is_up)
    yield
    signal.signal(signal.SIGUSR1, before)


@pytest.mark.parametrize("ordinary", [False, True], ids=["Ctrl-C", "a time limit"])
def test_an_interruption_at_any_moment_ends_the_call_and_nothing_else(
    pool: Pool, handler: None, said: Said, ordinary: bool
) -> None:
    with Interruption(10**9, ordinary) as counted:
        agree(sfast.compile(Net().eval().requires_grad_(False), HOISTING))
    most = 10**9 - counted.left
    assert most > 500
    moments = sorted(random.Random(0).sample(range(1, most), 40))
    raised: type[BaseException] = TimeIsUp if ordinary else KeyboardInterrupt
    for moment in moments:
        net = Net().eval().requires_grad_(False)
        before = {name: weight.clone() for name, weight in net.state_dict().items()}
        with Interruption(moment, ordinary) as interruption:
            try:
                sfast.compile(net, HOISTING)
                agree(net)
            except raised:
                pass
            else:
                assert interruption.left > 0, f"call {moment} of {most} was interrupted, and nobody heard of it"
        sfast.compile(net, HOISTING)
        agree(net, calls=4)
        report = sfast.report(net)
        assert (report.graphs, report.fallbacks) == (2, []), moment
        sfast.restore(net)
        assert all(torch.equal(weight, before[name]) for name, weight in net.state_dict().items())
    assert said() == []


def test_a_time_limit_in_an_operator_in_python(net: Net, handler: None) -> None:
    class Slow(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(1), requires_grad=False)

        def forward(self, x: Tensor) -> Tensor:
            return torch.ops.faults.slow(x) * self.weight

    slow, x = sfast.compile(Slow().eval()), torch.ones(2)
    assert torch.equal(slow(x), torch.full((2,), 2.0))
    SLOW.append(lambda: signal.raise_signal(signal.SIGUSR1))
    with pytest.raises(TimeIsUp, match="after some seconds"):  # of which TorchScript has made a text
        slow(x)
    assert sfast.report(slow).fallbacks == []
    assert torch.equal(slow(x), torch.full((2,), 2.0))


SLOW: list[Callable[[], Any]] = []
LIBRARY = torch.library.Library("faults", "DEF")
LIBRARY.define("slow(Tensor x) -> Tensor")


def _slow(x: Tensor) -> Tensor:
    while SLOW:
        SLOW.pop()()
    return x * 2


LIBRARY.impl("slow", _slow, "CompositeExplicitAutograd")


def test_what_a_handler_raises_in_a_kernel_is_no_failure_of_the_kernel(
    pipe: Pipeline, right: Tensor, said: Said, handler: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*args: Any, **options: Any) -> None:
        signal.raise_signal(signal.SIGUSR1)

    sfast.compile(pipe)
    with monkeypatch.context() as broken:
        broken.setattr("sfast.kernels.group_norm.triton_takes", lambda x: True)
        for kernel in ("moments", "whole_group"):
            broken.setattr(f"sfast.kernels.group_norm.{kernel}", Kernel(interrupted))
        with pytest.raises(TimeIsUp):
            draw(pipe)
    draws(pipe, right)
    assert said() == [] and op._resting == set()


@pytest.mark.gpu
@pytest.mark.parametrize("ordinary", [False, True], ids=["Ctrl-C", "a time limit"])
def test_on_a_gpu_an_interruption_at_any_moment(handler: None, said: Said, ordinary: bool) -> None:
    def build() -> Net:
        return Net(64).cuda().half().eval().requires_grad_(False)

    with Interruption(10**9, ordinary) as counted:
        agree(sfast.compile(build(), HOISTING), 16)
    most = 10**9 - counted.left
    for moment in sorted(random.Random(1).sample(range(1, most), 15)):
        net = build()
        with Interruption(moment, ordinary), contextlib.suppress(TimeIsUp if ordinary else KeyboardInterrupt):
            sfast.compile(net, HOISTING)
            agree(net, 16)
        sfast.compile(net, HOISTING)
        agree(net, 16, calls=4)
        assert sfast.report(net).fallbacks == [], moment
        sfast.restore(net)
    assert said() == []


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
