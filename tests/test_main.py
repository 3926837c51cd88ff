import subprocess
import sys

import pytest

from sfast import __main__ as cli


@pytest.mark.parametrize("arguments", [[], ["--help"]])
def test_help_lists_the_commands(arguments, capsys):
    try:
        status = cli.main(arguments)
    except SystemExit as end:
        status = end.code
    out = capsys.readouterr().out
    assert status == 0
    assert all(f"  {name} " in out for name in ("demo", "doctor", "bench"))


@pytest.mark.parametrize(
    ("command", "option"), [("demo", "--lora"), ("demo", "--steps"), ("doctor", "--json"), ("bench", "pipelines")]
)
def test_each_command_has_its_own_help(command, option, capsys):
    with pytest.raises(SystemExit) as end:
        cli.main([command, "--help"])
    out = capsys.readouterr().out
    assert end.value.code == 0
    assert f"usage: sfast {command}" in out
    assert option in out


def test_version(capsys):
    with pytest.raises(SystemExit) as end:
        cli.main(["--version"])
    assert end.value.code == 0
    assert capsys.readouterr().out.startswith("sfast ")


def test_an_unknown_command_says_what_is_allowed(capsys):
    with pytest.raises(SystemExit) as end:
        cli.main(["dance"])
    assert end.value.code == 2
    assert "demo" in capsys.readouterr().err


def test_bench_passes_the_rest_on(monkeypatch):
    calls = []
    monkeypatch.setattr(cli.subprocess, "call", lambda command, cwd: calls.append((command, cwd)) or 3)
    assert cli.main(["bench", "pipelines", "--models", "sd15", "--help"]) == 3
    assert calls == [([sys.executable, "-m", "benchmarks.pipelines", "--models", "sd15", "--help"], cli.ROOT)]


def test_bench_without_a_checkout_says_where_the_benchmarks_are(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(cli, "ROOT", tmp_path)
    assert cli.main(["bench", "fusions"]) == 1
    err = capsys.readouterr().err
    assert "not in the wheel" in err
    assert "make bench" in err


def test_bench_refuses_an_unknown_benchmark(capsys):
    with pytest.raises(SystemExit) as end:
        cli.main(["bench", "everything"])
    assert end.value.code == 2
    assert "pipelines" in capsys.readouterr().err


def test_python_dash_m_sfast():
    done = subprocess.run([sys.executable, "-m", "sfast", "--help"], capture_output=True, text=True, cwd=cli.ROOT)
    assert done.returncode == 0
    assert done.stdout.startswith("usage: sfast")
