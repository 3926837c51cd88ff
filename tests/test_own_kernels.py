"""Each cut of our own matrix kernel against fp64, on a GPU that runs it: products, gated products, convolutions."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F

from sfast import native
from tests.test_native_ops import ACTIVATIONS, check_conv2d, error, half, poison

pytestmark = pytest.mark.gpu

# rows x columns of a tile, and how blocks share the work; see all_kernels in csrc/hopper_gemm.cuh
CUTS = ["128x256", "128x192", "128x160", "128x128", "128x96", "128x64", "256x128", "256x160", "128x128 alternating"]
ACTIVATED_CUTS = ["128x256", "128x160", "128x128"]
GATED_CUTS = ["128x256", "128x128", "256x128", "128x128 alternating"]
# of matrices alone
MATRIX_CUTS = ["128x256 staged", "192x192 staged", "128x192 staged"]
ACTIVATED_MATRIX_CUTS = ["128x256 staged", "192x192 staged", "128x192 staged"]
GATED_MATRIX_CUTS = ["128x256 staged"]
SHARING = ["", " paired", " split 2", " split 5", " split 8"]
HALF, BFLOAT16 = (torch.float16, 2), (torch.bfloat16, 14)  # with their numbers in CUDA
EPILOGUES = ["none", "relu", "gelu_tanh", "gelu", "silu", "geglu", "geglu_tanh", "swiglu"]


def ways(cuts: list[str]) -> list[str]:
    alternating = [name for name in cuts if "alternating" in name]
    names = [f"hopper {c}{s}" for c, s in itertools.product(cuts, SHARING) if c not in alternating or "split" not in s]
    return list(dict.fromkeys(names))


@pytest.fixture
def ops():
    if not native.available():
        pytest.skip(f"the native ops are not available: {native.why_not()}")
    if not torch.ops.sfast_native.own_kernels(torch.cuda.current_device()):
        pytest.skip("this GPU or build has no matrix kernels of our own")
    return torch.ops.sfast_native


def choose(op: str, fields: list[int], way: str) -> None:
    """Make the op run a problem that it has not met by this way, as if another process had measured it."""
    line = f"{op} {' '.join(map(str, fields))} = {way}\n"
    assert torch.ops.sfast_native.recall(torch.cuda.current_device(), line) == 1


def assert_chosen(way: str, problem: str) -> None:
    lines = [line for line in native.plans().splitlines() if problem in line]
    assert any(f": {way}, known" in line for line in lines), lines


@pytest.mark.parametrize("dtype", [HALF, BFLOAT16], ids=["float16", "bfloat16"])
@pytest.mark.parametrize("activation", EPILOGUES[:-1])
def test_every_cut_of_a_product(ops, dtype, activation):
    torch_dtype, number = dtype
    gated = "geglu" in activation
    gelu = ACTIVATIONS["gelu_tanh"] if activation == "geglu_tanh" else F.gelu
    cuts = GATED_CUTS + GATED_MATRIX_CUTS if gated else ACTIVATED_CUTS + ACTIVATED_MATRIX_CUTS
    if activation == "none":
        cuts = CUTS + MATRIX_CUTS
    for i, way in enumerate(ways(cuts)):
        m, n, k = 2 + 131 * i, 8 * (1 + 7 * i), 8 * (256 + i)  # nothing divides; from two rows to many tiles
        rows = 2 * n if gated else n
        x = half(m, k + 16, dtype=torch_dtype)[:, :k]
        weight, bias = half(rows, k, dtype=torch_dtype, scale=k**-0.5), half(rows, dtype=torch_dtype)
        residual = None if gated or i % 2 else half(m, n, dtype=torch_dtype)

        def reference(cast, x=x, weight=weight, bias=bias, residual=residual, gated=gated):
            out = F.linear(cast(x), cast(weight), cast(bias))
            if gated:
                value, gate = out.chunk(2, dim=-1)
                return value * gelu(gate)
            out = out if residual is None else out + cast(residual)
            return F.gelu(out) if activation == "gelu" else ACTIVATIONS[activation](out)

        has_residual = int(residual is not None)
        fields = [
            number,
            m,
            n,
            k,
            1,
            0,
            k + 16,
            k,
            1,
            has_residual,
            n * has_residual,
            EPILOGUES.index(activation),
            0,
            0,
        ]
        choose("linear", fields, way)
        eager, exact = reference(lambda t: t), reference(torch.Tensor.double)
        poison(eager)
        result = ops.linear(x, weight, bias, residual, activation)
        assert_chosen(way, f"x [{m},{k}] weight [{n},{k}]")
        assert error(result, exact) <= 1.2 * error(eager, exact), way


@pytest.mark.parametrize("dtype", [HALF, BFLOAT16], ids=["float16", "bfloat16"])
def test_a_gate_with_a_weight_of_its_own(ops, dtype):
    torch_dtype, number = dtype
    for i, way in enumerate(ways(GATED_CUTS + GATED_MATRIX_CUTS)):
        m, n, k = 2 + 131 * i, 8 * (1 + 7 * i), 8 * (264 + i)
        x = half(m, k, dtype=torch_dtype)
        weights = [half(n, k + 8, dtype=torch_dtype, scale=k**-0.5)[:, :k] for _ in range(2)]
        biases = [half(n, dtype=torch_dtype) if i % 2 else None for _ in range(2)]

        def reference(cast, x=x, weights=weights, biases=biases):
            cast_biases = [None if bias is None else cast(bias) for bias in biases]
            value, gate = (F.linear(cast(x), cast(w), b) for w, b in zip(weights, cast_biases, strict=True))
            return value * F.silu(gate)

        choose("linear", [number, m, n, k, 1, 0, k, k + 8, i % 2, 0, 0, EPILOGUES.index("swiglu"), 0, 0], way)
        eager, exact = reference(lambda t: t), reference(torch.Tensor.double)
        poison(eager)
        result = ops.linear_swiglu(x, weights[0], biases[0], weights[1], biases[1])
        assert_chosen(way, f"x [{m},{k}] weight [{n},{k}]")
        assert error(result, exact) <= 1.2 * error(eager, exact), way


@pytest.mark.parametrize("dtype", [HALF, BFLOAT16], ids=["float16", "bfloat16"])
def test_two_matrices_side_by_side(ops, dtype):
    torch_dtype, number = dtype
    for i, way in enumerate(ways(CUTS + MATRIX_CUTS)):
        m, n, first, second = 2 + 131 * i, 8 * (1 + 7 * i), 64 * (1 + i), 8 * (256 + i)
        a, b = half(m, first + 8, dtype=torch_dtype)[:, :first], half(m, second, dtype=torch_dtype)
        weight, bias = (
            half(n, first + second, dtype=torch_dtype, scale=(first + second) ** -0.5),
            half(n, dtype=torch_dtype),
        )
        fields = [number, m, n, first, 1, 0, first + 8, first + second, 1, 0, 0, 0, second, second]
        choose("linear", fields, way)
        eager = F.linear(torch.cat([a, b], 1), weight, bias)
        exact = F.linear(torch.cat([a, b], 1).double(), weight.double(), bias.double())
        poison(eager)
        result = ops.linear_cat(a, b, weight, bias)
        assert_chosen(way, f"x [{m},{first}+{second}] weight [{n},{first + second}]")
        assert error(result, exact) <= 1.2 * error(eager, exact), way


# n, c, h, w, k, filter, stride, padding, dilation
CONVOLUTIONS = [
    (3, 72, 17, 23, 136, 3, 1, 1, 1),
    (2, 128, 8, 8, 264, 3, 1, 1, 1),
    (1, 64, 33, 150, 64, 3, 2, 1, 1),
    (2, 64, 19, 21, 40, 3, 1, 2, 2),
    (5, 8, 5, 7, 8, 5, 1, 2, 1),
    (2, 192, 16, 16, 320, 1, 2, 0, 1),
]


@pytest.mark.parametrize("shape", CONVOLUTIONS, ids=str)
def test_every_cut_of_a_convolution(ops, shape):
    n, c, h, w, k, size, stride, padding, dilation = shape
    for i, way in enumerate(ways(CUTS)):
        if "split" in way and size * size * -(-c // 64) < 4 * int(way.split()[-1]):
            continue  # too short a sum to be split
        height = h + i  # a problem of its own
        x, weight = half(n, c, height, w), half(k, c, size, size, scale=(c * size * size) ** -0.5)
        bias = half(k) if i % 3 else None
        out = F.conv2d(x, weight, None, stride, padding, dilation)
        residual = torch.randn_like(out) if i % 2 else None
        relu = i % 2 == 0 and any(cut == way.split()[1] for cut in ACTIVATED_CUTS) and "alternating" not in way
        fields = [2, n, c, height, w, k, size, size, *out.shape[2:], stride, stride, padding, padding]
        fields += [dilation, dilation, 1, bias is not None, residual is not None, relu]
        choose("conv2d", [int(field) for field in fields], way)
        geometry = ([stride] * 2, [padding] * 2, [dilation] * 2, 1)
        check_conv2d(ops, x, weight, bias, residual, *geometry, "relu" if relu else "none")
        assert_chosen(way, f"x [{n},{c},{height},{w}] weight [{k},{c},{size},{size}]")


def test_tiles_outnumber_the_processors(ops):
    """A block takes many tiles here, and the ring of stages goes round and round."""
    whole = [
        way for way in ways(GATED_CUTS + GATED_MATRIX_CUTS) if "split" not in way
    ]  # so many tiles leave nobody to share one with
    for i, way in enumerate(whole):
        m, n, k = 4096 + i, 2560, 640
        x, weight, bias = half(m, k), half(2 * n, k, scale=k**-0.5), half(2 * n)
        choose("linear", [2, m, n, k, 1, 0, k, k, 1, 0, 0, EPILOGUES.index("geglu"), 0, 0], way)
        value, gate = F.linear(x.float(), weight.float(), bias.float()).chunk(2, dim=-1)
        for _ in range(3):
            assert error(ops.linear(x, weight, bias, None, "geglu"), (value * F.gelu(gate)).double()) < 5e-4, way
        assert_chosen(way, f"x [{m},{k}] weight [{n},{k}]")


def test_gated_says_what_is_wrong(ops):
    with pytest.raises(RuntimeError, match="takes no residual"):
        ops.linear(half(4, 16), half(32, 16), None, half(4, 16), "geglu")
    with pytest.raises(RuntimeError, match="multiples of 8"):
        ops.linear(half(4, 16), half(24, 16), None, None, "geglu")
