"""What is kept on disk comes back as it was or not at all, and nothing that can happen to a folder is an error."""

from __future__ import annotations

import multiprocessing
import os
from pathlib import Path

import pytest
import torch

from sfast import disk_cache, fallback

VALUE = "conv2d 1 2 = engine\nlinear 3 = größer\n"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SFAST_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


def file_of(folder: Path) -> Path:
    (file,) = [path for path in folder.rglob("*") if path.is_file()]
    return file


def test_what_is_put_comes_back(folder: Path) -> None:
    assert disk_cache.get("plans", "a key") is None
    assert disk_cache.put("plans", "a key", VALUE)
    assert disk_cache.put("plans", "another", "")
    assert disk_cache.get("plans", "a key") == VALUE
    assert disk_cache.get("plans", "another") == ""
    assert disk_cache.get("attention", "a key") is None
    assert disk_cache.put("plans", "a key", "new")
    assert disk_cache.get("plans", "a key") == "new"
    assert len(list((folder / "plans").iterdir())) == 2, "no temporary file is left"
    assert fallback.noted() == []


@pytest.mark.parametrize(
    "break_it",
    [
        lambda content: b"",
        lambda content: content[:-1],
        lambda content: content + b"x",
        lambda content: content[: len(content) // 2],
        lambda content: content.replace(b"engine", b"engime"),
        lambda content: content.replace(b"cache 1", b"cache 2"),
        lambda content: content.replace(b"a key", b"b key"),
        lambda content: os.urandom(len(content)),
        lambda content: b"\xff\xfe" * 100,
    ],
    ids=["empty", "short", "long", "half", "another value", "another version", "another key", "noise", "no text"],
)
def test_a_broken_file_counts_as_not_there_and_is_replaced(folder: Path, break_it: object) -> None:
    disk_cache.put("plans", "a key", VALUE)
    file = file_of(folder)
    file.write_bytes(break_it(file.read_bytes()))  # type: ignore[operator]
    assert disk_cache.get("plans", "a key") is None
    assert disk_cache.get("plans", "a key") is None
    assert fallback.noted() == [("cache folder", f"{file} is broken or not ours, and counts as not there")]
    assert disk_cache.put("plans", "a key", VALUE)
    assert disk_cache.get("plans", "a key") == VALUE


def test_a_value_under_the_name_of_another_key_is_not_taken(folder: Path) -> None:
    disk_cache.put("plans", "a key", VALUE)
    mine = file_of(folder)
    other = disk_cache._file("plans", "another")
    assert other is not None
    mine.rename(other)
    assert disk_cache.get("plans", "another") is None


@pytest.mark.parametrize("there", ["a file", "a file above", "no permission", "a device"])
def test_a_folder_that_cannot_be_written(
    tmp_path: Path, there: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    place = tmp_path / "here"
    if there == "no permission":
        place.mkdir(mode=0o500)
        if os.access(place, os.W_OK):  # root may write anywhere: then the system says no instead of the folder

            def refuse(*args: object, **options: object) -> None:
                raise PermissionError(13, "Permission denied")

            monkeypatch.setattr(disk_cache.tempfile, "mkstemp", refuse)
    elif there == "a device":
        place = Path("/dev/null")
    else:
        place.write_text("not a folder")
    monkeypatch.setenv("SFAST_CACHE_DIR", str(place / "below" if there == "a file above" else place))
    assert not disk_cache.put("plans", "a key", VALUE)
    assert not disk_cache.put("plans", "a key", VALUE)
    assert disk_cache.get("plans", "a key") is None
    lines = [record.getMessage() for record in caplog.records]
    assert len([line for line in lines if "nothing is kept for the next process" in line]) == 1


def test_a_full_disk_leaves_what_was_there(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk_cache.put("plans", "a key", VALUE)

    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(disk_cache.os, "replace", full)
    assert not disk_cache.put("plans", "a key", "new")
    assert disk_cache.get("plans", "a key") == VALUE
    assert file_of(folder).name.endswith(".txt")


def test_interrupted_while_writing_leaves_what_was_there(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk_cache.put("plans", "a key", VALUE)

    def interrupt(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(disk_cache.os, "replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        disk_cache.put("plans", "a key", "new")
    assert disk_cache.get("plans", "a key") == VALUE
    assert file_of(folder).name.endswith(".txt")


def test_no_home(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("SFAST_CACHE_DIR", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", no_home)
    assert disk_cache.folder() is None
    assert disk_cache.get("plans", "a key") is None
    assert not disk_cache.put("plans", "a key", VALUE)
    disk_cache.clear()


def test_where_it_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SFAST_CACHE_DIR", "")
    assert disk_cache.folder() is None
    monkeypatch.delenv("SFAST_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert disk_cache.folder() == tmp_path / "sfast"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert disk_cache.folder() == tmp_path / ".cache" / "sfast"
    monkeypatch.setenv("SFAST_CACHE_DIR", "~/another")  # as a service's settings or a Dockerfile give it
    assert disk_cache.folder() == tmp_path / "another"


def write_and_read(rounds: int, mine: int, wrong: object) -> None:
    for i in range(rounds):
        disk_cache.put("plans", "shared", f"{mine} " * (1000 + i))
        disk_cache.put("plans", f"own {mine}", str(i))
        value = disk_cache.get("plans", "shared")
        if value is None or len(set(value.split())) != 1:
            wrong.put(value)  # type: ignore[attr-defined]


def test_processes_that_write_at_once(folder: Path) -> None:
    context = multiprocessing.get_context("fork")
    wrong = context.SimpleQueue()
    processes = [context.Process(target=write_and_read, args=(100, mine, wrong)) for mine in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert wrong.empty()
    assert [disk_cache.get("plans", f"own {mine}") for mine in range(3)] == ["99"] * 3
    assert len(list((folder / "plans").iterdir())) == 4


def test_clear(folder: Path) -> None:
    disk_cache.put("plans", "a key", VALUE)
    disk_cache.clear()
    disk_cache.clear()
    assert not folder.exists()
    assert disk_cache.get("plans", "a key") is None


def test_clear_takes_nothing_that_is_not_ours(folder: Path) -> None:
    theirs = [folder / "thesis.txt", folder / "plans" / "of mine.txt", folder / "a" / "b" / f"{'0' * 40}.txt"]
    for file in theirs:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("years of work")
    for namespace in ("plans", "choices"):
        disk_cache.put(namespace, "a key", VALUE)
        disk_cache.put(namespace, "a broken one", VALUE)
    for file in (folder / "choices").iterdir():
        file.write_text("broken")
    (folder / "plans" / ".ab_c1234.new").write_text("half of a")
    disk_cache.clear()
    assert sorted(path for path in folder.rglob("*") if path.is_file()) == sorted(theirs)
    assert not (folder / "choices").exists()


def test_the_command_says_in_one_line_what_it_cannot_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "file"
    file.write_text("not a folder")
    monkeypatch.setenv("SFAST_CACHE_DIR", str(file))
    for arguments in ([], ["--clear"]):
        assert disk_cache.main(arguments) == 1
        assert capsys.readouterr().err == f"sfast cache: {file} is no folder: nothing is kept\n"
    assert file.read_text() == "not a folder"

    def refuse(self: Path, missing_ok: bool = False) -> None:
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setenv("SFAST_CACHE_DIR", str(tmp_path / "folder ü 日本"))
    disk_cache.put("plans", "a key", VALUE)
    monkeypatch.setattr(Path, "unlink", refuse)
    assert disk_cache.main(["--clear"]) == 1
    assert "Permission denied" in capsys.readouterr().err


def test_the_command(folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    disk_cache.put("plans", "a key", VALUE)
    assert disk_cache.main([]) == 0
    assert f"{folder}: 1 files, " in capsys.readouterr().out
    assert disk_cache.main(["--clear"]) == 0
    assert capsys.readouterr().out == f"{folder}: 0 files, 0.0 KiB\n"
    assert disk_cache.get("plans", "a key") is None
    monkeypatch.setenv("SFAST_CACHE_DIR", "")
    assert disk_cache.main(["--clear"]) == 0
    assert capsys.readouterr().out == "nothing is kept\n"


def test_the_environment_names_what_choices_depend_on() -> None:
    text = disk_cache.environment(torch.device("cpu"))
    assert f"torch {torch.__version__}" in text
    assert text.startswith("sfast ")


@pytest.mark.gpu
def test_the_environment_of_a_gpu() -> None:
    text = disk_cache.environment(torch.device("cuda", 0))
    assert torch.cuda.get_device_name(0) in text
    assert str(torch.backends.cudnn.version()) in text
