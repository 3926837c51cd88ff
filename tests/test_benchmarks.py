"""The benchmark scripts: the models are the published ones, wrong outputs get no speed, rows have the agreed columns."""

from __future__ import annotations

import csv
import os
import re
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

import sfast
from benchmarks import budget, measure, pipelines, plot
from benchmarks.architectures import ARCHITECTURES
from benchmarks.models import MODELS, Draw, build, build_architecture, class_of, to_compile

ROOT = Path(__file__).parent.parent
CPU = torch.device("cpu")


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_an_architecture_has_the_published_number_of_parameters(name: str) -> None:
    try:
        class_of(name)
    except LookupError as error:
        pytest.skip(str(error))
    with torch.device("meta"):
        module = build_architecture(name)
    assert sum(parameter.numel() for parameter in module.parameters()) == ARCHITECTURES[name].parameters
    assert not module.training


class MetaDraw(Draw):
    def __init__(self, dtype: torch.dtype) -> None:
        self.device, self.dtype = torch.device("meta"), dtype

    def __call__(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.empty(shape, device="meta", dtype=dtype or self.dtype)


# SVD's blocks put one tensor on the CPU whatever their device is, so that model cannot run on the meta device.
@pytest.mark.parametrize("name", [name for name in MODELS if "svd" not in name and not MODELS[name].pipeline])
def test_a_step_takes_its_inputs_and_returns_what_it_should(name: str) -> None:
    model = MODELS[name]
    if not all(hasattr(diffusers, ARCHITECTURES[part].cls) for part in model.parts.values()):
        pytest.skip(f"diffusers {diffusers.__version__} lacks a class of {name}")
    with torch.device("meta"), torch.no_grad():
        parts = {part: build_architecture(architecture).to(model.dtype) for part, architecture in model.parts.items()}
        first, second = model.inputs(model, MetaDraw(model.dtype), 2)
        output = model.step(parts, first)
    assert output.dtype == model.dtype
    varying = next(key for key in ("sample", "hidden_states", "z", "x") if key in first)
    assert first[varying] is not second[varying]
    if "encoder_hidden_states" in first:
        assert first["encoder_hidden_states"] is second["encoder_hidden_states"]  # one prompt for the whole loop
    if "sample" in first:
        assert output.shape == first["sample"].shape
    assert len(to_compile(model, parts)) == max(len(model.parts), len(model.compiled))


def test_a_model_is_a_function_of_its_seed_and_has_no_constants() -> None:
    model = MODELS["tiny"]
    one, same, other = (build(model, CPU, seed)["unet"].state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not any(torch.equal(one[name], other[name]) for name in one)
    assert all(bool((value != value.flatten()[0]).any()) for value in one.values())
    first, again = (model.inputs(model, Draw(3, CPU, torch.float32), 2) for _ in range(2))
    assert torch.equal(first[1]["sample"], again[1]["sample"])
    assert not torch.equal(first[0]["sample"], first[1]["sample"])
    resized = model.resized(128, 64, 4)
    assert resized.inputs(resized, Draw(3, CPU, torch.float32), 1)[0]["sample"].shape == (8, 4, 8, 16)


def test_relative_error_against_a_hand_computed_one_and_nan_never_passes() -> None:
    assert measure.relative_error(torch.tensor([3.0, 4.0]), torch.tensor([3.0, 5.0])) == pytest.approx(1 / 34**0.5)
    assert not measure.relative_error(torch.tensor([float("nan")]), torch.ones(1)) <= 1e9


def test_the_ladder_sets_fields_that_exist_and_ends_at_the_default() -> None:
    full = sfast.CompilationConfig(enable_hoisting=True)  # what pipelines have
    for rung in measure.LADDER:
        config = sfast.CompilationConfig.Default()
        for name, value in measure.ladder_fields(f"sfast-{rung}").items():
            setattr(config, name, value)
        assert (config == full) == (rung == list(measure.LADDER)[-1]), rung
    assert measure.ladder_fields("sfast") == {"enable_hoisting": True}
    with pytest.raises(ValueError, match=r"variant must be one of .*got sfast-nothing"):
        measure.ladder_fields("sfast-nothing")


@pytest.mark.parametrize(
    ("kernel", "kind"),
    [
        ("Memset (Device)", "memset"),
        ("Memcpy DtoD (Device -> Device)", "memcpy"),
        ("void at::native::(anonymous namespace)::RowwiseMomentsCUDAKernel<c10::Half>(long)", "group norm"),
        ("sm90_xmma_fprop_implicit_gemm_f16f16_f16f32_f32_nhwckrsc_nhwc_tilesize128x128x64", "convolution"),
        ("void cudnn::engines_precompiled::nchwToNhwcKernel<__half, __half>(int)", "layout change"),
        ("nvjet_hsh_128x256_64x4_1x2_h_bz_coopA_bias_TNT", "gemm"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_3i_128x128x40", "attention"),
        ("void pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits<64>>", "attention"),
        ("triton_poi_fused_add_mul_silu_3", "fused by inductor"),
        ("triton_per_fused_clone_convolution_native_group_norm_12", "fused by inductor"),
        ("void at::native::vectorized_elementwise_kernel<4, at::native::gelu>(int)", "pointwise"),
        ("void at::native::(anonymous namespace)::CatArrayBatchedCopy<__half, 4>", "copy or cat"),
        ("apply", "group norm"),
        ("merge", "group norm"),
        ("void sfast::(anonymous namespace)::group_norm<__half>(sfast::Arguments)", "group norm"),
        ("void sfast::(anonymous namespace)::apply<__half, (sfast::HopperActivation)3>(__half const*)", "pointwise"),
        ("void sfast::hopper::multiply_tiles<__half, 1, 2, false, 160>()", "our products and convolutions"),
        ("void sfast::attention::attention_long<sfast::attention::LongKernel<__half, 40>>()", "attention"),
        ("exponentials", "attention"),
        ("_cat_tiles", "copy or cat"),
        ("_few_out", "convolution"),
        ("_layer_norm_rows", "layer norm"),
        ("modulate_rows", "layer norm"),
        ("something_new", "other"),
    ],
)
def test_kernels_are_sorted_by_name(kernel: str, kind: str) -> None:
    assert budget.kernel_class(kernel) == kind


def test_a_budget_is_that_of_one_step() -> None:
    ran = [("nvjet_a", 2.0), ("nvjet_a", 2.0), ("Memset (Device)", 0.5), ("Memset (Device)", 0.5)]
    one = budget.summarise(ran, [3.0, 4.0], steps=2)
    assert (one.nodes, one.kernel_ms, one.span_ms) == (2, 2.5, 3.5)
    assert one.classes["gemm"] == budget.Share(1, 2.0)
    assert one.table().splitlines()[2].split() == ["gemm", "1", "2.000", "80.0%"]


def row(**changed: Any) -> dict[str, Any]:
    figures = {"ms": 2.0, "ms_p20": 1.9, "ms_p80": 2.1, "cpu_ms": 0.3, "first_call_s": 1.5, "error": 1.1e-3}
    names = {"run": "r", "model": "sd15", "variant": "sfast", "precision": "fp16", "torch": "2.13.0", "commit": "abc"}
    sizes = {"width": 512, "height": 512, "batch": 2, "eager_error": 1e-3, "nodes": 600, "peak_gib": 2.5}
    return {**names, **sizes, **figures, "right": True, "gpu": "NVIDIA H200", **changed}


def test_no_speed_is_printed_where_the_output_is_wrong() -> None:
    medians = {"eager": 8.0, "sfast": 2.0}
    right = pipelines.line(row(), medians, tflop=1.6)
    assert "4.00x eager" in right
    assert "800 TFLOP/s" in right
    wrong = row(error=0.2, right=False)
    del wrong["ms"], wrong["ms_p20"], wrong["ms_p80"], wrong["cpu_ms"]
    text = pipelines.line(wrong, {"eager": 8.0}, tflop=1.6)
    assert "WRONG" in text
    assert "x eager" not in text
    assert "TFLOP/s" not in text


def test_rows_are_appended_with_the_agreed_columns(tmp_path: Path) -> None:
    path = tmp_path / "results.csv"
    pipelines.append(path, row())
    before = path.read_text()
    pipelines.append(path, row(variant="eager", nodes=None, ms=8.123456789))
    assert path.read_text().startswith(before)
    agreed = (
        "run,model,variant,precision,width,height,batch,ms,ms_p20,ms_p80,first_call_s,peak_gib,nodes,error,eager_error,"
        "gpu,torch,commit"
    )
    assert before.splitlines() == [
        agreed,
        "r,sd15,sfast,fp16,512,512,2,2.0,1.9,2.1,1.5,2.5,600,1.100e-03,1.000e-03,NVIDIA H200,2.13.0,abc",
    ]
    with path.open(newline="") as file:
        assert [line["ms"] for line in csv.DictReader(file)] == ["2.0", "8.1235"]


def test_the_committed_results_have_the_agreed_columns_and_draw(tmp_path: Path) -> None:
    with pipelines.RESULTS.open(newline="") as file:
        reader = csv.DictReader(file)
        rows = list(reader)
    assert reader.fieldnames == pipelines.COLUMNS
    assert {line["model"] for line in rows} <= MODELS.keys()
    assert {line["variant"] for line in rows} <= set(measure.VARIANTS)
    plot.main(["--out", str(tmp_path / "results.png")])
    assert (tmp_path / "results.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_sizes_and_numbers_of_pictures_multiply(tmp_path: Path) -> None:
    out = tmp_path / "results.csv"
    options = ["--models", "tiny", "--variants", "eager", "--quick", "--device", "cpu", "--out", str(out)]
    assert pipelines.main([*options, "--sizes", "32,64x32", "--pictures", "1,3"]) == 0
    with out.open(newline="") as file:
        cases = [(line["width"], line["height"], line["batch"]) for line in csv.DictReader(file)]
    assert cases == [("32", "32", "2"), ("32", "32", "6"), ("64", "32", "2"), ("64", "32", "6")]


def test_a_variant_that_comes_again_finds_the_caches_of_the_one_before(tmp_path: Path) -> None:
    def leave(name: str) -> dict[str, Any]:
        folder = Path(os.environ["SFAST_CACHE_DIR"])
        found = sorted(path.name for path in folder.glob("*"))
        folder.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
        return {"found": found}

    caches = tmp_path / "caches"
    found = [pipelines.in_fresh_process(partial(leave, name), 60, caches)["found"] for name in ("one", "two")]
    found.append(pipelines.in_fresh_process(partial(leave, "three"), 60)["found"])
    assert found == [[], ["one"], []]


def test_a_picture_is_drawn_from_its_prompt() -> None:
    model = MODELS["tiny-picture"]
    pipe = measure.assemble(model, build(model, CPU))
    first, second = model.inputs(model, Draw(3, CPU, torch.float32), 2)
    assert first["prompt"] != second["prompt"] and not torch.equal(first["latents"], second["latents"])
    with torch.no_grad():
        drawn = model.step(pipe, first)
        compared = model.step(pipe, {**first, **model.compared})
        other = model.step(pipe, {**first, "prompt": second["prompt"], **model.compared})
    assert drawn.dtype == torch.uint8 and drawn.shape == (1, 16, 16, 3)
    assert compared.dtype == torch.float32 and compared.shape == (1, 3, 16, 16)
    torch.testing.assert_close(drawn.permute(0, 3, 1, 2) / 255, compared, rtol=0, atol=0.6 / 255)
    assert not torch.equal(compared, other)


def test_a_run_that_is_not_there_is_named(tmp_path: Path) -> None:
    pipelines.append(tmp_path / "results.csv", row())
    with pytest.raises(SystemExit, match=r"no timed row of run other; it has the runs r"):
        plot.rows_of_run(tmp_path / "results.csv", "other")
    assert len(plot.rows_of_run(tmp_path / "results.csv")) == 1


@pytest.mark.parametrize(
    "arguments",
    [["--models", "sd16"], ["--variants", "sfast,fastest"], ["--models", ""], ["--variants", "sfast-again"]],
)
def test_an_unknown_name_is_refused_with_the_known_ones(arguments: list[str], capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as stopped:
        pipelines.main(arguments)
    assert stopped.value.code == 2
    assert re.search("must be of|name that before", capsys.readouterr().err)


@pytest.mark.parametrize(
    ("models", "variants"),
    [
        (("tiny", "tiny-vae"), ("eager", "sfast-trace", "sfast", "sfast-again")),
        (("tiny-controlnet", "tiny-svd", "tiny-vae-encode", "tiny-picture"), ("eager", "sfast")),
    ],
)
def test_the_script_runs_from_end_to_end_on_tiny_models(
    tmp_path: Path, models: tuple[str, ...], variants: tuple[str, ...]
) -> None:
    out = tmp_path / "results.csv"
    results = pipelines.RESULTS.read_text()
    command = [sys.executable, "-m", "benchmarks.pipelines", "--models", ",".join(models), "--quick"]
    command += ["--variants", ",".join(variants), "--device", "cpu", "--run", "test", "--out", str(out)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    with out.open(newline="") as file:
        rows = list(csv.DictReader(file))
    expected = [(model, variant) for model in models for variant in variants]
    assert [(line["model"], line["variant"]) for line in rows] == expected
    for line in rows:
        assert 0 < float(line["ms_p20"]) <= float(line["ms"]) <= float(line["ms_p80"])
        assert float(line["error"]) <= measure.ROUNDING
        assert (line["run"], line["gpu"], line["precision"], line["torch"]) == (
            "test",
            "none",
            "fp32",
            torch.__version__,
        )
    assert "group_norm_silu" in done.stdout
    assert "x eager" in done.stdout
    assert pipelines.RESULTS.read_text() == results


def test_the_reference_of_a_large_batch_is_computed_two_samples_at_a_time() -> None:
    model = MODELS["tiny"].resized(64, 64, 3)
    parts = build(model, CPU)
    inputs = measure._check_inputs(model, CPU, 0)
    sizes: list[int] = []
    parts["unet"].register_forward_pre_hook(
        lambda _, args, kwargs: sizes.append(len(kwargs["sample"])), with_kwargs=True
    )
    with torch.no_grad():
        whole = model.step(measure.assemble(model, parts), inputs)
        in_parts = measure._in_parts(model, measure.assemble(model, parts), inputs)
    assert sizes == [6, 2, 2, 2]
    torch.testing.assert_close(in_parts, whole, rtol=1e-4, atol=1e-4)
