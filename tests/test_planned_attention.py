"""Which attention eager's call for comparison and the traced one take; the setting belongs to the whole process."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sfast
from sfast.planned_attention import without_planned_attention

CUDA = torch.device("cuda", 0)
kernels = torch.backends.cuda


@pytest.fixture(autouse=True)
def settings() -> Iterator[None]:
    yield
    for enable in (kernels.enable_cudnn_sdp, kernels.enable_flash_sdp, kernels.enable_mem_efficient_sdp):
        enable(True)
    kernels.enable_math_sdp(True)


def test_cudnn_is_left_out_and_comes_back() -> None:
    for _ in range(2):
        with contextlib.suppress(ValueError), without_planned_attention(CUDA):
            assert not kernels.cudnn_sdp_enabled()
            assert kernels.flash_sdp_enabled()
            raise ValueError
        assert kernels.cudnn_sdp_enabled()
    with without_planned_attention(torch.device("cpu")):
        assert kernels.cudnn_sdp_enabled()


def test_who_asks_for_certain_kernels_gets_them() -> None:
    for enable in (kernels.enable_flash_sdp, kernels.enable_mem_efficient_sdp, kernels.enable_math_sdp):
        enable(False)
        with without_planned_attention(CUDA):
            assert kernels.cudnn_sdp_enabled()
        enable(True)
    kernels.enable_cudnn_sdp(False)
    with without_planned_attention(CUDA):
        pass
    assert not kernels.cudnn_sdp_enabled()


def test_where_other_threads_live_it_is_left_alone() -> None:
    done = threading.Event()
    thread = threading.Thread(target=done.wait)
    thread.start()
    try:
        with without_planned_attention(CUDA):
            assert kernels.cudnn_sdp_enabled()
    finally:
        done.set()
        thread.join()


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.to_qkv = nn.Linear(64, 192)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.to_qkv(x).unflatten(-1, (3, 1, 64)).movedim(-3, 0).transpose(2, 3)
        return F.scaled_dot_product_attention(q, k, v)


@pytest.mark.gpu
def test_what_happens_once_needs_no_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    module = Attention().half().cuda().eval().requires_grad_(False)
    x = torch.randn(2, 96, 64, device=CUDA).half()
    expected = module(x)
    told: list[bool] = []
    enable = kernels.enable_cudnn_sdp
    monkeypatch.setattr(kernels, "enable_cudnn_sdp", lambda wanted: (told.append(wanted), enable(wanted)))
    compiled = sfast.compile(module)
    torch.testing.assert_close(compiled(x), expected, rtol=1e-2, atol=1e-3)
    assert told[:4] == [False, True] * 2  # eager's call, and the traced one
    told.clear()
    assert compiled(x[:, :80]).shape == (2, 1, 80, 64)
    assert told[:2] == [False, True]  # eager's
    assert kernels.cudnn_sdp_enabled()
