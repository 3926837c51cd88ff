"""One trace serves other shapes, values and weights; what a trace cannot know is refused or mended."""

import ctypes
import gc
import math
import sys
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import flex_attention

import sfast
from sfast.decisions import DecidesByValue, Untraceable
from sfast.questions import FEW
from sfast.structure import flatten
from sfast.trace import Trace, is_tracing, trace
from tests import tiny


def _trace(module: Callable[..., Any], *args: Any, weights: list[Tensor] | None = None) -> tuple[Trace, list[Tensor]]:
    tensors: list[Tensor] = []
    call = flatten((args, {}), tensors)
    weights = list(module.parameters()) if weights is None and isinstance(module, nn.Module) else weights or []
    forward = module.forward if isinstance(module, nn.Module) else module
    return trace(forward, weights, call, tensors, []), weights


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.used, self.unused = nn.Linear(6, 4), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        return F.gelu(self.used(x.reshape(b * n, c))).view(b, n, -1) / (n // 2)


def test_one_trace_serves_other_shapes() -> None:
    block = Block()
    traced, weights = _trace(block, torch.randn(2, 4, 6))
    assert traced.used_weights == [0, 1]
    for shape in [(2, 4, 6), (1, 9, 6), (5, 2, 6)]:
        x = torch.randn(shape)
        with torch.no_grad():
            assert torch.equal(traced.run(weights, [x])[0], block(x))


def test_weights_are_inputs_and_never_copied() -> None:
    block = Block()
    traced, weights = _trace(block, torch.randn(2, 4, 6))
    x = torch.randn(2, 4, 6)
    with torch.no_grad():
        block.used.weight.mul_(3)  # in place
        block.used.bias.data = torch.randn(4)  # other storage
        assert torch.equal(traced.run(weights, [x])[0], block(x))
        block.used.weight = nn.Parameter(torch.randn(4, 6))  # another object: passed like any input
        assert torch.equal(traced.run(list(block.parameters()), [x])[0], block(x))


class Doubtful(nn.Module):
    """Asks for sizes of what it computes, in a graph of many operators."""

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(FEW // 2):
            x = x * 1.5 + 0.25
        return torch.cat(x.chunk(2)) if x.shape[0] > 2 else x


def test_a_trace_keeps_no_graph_for_a_question_that_nobody_asks() -> None:
    tensors = [torch.randn(4, 3)]
    call = flatten(((tensors[0],), {}), [])
    kept, dropped = (trace(Doubtful().forward, [], call, tensors, [], checked=checked) for checked in (False, True))
    assert dropped.sizes is not None and dropped.sizes.make is None
    assert dropped.fits([], tensors) is None
    assert kept.sizes is not None and kept.sizes.make is not None
    assert kept.fits([], tensors) is True and kept.fits([], [torch.randn(2, 3)]) is False
    assert kept.sizes.make is None  # nor what the function was made of
    for traced in (kept, dropped):
        assert not any(node.sourceRange() for node in traced.function.graph.nodes())
        assert torch.equal(traced.run([], tensors)[0], Doubtful()(*tensors))


_libc = ctypes.CDLL(None) if sys.platform == "linux" else None


class _Malloc(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_size_t) for name in ["arena", "n", "s", "h", "mapped", "us", "fs", "used", "free", "keep"]
    ]


@pytest.mark.skipif(not hasattr(_libc, "mallinfo2"), reason="another C library")
def test_what_each_further_trace_keeps() -> None:
    """Of a UNet's: 2 MiB, and it was 7 when each kept the graph as it was traced."""
    assert _libc is not None
    _libc.mallinfo2.restype = _Malloc
    unet = sfast.compile(tiny.unet().eval().requires_grad_(False))
    used = []
    for setting in range(3):
        unet.some_setting = setting
        with torch.no_grad():
            unet(torch.randn(1, 4, 8, 8), 3, torch.randn(1, 7, unet.config.cross_attention_dim))
        gc.collect()
        held = _libc.mallinfo2()
        used.append(held.used + held.mapped)
    assert sfast.report(unet).traces == len(used)
    assert used[2] - used[1] < 4 * 2**20


class Alike(nn.Module):
    """Weights of the same values in pairs: parameters, tensors among attributes, tensors of its code."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList([nn.LayerNorm(4), nn.LayerNorm(4)])
        self.layers = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])
        self.tables = torch.ones(4), torch.ones(4)
        for layer in self.layers:
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        a, b = (layer(norm(x)) + x for norm, layer in zip(self.norms, self.layers, strict=True))
        return torch.cat([a * self.tables[0] * ONES[0], b * self.tables[1] - ONES[1]])


ONES = torch.ones(4), torch.ones(4)


def test_equal_weights_stay_two() -> None:
    """Whatever merges the equal constants of a graph must not take weights for such: one may be edited alone."""
    module = sfast.compile(Alike().requires_grad_(False))
    x = torch.randn(2, 4)
    pairs = [
        (a, b)
        for parts in (module.norms, module.layers)
        for a, b in zip(*map(nn.Module.parameters, parts), strict=True)
    ]
    for weight in (one for pair in (*pairs, module.tables, ONES) for one in pair):
        torch.testing.assert_close(module(x), Alike.forward(module, x))
        weight.add_(torch.randn(weight.shape))
        torch.testing.assert_close(module(x), Alike.forward(module, x))
    assert (sfast.report(module).traces, sfast.report(module).fallbacks) == (1, [])
    assert not torch.equal(*module.tables)


def test_the_length_of_a_tensor_is_a_size() -> None:
    def pad(prompt: Tensor) -> Tensor:
        assert len([prompt]) == 1 and [*range(len(prompt))][-1] == prompt.shape[0] - 1 and [0] * len(prompt)
        positions = torch.arange(len(prompt) + 1, len(prompt) + 1 + -len(prompt) % 32)
        return torch.cat([prompt, positions[:, None] * prompt[-1:]]) / len(prompt)

    traced, _ = _trace(pad, torch.randn(5, 2))
    for n in (5, 1, 31, 40):
        prompt = torch.randn(n, 2)
        assert torch.equal(traced.run([], [prompt])[0], pad(prompt))
    with pytest.raises(TypeError, match="0-d"):
        _trace(lambda x: x * len(x.sum()), torch.randn(2))
    assert len(torch.zeros(3)) == 3 and type(len(torch.zeros(3))) is int


def test_writes_through_data_are_kept() -> None:
    def forward(x: Tensor) -> Tensor:
        y = x.clone()
        y.data[:, 0] = x[:, 1] * 7
        return y + 1

    traced, _ = _trace(forward, torch.randn(2, 3))
    x = torch.randn(4, 3)
    assert torch.equal(traced.run([], [x])[0], forward(x))


@pytest.mark.parametrize("rounded", [round, math.trunc, math.floor, math.ceil, int])
def test_rounding_of_a_size_is_traced(rounded: Callable[[Any], int]) -> None:
    def forward(x: Tensor) -> Tensor:
        return x[:, : rounded(x.shape[1] / 3)]

    traced, _ = _trace(forward, torch.randn(2, 8))
    x = torch.randn(2, 8)
    assert torch.equal(traced.run([], [x])[0], forward(x))
    assert not any(hasattr(Tensor, name) for name in ("__round__", "__trunc__", "__floor__", "__ceil__"))


def test_repeating_by_a_size_is_traced_without_an_index() -> None:
    def forward(x: Tensor, frames: Tensor) -> Tensor:
        count = frames.shape[1]
        rows = x.repeat_interleave(count, dim=0, output_size=x.shape[0] * count)
        return torch.repeat_interleave(rows, count, -1) + x.repeat_interleave(2, dim=0).sum()

    traced, _ = _trace(forward, torch.randn(2, 3), torch.randn(1, 4))
    assert "index" not in str(traced.function.graph)
    inputs = [torch.randn(3, 2), torch.randn(1, 5)]
    assert torch.equal(traced.run([], inputs)[0], forward(*inputs))


def test_repeat_interleave_by_a_size() -> None:
    def forward(x: Tensor, like: Tensor) -> tuple[Tensor, ...]:
        n = like.shape[0]
        return (
            x.repeat_interleave(n, dim=0, output_size=x.shape[0] * n),
            torch.repeat_interleave(x, repeats=n),
            x.repeat_interleave(n, -1),
        )

    traced, _ = _trace(forward, torch.randn(2, 3), torch.randn(4))
    x, like = torch.randn(3, 5), torch.randn(2)
    for result, expected in zip(traced.run([], [x, like]), forward(x, like), strict=True):
        assert torch.equal(result, expected)


def test_a_decision_by_what_the_model_computes_is_refused_with_its_line() -> None:
    def forward(x: Tensor) -> Tensor:
        return x + 1 if (x @ x.T).sum() > 0 else x

    with pytest.raises(DecidesByValue, match=r"computed itself: test_trace\.py:\d+.*x @ x\.T"):
        _trace(forward, torch.randn(3, 3))
    assert not is_tracing()


def test_functions_of_elements_are_refused_with_their_line() -> None:
    def mapped(x: Tensor) -> Tensor:
        return torch.vmap(lambda row: row * 2)(x)

    def attention(x: Tensor) -> Tensor:
        return flex_attention(x, x, x, score_mod=lambda score, b, h, q, k: score + q - k)

    for forward in (mapped, attention):
        with pytest.raises(Untraceable, match=r"functions of elements.*: test_trace\.py:\d+"):
            _trace(forward, torch.randn(1, 1, 4, 8))
        assert not is_tracing()


def test_a_decision_by_random_numbers_is_refused() -> None:
    with pytest.raises(DecidesByValue, match="random"):
        _trace(lambda x: x + 1 if (x + torch.rand(3)).sum() > 0 else x, torch.randn(3))


def test_sizes_out_of_sizes_are_allowed() -> None:
    def forward(x: Tensor) -> Tensor:
        places = torch.arange(x.shape[0]).repeat_interleave(2)
        mask = torch.ones(x.shape[0], x.shape[0], dtype=torch.bool).tril()
        assert x.repeat_interleave(3, 0).shape[0] > 2
        return x + 1 if places.shape[0] > 2 and mask.nonzero().shape[0] > 2 else x

    traced, _ = _trace(forward, torch.zeros(3))
    assert torch.equal(traced.run([], [torch.zeros(3)])[0], torch.ones(3))


@pytest.mark.parametrize(
    "use",
    [
        lambda x: (x > 1).masked_fill(x > 0, True),
        lambda x: (x > 1).fill_(True),
        lambda x: torch.full((3,), True, dtype=torch.bool) & (x > 0),
        lambda x: (x > 1).new_full((3,), fill_value=True) & (x > 0),
        lambda x: (x > 0) == True,  # noqa: E712
        lambda x: x.masked_fill(x > 0, True),
    ],
    ids=["masked_fill", "fill", "full", "new_full", "eq", "masked_fill_of_floats"],
)
def test_true_as_a_number(use: Callable[[Tensor], Tensor]) -> None:
    traced, _ = _trace(use, torch.randn(3))
    x = torch.randn(3)
    result = traced.run([], [x])[0]
    assert torch.equal(result, use(x))
    assert result.dtype is use(x).dtype


def test_decision_by_size_is_allowed() -> None:
    def forward(x: Tensor) -> Tensor:
        return x + 1 if x.shape[0] > 2 else x - 1

    traced, _ = _trace(forward, torch.zeros(3))
    assert torch.equal(traced.run([], [torch.zeros(3)])[0], torch.ones(3))


def test_an_input_returned_as_it_is() -> None:
    traced, _ = _trace(lambda x, y: {"same": x, "sum": x + y, "n": 3}, torch.ones(2), torch.ones(2))
    x, y = torch.randn(4), torch.randn(4)
    result = traced.unflatten(traced.run([], [x, y]))
    assert torch.equal(result["same"], x) and torch.equal(result["sum"], x + y) and result["n"] == 3


def test_the_same_tensor_twice_does_not_tie_the_arguments() -> None:
    same = torch.randn(3)
    traced, _ = _trace(lambda a, b: a - 2 * b, same, same)
    a, b = torch.randn(3), torch.randn(3)
    assert torch.equal(traced.run([], [a, b])[0], a - 2 * b)


def test_autocast_is_part_of_the_trace() -> None:
    layer = nn.Linear(4, 4)
    with torch.autocast("cpu", torch.bfloat16):
        traced, weights = _trace(layer, torch.randn(2, 4))
        x = torch.randn(2, 4)
        expected = layer(x)
    assert expected.dtype is torch.bfloat16
    assert torch.equal(traced.run(weights, [x])[0], expected)


def test_a_dense_result_stays_dense() -> None:
    def forward(x: Tensor) -> Tensor:
        return x.permute(0, 2, 1).contiguous() + 1

    traced, _ = _trace(forward, torch.randn(2, 3, 4))
    x = torch.randn(2, 5, 6)
    result = traced.run([], [x])[0]
    assert torch.equal(result, forward(x))
    assert result.is_contiguous()


def test_no_tensor_in_the_result() -> None:
    with pytest.raises(ValueError, match="returns no tensor"):
        _trace(lambda x: 3, torch.ones(1))


def test_hooks_are_called_while_tracing_and_modules_are_called_as_ever_afterwards() -> None:
    before = nn.Module.__call__
    block = Block()
    block.used.register_forward_hook(lambda module, args, result: result * 3)
    called = []
    block.used.register_forward_pre_hook(lambda module, args: called.append(module))
    x = torch.randn(2, 4, 6)
    traced, weights = _trace(block, x)
    assert called
    assert nn.Module.__call__ is before
    with torch.no_grad():
        assert torch.equal(traced.run(weights, [x])[0], block(x))

    class Breaks(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise KeyError(x)

    with pytest.raises(KeyError):
        _trace(Breaks(), x)
    assert nn.Module.__call__ is before


def test_other_threads_call_modules_as_ever_while_one_traces() -> None:
    calls: list[str] = []

    class Watched(nn.Module):
        def _call_impl(self, *args: Any, **kwargs: Any) -> Any:
            calls.append(threading.current_thread().name)
            return super()._call_impl(*args, **kwargs)

        def forward(self, x: Tensor) -> Tensor:
            return x + 1

    inner = Watched()

    def forward(x: Tensor) -> Tensor:
        other = threading.Thread(target=inner, args=(torch.zeros(1),), name="other")
        other.start()
        other.join()
        return inner(x)

    tensors = [torch.randn(3)]
    trace(forward, [], flatten(((tensors[0],), {}), []), tensors, [])
    assert calls == ["other"]


def test_who_replaces_the_call_of_modules_is_heard_while_tracing(monkeypatch: pytest.MonkeyPatch) -> None:
    own = nn.Module.__call__
    called: list[nn.Module] = []

    def call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        called.append(module)
        return own(module, *args, **kwargs)

    monkeypatch.setattr(nn.Module, "__call__", call)
    block = Block()
    _trace(block, torch.randn(2, 4, 6))
    assert block.used in called
    assert nn.Module.__call__ is call
