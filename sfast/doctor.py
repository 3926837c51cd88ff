"""`sfast doctor`: what is installed, which GPU, what is missing, and the exact command that adds it.

Every finding is one line with one of four states: `ok`, `note` (works, worth knowing), `missing` (optional, and slower
without it) or `broken` (sfast cannot do its work until this is repaired). The exit status is 1 if anything is broken.
No check changes anything, and none can end the others: what fails to import is a finding like the rest.
"""

import argparse
import importlib
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Literal

import torch

from sfast import disk_cache, versions
from sfast.triton_cache import broken_entries

OLDEST_CAPABILITY = (7, 5)  # Turing: the first with fast fp16 matrix units that today's cuDNN and Triton still serve
PIP = f"{shlex.quote(sys.executable)} -m pip"

State = Literal["ok", "note", "missing", "broken"]


@dataclass(frozen=True)
class Finding:
    name: str
    state: State
    detail: str
    fix: str | None = None


def examine() -> list[Finding]:
    """Every finding, in the order in which they are printed."""
    checks: Sequence[Callable[[], Iterator[Finding]]] = (
        check_python,
        check_sfast,
        check_torch,
        check_gpu,
        check_triton,
        check_native,
        check_xformers,
        check_libraries,
        check_kernel_cache,
        check_choices,
    )
    return [finding for check in checks for finding in check()]


def check_python() -> Iterator[Finding]:
    detail = f"{platform.python_version()} ({sys.executable}) on {platform.system()} {platform.machine()}"
    yield Finding("python", "ok", detail)  # an older Python does not get as far as this line


def check_sfast() -> Iterator[Finding]:
    """This package, and whoever else installs files under the same import name."""
    yield Finding("sfast", "ok", f"{installed_version('sfast') or 'source tree'} at {Path(__file__).parent}")
    for name in conflicts():
        yield Finding(
            "conflict",
            "broken",
            f"the distribution {name} {installed_version(name)} also installs the import name sfast: files mix",
            f"{PIP} uninstall -y {name}" + (f" && {reinstall_command()}" if shares_our_folder(name) else ""),
        )


def conflicts() -> list[str]:
    """Installed distributions other than this one that own the import name sfast: stable-fast and its forks."""
    owners = set(metadata.packages_distributions().get("sfast", ()))
    named = {
        d.metadata["Name"] for d in metadata.distributions() if _normal(d.metadata["Name"]).startswith("stable-fast")
    }
    return sorted(name for name in owners | named if name and _normal(name) != "sfast")


def shares_our_folder(name: str) -> bool:
    """Whether uninstalling a distribution would delete files of this package's own folder."""
    ours = Path(__file__).parent.resolve()
    files = metadata.distribution(name).files or ()
    return any(Path(str(file.locate())).resolve().parent == ours for file in files)


def reinstall_command() -> str:
    """The command that puts this package's files back, from wherever it was installed."""
    source = f"sfast=={installed_version('sfast')}"  # from a package index
    try:
        origin = json.loads(metadata.distribution("sfast").read_text("direct_url.json") or "{}")
    except metadata.PackageNotFoundError:
        origin = {"url": str(Path(__file__).parents[1])}
    if "url" in origin:
        source = shlex.quote(origin["url"].removeprefix("file://"))
    return f"{PIP} install --force-reinstall --no-deps {source}"


def check_torch() -> Iterator[Finding]:
    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "no CUDA in this build"
    detail = f"{torch.__version__}, {build}"
    refusal, caution = versions.refusal(torch.__version__), versions.caution(torch.__version__)
    if refusal is not None:
        oldest = ".".join(map(str, versions.OLDEST))
        yield Finding("torch", "broken", refusal.split(";")[0], f"{PIP} install --upgrade 'torch>={oldest}'")
    else:
        yield Finding("torch", "note" if caution else "ok", f"{detail}; {caution}" if caution else detail)
    if torch.version.cuda:
        cudnn = torch.backends.cudnn.version()
        yield Finding("cudnn", "ok" if cudnn else "broken", str(cudnn or "torch has CUDA, but its cuDNN does not load"))


def check_gpu() -> Iterator[Finding]:
    """Driver, then each GPU with what it can do."""
    driver = driver_version()
    if driver is not None:
        yield Finding("driver", "ok", driver)
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            yield judge_gpu(
                index,
                torch.cuda.get_device_name(index),
                torch.cuda.get_device_capability(index),
                torch.cuda.get_device_properties(index).total_memory,
            )
    elif driver is None:
        yield Finding("gpu", "note", "no NVIDIA GPU: everything runs on the CPU, eager code and compiled code alike")
    elif torch.version.cuda is None:
        yield Finding(
            "gpu",
            "broken",
            "there is an NVIDIA driver, but this torch was built without CUDA",
            f"{PIP} uninstall -y torch && {PIP} install 'torch=={torch.__version__.split('+')[0]}'",
        )
    else:
        yield Finding("gpu", "broken", f"there is an NVIDIA driver, but torch cannot use it: {cuda_failure()}")


def judge_gpu(index: int, name: str, capability: tuple[int, int], memory: int) -> Finding:
    """One GPU: compute capability against the oldest that is served; memory in bytes."""
    sm, oldest = ("sm{}{}".format(*c) for c in (capability, OLDEST_CAPABILITY))
    detail = f"{name}, {sm}, {memory / 2**30:.1f} GiB"
    if capability < OLDEST_CAPABILITY:
        return Finding(f"gpu {index}", "broken", f"{detail}: sfast needs {oldest} (Turing) or later; eager still works")
    return Finding(f"gpu {index}", "ok", detail)


def driver_version() -> str | None:
    """The NVIDIA driver's version, or None where there is no working driver."""
    smi = shutil.which("nvidia-smi")
    if smi is None:
        return None
    query = [smi, "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=30, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return None  # nvidia-smi without a driver behind it: the same as no driver
    return answer.split("\n")[0].strip() or None


def cuda_failure() -> str:
    """torch's own words about why CUDA does not start."""
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        return str(error).split("\n")[0]
    return "CUDA starts, but finds no device (is CUDA_VISIBLE_DEVICES set?)"


def check_triton() -> Iterator[Finding]:
    wanted = (
        next((r for r in metadata.requires("torch") or () if r.startswith("triton")), "triton").split(";")[0].strip()
    )
    add = f"{PIP} install {shlex.quote(wanted.replace(' ', ''))}"
    module, failure = attempt("triton")
    if module is not None:
        yield Finding("triton", "ok", module.__version__)
    elif installed_version("triton"):
        yield Finding(
            "triton", "broken", f"does not import ({failure}); its kernels fall back", f"{add} --force-reinstall"
        )
    elif not torch.cuda.is_available():
        yield Finding("triton", "note", "not installed, and not used without a GPU")
    else:
        yield Finding("triton", "missing", "the norm and GEGLU kernels fall back to PyTorch", add)


def check_native() -> Iterator[Finding]:
    from sfast import native

    if native.available():
        yield Finding("native ops", "ok", "cuDNN and cuBLASLt fusions are loaded")
    elif not torch.cuda.is_available():
        yield Finding("native ops", "note", "not used without a GPU")
    else:
        root = Path(__file__).parents[1]
        source = str(root) if (root / "csrc").is_dir() else "<your clone of sfast>"
        add = f"{PIP} install --no-build-isolation --no-deps --force-reinstall {shlex.quote(source)}"
        yield Finding("native ops", "missing", native.why_not() or "not built", add)


def check_xformers() -> Iterator[Finding]:
    """Optional: attention goes through scaled_dot_product_attention without it."""
    add = f"{PIP} install xformers 'torch=={torch.__version__.split('+')[0]}'"
    module, failure = attempt("xformers.ops")
    if module is not None:
        yield Finding("xformers", "ok", installed_version("xformers") or "imports")
    elif installed_version("xformers"):
        yield Finding(
            "xformers", "note", f"does not import ({failure}); attention uses torch's own", f"{add} --upgrade"
        )
    elif not torch.cuda.is_available():
        yield Finding("xformers", "note", "not installed, and not used without a GPU")
    else:
        yield Finding("xformers", "note", "not installed; attention uses torch's own", add)


def check_libraries() -> Iterator[Finding]:
    uses = {
        "diffusers": "pipelines cannot be compiled, modules can",
        "transformers": "text encoders cannot be loaded",
        "safetensors": "weights cannot be loaded",
        "peft": "LoRAs cannot be loaded",
        "accelerate": "loading a pipeline is slower and takes more memory",
    }
    for name, loss in uses.items():
        module, failure = attempt(name)
        if module is not None:
            yield Finding(name, "ok", installed_version(name) or "imports")
        elif installed_version(name):
            yield Finding(
                name, "broken", f"does not import: {failure}", f"{PIP} install --upgrade --force-reinstall {name}"
            )
        else:
            yield Finding(name, "missing", loss, f"{PIP} install {name}")


def check_kernel_cache() -> Iterator[Finding]:
    """The folder in which Triton keeps compiled kernels: can it be written, and do its files read back?"""
    folder = Path(os.environ.get("TRITON_CACHE_DIR") or Path.home() / ".triton" / "cache")
    there = next(place for place in (folder, *folder.absolute().parents) if os.path.exists(place))
    writable = os.access(there, os.W_OK | os.X_OK) and there.is_dir()
    if writable and not folder.exists():
        yield Finding("kernel cache", "ok", f"{folder} does not exist yet; the first kernel makes it")
        return
    if not writable:
        yield Finding(
            "kernel cache",
            "broken",
            f"{folder} cannot be written: every process compiles every kernel again",
            f"export TRITON_CACHE_DIR={shlex.quote(str(Path.home() / '.cache' / 'triton'))}",
        )
        return
    files = [path for path in folder.glob("*/*") if path.is_file()]
    entries = broken_entries(folder)
    detail = f"{folder}: {len(files)} files, {sum(path.stat().st_size for path in files) / 2**20:.1f} MiB"
    if entries:
        detail += (
            f"; broken entries: {len(entries)}; sfast removes them before its first kernel, other programs may not"
        )
        yield Finding("kernel cache", "note", detail, f"rm -rf {shlex.join(map(str, sorted(entries)))}")
    else:
        yield Finding("kernel cache", "ok", detail)


def check_choices() -> Iterator[Finding]:
    """The folder in which sfast keeps which kernels were fastest."""
    folder = disk_cache.folder()
    if folder is None:
        yield Finding("choices", "note", "not kept for the next process: SFAST_CACHE_DIR is empty, or there is no home")
        return
    there = next(place for place in (folder, *folder.absolute().parents) if os.path.exists(place))
    if not (there.is_dir() and os.access(there, os.W_OK | os.X_OK)):
        fix = f"export SFAST_CACHE_DIR={shlex.quote(str(Path(tempfile.gettempdir()) / 'sfast'))}"
        yield Finding("choices", "note", f"{folder} cannot be written: every process measures kernels again", fix)
        return
    try:
        yield Finding("choices", "ok", disk_cache.describe(folder))
    except OSError as error:
        yield Finding("choices", "note", f"{folder} cannot be looked into: {error.strerror}")


def attempt(name: str) -> tuple[ModuleType | None, str]:
    """The imported module, or None and one line that says why not."""
    try:
        return importlib.import_module(name), ""
    except Exception as error:  # a broken binary package raises whatever it likes
        return None, f"{type(error).__name__}: {error}".split("\n")[0]


def installed_version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _normal(name: str | None) -> str:
    return re.sub(r"[-_.]+", "-", name or "").lower()


def table(findings: Sequence[Finding]) -> str:
    """Aligned lines; under each line that can be helped, the command that helps."""
    width = max(len(finding.name) for finding in findings)
    lines = []
    for finding in findings:
        lines.append(f"{finding.state:>7}  {finding.name:<{width}}  {finding.detail}")
        if finding.fix:
            lines.append(f"{'':>7}  {'':<{width}}  -> {finding.fix}")
    return "\n".join(lines)


def verdict(findings: Sequence[Finding]) -> str:
    broken = [finding.name for finding in findings if finding.state == "broken"]
    missing = [finding.name for finding in findings if finding.state == "missing"]
    if broken:
        return f"To repair: {', '.join(broken)}. The commands are above."
    if missing:
        return f"sfast works. It would be faster or do more with: {', '.join(missing)}."
    return "sfast works; nothing is missing."


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="sfast doctor", description="What is installed, which GPU, what is missing, and the command that adds it."
    )
    parser.add_argument("--json", action="store_true", help="print the findings as JSON")
    options = parser.parse_args(arguments)
    findings = examine()
    broken = any(finding.state == "broken" for finding in findings)
    if options.json:
        print(json.dumps({"usable": not broken, "findings": [asdict(finding) for finding in findings]}, indent=2))
    else:
        print(table(findings))
        print()
        print(verdict(findings))
    return int(broken)
