"""The benchmark of fusions: every fused operator has rows, and a wrong result never gets a speed-up."""

from __future__ import annotations

import pytest
import torch

from benchmarks import fusions
from benchmarks.fusions import Case, Timing
from sfast.kernels.linear_activation import linear_silu_reference


def test_without_a_gpu_it_says_so(monkeypatch, capsys) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("sys.argv", ["benchmarks.fusions"])
    assert fusions.main() == 1
    assert "needs an NVIDIA GPU" in capsys.readouterr().err


def test_every_kind_of_fusion_has_a_row() -> None:
    names = {case.name for case in fusions.cases(torch.float16)}
    assert names >= {"group_norm", "group_norm_silu", "add_group_norm_silu", "layer_norm", "add_layer_norm"}
    assert names >= {"linear_geglu", "linear_gelu", "conv2d_add", "upsample_nearest2d", "cat_channels", "attention"}


@pytest.mark.parametrize(("offset", "verdict"), [(0.0, "4.00x"), (1e-3, "OUTPUTS DIFFER")])
def test_a_speed_up_is_printed_only_where_outputs_agree(offset, verdict, monkeypatch) -> None:
    times = iter([Timing(0.5, 0.4, 0.6), Timing(2.0, 1.9, 2.1)])
    monkeypatch.setattr(fusions, "time_calls", lambda call, sets: next(times))
    inputs = (torch.randn(4, 8), torch.randn(6, 8), torch.randn(6))
    case = Case(
        name="linear_silu",
        shape="4x8->6",
        op=lambda *tensors: linear_silu_reference(*tensors) + offset,
        reference=linear_silu_reference,
        inputs=lambda: inputs,
        moved=1000,
        flops=0,
    )
    row = fusions.measure(case, torch.float32, warm=True)
    assert verdict in row
    assert "0.5000 (0.4000 0.6000)" in row
