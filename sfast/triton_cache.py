"""Takes broken entries out of Triton's kernel cache before Triton reads them.

A disk that was full or a machine that went down leaves truncated files behind. Opening a truncated launcher kills the
process with a bus error, which nothing can catch, and a truncated description makes its kernel fail in every process to
come. Such an entry is removed, with one line, and Triton compiles it anew. The cache is looked through once in a process.

Without a folder that it can write to, Triton compiles nothing at all: a home that is read-only gets a temporary one.
"""

from __future__ import annotations

import atexit
import functools
import importlib
import json
import re
import shutil
import tempfile
from pathlib import Path

from sfast.elf import is_whole
from sfast.fallback import note

ENTRY = re.compile(r"[A-Z2-7]{52}")  # the base-32 digits of a SHA-256


@functools.cache
def mend() -> bool:
    """Remove every broken entry of this process's cache directory; True, so that it may stand in a condition."""
    try:
        remove_broken_entries(place())
    except (ImportError, OSError) as error:
        note("Triton's kernel cache", f"not looked through for broken entries: {error}")
    return True


@functools.cache
def place() -> Path:
    """The folder of this process's cache: Triton's own, or one for this process alone where that cannot be written to.

    Raises:
        ImportError, OSError: there is no Triton that tells, or nowhere to write at all.
    """
    knobs = importlib.import_module("triton.knobs")
    folder = Path(knobs.cache.dir)
    if is_writable(folder):
        return folder
    knobs.cache.dir = tempfile.mkdtemp(prefix="sfast-triton-")
    atexit.register(shutil.rmtree, knobs.cache.dir, ignore_errors=True)
    note("Triton's kernel cache", f"{folder} cannot be written to: kernels are compiled anew in every process")
    return Path(knobs.cache.dir)


def is_writable(folder: Path) -> bool:
    """Whether files can be put into a folder, which is made if it is not there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False


def remove_broken_entries(cache: Path) -> None:
    """Remove the entries (folders) of a cache that hold a truncated file."""
    broken = broken_entries(cache)
    for entry in broken:
        shutil.rmtree(entry, ignore_errors=True)  # another process may be mending it too
    if broken:
        note("Triton's kernel cache", f"{len(broken)} broken entries removed from {cache}; they are compiled anew")


def broken_entries(cache: Path) -> list[Path]:
    """The entries of a cache that hold a truncated file; other people's folders, in a shared one, are no entries."""
    entries = [entry for entry in cache.glob("*") if ENTRY.fullmatch(entry.name) and entry.is_dir()]
    return [entry for entry in entries if not all(map(is_readable, entry.iterdir()))]


def is_readable(file: Path) -> bool:
    """Whether Triton can read a file of its cache back."""
    try:
        if file.suffix in (".so", ".cubin"):
            return is_whole(file)
        if file.suffix == ".json":
            json.loads(file.read_bytes())
    except FileNotFoundError:  # another process has just replaced it
        return True
    except ValueError:
        return False
    return True
