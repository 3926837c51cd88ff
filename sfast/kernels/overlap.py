"""Programmatic dependent launch: a kernel is put on the GPU while the one before it still runs, and waits there.

Between two kernels of a stream, or of a replayed CUDA graph, a GPU otherwise idles for about a microsecond, which is as much
as a small kernel takes. Hopper and later can hide that. A kernel that takes part launches with `launch_options(device)` and
calls `wait_for_previous_kernel` before it touches memory: from there on all earlier work is complete and visible, so nothing
else about it changes.
"""

from __future__ import annotations

import functools
from typing import Any

import torch

from sfast.kernels.triton_or_none import tl, triton


@triton.jit
def wait_for_previous_kernel(OVERLAP: tl.constexpr) -> None:
    """Let the next kernel come onto the GPU as well, then wait until all earlier ones are complete."""
    if OVERLAP:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()


@functools.cache
def launch_options(device: torch.device) -> dict[str, Any]:
    """Keyword arguments for a launch of a kernel with an `OVERLAP` constant."""
    overlap = (
        device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0) and _cuda_version() >= (12, 4)
    )
    return {"OVERLAP": True, "launch_pdl": True} if overlap else {"OVERLAP": False}


def _cuda_version() -> tuple[int, ...]:
    """The version of CUDA that PyTorch was built for; from 12.4 on, such launches can be captured in a graph."""
    return tuple(int(part) for part in (torch.version.cuda or "0").split(".")[:2])
