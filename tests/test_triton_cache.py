"""Broken entries of Triton's kernel cache are removed, whole ones and other people's files stay."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest

from sfast import fallback
from sfast.triton_cache import remove_broken_entries

HEADER = b"\x7fELF\x02" + bytes(35) + struct.pack("<Q", 128) + bytes(10) + struct.pack("<HH", 64, 2) + bytes(2)
ONE, TWO, THREE = (digit * 52 for digit in "AB7")  # Triton names entries by 52 digits of base 32
WHOLE = {  # an ELF file whose table of two sections of 64 bytes starts at 128
    "launcher.so": HEADER + bytes(128 + 2 * 64 - len(HEADER)),
    "kernel.cubin": HEADER + bytes(128 + 2 * 64 - len(HEADER) + 5),
    "kernel.json": b'{"num_warps": 4}\n',
    "__grp__kernel.json": b'{"child_paths": {}}',
    "kernel.ttir": b"",
}


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    assert len(HEADER) == 64
    for entry in (ONE, TWO, THREE):
        (tmp_path / entry).mkdir()
        for name, content in WHOLE.items():
            (tmp_path / entry / name).write_bytes(content)
    (tmp_path / THREE / "tmp.pid_1").mkdir()  # another process is writing
    (tmp_path / "a file").write_bytes(b"")
    fallback.forget()
    return tmp_path


def test_whole_entries_stay_without_a_word(cache: Path, caplog: pytest.LogCaptureFixture) -> None:
    before = sorted(cache.rglob("*"))
    remove_broken_entries(cache)
    assert sorted(cache.rglob("*")) == before
    assert caplog.records == []


@pytest.mark.parametrize("name", [name for name in WHOLE if name != "kernel.ttir"])
@pytest.mark.parametrize("kept", [0, 0.5, 0.99])
def test_an_entry_with_a_truncated_file_goes(
    cache: Path, name: str, kept: float, caplog: pytest.LogCaptureFixture
) -> None:
    file = cache / TWO / name
    file.write_bytes(
        WHOLE[name][: int(kept * len(WHOLE[name].rstrip())) if name != "kernel.cubin" else int(kept * 256)]
    )
    remove_broken_entries(cache)
    assert sorted(entry.name for entry in cache.glob("*/")) == sorted([ONE, THREE])
    assert (cache / "a file").exists()
    assert [record.getMessage() for record in caplog.records] == [
        f"Triton's kernel cache: 1 broken entries removed from {cache}; they are compiled anew"
    ]


def test_folders_that_are_not_tritons_stay(cache: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in (".vscode", "kernels", ONE[1:], ONE + "A", ONE.lower()):
        (cache / name).mkdir()
        (cache / name / "settings.json").write_text("{ // with comments\n}")
    before = sorted(cache.rglob("*"))
    remove_broken_entries(cache)
    assert sorted(cache.rglob("*")) == before
    assert caplog.records == []


def test_a_cache_that_is_not_there_is_whole(tmp_path: Path) -> None:
    remove_broken_entries(tmp_path / "nowhere")
    assert not (tmp_path / "nowhere").exists()
