"""What can go wrong for a user: a clear error, or a working fallback with one line, and a pipeline that still works."""

from __future__ import annotations

import inspect
import json
import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sfast
from sfast import fallback, native
from sfast.component import component_of
from sfast.components import find_components
from sfast.kernels.op import define
from tests.tiny import TINY, Pipeline

ROOT = Path(__file__).parent.parent
TEXT_TO_IMAGE = TINY["text-to-image"]


@pytest.fixture
def pipe() -> Pipeline:
    return TEXT_TO_IMAGE.build()


@pytest.fixture(autouse=True)
def fresh_notes() -> None:
    fallback.forget()


def draw(pipe: Pipeline) -> Tensor:
    return TEXT_TO_IMAGE.draw(pipe, steps=1)


def untouched(pipe: Pipeline) -> bool:
    return all(component_of(module) is None for module in find_components(pipe).values())


class Block(nn.Module):
    """A convolution, GroupNorm and SiLU: enough for a few fusions."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(8, 16, 3, padding=1), nn.GroupNorm(4, 16)
        self.eval().requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.nn.functional.silu(self.norm(self.conv(x)))


# Nothing to compile, and what is no module at all.


@pytest.mark.parametrize("target", [None, 3, "runwayml/stable-diffusion-v1-5", [nn.Linear(2, 2)], nn.Linear])
def test_what_is_no_pipeline_and_no_module_is_named(target: Any) -> None:
    for call in (sfast.compile, sfast.restore, sfast.report):
        with pytest.raises(TypeError, match=f"got (the class )?{getattr(target, '__name__', type(target).__name__)}"):
            call(target)


def test_a_pipeline_without_modules_has_nothing_to_compile(pipe: Pipeline) -> None:
    for name, component in pipe.components.items():
        if isinstance(component, nn.Module):
            pipe.register_modules(**{name: None})
    with pytest.raises(ValueError, match=r"StableDiffusionPipeline has nothing to compile"):
        sfast.compile(pipe)


def test_a_module_without_weights_stays_as_it_is(caplog: pytest.LogCaptureFixture) -> None:
    module = nn.SiLU()
    x = torch.randn(3)
    assert torch.equal(sfast.compile(module)(x), torch.nn.functional.silu(x))
    sfast.compile(module)
    assert [record.getMessage() for record in caplog.records] == ["SiLU: stays eager: it has no weights"]
    assert sfast.report(module).fallbacks == [("SiLU", "stays eager: it has no weights")]
    assert sfast.report(nn.SiLU()).fallbacks == []  # which nobody has asked to compile
    assert sfast.report(sfast.restore(module)).fallbacks == []


def test_a_report_of_nothing_says_so() -> None:
    net = nn.Linear(2, 2).eval()
    assert str(sfast.report(net)).startswith("nothing is compiled")
    assert str(sfast.report(sfast.compile(net))).startswith("component  traces")


def test_weights_without_an_address_stay_eager_and_the_rest_is_compiled(
    pipe: Pipeline, caplog: pytest.LogCaptureFixture
) -> None:
    before = draw(pipe)
    pipe.unet.register_buffer("sparse", torch.eye(3).to_sparse())
    sfast.compile(pipe)
    assert sfast.report(pipe).components == ["vae.encoder", "vae.decoder", "text_encoder"]
    assert (draw(pipe) - before).abs().max() < 1e-5
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 1
    assert said[0].startswith("unet: stays eager: RuntimeError: Cannot access data pointer")


def test_torchscript_and_lazy_modules_stay_as_they_are(caplog: pytest.LogCaptureFixture) -> None:
    x = torch.randn(2, 8, 8, 8)
    scripted, lazy = torch.jit.script(Block()), nn.Sequential(nn.LazyConv2d(4, 1)).eval()
    before = scripted(x)
    assert torch.equal(sfast.compile(scripted)(x), before)
    assert sfast.compile(lazy)(x).shape == (2, 4, 8, 8)
    said = [record.getMessage() for record in caplog.records if record.name == "sfast"]
    assert len(said) == 2
    assert said[0].endswith("stays eager: it is a TorchScript module already")
    assert said[1].startswith("Sequential: stays eager: ValueError: Attempted to use an uninitialized parameter")


# Configuration.


def test_a_misspelt_field_is_refused_with_the_right_name(pipe: Pipeline) -> None:
    with pytest.raises(TypeError, match=r"no field `enable_cudagraph`.*Did you mean `enable_cuda_graph`"):
        sfast.CompilationConfig(enable_cudagraph=True)
    config = sfast.CompilationConfig.Default()
    with pytest.raises(TypeError, match=r"no field `memory_fromat`.*Did you mean `memory_format`"):
        config.memory_fromat = torch.channels_last
    assert untouched(sfast.restore(pipe))


@pytest.mark.parametrize(
    ("field", "value", "error"),
    [
        ("enable_triton", "yes", TypeError),
        ("enable_cuda_graph", 1, TypeError),
        ("enable_jit", None, TypeError),
        ("memory_format", "channels_last", TypeError),
        ("memory_format", torch.channels_last_3d, ValueError),
        ("graph_memory_budget", 1.5, TypeError),
        ("graph_memory_budget", True, TypeError),
        ("graph_memory_budget", -1, ValueError),
    ],
)
def test_a_wrong_value_is_refused_when_given_and_when_assigned(field: str, value: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match=rf"`{field}` must.*got"):
        sfast.CompilationConfig(**{field: value})
    config = sfast.CompilationConfig.Default()
    before = getattr(config, field)
    with pytest.raises(error, match=rf"`{field}` must.*got"):
        setattr(config, field, value)
    assert getattr(config, field) == before


def test_contradicting_fields_are_refused_before_anything_is_touched(pipe: Pipeline) -> None:
    with pytest.raises(ValueError, match=r"enable_xformers.*enable_jit"):
        sfast.CompilationConfig(enable_xformers=True, enable_jit=False)
    config = sfast.CompilationConfig(enable_jit=False)
    config.enable_xformers = True
    with pytest.raises(ValueError, match=r"enable_xformers.*enable_jit"):
        sfast.compile(pipe, config)
    assert untouched(pipe)


@pytest.mark.parametrize("config", [{"enable_triton": False}, True, "default", sfast.CompilationConfig])
def test_a_config_of_another_type_is_refused(pipe: Pipeline, config: Any) -> None:
    with pytest.raises(TypeError, match=r"`config` must be a sfast\.CompilationConfig or None, got"):
        sfast.compile(pipe, config)
    assert untouched(pipe)


# The meta device.


def test_weights_on_the_meta_device_are_named_and_nothing_is_half_compiled(pipe: Pipeline) -> None:
    before = draw(pipe)
    real = pipe.unet
    with torch.device("meta"):
        pipe.unet = type(real).from_config(real.config)
    with pytest.raises(
        ValueError, match=r"`unet` cannot be compiled: its weight `conv_in\.weight` is on the meta device"
    ):
        sfast.compile(pipe)
    assert untouched(pipe)
    pipe.unet = real
    assert torch.equal(draw(pipe), before)


def test_one_meta_weight_among_real_ones_is_enough() -> None:
    block = Block()
    block.norm.weight = nn.Parameter(block.norm.weight.to("meta"), requires_grad=False)
    with pytest.raises(ValueError, match=r"norm\.weight"):
        sfast.compile(block)
    assert "forward" not in vars(block)


def test_weights_that_accelerate_has_offloaded_one_by_one(pipe: Pipeline) -> None:
    accelerate = pytest.importorskip("accelerate")
    before = draw(pipe)
    for module in (pipe.text_encoder, pipe.unet, pipe.vae):
        accelerate.cpu_offload(module, "cpu")  # as `enable_sequential_cpu_offload` does, which needs a GPU
    sfast.compile(pipe)
    assert torch.equal(draw(pipe), before)
    sfast.restore(pipe)
    assert torch.equal(draw(pipe), before)


# The machine.


class OnAnOldGpu(nn.Parameter):
    """A CPU parameter that says it lies on a GPU."""

    is_cuda = True


def test_a_gpu_older_than_sm75_stays_eager_with_one_line(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (7, 0))
    block, x = Block(), torch.randn(2, 8, 8, 8)
    before = block(x)
    block.conv.weight = OnAnOldGpu(block.conv.weight.data, requires_grad=False)
    sfast.compile(block)
    assert torch.equal(block(x), before)
    assert torch.equal(block(x), before)
    assert sfast.report(block).components == []
    said = [record.getMessage() for record in caplog.records]
    assert said == ["Block: stays eager: its GPU has compute capability 7.0, 7.5 is the oldest supported"]
    assert ("Block", said[0].removeprefix("Block: ")) in sfast.report(block).fallbacks


def test_a_kernel_that_cannot_be_compiled_or_loaded_gives_way_to_its_reference(
    caplog: pytest.LogCaptureFixture,
) -> None:
    def launch(x: Tensor) -> Tensor:
        raise json.JSONDecodeError("Expecting value", "", 0)  # what Triton raises at a truncated cache entry

    define("corrupt_cache_probe(Tensor x) -> Tensor", torch.sin, lambda x: True, launch, torch.empty_like)
    x = torch.randn(4)
    for _ in range(3):
        assert torch.equal(torch.ops.sfast.corrupt_cache_probe(x), torch.sin(x))
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 1
    assert said[0].startswith("kernel corrupt_cache_probe for torch.float32 on cpu: runs as plain PyTorch: JSONDecode")


def test_corrupt_native_ops_are_left_out_with_one_line(
    pipe: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    before = draw(pipe)
    (tmp_path / "_native_cu13.so").write_bytes(b"\x7fELF\x02 and then nothing more")
    monkeypatch.setattr(native, "FOLDER", tmp_path)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.delenv("SFAST_DISABLE_NATIVE", raising=False)
    native._load.cache_clear()
    try:
        sfast.compile(pipe)
        assert not native.available()
        assert not native.available()
        assert native.why_not() == "_native_cu13.so is corrupt: reinstall sfast"
        assert (draw(pipe) - before).abs().max() < 1e-5
    finally:
        native._load.cache_clear()
    said = [record.getMessage() for record in caplog.records if record.name == "sfast"]
    assert said == ["native ops: _native_cu13.so is corrupt: reinstall sfast"]


SCRIPT = f"""
import json, logging, sys, torch
from torch import Tensor, nn
torch.manual_seed(0)
torch.set_num_threads(1)
lines = []
logger = logging.getLogger("sfast")
logger.addHandler(type("Keep", (logging.Handler,), dict(emit=lambda self, record: lines.append(record.getMessage())))())
logger.propagate = False
{inspect.getsource(Block)}
import sfast
from sfast.kernels import triton_or_none
device, dtype = sys.argv[1], getattr(torch, sys.argv[2])
block, x = Block().to(device, dtype), torch.randn(2, 8, 32, 32, device=device, dtype=dtype)
eager = block(x).double()
sfast.compile(block)
errors = [float((block(x).double() - eager).norm() / eager.norm()) for _ in range(3)]
fusions = sfast.report(block).fusions
print(json.dumps(dict(errors=errors, lines=lines, missing=triton_or_none.MISSING, fusions=fusions)))
"""


def run_script(device: str = "cpu", dtype: str = "float32", **environment: str) -> dict[str, Any]:
    """What SCRIPT reports from a process of its own."""
    paths = os.pathsep.join([*environment.pop("first", "").split(), str(ROOT), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, device, dtype],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": paths, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def broken_triton(folder: Path, raises: str) -> str:
    """A folder to put first on the path, whose `triton` cannot be imported."""
    (folder / "triton").mkdir()
    (folder / "triton" / "__init__.py").write_text(f"raise {raises}\n")
    return str(folder)


BROKEN = [
    "ModuleNotFoundError(\"No module named 'triton'\", name='triton')",
    "ImportError('libtriton.so: undefined symbol')",
]


@pytest.mark.parametrize("raises", BROKEN, ids=["missing", "broken"])
def test_triton_that_cannot_be_imported_is_done_without(tmp_path: Path, raises: str) -> None:
    result = run_script(first=broken_triton(tmp_path, raises))
    assert max(result["errors"]) < 1e-5
    assert result["missing"].startswith(raises.partition("(")[0])
    assert result["fusions"]["group_norm_silu"] == 1  # fused all the same; its operator runs the reference
    assert result["lines"] == []  # on a CPU nothing is slower for it


@pytest.mark.gpu
@pytest.mark.parametrize("raises", BROKEN, ids=["missing", "broken"])
def test_triton_that_cannot_be_imported_costs_one_line_on_a_gpu(tmp_path: Path, raises: str) -> None:
    result = run_script("cuda", "float16", first=broken_triton(tmp_path, raises), SFAST_DISABLE_NATIVE="1")
    assert max(result["errors"]) < 5e-3
    assert sum(line.startswith("Triton: kernels run as plain PyTorch: ") for line in result["lines"]) == 1
    assert len(result["lines"]) == 1, result["lines"]


@pytest.mark.gpu
def test_a_corrupt_kernel_cache_is_survived(tmp_path: Path) -> None:
    cache = {"TRITON_CACHE_DIR": str(tmp_path / "triton"), "SFAST_CACHE_DIR": str(tmp_path / "sfast")}
    first = run_script("cuda", "float16", **cache)
    assert max(first["errors"]) < 5e-3
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) >= 3
    for path in files:
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    second = run_script("cuda", "float16", **cache)
    assert max(second["errors"]) < 5e-3
    assert len([line for line in second["lines"] if line.startswith("Triton's kernel cache: ")]) == 1
    third = run_script("cuda", "float16", **cache)
    assert third["lines"] == first["lines"]


# The call.


class DecidesByValue(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.eval().requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        return y if bool(y.sum() > 0) else -y


def test_a_decision_by_value_stays_eager_with_one_line(caplog: pytest.LogCaptureFixture) -> None:
    module = DecidesByValue()
    x = torch.ones(2, 4)
    expected = [module(x), module(-x)]
    sfast.compile(module)
    assert torch.equal(module(x), expected[0])
    assert torch.equal(module(-x), expected[1])
    said = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert len(said) == 1
    assert "decides in Python by the value of a tensor" in said[0]


def test_a_wrong_argument_raises_what_eager_raises_and_does_no_harm() -> None:
    block, x = Block(), torch.randn(2, 8, 8, 8)
    expected = block(x)
    with pytest.raises(RuntimeError) as eager:
        block(torch.randn(2, 7, 8, 8))
    sfast.compile(block)
    for _ in range(2):
        with pytest.raises(RuntimeError) as compiled:
            block(torch.randn(2, 7, 8, 8))
        assert str(compiled.value) == str(eager.value)
        with pytest.raises(TypeError, match="forward"):
            block(x, strength=3)
        assert (block(x) - expected).abs().max() < 1e-6


def test_a_failed_compile_leaves_what_was_compiled_before(pipe: Pipeline) -> None:
    before = draw(pipe)
    sfast.compile(pipe)
    with pytest.raises(TypeError):
        sfast.compile(pipe, "fast")  # type: ignore[arg-type]
    assert not untouched(pipe)
    assert (draw(pipe) - before).abs().max() < 1e-5
    assert torch.equal(draw(sfast.restore(pipe)), before)
