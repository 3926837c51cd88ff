"""The wheel holds the package and nothing else, and works from where it is installed."""

import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ("pyproject.toml", "setup.py", "README.md", "LICENSE", "sfast", "csrc")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built from a copy, as `pip wheel .` builds it where there is no CUDA toolkit."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
        else:
            shutil.copy(ROOT / name, source / name)
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "-q",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        str(out),
        str(source),
    ]
    environment = {"PATH": "/usr/bin:/bin", "HOME": str(out), "SFAST_BUILD_NATIVE": "0"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    (built,) = out.glob("sfast-*.whl")
    return built


def test_a_build_without_native_ops_is_pure_python(wheel):
    assert wheel.name.endswith("-py3-none-any.whl")


def test_the_wheel_holds_the_package_and_nothing_else(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0].split("-")[0] for name in names} == {"sfast"}
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "sfast").rglob("*.py")}
    assert modules <= set(names)
    assert not [name for name in names if name.endswith((".so", ".cpp", ".pyc"))]


def test_the_wheel_carries_the_shipped_pipeline(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    shipped = [path for path in (ROOT / "sfast" / "demo").rglob("*") if path.suffix in (".safetensors", ".json")]
    assert {str(path.relative_to(ROOT)) for path in shipped} <= names
    assert "sfast/demo/pipeline/model_index.json" in names


def test_the_wheel_is_small(wheel):
    assert wheel.stat().st_size <= 16 * 2**20


def metadata_of(wheel):
    archive = zipfile.ZipFile(wheel)
    (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
    return archive.read(name).decode()


def test_metadata(wheel):
    archive, text = zipfile.ZipFile(wheel), metadata_of(wheel)
    assert "\nName: sfast\n" in text
    assert "\nRequires-Python: >=3.10\n" in text
    assert "\nLicense-Expression: MIT\n" in text
    (entry,) = (name for name in archive.namelist() if name.endswith("entry_points.txt"))
    assert "sfast = sfast.__main__:main" in archive.read(entry).decode()
    (licence,) = (name for name in archive.namelist() if name.endswith("/LICENSE"))
    assert "sfast authors" in archive.read(licence).decode()


def test_the_installed_wheel_runs_and_says_where_the_benchmarks_are(wheel, tmp_path):
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")

    def run(*arguments):
        command = [sys.executable, "-m", "sfast", *arguments]
        return subprocess.run(command, capture_output=True, text=True, cwd=tmp_path / "site")

    assert run("--help").stdout.startswith("usage: sfast")
    bench = run("bench", "pipelines")
    assert bench.returncode == 1
    assert "not in the wheel" in bench.stderr


def requirements(path):
    lines = (line.split("#")[0].strip() for line in path.read_text().splitlines())
    return [Requirement(line) for line in lines if line]


def test_constraints_are_exact_and_let_torch_bring_its_own_triton():
    pins = requirements(ROOT / "constraints.txt")
    assert all(re.fullmatch(r"==[\w.]+", str(pin.specifier)) for pin in pins)
    assert "torch" in {pin.name for pin in pins}
    assert "triton" not in {pin.name for pin in pins}


def test_constraints_satisfy_what_the_package_asks_for(wheel):
    pins = {pin.name: str(pin.specifier).removeprefix("==") for pin in requirements(ROOT / "constraints.txt")}
    asked = [Requirement(line) for line in re.findall(r"^Requires-Dist: (.+)$", metadata_of(wheel), re.MULTILINE)]
    checked = [need for need in asked if need.name in pins]
    assert {"torch", "diffusers", "transformers"} <= {need.name for need in checked}
    assert all(need.specifier.contains(pins[need.name]) for need in checked)
