"""Whether a compiled file is whole. Loading a truncated one can kill the process, so it is asked before."""

from __future__ import annotations

import struct
from pathlib import Path


def is_whole(path: Path) -> bool:
    """Whether a 64-bit ELF file (a shared library, or a GPU binary) reaches as far as its own table of sections says."""
    with path.open("rb") as file:
        header = file.read(64)
    if len(header) < 64 or header[:5] != b"\x7fELF\x02":
        return False
    (table_at,) = struct.unpack_from("<Q", header, 40)
    size_of_one, count = struct.unpack_from("<HH", header, 58)
    return path.stat().st_size >= table_at + size_of_one * count
