"""The benchmark of fusions: every fused operator has rows, and a wrong result never gets a speed-up."""

from __future__ import annotations

import pytest
import torch

from benchmarks import fusions, transformer_fusions
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
    assert names >= {"gate_add_layer_norm_modulate", "cat_rms_norm_rotary", "rms_norm_rotary_complex", "linear_cat"}
    assert names >= {"linear_geglu", "linear_gelu", "conv2d_add", "upsample_nearest2d", "cat_channels", "attention"}


def test_the_rows_of_transformers_compare_what_they_should(monkeypatch) -> None:
    monkeypatch.setattr(transformer_fusions, "ROWS", [(2, 3, 16)])
    monkeypatch.setattr(transformer_fusions, "HEADS", [(2, 2, 3, 3, 16), (1, 0, 4, 2, 16)])

    def randn(*shape: int, mean: float = 0.0, std: float = 1.0) -> torch.Tensor:
        return torch.randn(shape) * std + mean

    monkeypatch.setattr(transformer_fusions, "VIDEO", (22, 16))
    kinds = (transformer_fusions.row_cases, transformer_fusions.head_cases, transformer_fusions.run_cases)
    rows = [case for cases in kinds for case in cases(randn)]
    assert {"gate_add_layer_norm_modulate", "cat_rms_norm_rotary_complex", "cat_tokens"} <= {row.name for row in rows}
    assert {"gate_rms_norm_add_rms_norm_modulate", "runs", "linear_runs"} <= {row.name for row in rows}
    for case in rows:
        inputs = case.inputs()
        exact = case.reference(*map(fusions._doubled, inputs))
        result, exact = (each if isinstance(each, torch.Tensor) else each[0] for each in (case.op(*inputs), exact))
        assert fusions._error(result, exact) < 1e-6


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
