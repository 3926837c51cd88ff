"""The native ops load or say why not, and never raise."""

from __future__ import annotations

import struct
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from sfast import disk_cache, fallback, native

CUDA = "13"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An installation whose native folder is ours, on a PyTorch that claims CUDA 13; its answer is asked afresh."""
    monkeypatch.setattr(native, "FOLDER", tmp_path)
    monkeypatch.setattr(torch.version, "cuda", f"{CUDA}.0")
    monkeypatch.setattr(native, "_registered", lambda: False)
    monkeypatch.delenv("SFAST_DISABLE_NATIVE", raising=False)
    native._load.cache_clear()
    fallback.forget()
    yield tmp_path
    native._load.cache_clear()
    fallback.forget()


def elf(size: int, tables_at: int) -> bytes:
    """`size` bytes that open as a 64-bit ELF file with one section header at `tables_at`."""
    header = bytearray(64)
    header[:5] = b"\x7fELF\x02"
    struct.pack_into("<Q", header, 40, tables_at)
    struct.pack_into("<HH", header, 58, 64, 1)
    return bytes(header).ljust(size, b"\0")


class TestAvailability:
    def test_not_built_is_no_fallback(self, folder):
        assert not native.available()
        assert "not built into this installation" in native.why_not()
        assert "--no-build-isolation" in native.why_not()
        assert fallback.noted() == []
        assert native.plans() == ""

    def test_switched_off(self, folder, monkeypatch):
        (folder / f"_native_cu{CUDA}.so").write_bytes(b"never read")
        monkeypatch.setenv("SFAST_DISABLE_NATIVE", "1")
        assert native.why_not() == "switched off by SFAST_DISABLE_NATIVE"
        assert fallback.noted() == []

    def test_zero_does_not_switch_off(self, folder, monkeypatch):
        monkeypatch.setenv("SFAST_DISABLE_NATIVE", "0")
        assert "not built" in native.why_not()

    @pytest.mark.parametrize(
        "content",
        [b"", b"not a library at all" * 10, elf(64, 0)[:40], elf(1000, 5000)],
        ids=["empty", "text", "half a header", "truncated"],
    )
    def test_corrupt_file(self, folder, content):
        (folder / f"_native_cu{CUDA}.so").write_bytes(content)
        for _ in range(2):
            assert not native.available()
        assert native.why_not() == f"_native_cu{CUDA}.so is corrupt: reinstall sfast"
        assert fallback.noted() == [("native ops", native.why_not())]

    def test_elf_that_no_loader_accepts(self, folder):
        (folder / f"_native_cu{CUDA}.so").write_bytes(elf(1000, 64))
        assert not native.available()
        assert native.why_not().startswith("OSError: ")
        assert len(fallback.noted()) == 1

    def test_another_library(self, folder):
        stranger = next(Path(torch.__file__).parent.glob("lib/libtorch_global_deps.so*"))
        (folder / f"_native_cu{CUDA}.so").symlink_to(stranger)
        assert native.why_not() == f"_native_cu{CUDA}.so registers no operators: reinstall sfast"

    def test_torch_without_cuda(self, folder, monkeypatch):
        (folder / f"_native_cu{CUDA}.so").write_bytes(b"never read")
        monkeypatch.setattr(torch.version, "cuda", None)
        assert native.why_not() == f"built for CUDA {CUDA}, but PyTorch {torch.__version__} has no CUDA"

    def test_another_cuda(self, folder, monkeypatch):
        (folder / f"_native_cu{CUDA}.so").write_bytes(b"never read")
        monkeypatch.setattr(torch.version, "cuda", "12.8")
        assert native.why_not() == f"built for CUDA {CUDA}, but PyTorch {torch.__version__} has CUDA 12.8"

    def test_missing_cudnn(self, folder, monkeypatch):
        def load_library(path):
            raise OSError("libcudnn.so.9: cannot open shared object file: No such file or directory")

        (folder / f"_native_cu{CUDA}.so").write_bytes(elf(1000, 64))
        monkeypatch.setattr(torch.ops, "load_library", load_library)
        assert not native.available()
        assert "libcudnn.so.9: cannot open" in native.why_not()

    def test_the_linkers_own_words_are_told(self, folder, monkeypatch):
        def load_library(path):
            raise OSError(f"Could not load this library: {path}") from OSError("undefined symbol: aoti_torch_new")

        (folder / f"_native_cu{CUDA}.so").write_bytes(elf(1000, 64))
        monkeypatch.setattr(torch.ops, "load_library", load_library)
        assert native.why_not() == "OSError: undefined symbol: aoti_torch_new"

    def test_missing_libraries_are_looked_up_in_wheels(self, folder, monkeypatch):
        missing, preloaded = ["libcudnn.so.9", "libcublasLt.so.13"], []

        def load_library(path):
            if missing:
                raise OSError(f"{missing.pop(0)}: cannot open shared object file: No such file or directory")
            monkeypatch.setattr(native, "_registered", lambda: True)

        (folder / f"_native_cu{CUDA}.so").write_bytes(elf(1000, 64))
        monkeypatch.setattr(torch.ops, "load_library", load_library)
        monkeypatch.setattr(native, "_preload", lambda name: preloaded.append(name) or True)
        monkeypatch.setattr(native, "_register_fakes", lambda: None)
        assert native.available()
        assert native.why_not() is None
        assert preloaded == ["libcudnn.so.9", "libcublasLt.so.13"]
        assert fallback.noted() == []

    def test_never_raises(self, folder, monkeypatch):
        (folder / f"_native_cu{CUDA}.so").write_bytes(b"never read")
        monkeypatch.setattr(native, "_load_one", lambda libraries: 1 / 0)
        assert native.why_not() == "ZeroDivisionError: division by zero"
        assert not native.available()


class TestChoices:
    """What is measured once is taken over by the next process, whoever writes beside it, and nothing of that can raise."""

    DEVICE = torch.device("cuda", 0)

    @pytest.fixture
    def ops(self, tmp_path, monkeypatch):
        """The native ops as a later process finds them: `choices` is what it has chosen, `recalled` what it was told."""
        monkeypatch.setenv("SFAST_CACHE_DIR", str(tmp_path))
        monkeypatch.setattr(native, "_kept", {})
        monkeypatch.setattr(native, "available", lambda: True)
        monkeypatch.setattr(native, "_environment", lambda device: "this machine")
        made = SimpleNamespace(chosen="", recalled=[])
        made.choices = lambda device: made.chosen
        made.recall = lambda device, choices: made.recalled.append(choices)
        monkeypatch.setattr(torch.ops, "sfast_native", made)
        return made

    def test_for_the_next_process(self, ops, monkeypatch):
        native.recall_choices(self.DEVICE)
        assert ops.recalled == []
        ops.chosen = "conv2d 1 2 = cuDNN 41\nlinear 3 = cublasLt 7\n"
        native.keep_choices(self.DEVICE)
        native._kept.clear()
        native.recall_choices(self.DEVICE)
        native.recall_choices(self.DEVICE)
        assert ops.recalled == [ops.chosen]

    def test_nothing_new_is_not_written(self, ops, monkeypatch):
        native.recall_choices(self.DEVICE)
        ops.chosen = "linear 3 = cublasLt 7\n"
        native.keep_choices(self.DEVICE)
        monkeypatch.setattr(disk_cache, "put", lambda *_: pytest.fail("written again"))
        native.keep_choices(self.DEVICE)

    def test_what_another_process_has_kept_meanwhile_stays(self, ops):
        native.recall_choices(self.DEVICE)
        disk_cache.put("plans", "this machine", "conv2d 1 = cuDNN 1\nconv2d 2 = cuDNN 2\n")
        ops.chosen = "conv2d 2 = cuDNN 3\nconv2d 4 = cuDNN 4\n"
        native.keep_choices(self.DEVICE)
        kept = disk_cache.get("plans", "this machine")
        assert kept == "conv2d 1 = cuDNN 1\nconv2d 2 = cuDNN 3\nconv2d 4 = cuDNN 4\n"

    def test_what_cannot_be_read_is_measured_again(self, ops):
        def raises(device, choices=""):
            raise RuntimeError("no such operator")

        disk_cache.put("plans", "this machine", "conv2d 1 = cuDNN 1\n")
        ops.recall = ops.choices = raises
        native.recall_choices(self.DEVICE)
        native.keep_choices(self.DEVICE)
        assert disk_cache.get("plans", "this machine") == "conv2d 1 = cuDNN 1\n"

    def test_without_a_gpu_there_is_nothing_to_keep(self, ops):
        native.recall_choices(torch.device("cpu"))
        ops.chosen = "linear 3 = cublasLt 7\n"
        native.keep_choices(torch.device("cpu"))
        assert disk_cache.get("plans", "this machine") is None


@pytest.mark.parametrize(
    ("stride", "padding", "dilation", "groups"),
    [([1, 1], [1, 1], [1, 1], 1), ([2, 1], [0, 2], [1, 2], 2), ([2, 2], [1, 1], [1, 1], 8)],
)
def test_conv2d_fake_has_the_shape_of_conv2d(stride, padding, dilation, groups):
    x, weight = torch.randn(2, 8, 13, 11), torch.randn(16, 8 // groups, 3, 3)
    fake = native._conv2d_fake(x, weight, None, None, stride, padding, dilation, groups, "none")
    assert fake.shape == F.conv2d(x, weight, None, stride, padding, dilation, groups).shape
    assert fake.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(("activation", "width"), [("none", 16), ("gelu", 16), ("geglu", 8), ("geglu_tanh", 8)])
def test_linear_fake_has_the_shape_of_linear(activation, width):
    fake = native._linear_fake(torch.randn(2, 5, 8), torch.randn(16, 8), None, None, activation)
    assert fake.shape == (2, 5, width)
    assert fake.is_contiguous()
