"""Attention in a call that happens once is computed by a kernel that is there, not by one that is planned for its shape first.

On Hopper and later PyTorch prefers cuDNN's attention, which plans each new shape for some 40 ms. A UNet has four of them at
every new size: eager's call for comparison and the traced one would wait longer for plans than for everything else that
they do, although what runs afterwards has been chosen already. Flash attention computes the same without a plan.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

import torch

_lock = threading.Lock()
_users = 0  # of the setting, which belongs to the whole process


@contextlib.contextmanager
def without_planned_attention(device: torch.device) -> Iterator[None]:
    """Meanwhile PyTorch takes flash attention instead of cuDNN's, unless the caller has asked for certain kernels."""
    if device.type != "cuda" or not _begin():
        yield
        return
    try:
        yield
    finally:
        _end()


def _begin() -> bool:
    global _users
    kernels = torch.backends.cuda
    with _lock:
        if not (kernels.flash_sdp_enabled() and kernels.mem_efficient_sdp_enabled() and kernels.math_sdp_enabled()):
            return False
        if not _users and not kernels.cudnn_sdp_enabled():
            return False
        _users += 1
        kernels.enable_cudnn_sdp(False)
        return True


def _end() -> None:
    global _users
    with _lock:
        _users -= 1
        if not _users:
            torch.backends.cuda.enable_cudnn_sdp(True)
