"""Gate, residual, norm and modulation against fp64: what broadcasts and what does not, wide rows, and the reference's part."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sfast.kernels import modulate
from sfast.kernels import modulate_references as references
from tests.kernels.fp64 import assert_close_to_fp64

ops = torch.ops.sfast
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
shapes = pytest.mark.parametrize("shape", [(2, 5, 33), (3, 4, 64), (1, 3, 4100)], ids=str)


def rows(kind: str, shape: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> list[Tensor]:
    """Gate, scale and shift as models have them: cut out of one product, for each sample, for each token, or for all."""
    B, T, C = shape
    sizes = {"samples": (B, 1, 3 * C), "tokens": (B, T, 3 * C), "all": (3 * C,)}
    return list((0.5 * torch.randn(sizes[kind], device=device)).to(dtype).chunk(3, -1))


@dtypes
@shapes
@pytest.mark.parametrize("kind", ["samples", "tokens", "all"])
def test_layer_norm(kind, shape, dtype, device, runs_kernel) -> None:
    x, y = (torch.randn(shape, device=device).to(dtype) for _ in range(2))
    gate, scale, shift = rows(kind, shape, device, dtype)
    weight, bias = (torch.randn(shape[-1], device=device).to(dtype) for _ in range(2))
    for affine in ((None, None), (weight, bias)):
        norm = ([shape[-1]], *affine, 1e-6, scale, shift)
        if runs_kernel:
            assert modulate.takes(modulate.JOBS["gate_add_layer_norm_modulate"](x, y, gate, *norm))
        result = ops.layer_norm_modulate(x, *norm)
        assert_close_to_fp64(result, references.layer_norm_modulate_reference, x, *norm)
        for part, result in enumerate(ops.add_layer_norm_modulate(x, y, *norm)):
            assert_close_to_fp64(result, references.add_layer_norm_modulate_reference, x, y, *norm, part=part)
        for pair in ((y, gate), (gate, y)) if kind == "samples" else ((y, gate),):
            inputs = (x, *pair, *norm)
            for part, result in enumerate(ops.gate_add_layer_norm_modulate(*inputs)):
                assert_close_to_fp64(result, references.gate_add_layer_norm_modulate_reference, *inputs, part=part)
    inputs = (x, y, gate, x.flip(1), scale, *norm)
    if runs_kernel:
        assert modulate.takes(modulate.JOBS["gate_add_twice_layer_norm_modulate"](*inputs))
    for part, result in enumerate(ops.gate_add_twice_layer_norm_modulate(*inputs)):
        assert_close_to_fp64(result, references.gate_add_twice_layer_norm_modulate_reference, *inputs, part=part)
    assert_close_to_fp64(ops.gate_add(x, y, gate), references.gate_add_reference, x, y, gate)


@dtypes
@shapes
def test_rms_norm(shape, dtype, device, runs_kernel) -> None:
    x, y = (torch.randn(shape, device=device).to(dtype) for _ in range(2))
    gate, scale, _ = rows("samples", shape, device, dtype)
    weight, weight_y = ((1 + 0.3 * torch.randn(shape[-1], device=device)).to(dtype) for _ in range(2))
    inputs = (x, weight, 1e-6, scale)
    assert_close_to_fp64(ops.rms_norm_scale(*inputs), references.rms_norm_scale_reference, *inputs)
    inputs = (x, y, weight_y, 1e-2, gate)
    assert_close_to_fp64(ops.gate_rms_norm_add(*inputs), references.gate_rms_norm_add_reference, *inputs)
    inputs = (*inputs, weight, 1e-6, scale)
    if runs_kernel:
        assert modulate.takes(modulate.JOBS["gate_rms_norm_add_rms_norm_scale"](*inputs))
    for part, result in enumerate(ops.gate_rms_norm_add_rms_norm_scale(*inputs)):
        assert_close_to_fp64(result, references.gate_rms_norm_add_rms_norm_scale_reference, *inputs, part=part)
    name = "gate_rms_norm_add_rms_norm_modulate"
    for part, result in enumerate(getattr(ops, name)(*inputs)):
        assert_close_to_fp64(result, getattr(references, f"{name}_reference"), *inputs, part=part)
    inputs = (x, weight, 1e-6, scale)
    assert_close_to_fp64(ops.rms_norm_modulate(*inputs), references.rms_norm_modulate_reference, *inputs)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["samples", "tokens"])
def test_modulation_in_fp32(kind, dtype, device, runs_kernel) -> None:
    shape = (2, 5, 40)
    x, y = (torch.randn(shape, device=device).to(dtype) for _ in range(2))
    gate, scale, shift = rows(kind, shape, device, torch.float32)
    norm = ([40], torch.randn(40, device=device), torch.randn(40, device=device), 1e-6)
    if runs_kernel:
        assert modulate.takes(modulate.JOBS["gate_add_layer_norm_modulate_wide"](x, y, gate, *norm, scale, shift))
    for name, part, inputs in [
        ("layer_norm_wide", None, (x, *norm)),
        ("layer_norm_modulate_wide", None, (x, *norm, scale, shift)),
        ("gate_add_wide", None, (x, y, gate)),
        *(("gate_add_layer_norm_wide", part, (x, y, gate, *norm)) for part in (0, 1)),
        *(("gate_add_layer_norm_modulate_wide", part, (x, y, gate, *norm, scale, shift)) for part in (0, 1)),
    ]:
        result = getattr(ops, name)(*inputs)
        reference = getattr(references, f"{name}_reference")
        assert_close_to_fp64(result if part is None else result[part], reference, *inputs, part=part)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_a_table_and_something_for_every_token(dtype, device, runs_kernel) -> None:
    B, T, C = 2, 5, 40
    x, y = (torch.randn(B, T, C, device=device).to(dtype) for _ in range(2))
    tables = (0.5 * torch.randn(1, 1, 6, C, device=device)).chunk(6, 2)
    tokens = (0.5 * torch.randn(B, T, 6, C, device=device)).to(dtype).chunk(6, 2)
    norm = ([C], torch.randn(C, device=device), torch.randn(C, device=device), 1e-6)
    modulation = (tables[1], tokens[1], tables[0], tokens[0])
    if runs_kernel:
        assert modulate.takes(modulate.JOBS["layer_norm_modulate_sums"](x, *norm, *modulation))
    for name, part, inputs in [
        ("layer_norm_modulate_sums", None, (x, *norm, *modulation)),
        *(("gate_add_layer_norm_sums", part, (x, y, tables[2], tokens[5], *norm)) for part in (0, 1)),
        *(
            ("gate_add_layer_norm_modulate_sums", part, (x, y, tables[2], tokens[5], *norm, *modulation))
            for part in (0, 1)
        ),
    ]:
        result = getattr(ops, name)(*inputs)
        reference = getattr(references, f"{name}_reference")
        assert_close_to_fp64(result if part is None else result[part], reference, *inputs, part=part)
    mixed = (x, *norm, tables[1], tokens[1], tables[0], tokens[0].float())
    assert not modulate.takes(modulate.JOBS["layer_norm_modulate_sums"](*mixed))  # of two precisions
    torch.testing.assert_close(
        ops.layer_norm_modulate_sums(*mixed), references.layer_norm_modulate_sums_reference(*mixed)
    )


def test_several_rows_to_a_program(device, monkeypatch) -> None:
    x, (gate, scale, shift) = torch.randn(3, 7, 40, device=device), rows("samples", (3, 7, 40), device, torch.float32)
    inputs = (x, x.flip(0), gate, [40], None, None, 1e-6, scale, shift)
    for part, result in enumerate(ops.gate_add_layer_norm_modulate(*inputs)):
        assert_close_to_fp64(result, references.gate_add_layer_norm_modulate_reference, *inputs, part=part)


def test_rows_are_read_where_a_merged_product_left_them(device) -> None:
    x, y, _ = torch.randn(2, 5, 3 * 40, device=device).chunk(3, -1)
    gate, scale, shift = rows("samples", (2, 5, 40), device, torch.float32)
    assert modulate._as_samples(x).data_ptr() == x.data_ptr()
    inputs = (x, y, gate, [40], None, None, 1e-6, scale, shift)
    for part, result in enumerate(ops.gate_add_layer_norm_modulate(*inputs)):
        assert result.is_contiguous()
        assert_close_to_fp64(result, references.gate_add_layer_norm_modulate_reference, *inputs, part=part)
    weight = torch.randn(40, device=device)
    for each in (x, x[0], x[..., ::2].repeat(1, 1, 2), x.view(2, 5, 1, 40).expand(2, 5, 3, 40)):
        result = ops.rms_norm(each, weight, 1e-6)
        assert_close_to_fp64(result, lambda each, weight: F.rms_norm(each, weight.shape, weight, 1e-6), each, weight)


@pytest.mark.parametrize(
    ("width", "block", "pieces"), [(3072, 1024, 3), (1536, 512, 3), (1152, 256, 5), (40, 16, 3), (16384, 4096, 4)]
)
def test_a_row_is_cut_into_few_pieces_of_which_little_is_idle(width, block, pieces) -> None:
    assert modulate.tile(width) == (block, pieces)


def test_a_nan_spoils_its_own_row_and_no_other(device) -> None:
    x, scale = torch.randn(1, 7, 48, device=device), torch.randn(1, 1, 48, device=device)
    x[0, 3, 5] = float("nan")
    result = ops.layer_norm_modulate(x, [48], None, None, 1e-6, scale, scale)[0]
    assert result.isnan().all(dim=1).tolist() == [row == 3 for row in range(7)]
    assert result.isnan().any(dim=1).tolist() == [row == 3 for row in range(7)]


def test_what_is_left_to_the_reference(device) -> None:
    x, row = torch.randn(2, 3, 8, device=device), torch.randn(2, 1, 8, device=device)
    norm = ([8], None, None, 1e-6)
    for job in (
        modulate.JOBS["layer_norm_modulate"](x, *norm, row.half(), row),  # eager's result would be another precision
        modulate.JOBS["layer_norm_modulate"](x, *norm, row[..., :1], row),
        modulate.JOBS["layer_norm_modulate"](x, [3, 8], None, None, 1e-6, row, row),
        modulate.JOBS["gate_add"](x, x[:, :1], row),
        modulate.JOBS["gate_add"](x[0], x[0], row),  # the sum has more dimensions
    ):
        assert not modulate.takes(job)
    narrow = (x, *norm, row[..., :1], row)
    assert torch.equal(ops.layer_norm_modulate(*narrow), references.layer_norm_modulate_reference(*narrow))
    assert torch.equal(ops.gate_add(x[0], x[0], row), references.gate_add_reference(x[0], x[0], row))


def test_fake_tensors(device) -> None:
    x, row = torch.randn(2, 3, 8, device=device), torch.randn(2, 1, 8, device=device)
    inputs = (x, x + 1, row, [8], None, None, 1e-6, row, row)
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(ops.gate_add_layer_norm_modulate.default, inputs, test_utils=checks)
    torch.library.opcheck(ops.gate_add.default, (x, x + 1, row), test_utils=checks)
