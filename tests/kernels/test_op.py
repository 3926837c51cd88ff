"""An operator cannot fail: whatever breaks below it is noted once, and the reference answers."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from sfast import fallback
from sfast.kernels import geglu, group_norm, layer_norm, triton_or_none
from sfast.kernels.overlap import launch_options

ops = torch.ops.sfast
ROOT = Path(__file__).parents[2]


def fail(*args: object) -> None:
    raise RuntimeError("the compiler is broken\nand says so on many lines")


@pytest.mark.usefixtures("falls_back")
def test_a_launch_that_raises_is_noted_once_and_the_reference_answers(monkeypatch) -> None:
    calls = []
    monkeypatch.setattr(group_norm, "triton_takes", lambda x: calls.append(x) is None)
    monkeypatch.setattr(group_norm, "_launch", fail)
    x = torch.randn(2, 8, 5, 5)
    for _ in range(3):
        torch.testing.assert_close(ops.group_norm(x, 2, None, None, 1e-5), F.group_norm(x, 2, eps=1e-5))
    assert len(calls) == 3
    assert fallback.noted() == [
        ("kernel group_norm for torch.float32 on cpu", "runs as plain PyTorch: RuntimeError: the compiler is broken")
    ]


@pytest.mark.usefixtures("falls_back")
def test_a_failure_rests_its_own_dtype_only(monkeypatch) -> None:
    launches = []

    def refuse_bfloat16(x, *rest):
        launches.append(x.dtype)
        if x.dtype == torch.bfloat16:
            raise ValueError("type bf16 not supported in this architecture")
        return torch.zeros_like(x), x

    monkeypatch.setattr(layer_norm, "triton_takes", lambda x: True)
    monkeypatch.setattr(layer_norm, "_launch", refuse_bfloat16)
    for dtype in (torch.bfloat16, torch.bfloat16, torch.float16, torch.float16):
        ops.layer_norm(torch.ones(2, 8, dtype=dtype), [8], None, None, 1e-5)
    assert launches == [torch.bfloat16, torch.float16, torch.float16]


@pytest.mark.usefixtures("falls_back")
def test_a_native_op_that_refuses_one_shape_is_asked_again_at_the_next(monkeypatch) -> None:
    launches = []

    def refuse_odd(x, *rest):
        launches.append(x.shape[0])
        if x.shape[0] % 2:
            raise RuntimeError("sfast_native: no kernel")
        return torch.zeros_like(x), x

    monkeypatch.setattr(layer_norm, "triton_takes", lambda x: True)
    monkeypatch.setattr(layer_norm, "_launch", refuse_odd)
    for rows in (3, 2, 3, 4):
        ops.layer_norm(torch.ones(rows, 8), [8], None, None, 1e-5)
    assert launches == [3, 2, 3, 4]
    assert len(fallback.noted()) == 1


@pytest.mark.usefixtures("falls_back")
def test_a_real_launch_on_memory_that_triton_cannot_reach(monkeypatch) -> None:
    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("the interpreter reaches the memory of the CPU")
    for module in (group_norm, layer_norm, geglu):
        monkeypatch.setattr(module, "triton_takes", lambda x: True)
    x, weight = torch.randn(2, 8, 5, 5), torch.randn(12, 5)
    torch.testing.assert_close(ops.group_norm_silu(x, 2, None, None, 1e-5), F.silu(F.group_norm(x, 2, eps=1e-5)))
    torch.testing.assert_close(ops.layer_norm(x, [5, 5], None, None, 1e-5), F.layer_norm(x, [5, 5], eps=1e-5))
    expected = geglu.linear_geglu_reference(x, weight, None, "none")
    torch.testing.assert_close(ops.linear_geglu(x, weight, None, "none"), expected)
    assert [what for what, _ in fallback.noted()] == [
        f"kernel {name} for torch.float32 on cpu" for name in ("group_norm_silu", "layer_norm", "linear_geglu")
    ]


def test_running_out_of_memory_is_not_a_reason_to_fall_back(monkeypatch) -> None:
    def exhaust(*args: object) -> None:
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(group_norm, "triton_takes", lambda x: True)
    monkeypatch.setattr(group_norm, "_launch", exhaust)
    with pytest.raises(torch.OutOfMemoryError):
        ops.group_norm(torch.randn(2, 8, 5, 5), 2, None, None, 1e-5)


@pytest.mark.usefixtures("falls_back")
def test_a_gpu_older_than_sm75_is_noted(monkeypatch) -> None:
    for capability, enough in [((7, 0), False), ((7, 5), True), ((9, 0), True)]:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, capability=capability: capability)
        assert triton_or_none._is_new_enough.__wrapped__(torch.device("cuda", 0)) is enough
    assert fallback.noted() == [
        ("Triton", "kernels run as plain PyTorch: they need an sm75 GPU or later, cuda:0 is sm70")
    ]


def test_kernels_overlap_from_hopper_on(monkeypatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    for capability, overlap in [((8, 9), False), ((9, 0), True), ((12, 0), True)]:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, capability=capability: capability)
        assert launch_options.__wrapped__(torch.device("cuda", 0))["OVERLAP"] is overlap
    monkeypatch.setattr(torch.version, "cuda", "12.1")
    assert launch_options.__wrapped__(torch.device("cuda", 0)) == {"OVERLAP": False}
    assert launch_options.__wrapped__(torch.device("cpu")) == {"OVERLAP": False}


def python(code: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]), **environment},
        timeout=300,
    )


def test_operators_work_without_triton() -> None:
    ran = python(
        "import sys; sys.modules['triton'] = None\n"
        "import torch, sfast.kernels\n"
        "from sfast.kernels.group_norm import group_norm_silu_reference as reference\n"
        "from sfast.kernels.triton_or_none import MISSING\n"
        "x = torch.randn(2, 8, 5, 5)\n"
        "inputs = (x, 2, torch.randn(8), None, 1e-5)\n"
        "assert torch.equal(torch.ops.sfast.group_norm_silu(*inputs), reference(*inputs))\n"
        "torch.ops.sfast.layer_norm(x, [5], None, None, 1e-5), torch.ops.sfast.linear_geglu(x, x[0, :6, 0], None, 'tanh')\n"
        "print(MISSING)"
    )
    assert ran.returncode == 0, ran.stderr
    assert "ModuleNotFoundError" in ran.stdout


BROKEN_CACHE = """
import torch, sfast.kernels
from sfast import fallback
x = torch.randn(2, 32, 40, 40, device="cuda", dtype=torch.float16)
for _ in range(2):
    y = torch.ops.sfast.group_norm(x, 8, None, None, 1e-5)
exact = torch.nn.functional.group_norm(x.double(), 8)
assert (y - exact).abs().max() < 1e-2
print(len(fallback.noted()))
"""


@pytest.mark.gpu
def test_a_corrupt_kernel_cache(tmp_path) -> None:
    assert python(BROKEN_CACHE, TRITON_CACHE_DIR=str(tmp_path)).stdout.strip() == "0"
    written = [path for path in tmp_path.rglob("*") if path.suffix in (".cubin", ".json")]
    assert written
    for path in written:
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    ran = python(BROKEN_CACHE, TRITON_CACHE_DIR=str(tmp_path))
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.strip() in ("0", "1")  # Triton may notice and compile again


@pytest.mark.gpu
def test_a_kernel_cache_that_cannot_be_written(tmp_path) -> None:
    occupied = tmp_path / "cache"
    occupied.write_text("a file where Triton wants a folder")
    ran = python(BROKEN_CACHE, TRITON_CACHE_DIR=str(occupied))
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.strip() == "1"
