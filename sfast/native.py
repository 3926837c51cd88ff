"""Loads the native ops (cuDNN convolution, cuBLASLt linear) where they were built, and says plainly why where not.

They live in one shared library without any Python in it, built against PyTorch's stable ABI, so the same file serves
many versions of PyTorch and Python; its name carries the CUDA major version that it needs. Nothing here ever raises:
whoever asks `available()` and hears no runs plain PyTorch instead.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import re
from pathlib import Path

import torch

from sfast import disk_cache, elf, fallback

FOLDER = Path(__file__).parent
OPS = ("conv2d", "linear", "plans")


def available() -> bool:
    """Whether `torch.ops.sfast_native.conv2d` and `.linear` can be called. Loads them at the first question."""
    return _load() is None


def why_not() -> str | None:
    """One sentence on what is missing, or None when the native ops are available."""
    return _load()


def plans() -> str:
    """One line for each convolution and linear shape met: the kernel chosen, its time, how long choosing took."""
    return torch.ops.sfast_native.plans() if available() else ""


_kept: dict[torch.device, str] = {}  # the choices that are on disk, as this process has read or written them


def recall_choices(device: torch.device) -> None:
    """Once for each GPU: take over the kernels that an earlier process has chosen, so that nothing is measured again."""
    if device.type != "cuda" or device in _kept or not available():
        return
    _kept[device] = ""
    try:
        _kept[device] = disk_cache.get("plans", _environment(device)) or ""
        if _kept[device]:
            torch.ops.sfast_native.recall(device.index, _kept[device])
    except Exception as error:  # then they are measured
        fallback.let_through(error)
        fallback.logger.debug("choices of an earlier process could not be taken over", exc_info=error)


_borrowed: dict[tuple[torch.device, str], str] = {}  # what was measured for another size: (device, problem) -> recipe


def measured(device: torch.device) -> dict[str, str]:
    """Problem -> recipe of every choice that was measured for just that problem, in this process or an earlier one."""
    chosen = _by_problem(torch.ops.sfast_native.choices(device.index)) if available() else {}
    known = {**_by_problem(_kept.get(device, "")), **chosen}
    return {problem: recipe for problem, recipe in known.items() if _borrowed.get((device, problem)) != recipe}


def borrow(device: torch.device, problem: str, recipe: str) -> None:
    """Have a problem that was not met yet computed by the kernel of another one."""
    _borrowed[device, problem] = recipe
    torch.ops.sfast_native.recall(device.index, f"{problem} = {recipe}\n")


def keep_choices(device: torch.device) -> None:
    """Keep the kernels chosen so far for later processes, together with what others have kept meanwhile."""
    if device not in _kept:
        return
    try:
        mine = measured(device)
        if mine.items() <= _by_problem(_kept[device]).items():
            return
        others = _by_problem(disk_cache.get("plans", _environment(device)) or "")
        _kept[device] = "".join(f"{problem} = {recipe}\n" for problem, recipe in {**others, **mine}.items())
        disk_cache.put("plans", _environment(device), _kept[device])
    except Exception as error:
        fallback.let_through(error)
        fallback.logger.debug("the chosen kernels cannot be kept", exc_info=error)


def _by_problem(choices: str) -> dict[str, str]:
    return dict([line.split(" = ", 1) for line in choices.splitlines() if " = " in line])


def _environment(device: torch.device) -> str:
    return f"{disk_cache.environment(device)}, native {_build()}"


@functools.cache
def _build() -> str:
    """Which build of the native library this is: others number their kernels in other ways."""
    library = FOLDER / f"_native_cu{(torch.version.cuda or '').split('.')[0]}.so"
    return hashlib.sha256(library.read_bytes()).hexdigest()[:16]


@functools.cache
def _load() -> str | None:
    if os.environ.get("SFAST_DISABLE_NATIVE", "0") not in ("", "0"):
        return "switched off by SFAST_DISABLE_NATIVE"
    libraries = {path.stem.removeprefix("_native_cu"): path for path in FOLDER.glob("_native_cu*.so")}
    if not libraries:
        return (
            "not built into this installation; with a CUDA toolkit and a CUDA build of PyTorch in place, reinstall "
            "sfast with --no-build-isolation"
        )
    try:
        reason = _load_one(libraries)
    except Exception as error:  # whatever a broken installation raises: the caller must be able to go on without
        reason = f"{type(error).__name__}: {error}"
    if reason is not None:
        fallback.note("native ops", reason)
    return reason


def _load_one(libraries: dict[str, Path]) -> str | None:
    cuda = torch.version.cuda
    if cuda is None:
        return f"built for CUDA {' and '.join(sorted(libraries))}, but PyTorch {torch.__version__} has no CUDA"
    library = libraries.get(cuda.split(".")[0])
    if library is None:
        return f"built for CUDA {' and '.join(sorted(libraries))}, but PyTorch {torch.__version__} has CUDA {cuda}"
    if not elf.is_whole(library):
        return f"{library.name} is corrupt: reinstall sfast"
    if not _registered():
        _open(library)
    if not _registered():
        return f"{library.name} registers no operators: reinstall sfast"
    _register_fakes()
    return None


def _open(library: Path) -> None:
    """Open the library; cuDNN and cuBLASLt are those that PyTorch has loaded, or failing that those of its wheels."""
    preloaded: set[str] = set()
    while True:
        try:
            torch.ops.load_library(str(library))
        except OSError as error:
            reason = str(error.__cause__ or error)  # newer versions of PyTorch wrap the linker's own words
            missing = re.match(r"(lib\S+\.so[.\d]*): cannot open shared object file", reason)
            if missing is None or missing.group(1) in preloaded or not _preload(missing.group(1)):
                raise OSError(reason) from error
            preloaded.add(missing.group(1))
        else:
            return


def _preload(name: str) -> bool:
    """Open a library out of the nvidia-* wheels beside PyTorch."""
    for path in sorted(Path(torch.__file__).parent.parent.glob(f"nvidia/*/lib/{name}")):
        ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
        return True
    return False


def _registered() -> bool:
    return all(hasattr(torch.ops.sfast_native, name) for name in OPS)


def _register_fakes() -> None:
    """Tell PyTorch the shapes and layouts of the results, for whoever traces without data."""
    torch.library.register_fake("sfast_native::conv2d", _conv2d_fake)
    torch.library.register_fake("sfast_native::linear", _linear_fake)
    if hasattr(torch.ops.sfast_native, "attention"):  # not in a library that was built before it
        torch.library.register_fake("sfast_native::attention", _attention_fake)


def _conv2d_fake(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    activation: str,
) -> torch.Tensor:
    size = [x.shape[0], weight.shape[0]]
    for d in range(2):
        reach = dilation[d % len(dilation)] * (weight.shape[2 + d] - 1) + 1
        around = padding[d % len(padding)] + padding[(d + 2) % len(padding)]  # of two or four: top, left, bottom, right
        size.append((x.shape[2 + d] + around - reach) // stride[d % len(stride)] + 1)
    return torch.empty(size, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


def _linear_fake(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, residual: torch.Tensor | None, activation: str
) -> torch.Tensor:
    halves = 2 if activation.startswith("geglu") else 1
    return x.new_empty([*x.shape[:-1], weight.shape[0] // halves])


def _attention_fake(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, mask: torch.Tensor | None = None
) -> torch.Tensor:
    B, H, T, D = query.shape
    return query.new_empty(B, T, H, D).transpose(1, 2)
