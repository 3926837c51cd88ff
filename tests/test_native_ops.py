"""The native ops' numbers against fp64, in every variant, on a GPU."""

from __future__ import annotations

import itertools
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from sfast import native

pytestmark = pytest.mark.gpu


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


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_conv2d_every_epilogue(ops, shape):
    n, c, h, w, k, size, stride, padding = shape
    x, weight, bias = half(n, c, h, w), half(k, c, size, size, scale=(c * size * size) ** -0.5), half(k)
    residual = torch.randn_like(F.conv2d(x, weight, None, stride, padding))
    for b, r, activation in itertools.product((None, bias), (None, residual), ("none", "relu", "silu")):
        check_conv2d(ops, x, weight, b, r, [stride] * 2, [padding] * 2, [1, 1], 1, activation)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_conv2d_dilation_and_dtype(ops, dtype):
    x, weight, bias = (
        half(2, 64, 19, 21, dtype=dtype),
        half(128, 64, 3, 3, dtype=dtype, scale=0.05),
        half(128, dtype=dtype),
    )
    check_conv2d(ops, x, weight, bias, None, [1, 1], [2, 2], [2, 2], 1, "none")


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


def test_conv2d_copies_weights_and_residuals_of_other_layouts(ops):
    x, weight = half(2, 32, 16, 16), half(64, 32, 3, 3, scale=0.1).contiguous()
    residual = half(2, 64, 16, 16).contiguous()
    check_conv2d(ops, x, weight, None, residual, [1], [1], [1], 1, "none")


def test_conv2d_reads_the_residual_and_leaves_it(ops):
    x, weight, residual = half(2, 64, 16, 16), half(64, 64, 3, 3, scale=0.05), half(2, 64, 16, 16)
    kept = residual.clone()
    result = check_conv2d(ops, x, weight, None, residual, [1, 1], [1, 1], [1, 1], 1, "none")
    assert torch.equal(residual, kept)
    assert result.data_ptr() != residual.data_ptr()
    doubled = ops.conv2d(x, weight, None, x, [1, 1], [1, 1], [1, 1], 1, "none")  # the input as its own residual
    exact = F.conv2d(x.double(), weight.double(), padding=1) + x.double()
    assert error(doubled, exact) < 1e-3


def test_conv2d_shapes_interleaved_give_the_same_bits(ops):
    inputs = [(half(2, c, 16, 16), half(k, c, 3, 3, scale=0.05), half(k)) for c, k in ((32, 64), (64, 32), (96, 96))]
    first = [ops.conv2d(*i, None, [1, 1], [1, 1], [1, 1], 1, "none") for i in inputs]
    for _ in range(3):
        for i, expected in zip(inputs, first, strict=True):
            assert torch.equal(ops.conv2d(*i, None, [1, 1], [1, 1], [1, 1], 1, "none"), expected)


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


def test_first_call_inside_a_capture(ops):
    x, weight = half(2, 48, 10, 12), half(56, 48, 3, 3, scale=0.05)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = ops.conv2d(x, weight, None, None, [1, 1], [1, 1], [1, 1], 1, "none")
    graph.replay()
    exact = F.conv2d(x.double(), weight.double(), padding=1)
    assert error(out, exact) < 1e-3


def test_on_a_side_stream(ops):
    x, weight = half(4, 128, 64, 64), half(128, 128, 3, 3, scale=0.03)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        y = x * 2
        out = ops.conv2d(y, weight, None, None, [1, 1], [1, 1], [1, 1], 1, "none")
    stream.synchronize()
    assert error(out, F.conv2d(x.double() * 2, weight.double(), padding=1)) < 1e-3


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


def test_a_large_product_is_one_kernel_and_clears_no_memory(ops):
    x, weight, bias = half(4608, 3072), half(9216, 3072, scale=3072**-0.5), half(9216)
    for _ in range(3):  # chooses; then the first profile starts the machinery
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA], acc_events=True) as profile:
            ops.linear(x, weight, bias, None, "none")
            torch.cuda.synchronize()
    ran = [event.name for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    assert len(ran) == 1 and "memset" not in ran[0].lower(), ran


def test_linear_takes_slices_with_even_rows(ops):
    merged = half(2, 9, 3 * 64)
    x, weight = merged[..., 64:128], half(32, 64, scale=0.1)
    assert error(ops.linear(x, weight, None, None, "none"), F.linear(x.double(), weight.double())) < 1e-3


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_linear_takes_some_tokens_of_each_sample(ops, activation):
    tokens, weight, bias = half(3, 700, 96, dtype=torch.bfloat16), half(40, 64, scale=0.1), half(40)
    weight, bias, residual = weight.bfloat16(), bias.bfloat16(), half(3, 333, 40, dtype=torch.bfloat16)
    for x in (tokens[:, 367:, 16:80], tokens[:, :333, 32:]):
        for c, r in itertools.product((None, bias), (None, residual)):
            out = F.linear(x.double(), weight.double(), None if c is None else c.double())
            exact = ACTIVATIONS[activation](out if r is None else out + r.double())
            poison(residual)
            result = ops.linear(x, weight, c, r, activation)
            assert result.is_contiguous()
            assert error(result, exact) <= 4e-3
    with pytest.raises(RuntimeError, match="evenly spaced rows"):
        ops.linear(tokens.view(3, 7, 100, 96)[:, :5, :9, :64], weight, None, None, activation)


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


def test_plans_tell_what_was_chosen(ops):
    x, weight = half(2, 16, 8, 8), half(16, 16, 3, 3)
    ops.conv2d(x, weight, None, None, [1, 1], [1, 1], [1, 1], 1, "none")
    line = next(line for line in native.plans().splitlines() if "x [2,16,8,8] weight [16,16,3,3]" in line)
    assert "cuDNN engine" in line
    assert "chosen in" in line


# A product, a convolution by cuDNN and one that is a product; input, weight, padding.
CHOOSES = """
import sys, torch
from sfast import native
assert native.available()
ops = torch.ops.sfast_native
known = sys.stdin.read()
assert ops.recall(0, known) == len(known.splitlines())
made = torch.Generator("cuda").manual_seed(0)
half = lambda *s: torch.randn(*s, device="cuda", generator=made).half()
results = [ops.linear(half(200, 128), half(256, 128), half(256), None, "gelu_tanh")]
for x, w, padding in ((2, 64, 17, 13), (96, 64, 3, 3), [1, 1]), ((2, 64, 16, 24), (96, 64, 1, 1), [0, 0]):
    x, w = (half(*s).to(memory_format=torch.channels_last) for s in (x, w))
    results.append(ops.conv2d(x, w, half(w.shape[0]), None, [1, 1], padding, [1, 1], 1, "none"))
print(ops.plans(), file=sys.stderr)
print(sum(r.double().abs().sum().item() for r in results))
print(ops.choices(0), end="")
"""


def in_a_process(known: str) -> tuple[float, str, str]:
    """(what the results add up to, the choices, a line for each on how it was made) of a process that is told `known`."""
    run = subprocess.run([sys.executable, "-c", CHOOSES], input=known, capture_output=True, text=True, check=True)
    total, _, choices = run.stdout.partition("\n")
    return float(total), choices, run.stderr


def test_choices_go_to_the_next_process(ops):
    total, choices, story = in_a_process("")
    assert len(choices.splitlines()) == 3
    assert "known" not in story
    again, same, story = in_a_process(choices)
    assert story.count(", known, made in ") == 3, story
    assert same == choices
    assert abs(again - total) <= 1e-3 * total


def test_choices_that_do_not_fit_are_made_anew(ops):
    total, choices, _ = in_a_process("")
    problems = [line.partition(" = ")[0] for line in choices.splitlines()]
    foreign = ["cuDNN 99999 1 1", "cublasLt ffff 1 2 3 4 5 6 7", "a kernel of another version"]
    for recipes in (foreign, foreign[1:] + foreign[:1], ["", "cuDNN", "cublasLt"]):
        known = "".join(f"{problem} = {recipe}\n" for problem, recipe in zip(problems, recipes, strict=True))
        again, anew, story = in_a_process(known)
        assert "known" not in story
        assert [line.partition(" = ")[0] for line in anew.splitlines()] == problems
        assert abs(again - total) <= 1e-3 * total


def test_lines_that_are_no_choices_are_not_taken(ops):
    nonsense = (
        "conv2d = x\nlinear 1 2 = y\nconv3d 1 = z\n\nlinear 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 = w\nlinear a b = v\n"
    )
    assert ops.recall(0, nonsense) == 0
