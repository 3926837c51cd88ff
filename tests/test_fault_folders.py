"""Folders that hold what others have written, or that nobody may write to, cost time and one line, and no picture."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import sfast
from sfast import fallback, triton_cache
from sfast.kernels import attention, choice
from tests.faults import TEXT_TO_IMAGE, Said, draw, draws, pipe, right, said
from tests.tiny import Pipeline

__all__ = ["pipe", "right", "said"]  # fixtures

ROOT = Path(__file__).parent.parent


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
from tests.faults import Net, agree
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
