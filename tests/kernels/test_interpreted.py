"""The kernels themselves on the CPU: this folder's tests once more, in a process where Triton interprets its kernels."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from sfast.kernels.triton_or_none import INTERPRETED, MISSING

HERE = Path(__file__).parent
FILES = [
    "test_attention.py",
    "test_blend.py",
    "test_cat_channels.py",
    "test_conv2d_depthwise.py",
    "test_checksum.py",
    "test_group_norm.py",
    "test_layer_norm.py",
    "test_linear.py",
    "test_linear_attention.py",
    "test_linear_rounded.py",
    "test_modulate.py",
    "test_rotary.py",
    "test_runs.py",
    "test_transpose_layer_norm.py",
    "test_upsample.py",
]


@pytest.mark.skipif(INTERPRETED, reason="this is that process")
@pytest.mark.skipif(MISSING is not None, reason=f"needs Triton: {MISSING}")
def test_kernels_under_the_interpreter() -> None:
    # Triton reads the variable when its own library of functions is defined: too late to set it in this process.
    ran = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-m", "not gpu", "-k", "not cuda", "-p", "no:cacheprovider", *FILES],
        capture_output=True,
        text=True,
        cwd=HERE,
        env={
            **os.environ,
            "TRITON_INTERPRET": "1",
            "PYTHONPATH": os.pathsep.join([str(HERE.parents[1]), os.environ.get("PYTHONPATH", "")]),
        },
        timeout=600,
    )
    assert ran.returncode == 0, ran.stdout[-4000:] + ran.stderr[-2000:]
