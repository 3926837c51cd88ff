"""The configuration refuses what it does not know, whenever it is told."""

import pickle
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch

from sfast import CompilationConfig
from sfast.config import RETIRED


def test_defaults_are_lossless_and_checked() -> None:
    config = CompilationConfig.Default()
    assert config == CompilationConfig()
    assert config.verify and config.enable_jit and config.enable_cuda_graph and not config.enable_xformers
    assert set(RETIRED) == {"enable_jit_freeze", "preserve_parameters", "prefer_lowp_gemm", "trace_scheduler"}


@pytest.mark.parametrize(
    "misspell",
    [
        lambda: CompilationConfig(enable_cuda_graphs=True),  # type: ignore[call-arg]
        lambda: setattr(CompilationConfig(), "enable_cuda_graphs", True),
    ],
    ids=["constructor", "assignment"],
)
def test_misspelt_field_names_the_right_one(misspell: Callable[[], object]) -> None:
    message = r"no field `enable_cuda_graphs`\. Did you mean `enable_cuda_graph`.*Allowed: memory_format"
    with pytest.raises(TypeError, match=message):
        misspell()


@pytest.mark.parametrize(
    ("field", "value", "error"),
    [
        ("enable_triton", 1, TypeError),
        ("enable_triton", "yes", TypeError),
        ("memory_format", "channels_last", TypeError),
        ("memory_format", torch.channels_last_3d, ValueError),
        ("graph_memory_budget", "1GB", TypeError),
        ("graph_memory_budget", True, TypeError),
        ("graph_memory_budget", -1, ValueError),
    ],
)
def test_wrong_value_raises_and_leaves_the_field(field: str, value: object, error: type[Exception]) -> None:
    with pytest.raises(error, match=f"`{field}`"):
        CompilationConfig(**{field: value})  # type: ignore[arg-type]
    config = CompilationConfig()
    before = getattr(config, field)
    with pytest.raises(error, match=f"`{field}`"):
        setattr(config, field, value)
    assert getattr(config, field) == before


def test_contradiction_raises_when_built_and_when_used() -> None:
    with pytest.raises(ValueError, match="enable_xformers"):
        CompilationConfig(enable_xformers=True, enable_jit=False)
    config = CompilationConfig(enable_jit=False)
    config.enable_xformers = True  # the other field may be assigned next
    with pytest.raises(ValueError, match="enable_xformers"):
        config.check()


def test_pickles() -> None:
    config = CompilationConfig(enable_triton=False)
    assert pickle.loads(pickle.dumps(config)) == config


def test_import_touches_no_gpu() -> None:
    code = "import sfast, torch; sfast.CompilationConfig.Default(); assert not torch.cuda.is_initialized()"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
