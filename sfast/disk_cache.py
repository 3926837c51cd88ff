"""What a process has found out about this machine, such as which kernel is fastest for a shape, kept for the next one.

Small texts under keys, one file each, in a folder of the user's: `SFAST_CACHE_DIR`, or else `sfast` in the user's cache
folder; with `SFAST_CACHE_DIR=` (empty) nothing is kept. A file appears whole or not at all, however many processes write,
and tells by its checksum whether it is still what was written. Nothing here raises: a file that is broken or
foreign counts as not there, and a folder that cannot be written is a line in the log. Deleting the folder costs time only.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import hashlib
import json
import os
import re
import sys
import tempfile
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

import torch

from sfast.fallback import let_through, note

MAGIC = "sfast cache 1"
OUR_FILE = re.compile(r"[0-9a-f]{40}\.txt|\.\w{8}\.new")  # the second while it is written
MOST_BYTES = 16 * 2**20  # of one file; none of ours comes near it


def folder() -> Path | None:
    """Where everything is kept; None if nothing is."""
    asked = os.environ.get("SFAST_CACHE_DIR")
    try:
        if asked is not None:
            return Path(asked).expanduser() if asked else None
        if os.name == "nt":
            return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local") / "sfast" / "Cache"
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sfast"
    except RuntimeError as error:  # there is no home
        note("cache folder", f"nothing is kept for the next process: {error}")
        return None


def get(namespace: str, key: str) -> str | None:
    """The text that was put under `key`; None if there is none, or it cannot be read back as it was."""
    file = _file(namespace, key)
    if file is None:
        return None
    try:
        with file.open("rb") as opened:
            content = opened.read(MOST_BYTES + 1)
    except FileNotFoundError:
        return None
    except OSError as error:
        let_through(error)  # a TimeoutError is one, too
        note("cache folder", f"{file} cannot be read: {error.strerror}")
        return None
    value = _unpack(key, content)
    if value is None:
        note("cache folder", f"{file} is broken or not ours, and counts as not there")
    return value


def put(namespace: str, key: str, value: str) -> bool:
    """Keep `value` under `key`, in the place of what was there; whether that succeeded."""
    file = _file(namespace, key)
    if file is None:
        return False
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        handle, written = tempfile.mkstemp(dir=file.parent, prefix=".", suffix=".new")
        try:
            with os.fdopen(handle, "wb") as opened:
                opened.write(_pack(key, value))
            os.replace(written, file)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(written)
            raise
    except OSError as error:
        let_through(error)
        note("cache folder", f"nothing is kept for the next process: {error.strerror}: {file.parent}")
        return False
    return True


def clear() -> None:
    """Forget everything; what is in the folder and not ours stays.

    Raises:
        OSError: something cannot be removed.
    """
    where = folder()
    for file in files(where):
        file.unlink(missing_ok=True)
    if where is not None:
        for place in (*where.glob("*/"), where):
            with contextlib.suppress(OSError):  # somebody else's, too, or not there
                place.rmdir()


def files(where: Path | None) -> list[Path]:
    """The files that we have put into a folder, or were about to, known by their names: also broken ones."""
    found = [] if where is None else [path for path in where.glob("*/*") if OUR_FILE.fullmatch(path.name)]
    return [path for path in found if path.is_file()]


def describe(where: Path) -> str:
    """How much is kept in a folder, in one line.

    Raises:
        OSError: the folder is none, or cannot be looked into.
    """
    if where.exists() and not where.is_dir():
        raise NotADirectoryError(f"{where} is no folder: nothing is kept")
    sizes = []
    for file in files(where):
        with contextlib.suppress(FileNotFoundError):  # another process has just finished or removed it
            sizes.append(file.stat().st_size)
    return f"{where}: {len(sizes)} files, {sum(sizes) / 2**10:.1f} KiB"


@functools.cache
def environment(device: torch.device) -> str:
    """What a measured choice depends on beside the question itself: versions, driver and GPU. Part of such a key."""
    parts = [f"sfast {_version()}", f"torch {torch.__version__}", f"CUDA {torch.version.cuda}"]
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        parts += [
            f"cuDNN {torch.backends.cudnn.version()}",
            f"driver {_driver()}",
            f"{properties.name} sm{properties.major}{properties.minor} {properties.multi_processor_count}",
        ]
    return ", ".join(parts)


def _version() -> str:
    try:
        return metadata.version("sfast")
    except metadata.PackageNotFoundError:
        return "source tree"


def _driver() -> str:
    try:
        return Path("/proc/driver/nvidia/version").read_text().partition("\n")[0].strip()
    except OSError:  # not on Linux: at least what CUDA it can do
        return str(torch._C._cuda_getDriverVersion())


def _file(namespace: str, key: str) -> Path | None:
    where = folder()
    return None if where is None else where / namespace / f"{_digest(key.encode())[:40]}.txt"


def _pack(key: str, value: str) -> bytes:
    body = f"{json.dumps(key)}\n{value}".encode()
    return f"{MAGIC} {_digest(body)}\n".encode() + body


def _unpack(key: str, content: bytes) -> str | None:
    head, _, body = content.partition(b"\n")
    name, _, value = body.partition(b"\n")
    if head != f"{MAGIC} {_digest(body)}".encode() or name != json.dumps(key).encode():
        return None
    return value.decode()


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def main(arguments: Sequence[str] | None = None) -> int:
    """The command `sfast cache`."""
    parser = argparse.ArgumentParser(
        prog="sfast cache",
        description="Where sfast keeps which kernels were fastest on this machine, and how much that is.",
        epilog="SFAST_CACHE_DIR names another folder; SFAST_CACHE_DIR= (empty) keeps nothing.",
    )
    parser.add_argument("--clear", action="store_true", help="remove it: the next first call measures again")
    options = parser.parse_args(arguments)
    where = folder()
    if where is None:
        print("nothing is kept")
        return 0
    try:
        if options.clear:
            clear()
        print(describe(where))
    except OSError as error:
        print(f"sfast cache: {error}", file=sys.stderr)
        return 1
    return 0
