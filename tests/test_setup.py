"""setup.py builds the native ops or leaves them out with one clear line; nothing is compiled here."""

from __future__ import annotations

import runpy
from pathlib import Path
from types import SimpleNamespace

import pytest
import setuptools
import torch

ROOT = Path(__file__).parents[1]


@pytest.fixture
def build(monkeypatch):
    """setup.py's functions, and what it would have passed to setup()."""

    def run(choice: str) -> SimpleNamespace:
        passed = {}
        monkeypatch.setenv("SFAST_BUILD_NATIVE", choice)
        monkeypatch.setattr(setuptools, "setup", lambda **arguments: passed.update(arguments))
        monkeypatch.chdir(ROOT)
        return SimpleNamespace(passed=passed, **runpy.run_path(str(ROOT / "setup.py")))

    return run


def test_left_out_on_request(build, capsys):
    assert build("0").passed["ext_modules"] == []
    assert capsys.readouterr().err == "sfast: the native ops are left out: SFAST_BUILD_NATIVE=0\n"


def test_left_out_without_cuda(build, capsys, monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", None)
    assert build("auto").passed["ext_modules"] == []
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith(f"left out: PyTorch {torch.__version__} is built without CUDA")


def test_required_but_impossible(build, monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(SystemExit, match=r"cannot be built: PyTorch .* is built without CUDA"):
        build("1")


def test_misspelt_choice(build):
    with pytest.raises(SystemExit, match="must be 0, 1 or auto, got 'yes'"):
        build("yes")


def test_old_torch(build, monkeypatch):
    setup = build("0")
    monkeypatch.setattr(torch, "__version__", "2.9.1+cu130")
    with pytest.raises(setup.CannotBuildError, match=r"must be 2\.10 or later, got 2\.9\.1"):
        setup.torch_folder()


def test_missing_header_is_named(build, tmp_path):
    setup = build("0")
    with pytest.raises(setup.CannotBuildError, match=r"cudnn\.h was not found"):
        setup.find("cudnn.h", [tmp_path])


def test_toolkits_of_another_cuda_are_passed_over(build, tmp_path, monkeypatch):
    setup = build("0")
    for major in (12, 13):
        (tmp_path / f"cuda{major}" / "include").mkdir(parents=True)
        header = tmp_path / f"cuda{major}" / "include" / "cuda_runtime_api.h"
        header.write_text(f"#define CUDART_VERSION  {major}000\n")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "cuda12"))
    monkeypatch.setenv("CUDA_PATH", str(tmp_path / "cuda13"))
    roots = setup.cuda_roots(tmp_path / "torch", 13)
    assert tmp_path / "cuda13" in roots
    assert tmp_path / "cuda12" not in roots


def test_tags(build):
    setup = build("0")
    pure = setup.PythonFreeWheel(setuptools.Distribution())
    pure.finalize_options()
    assert pure.get_tag() == ("py3", "none", "any")
    compiled = setup.PythonFreeWheel(setuptools.Distribution({"ext_modules": [setuptools.Extension("a", [])]}))
    compiled.finalize_options()
    python, abi, platform = compiled.get_tag()
    assert (python, abi) == ("py3", "none")
    assert platform != "any"


def extension(tmp_path: Path) -> setuptools.Extension:
    return setuptools.Extension("sfast._native_cu13", [], include_dirs=[str(tmp_path / "toolkit" / "include")])


def fake_toolkit(tmp_path: Path, major: int, script: str) -> None:
    (tmp_path / "toolkit" / "include").mkdir(parents=True)
    (tmp_path / "toolkit" / "bin").mkdir()
    header = tmp_path / "toolkit" / "include" / "cuda_runtime_api.h"
    header.write_text(f"#define CUDART_VERSION  {major}000\n")
    nvcc = tmp_path / "toolkit" / "bin" / "nvcc"
    nvcc.write_text(f"#!/bin/sh\n{script}\n")
    nvcc.chmod(0o755)


def test_kernels_are_left_out_without_nvcc(build, tmp_path, monkeypatch, capsys):
    setup = build("0")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert setup.compile_kernels(extension(tmp_path), tmp_path / "objects") == []
    assert capsys.readouterr().err.endswith("matrix kernels are left out: nvcc was not found\n")


def test_kernels_are_left_out_where_nvcc_is_another_cudas(build, tmp_path, monkeypatch):
    setup = build("0")
    monkeypatch.setenv("PATH", str(tmp_path))
    fake_toolkit(tmp_path, 12, "exit 0")
    assert setup.nvcc_of(extension(tmp_path)) is None


def test_kernels_are_left_out_where_nvcc_fails(build, tmp_path, capsys):
    setup = build("0")
    fake_toolkit(tmp_path, 13, "exit 7")
    assert setup.compile_kernels(extension(tmp_path), tmp_path / "objects") == []
    assert "matrix kernels are left out" in capsys.readouterr().err


def test_kernels_become_objects_of_the_extension(build, tmp_path, monkeypatch):
    setup = build("0")
    fake_toolkit(tmp_path, 13, 'for last; do :; done; echo "$@" > "$last"')
    made = setup.compile_kernels(extension(tmp_path), tmp_path / "objects")
    assert [Path(path).name for path in made] == [f"{path.name}.o" for path in sorted((ROOT / "csrc").glob("*.cu"))]
    command = setuptools.Distribution({"ext_modules": [extension(tmp_path)]}).get_command_obj("build_ext")
    native = setup.PythonFreeBuildExt(command.distribution)
    native.build_temp = str(tmp_path)
    built = []
    monkeypatch.setattr(setup.build_ext, "build_extension", lambda self, ext: built.append(ext))
    native.build_extension(extension(tmp_path))
    assert [Path(path).name for path in built[0].extra_objects] == [Path(path).name for path in made]
    assert (("SFAST_HOPPER", "1") in built[0].define_macros) == bool(made)
