"""Kernels are compared with fp64 on every device that can run them, and no fallback may hide a failure.

On the CPU the operators run their references, unless Triton's interpreter is on (`TRITON_INTERPRET=1`, set before anything
imports Triton): `test_interpreted.py` runs these same files once more that way.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from sfast import fallback
from sfast.kernels import op
from sfast.kernels.triton_or_none import INTERPRETED


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device(request.param, 0) if request.param == "cuda" else torch.device("cpu")


@pytest.fixture
def runs_kernel(device: torch.device) -> bool:
    """Whether the device runs the kernel itself, not the reference."""
    return INTERPRETED or device.type == "cuda"


@pytest.fixture
def falls_back() -> None:
    """For a test that makes kernels fail."""


@pytest.fixture(autouse=True)
def no_fallback(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fail a test whose kernel fell back, unless it asks for `falls_back`."""
    fallback.forget()
    op.enable_again()
    yield
    notes = fallback.noted()
    fallback.forget()
    op.enable_again()
    assert "falls_back" in request.fixturenames or notes == []


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """Fill every `torch.empty` with NaN, so that an element nobody wrote shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)
