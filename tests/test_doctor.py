import json
import sys

import pytest
import torch

from sfast import disk_cache, doctor

STATES = {"ok", "note", "missing", "broken"}


@pytest.fixture
def stranger(tmp_path, monkeypatch):
    """Installs the metadata of a distribution that ships the import name sfast, as pip would write it."""

    def install(name, version="1.0.5", top_level="sfast"):
        folder = tmp_path / f"{name.replace('-', '_')}-{version}.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        (folder / "top_level.txt").write_text(f"{top_level}\n")
        (folder / "RECORD").write_text(f"{top_level}/__init__.py,,\n")
        (tmp_path / top_level).mkdir(exist_ok=True)
        (tmp_path / top_level / "__init__.py").touch()

    monkeypatch.syspath_prepend(tmp_path)
    return install


def test_every_finding_is_complete():
    findings = doctor.examine()
    names = [finding.name for finding in findings]
    assert len(names) == len(set(names))
    assert {"python", "sfast", "torch", "triton", "native ops", "diffusers", "peft", "kernel cache"} <= set(names)
    assert {finding.state for finding in findings} <= STATES
    assert all(finding.detail for finding in findings)
    assert all(finding.fix for finding in findings if finding.state == "missing")


def test_json_and_exit_status_agree(capsys):
    status = doctor.main(["--json"])
    answer = json.loads(capsys.readouterr().out)
    assert answer["usable"] == (status == 0)
    assert status == int(any(finding["state"] == "broken" for finding in answer["findings"]))


def test_table_names_torch_and_the_verdict(capsys):
    doctor.main([])
    out = capsys.readouterr().out
    assert torch.__version__ in out
    assert "sfast works" in out or "To repair" in out


def test_nothing_conflicts_here():
    assert doctor.conflicts() == []


@pytest.mark.parametrize("name", ["stable-fast", "stable_fast_turbo", "my-fork"])
def test_whoever_else_installs_sfast_is_named_with_the_uninstall_command(stranger, name):
    stranger(name)
    assert doctor.conflicts() == [name]
    finding = next(f for f in doctor.check_sfast() if f.name == "conflict")
    assert finding.state == "broken"
    assert f"{name} 1.0.5" in finding.detail
    assert finding.fix == f"{doctor.PIP} uninstall -y {name}"


def test_stable_fast_is_noticed_even_without_its_record(stranger):
    stranger("stable-fast-pt", top_level="elsewhere")
    assert doctor.conflicts() == ["stable-fast-pt"]


def test_a_stranger_without_our_name_is_left_alone(stranger):
    stranger("something-else", top_level="something")
    assert doctor.conflicts() == []


def test_a_conflict_makes_the_exit_status_1(stranger, capsys):
    stranger("stable-fast")
    assert doctor.main([]) == 1
    assert "pip uninstall -y stable-fast" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("capability", "state"), [((9, 0), "ok"), ((7, 5), "ok"), ((7, 0), "broken"), ((6, 1), "broken")]
)
def test_gpus_are_judged_by_capability(capability, state):
    finding = doctor.judge_gpu(0, "some GPU", capability, 16 * 2**30)
    assert finding.state == state
    assert "sm{}{}, 16.0 GiB".format(*capability) in finding.detail
    assert ("sm75" in finding.detail) == (capability <= (7, 5))


def test_an_old_torch_is_broken_with_the_command(monkeypatch):
    monkeypatch.setattr(doctor.torch, "__version__", "2.4.1+cu121")
    finding = next(doctor.check_torch())
    assert (finding.state, finding.detail) == ("broken", "sfast needs torch 2.10 or later, found 2.4.1+cu121")
    assert finding.fix == f"{doctor.PIP} install --upgrade 'torch>=2.10'"


def test_a_gpu_behind_a_cpu_torch_is_broken(monkeypatch):
    monkeypatch.setattr(doctor, "driver_version", lambda: "580.82.07")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", None)
    driver, gpu = doctor.check_gpu()
    assert (driver.state, driver.detail) == ("ok", "580.82.07")
    assert gpu.state == "broken"
    assert "without CUDA" in gpu.detail


def test_missing_triton_is_said_with_the_version_that_torch_wants(monkeypatch):
    monkeypatch.setattr(doctor, "attempt", lambda name: (None, "ModuleNotFoundError"))
    monkeypatch.setattr(doctor, "installed_version", lambda name: None)
    monkeypatch.setattr(doctor.metadata, "requires", lambda name: ['triton==3.6.0; platform_system == "Linux"'])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    (finding,) = doctor.check_triton()
    assert (finding.state, finding.fix) == ("missing", f"{doctor.PIP} install triton==3.6.0")


def test_a_package_that_raises_on_import_is_a_finding(tmp_path, monkeypatch):
    (tmp_path / "sfast_broken_binary.py").write_text("raise OSError('undefined symbol: _ZN3c10')\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert doctor.attempt("sfast_broken_binary") == (None, "OSError: undefined symbol: _ZN3c10")


def test_a_kernel_cache_that_cannot_be_made(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "file" / "cache"))
    (finding,) = doctor.check_kernel_cache()
    assert finding.state == "broken"
    assert "cannot be written" in finding.detail


def test_kernel_cache_states(tmp_path, monkeypatch):
    folder = tmp_path / "cache"
    monkeypatch.setenv("TRITON_CACHE_DIR", str(folder))
    (finding,) = doctor.check_kernel_cache()
    assert (finding.state, "does not exist yet" in finding.detail) == ("ok", True)

    entry = folder / ("ABCDEF27" * 7)[:52]
    entry.mkdir(parents=True)
    (entry / "kernel.json").write_text('{"num_warps": 4}')
    (entry / "kernel.ptx").write_text("// a kernel")
    (finding,) = doctor.check_kernel_cache()
    assert (finding.state, f"{folder}: 2 files" in finding.detail) == ("ok", True)

    (entry / "kernel.json").write_text('{"num_warps": ')
    (finding,) = doctor.check_kernel_cache()
    assert finding.state == "note"
    assert "broken entries: 1;" in finding.detail
    assert finding.fix == f"rm -rf {entry}"
    assert entry.exists()  # the doctor only looks


def test_an_unwritable_kernel_cache_is_broken(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(doctor.os, "access", lambda path, mode: False)
    (finding,) = doctor.check_kernel_cache()
    assert finding.state == "broken"
    assert finding.fix.startswith("export TRITON_CACHE_DIR=")


def test_reinstall_command_knows_where_it_came_from():
    command = doctor.reinstall_command()
    assert command.startswith(f"{doctor.PIP} install --force-reinstall --no-deps ")
    assert sys.executable in command


class TestChoices:
    def finding(self):
        (finding,) = doctor.check_choices()
        return finding

    def test_where_and_how_many(self, tmp_path, monkeypatch):
        monkeypatch.setenv("SFAST_CACHE_DIR", str(tmp_path / "cache"))
        assert self.finding() == doctor.Finding("choices", "ok", f"{tmp_path / 'cache'}: 0 files, 0.0 KiB")
        assert disk_cache.put("plans", "a key", "x" * 2048)
        assert self.finding().detail.startswith(f"{tmp_path / 'cache'}: 1 files, 2.")

    def test_switched_off(self, monkeypatch):
        monkeypatch.setenv("SFAST_CACHE_DIR", "")
        assert self.finding().state == "note"
        assert "not kept" in self.finding().detail

    def test_a_folder_that_cannot_be_written(self, tmp_path, monkeypatch):
        (tmp_path / "file").touch()
        monkeypatch.setenv("SFAST_CACHE_DIR", str(tmp_path / "file" / "below"))
        assert self.finding().state == "note"
        assert self.finding().fix.startswith("export SFAST_CACHE_DIR=")
