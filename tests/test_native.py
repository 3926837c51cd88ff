"""The native ops: when they load, what they say when they do not, and their numbers against fp64."""

from __future__ import annotations

import itertools
import runpy
import struct
from pathlib import Path
from types import SimpleNamespace

import pytest
import setuptools
import torch
import torch.nn.functional as F

from sfast import fallback, native

ROOT = Path(__file__).parents[1]
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


@pytest.mark.parametrize(
    ("stride", "padding", "dilation", "groups"),
    [([1, 1], [1, 1], [1, 1], 1), ([2, 1], [0, 2], [1, 2], 2), ([2, 2], [1, 1], [1, 1], 8)],
)
def test_conv2d_fake_has_the_shape_of_conv2d(stride, padding, dilation, groups):
    x, weight = torch.randn(2, 8, 13, 11), torch.randn(16, 8 // groups, 3, 3)
    fake = native._conv2d_fake(x, weight, None, None, stride, padding, dilation, groups, "none")
    assert fake.shape == F.conv2d(x, weight, None, stride, padding, dilation, groups).shape
    assert fake.is_contiguous(memory_format=torch.channels_last)


def test_linear_fake_has_the_shape_of_linear():
    fake = native._linear_fake(torch.randn(2, 5, 8), torch.randn(16, 8), None, None, "none")
    assert fake.shape == (2, 5, 16)
    assert fake.is_contiguous()


class TestBuild:
    """setup.py's decision, without building anything."""

    @pytest.fixture
    def build(self, monkeypatch):
        """setup.py's functions, and what it would have passed to setup()."""

        def run(choice: str) -> SimpleNamespace:
            passed = {}
            monkeypatch.setenv("SFAST_BUILD_NATIVE", choice)
            monkeypatch.setattr(setuptools, "setup", lambda **arguments: passed.update(arguments))
            monkeypatch.chdir(ROOT)
            return SimpleNamespace(passed=passed, **runpy.run_path(str(ROOT / "setup.py")))

        return run

    def test_left_out_on_request(self, build, capsys):
        assert build("0").passed["ext_modules"] == []
        assert capsys.readouterr().err == "sfast: the native ops are left out: SFAST_BUILD_NATIVE=0\n"

    def test_left_out_without_cuda(self, build, capsys, monkeypatch):
        monkeypatch.setattr(torch.version, "cuda", None)
        assert build("auto").passed["ext_modules"] == []
        (line,) = capsys.readouterr().err.splitlines()
        assert line.endswith(f"left out: PyTorch {torch.__version__} is built without CUDA")

    def test_required_but_impossible(self, build, monkeypatch):
        monkeypatch.setattr(torch.version, "cuda", None)
        with pytest.raises(SystemExit, match=r"cannot be built: PyTorch .* is built without CUDA"):
            build("1")

    def test_misspelt_choice(self, build):
        with pytest.raises(SystemExit, match="must be 0, 1 or auto, got 'yes'"):
            build("yes")

    def test_old_torch(self, build, monkeypatch):
        setup = build("0")
        monkeypatch.setattr(torch, "__version__", "2.9.1+cu130")
        with pytest.raises(setup.CannotBuildError, match=r"must be 2\.10 or later, got 2\.9\.1"):
            setup.torch_folder()

    def test_missing_header_is_named(self, build, tmp_path):
        setup = build("0")
        with pytest.raises(setup.CannotBuildError, match=r"cudnn\.h was not found"):
            setup.find("cudnn.h", [tmp_path])

    def test_toolkits_of_another_cuda_are_passed_over(self, build, tmp_path, monkeypatch):
        setup = build("0")
        for major in (12, 13):
            (tmp_path / f"cuda{major}" / "include").mkdir(parents=True)
            header = tmp_path / f"cuda{major}" / "include" / "cuda_runtime_api.h"
            header.write_text(f"#define CUDART_VERSION  {major}000\n")
        monkeypatch.setenv("CUDA_HOME", str(tmp_path / "cuda12"))
        monkeypatch.setenv("CUDA_PATH", str(tmp_path / "cuda13"))
        roots = setup.cuda_roots(tmp_path / "torch", 13)
        assert tmp_path / "cuda13" in roots
        assert tmp_path / "cuda12" not in roots

    def test_tags(self, build):
        setup = build("0")
        pure = setup.PythonFreeWheel(setuptools.Distribution())
        pure.finalize_options()
        assert pure.get_tag() == ("py3", "none", "any")
        compiled = setup.PythonFreeWheel(setuptools.Distribution({"ext_modules": [setuptools.Extension("a", [])]}))
        compiled.finalize_options()
        python, abi, platform = compiled.get_tag()
        assert (python, abi) == ("py3", "none")
        assert platform != "any"


# ---- on a GPU, against fp64 ----


@pytest.fixture
def ops():
    if not native.available():
        pytest.skip(f"the native ops are not available: {native.why_not()}")
    return torch.ops.sfast_native


def half(*shape: int, dtype: torch.dtype = torch.float16, scale: float = 1.0) -> torch.Tensor:
    made = (torch.randn(*shape, device="cuda") * scale).to(dtype)
    return made.to(memory_format=torch.channels_last) if len(shape) == 4 else made


def poison(like: torch.Tensor) -> None:
    """Leave NaNs where the allocator will place the next tensor of this size."""
    torch.full_like(like, float("nan"))


def error(result: torch.Tensor, reference: torch.Tensor) -> float:
    return ((result.double() - reference).norm() / reference.norm()).item()


ACTIVATIONS = {
    "none": lambda x: x,
    "relu": F.relu,
    "silu": F.silu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
}


def check_conv2d(ops, x, weight, bias, residual, stride, padding, dilation, groups, activation):
    """The op's error against fp64 is at most 1.2 times that of PyTorch's own chain; returns the op's result."""
    geometry = (stride, padding, dilation, groups)

    def reference(cast):
        out = F.conv2d(cast(x), cast(weight), None if bias is None else cast(bias), *geometry)
        return ACTIVATIONS[activation](out if residual is None else out + cast(residual))

    eager, exact = reference(lambda t: t), reference(torch.Tensor.double)
    poison(eager)
    result = ops.conv2d(x, weight, bias, residual, *geometry, activation)
    assert result.shape == exact.shape
    assert result.dtype == x.dtype
    assert result.is_contiguous(memory_format=torch.channels_last)
    assert error(result, exact) <= 1.2 * error(eager, exact)
    return result


# n, c, h, w, k, filter, stride, padding
SHAPES = [
    (2, 320, 16, 16, 320, 3, 1, 1),
    (1, 64, 17, 23, 128, 3, 1, 1),
    (2, 128, 15, 9, 64, 3, 2, 1),
    (2, 192, 17, 13, 320, 1, 1, 0),
    (1, 8, 9, 7, 8, 3, 1, 1),
    (1, 1280, 8, 8, 1280, 3, 1, 1),
    (1, 72, 11, 11, 40, 1, 2, 0),
]


@pytest.mark.gpu
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_conv2d_every_epilogue(ops, shape):
    n, c, h, w, k, size, stride, padding = shape
    x, weight, bias = half(n, c, h, w), half(k, c, size, size, scale=(c * size * size) ** -0.5), half(k)
    residual = torch.randn_like(F.conv2d(x, weight, None, stride, padding))
    for b, r, activation in itertools.product((None, bias), (None, residual), ("none", "relu", "silu")):
        check_conv2d(ops, x, weight, b, r, [stride] * 2, [padding] * 2, [1, 1], 1, activation)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_conv2d_dilation_and_dtype(ops, dtype):
    x, weight, bias = (
        half(2, 64, 19, 21, dtype=dtype),
        half(128, 64, 3, 3, dtype=dtype, scale=0.05),
        half(128, dtype=dtype),
    )
    check_conv2d(ops, x, weight, bias, None, [1, 1], [2, 2], [2, 2], 1, "none")


@pytest.mark.gpu
@pytest.mark.parametrize(("c", "k", "groups"), [(64, 128, 2), (64, 64, 64), (3, 128, 1), (4, 320, 1), (9, 320, 1)])
def test_conv2d_groups_and_few_channels_are_right_or_refused_twice(ops, c, k, groups):
    x, weight, bias = half(2, c, 16, 16), half(k, c // groups, 3, 3, scale=0.1), half(k)
    answers = []
    for _ in range(2):
        try:
            answers.append(check_conv2d(ops, x, weight, bias, None, [1, 1], [1, 1], [1, 1], groups, "none"))
        except RuntimeError as refused:
            answers.append(str(refused))
    assert all(
        isinstance(a, torch.Tensor) or (a.startswith("sfast_native: conv2d") and a.endswith("no kernel"))
        for a in answers
    ), answers
    assert type(answers[0]) is type(answers[1])


@pytest.mark.gpu
def test_conv2d_copies_weights_and_residuals_of_other_layouts(ops):
    x, weight = half(2, 32, 16, 16), half(64, 32, 3, 3, scale=0.1).contiguous()
    residual = half(2, 64, 16, 16).contiguous()
    check_conv2d(ops, x, weight, None, residual, [1], [1], [1], 1, "none")


@pytest.mark.gpu
def test_conv2d_reads_the_residual_and_leaves_it(ops):
    x, weight, residual = half(2, 64, 16, 16), half(64, 64, 3, 3, scale=0.05), half(2, 64, 16, 16)
    kept = residual.clone()
    result = check_conv2d(ops, x, weight, None, residual, [1, 1], [1, 1], [1, 1], 1, "none")
    assert torch.equal(residual, kept)
    assert result.data_ptr() != residual.data_ptr()
    doubled = ops.conv2d(x, weight, None, x, [1, 1], [1, 1], [1, 1], 1, "none")  # the input as its own residual
    exact = F.conv2d(x.double(), weight.double(), padding=1) + x.double()
    assert error(doubled, exact) < 1e-3


@pytest.mark.gpu
def test_conv2d_shapes_interleaved_give_the_same_bits(ops):
    inputs = [(half(2, c, 16, 16), half(k, c, 3, 3, scale=0.05), half(k)) for c, k in ((32, 64), (64, 32), (96, 96))]
    first = [ops.conv2d(*i, None, [1, 1], [1, 1], [1, 1], 1, "none") for i in inputs]
    for _ in range(3):
        for i, expected in zip(inputs, first, strict=True):
            assert torch.equal(ops.conv2d(*i, None, [1, 1], [1, 1], [1, 1], 1, "none"), expected)


@pytest.mark.gpu
def test_replays_see_new_data(ops):
    x, weight, bias, residual = half(2, 64, 16, 16), half(64, 64, 3, 3, scale=0.05), half(64), half(2, 64, 16, 16)
    rows, matrix = half(77, 64), half(128, 64, scale=0.1)

    def step():
        return (
            ops.conv2d(x, weight, bias, residual, [1, 1], [1, 1], [1, 1], 1, "none"),
            ops.linear(rows, matrix, None, None, "gelu_tanh"),
        )

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for tensor in (x, residual, rows):
        tensor.normal_()
    for out in captured:
        out.fill_(float("nan"))
    graph.replay()
    for replayed, expected in zip(captured, step(), strict=True):
        assert torch.equal(replayed, expected)


@pytest.mark.gpu
def test_first_call_inside_a_capture(ops):
    x, weight = half(2, 48, 10, 12), half(56, 48, 3, 3, scale=0.05)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = ops.conv2d(x, weight, None, None, [1, 1], [1, 1], [1, 1], 1, "none")
    graph.replay()
    exact = F.conv2d(x.double(), weight.double(), padding=1)
    assert error(out, exact) < 1e-3


@pytest.mark.gpu
def test_on_a_side_stream(ops):
    x, weight = half(4, 128, 64, 64), half(128, 128, 3, 3, scale=0.03)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        y = x * 2
        out = ops.conv2d(y, weight, None, None, [1, 1], [1, 1], [1, 1], 1, "none")
    stream.synchronize()
    assert error(out, F.conv2d(x.double() * 2, weight.double(), padding=1)) < 1e-3


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": lambda t: t.contiguous()}, "x must be dense channels-last"),
        ({"x": lambda t: t.float()}, "x must be float16 or bfloat16"),
        ({"x": lambda t: t[0]}, "must have 4 dimensions"),
        ({"weight": lambda t: t[:, :8]}, "weight .* must fit x"),
        ({"weight": lambda t: t.bfloat16()}, "weight must have x's dtype"),
        ({"bias": lambda t: t[:8]}, "bias must be contiguous"),
        ({"bias": lambda t: t.cpu()}, "bias must lie on x's device"),
        ({"residual": lambda t: t[:, :, :4]}, "residual must have the result's shape"),
        ({"stride": lambda t: [0, 1]}, "stride must be at least 1, got 0, 1"),
        ({"weight": lambda t: t[:20]}, "output channels must be a multiple of 8, got 20"),
        ({"activation": lambda t: "gelu"}, "activation must be none, relu or silu, got gelu"),
    ],
    ids=lambda value: value if isinstance(value, str) else next(iter(value)),
)
def test_conv2d_says_what_is_wrong(ops, change, message):
    arguments = {
        "x": half(2, 16, 8, 8),
        "weight": half(24, 16, 3, 3),
        "bias": half(24),
        "residual": half(2, 24, 8, 8),
        "stride": [1, 1],
        "padding": [1, 1],
        "dilation": [1, 1],
        "groups": 1,
        "activation": "none",
    }
    for name, alter in change.items():
        arguments[name] = alter(arguments[name])
    with pytest.raises(RuntimeError, match=f"sfast_native::conv2d: .*{message}"):
        ops.conv2d(*arguments.values())


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(2, 77, 768, 320), (1, 1, 1280, 640), (3, 33, 64, 8), (2, 4096, 320, 1280)])
def test_linear_every_epilogue(ops, dtype, shape):
    b, m, k, n = shape
    x, weight, bias = (
        half(b, m, k, dtype=dtype),
        half(n, k, dtype=dtype, scale=k**-0.5),
        half(n, dtype=dtype),
    )
    residual = half(b, m, n, dtype=dtype)
    for c, r, activation in itertools.product((None, bias), (None, residual), ("none", "relu", "gelu_tanh")):

        def reference(cast, c=c, r=r, activation=activation):
            out = F.linear(cast(x), cast(weight), None if c is None else cast(c))
            return ACTIVATIONS[activation](out if r is None else out + cast(r))

        eager, exact = reference(lambda t: t), reference(torch.Tensor.double)
        kept = residual.clone()
        poison(eager)
        result = ops.linear(x, weight, c, r, activation)
        assert result.shape == exact.shape
        assert error(result, exact) <= 1.2 * error(eager, exact)
        assert torch.equal(residual, kept)


@pytest.mark.gpu
def test_linear_takes_slices_with_even_rows(ops):
    merged = half(2, 9, 3 * 64)
    x, weight = merged[..., 64:128], half(32, 64, scale=0.1)
    assert error(ops.linear(x, weight, None, None, "none"), F.linear(x.double(), weight.double())) < 1e-3


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("x", "weight", "message"),
    [
        ((4, 16), (8, 24), "must fit x"),
        ((4, 12), (8, 12), "multiples of 8"),
        ((4, 16), (6, 16), "multiples of 8"),
    ],
)
def test_linear_says_what_is_wrong(ops, x, weight, message):
    with pytest.raises(RuntimeError, match=f"sfast_native::linear: .*{message}"):
        ops.linear(half(*x), half(*weight), None, None, "none")


@pytest.mark.gpu
def test_plans_tell_what_was_chosen(ops):
    x, weight = half(2, 16, 8, 8), half(16, 16, 3, 3)
    ops.conv2d(x, weight, None, None, [1, 1], [1, 1], [1, 1], 1, "none")
    line = next(line for line in native.plans().splitlines() if "x [2,16,8,8] weight [16,16,3,3]" in line)
    assert "cuDNN engine" in line
    assert "chosen in" in line
