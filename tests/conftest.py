"""What every test starts from: one thread, no network, a seed, and a reason to skip where there is no GPU."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import pytest
import torch

from sfast import fallback

# Tiny models on a small shared machine run many times slower with two threads than with one.
torch.set_num_threads(1)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("slow") and "slow" not in config.option.markexpr:
            item.add_marker(pytest.mark.skip(reason="takes long: pytest -m slow"))
    if torch.cuda.is_available():
        return
    reason = f"needs an NVIDIA GPU, and torch {torch.__version__} sees none"
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(autouse=True)
def fresh() -> None:
    """A seed, and no memory of what fell back in the test before."""
    torch.manual_seed(0)
    fallback.forget()


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> Iterator[str]:
    """Both kinds of device, with fp32 that is fp32."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield request.param
    torch.backends.cudnn.allow_tf32 = before


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture) -> Iterator[Callable[[], list[str]]]:
    """What was logged since the last time somebody asked; a test fails on lines that it has not asked for.

    Which kernels this machine lacks is another matter.
    """
    heard = 0

    def lines() -> list[str]:
        nonlocal heard
        messages = [record.getMessage() for record in caplog.records if record.name == "sfast"]
        new, heard = messages[heard:], len(messages)
        return [line for line in new if not line.startswith(("kernel ", "native ops", "Triton"))]

    with caplog.at_level(logging.WARNING, "sfast"):
        yield lines
    assert lines() == []
