"""Attention in a call that happens once is computed by a kernel that is there, not by one that is planned for its shape first.

On Hopper and later PyTorch prefers cuDNN's attention, which plans each new shape for some 40 ms. A UNet has four of them at
every new size: eager's call for comparison and the traced one would wait longer for plans than for everything else that
they do, although what runs afterwards has been chosen already. Flash attention computes the same without a plan.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from sfast.trial import is_alone


@contextlib.contextmanager
def without_planned_attention(device: torch.device) -> Iterator[None]:
    """Meanwhile PyTorch takes flash attention instead of cuDNN's, unless the caller has asked for certain kernels.

    The setting belongs to the whole process: where other threads live, one of them might save it now and bring it back
    later, so there it is left alone.
    """
    kernels = torch.backends.cuda
    enabled = (
        kernels.cudnn_sdp_enabled(),
        kernels.flash_sdp_enabled(),
        kernels.mem_efficient_sdp_enabled(),
        kernels.math_sdp_enabled(),
    )
    if device.type != "cuda" or not all(enabled) or not is_alone():
        yield
        return
    kernels.enable_cudnn_sdp(False)
    try:
        yield
    finally:
        kernels.enable_cudnn_sdp(True)
