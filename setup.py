"""Builds the wheel, with the native ops in it where a CUDA toolkit and a CUDA build of PyTorch are at hand.

The rest of the metadata is in pyproject.toml. Without what the native ops need they are left out with one line that
says what is missing, and the wheel is a pure Python one. SFAST_BUILD_NATIVE=0 leaves them out, SFAST_BUILD_NATIVE=1
makes a missing piece an error. An isolated build sees no PyTorch: for the native ops build with --no-build-isolation.

Our own matrix kernels (csrc/*.cu, for Hopper) are compiled where nvcc is at hand; without it, or where it fails, the
native ops are built without them and run on cuDNN and cuBLASLt alone.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

# The oldest PyTorch that the binary shall load in: it is compiled against this version of the stable ABI.
TORCH_TARGET = (2, 10)
HEADERS = ("cuda_runtime_api.h", "crt/host_defines.h", "cublasLt.h", "cudnn.h")
# The kernels are written in sm_90a's instructions; which GPU runs them is asked at run time.
NVCC_FLAGS = ["-std=c++17", "-O3", "-gencode=arch=compute_90a,code=sm_90a", "-Xcompiler=-fPIC,-fvisibility=hidden"]


class CannotBuildError(Exception):
    """Says what the native ops miss on this machine."""


def torch_folder() -> tuple[Path, int]:
    """PyTorch's folder and the major version of its CUDA."""
    if not sys.platform.startswith("linux"):
        raise CannotBuildError(f"they are built on Linux only, this is {sys.platform}")
    if importlib.util.find_spec("torch") is None:
        raise CannotBuildError("PyTorch is not in the build environment (install it first, pass --no-build-isolation)")
    import torch

    version = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    if version < TORCH_TARGET:
        raise CannotBuildError(f"PyTorch must be 2.10 or later, got {torch.__version__}")
    if torch.version.cuda is None:
        raise CannotBuildError(f"PyTorch {torch.__version__} is built without CUDA")
    return Path(torch.__file__).parent, int(torch.version.cuda.split(".")[0])


def cuda_roots(torch_path: Path, cuda: int) -> list[Path]:
    """Folders with include/ and lib/ in them: toolkits, then the nvidia-* wheels beside PyTorch, then the system."""
    nvcc = shutil.which("nvcc")
    toolkits = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), nvcc and Path(nvcc).resolve().parents[1]]
    toolkits += sorted(Path("/usr/local").glob(f"cuda-{cuda}*"), reverse=True)
    wheels = sorted((torch_path.parent / "nvidia").glob("*"))
    roots = [Path(root) for root in [*toolkits, "/usr/local/cuda", *wheels, "/usr"] if root]
    return [root for root in roots if toolkit_major(root) in (None, cuda)]


def toolkit_major(root: Path) -> int | None:
    """The CUDA major version of the headers in a folder; None where it has none of CUDA's."""
    header = root / "include" / "cuda_runtime_api.h"
    if not header.exists():
        return None
    for line in header.read_text(errors="replace").splitlines():
        if line.startswith("#define CUDART_VERSION"):
            return int(line.split()[2]) // 1000
    return None


def find(name: str, folders: list[Path]) -> Path:
    """The first of the folders that holds a file of this name."""
    for folder in folders:
        if (folder / name).exists():
            return folder
    raise CannotBuildError(f"{name} was not found: install the CUDA toolkit, and cuDNN with its headers")


def native_extension() -> Extension:
    """The native ops as an extension without any Python in it, one for each CUDA major version."""
    torch_path, cuda = torch_folder()
    roots = cuda_roots(torch_path, cuda)
    includes = [find(name, [root / "include" for root in roots]) for name in HEADERS]
    multiarch = sysconfig.get_config_var("MULTIARCH") or "lib64"
    lib_folders = [root / lib for root in roots for lib in ("lib64", "lib", f"lib/{multiarch}")]
    libraries = [f"libcudart.so.{cuda}", f"libcublasLt.so.{cuda}", "libcudnn.so.9"]
    lib_paths = [find(name, lib_folders) for name in libraries]
    # Some compilers link libstdc++ statically, and a second one beside PyTorch's crashes at the first exception.
    shared_libstdcxx = [folder for folder in lib_folders if (folder / "libstdc++.so.6").exists()][:1]
    libraries += ["libstdc++.so.6"] * len(shared_libstdcxx)
    lib_paths += shared_libstdcxx
    if shutil.which(os.environ.get("CXX", "c++").split()[0]) is None:
        raise CannotBuildError("no C++ compiler was found: install g++")
    major, minor = TORCH_TARGET
    return Extension(
        f"sfast._native_cu{cuda}",
        sources=sorted(str(path) for path in Path("csrc").glob("*.cpp")),
        depends=sorted(str(path) for pattern in ("*.h", "*.cu", "*.cuh") for path in Path("csrc").glob(pattern)),
        include_dirs=list(dict.fromkeys(str(path) for path in [torch_path / "include", *includes])),
        define_macros=[("USE_CUDA", "1"), ("TORCH_TARGET_VERSION", f"0x{major:02x}{minor:02x}000000000000")],
        extra_compile_args=["-std=c++17", "-O2", "-g0", "-fvisibility=hidden"],
        library_dirs=list(dict.fromkeys(str(path) for path in [torch_path / "lib", *lib_paths])),
        libraries=["torch_cpu", "torch_cuda"],
        # The versioned names: wheels carry no others. What these libraries need in turn, PyTorch brings.
        extra_link_args=[*(f"-l:{name}" for name in libraries), "-Wl,--allow-shlib-undefined,--exclude-libs,ALL"],
        language="c++",
        # A compiler that fails costs the native ops and a warning, not the installation.
        optional=os.environ.get("SFAST_BUILD_NATIVE") != "1",
    )


def native_extensions() -> list[Extension]:
    """The extension in a list, or an empty list and one line that says why."""
    wanted = os.environ.get("SFAST_BUILD_NATIVE", "auto")
    if wanted not in ("0", "1", "auto"):
        sys.exit(f"SFAST_BUILD_NATIVE must be 0, 1 or auto, got {wanted!r}")
    try:
        if wanted == "0":
            raise CannotBuildError("SFAST_BUILD_NATIVE=0")
        return [native_extension()]
    except CannotBuildError as reason:
        if wanted == "1":
            sys.exit(f"sfast: the native ops cannot be built: {reason}")
        print(f"sfast: the native ops are left out: {reason}", file=sys.stderr)
        return []


def nvcc_of(extension: Extension) -> Path | None:
    """The compiler of the toolkit whose headers the extension reads, else the one on the path; None without any."""
    major = int(extension.name.rpartition("_cu")[2])
    beside = [Path(folder).parent / "bin" / "nvcc" for folder in extension.include_dirs]
    on_path = shutil.which("nvcc")
    found = [path for path in [*beside, *([Path(on_path).resolve()] if on_path else [])] if path.exists()]
    return next((path for path in found if toolkit_major(path.parents[1]) == major), None)


def compile_kernels(extension: Extension, folder: Path) -> list[str]:
    """The objects of csrc/*.cu; an empty list and one line on stderr where they cannot be made."""
    nvcc = nvcc_of(extension)
    sources = sorted(Path("csrc").glob("*.cu"))
    if nvcc is None:
        print("sfast: our own matrix kernels are left out: nvcc was not found", file=sys.stderr)
        return []
    folder.mkdir(parents=True, exist_ok=True)
    host = ["-ccbin", os.environ["CXX"].split()[0]] if "CXX" in os.environ else []
    includes = [f"-I{path}" for path in extension.include_dirs]

    def make(source: Path) -> str:
        made = str(folder / f"{source.stem}.cu.o")
        command = [str(nvcc), *NVCC_FLAGS, *host, *includes, "-c", str(source), "-o", made]
        subprocess.run(command, check=True)
        return made

    try:
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            return list(pool.map(make, sources))
    except (OSError, subprocess.CalledProcessError) as error:
        print(f"sfast: our own matrix kernels are left out: {error}", file=sys.stderr)
        return []


class PythonFreeBuildExt(build_ext):
    """Names the library without a Python version: it has none in it. Compiles the kernels first."""

    def build_extension(self, ext: Extension) -> None:
        objects = compile_kernels(ext, Path(self.build_temp) / "csrc")
        if objects:
            ext.extra_objects += objects
            ext.define_macros.append(("SFAST_HOPPER", "1"))
        super().build_extension(ext)

    def get_ext_filename(self, fullname: str) -> str:
        return fullname.replace(".", os.sep) + ".so"


class PythonFreeWheel(bdist_wheel):
    """Tags the wheel for every Python 3 on this platform, or on any platform when nothing was compiled."""

    def get_tag(self) -> tuple[str, str, str]:
        platform = super().get_tag()[2]
        return ("py3", "none", platform if self.distribution.has_ext_modules() else "any")


setup(
    ext_modules=native_extensions(),
    cmdclass={"build_ext": PythonFreeBuildExt, "bdist_wheel": PythonFreeWheel},
)
