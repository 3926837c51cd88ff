"""New sizes and batches: one trace for all of them, bounded memory, little time, and eager's result at every one."""

from __future__ import annotations

import copy
import csv
import gc
import math
import time
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sfast
from benchmarks import shapes
from sfast import CompilationConfig, launch, native
from sfast.component import component_of
from sfast.cuda_graph import pool_of
from sfast.kernels import choice, nearby
from tests.graphs import Pool, pool
from tests.tiny import TINY, WIDTH, sdxl_unet

__all__ = ["pool"]

SIZES = [(16, 16), (32, 32), (16, 32), (48, 16), (24, 40), (40, 24), (56, 16), (8, 8), (64, 8), (20, 12)]
SHAPES = [(batch, height, width) for batch in (2, 6) for height, width in SIZES]  # of latents
GIB = 2**30

Inputs = dict[str, Any]


def steps(shape: tuple[int, int, int], count: int = 3, like: Tensor | None = None) -> list[Inputs]:
    """What an SDXL UNet is called with in a loop: the prompt stays the same object."""
    batch, height, width = shape
    like = torch.empty(0) if like is None else like
    prompt = {
        "encoder_hidden_states": torch.randn(batch, 7, 2 * WIDTH).to(like),
        "added_cond_kwargs": {
            "text_embeds": torch.randn(batch, WIDTH).to(like),
            "time_ids": torch.rand(batch, 6).to(like),
        },
    }
    latents = [torch.randn(batch, 4, height, width).to(like) for _ in range(count)]
    return [{"sample": x, "timestep": torch.tensor(900.0 - i), **prompt} for i, x in enumerate(latents)]


def error(mine: Tensor, right: Tensor) -> float:
    return float((mine - right).norm() / right.norm())


@torch.no_grad()
def run(unet: nn.Module, inputs: list[Inputs]) -> list[Tensor]:
    return [unet(**one, return_dict=False)[0] for one in inputs]


def unets(config: CompilationConfig | None = None) -> tuple[nn.Module, nn.Module]:
    """Eager, and the same compiled."""
    unet = sdxl_unet(time_ids=6, cross_attention_dim=2 * WIDTH)
    return copy.deepcopy(unet), sfast.compile(unet, config or CompilationConfig(enable_hoisting=True))


# One trace.


def test_twenty_shapes_are_one_trace_and_do_not_drift() -> None:
    tiny = TINY["sdxl"]
    eager, compiled = tiny.build(), sfast.compile(tiny.build())
    shapes = [(8 * size, batch) for batch in (1, 2) for size in range(2, 12)]
    first = {}
    for size, batch in shapes:
        first[size, batch] = tiny.draw(compiled, size, batch, steps=2)
        assert error(first[size, batch], tiny.draw(eager, size, batch, steps=2)) < 1e-4
    report = sfast.report(compiled)
    assert report.traces == len([row for row in report.rows if row[1]]) == 4  # UNet, decoder, two text encoders
    assert report.fallbacks == []
    for size, batch in shapes[::-4]:
        assert error(tiny.draw(compiled, size, batch, steps=2), first[size, batch]) < 1e-6
    assert sfast.report(compiled).traces == 4


def test_a_shape_after_the_first_begins_in_two_parts(pool: Pool) -> None:
    eager, compiled = unets()
    captures = []
    for shape in SHAPES[:4]:
        before = pool.captures
        for inputs in steps(shape):
            (result,), (right,) = run(compiled, [inputs]), run(eager, [inputs])
            assert error(result, right) < 1e-5
        captures.append(pool.captures - before)
    assert captures == [3, 2, 2, 2]  # whole, prologue and body; then prologue and body alone
    report = sfast.report(compiled)
    assert (report.traces, report.graphs, report.fallbacks) == (1, 8, [])
    plans = list(compiled.forward.plans.values())
    assert all(plan.loop is not None and plan.loop.misses == 1 for plan in plans)


def test_parts_that_are_wrong_at_another_shape_are_not_used(pool: Pool, said: Any) -> None:
    eager, compiled = unets()
    run(compiled, steps(SHAPES[0]))
    split = next(iter(compiled.forward.plans.values())).call.hoisted
    right = split.body
    split.body = lambda *args: [result * 1.5 for result in right(*args)]
    inputs = steps(SHAPES[1])
    for mine, expected in zip(run(compiled, inputs), run(eager, inputs), strict=True):
        assert error(mine, expected) < 1e-5
    assert sfast.report(compiled).traces == 2  # traced anew for that shape
    assert said() == []


def test_sizes_that_leave_a_rest_have_a_trace_of_their_own_and_disturb_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    eager, compiled = unets()
    tries: list[int] = []
    capture = launch.capture_if_possible
    monkeypatch.setattr(launch, "capture_if_possible", lambda *args: tries.append(1) or capture(*args))
    for sides in [(16, 16), (9, 7), (8, 12), (11, 13), (12, 8), (7, 9), (24, 8), (16, 32)]:
        inputs = steps((2, *sides))
        assert max(map(error, run(compiled, inputs), run(eager, inputs))) < 1e-5, sides
    assert sfast.report(compiled).traces == 2
    assert len(tries) == 8 + 1  # the first trace is tried once where a size leaves a rest, and then no more


# Memory.


def test_the_least_recently_used_graphs_are_dropped_over_budget(pool: Pool) -> None:
    eager, compiled = unets()
    loops = {shape: steps(shape) for shape in SHAPES[:4]}
    for shape, inputs in loops.items():
        run(compiled, inputs)
        assert pool.memory() <= pool.size // 4
        assert len(pool.runners()) == 2 * (list(loops).index(shape) + 1)
    needed = pool.memory()
    pool.size = 3 * needed  # a quarter of what is free or the graphs' does not suffice for the largest any more
    run(compiled, steps((2, 8, 8)))
    assert 0 < pool.memory() <= pool.size // 4
    for shape, inputs in [*loops.items()] * 2:
        for mine, right in zip(run(compiled, inputs), run(eager, inputs), strict=True):
            assert error(mine, right) < 1e-5
        assert pool.memory() <= pool.size // 4, shape


def test_nobody_holds_a_graph_after_restore_and_nobody_a_module_that_is_deleted(pool: Pool) -> None:
    _, compiled = unets()
    for shape in SHAPES[:3]:
        run(compiled, steps(shape))
    graphs = [weakref.ref(runner) for runner in pool.runners()]
    assert len(graphs) == 6
    gc.disable()  # no cycles of references
    try:
        sfast.restore(compiled)
        assert pool.runners() == [] and pool.memory() == 0
        assert [graph() for graph in graphs] == [None] * 6
    finally:
        gc.enable()
    sfast.compile(compiled, CompilationConfig(enable_hoisting=True))
    run(compiled, steps(SHAPES[0]))
    left = [weakref.ref(thing) for thing in (compiled, compiled.forward, *pool.runners())]
    assert len(left) == 4
    del compiled
    gc.collect()
    assert [thing() for thing in left] == [None] * 4 and pool.memory() == 0


def test_a_budget_that_was_given_holds(pool: Pool, said: Any) -> None:
    largest = pool.each * (2 * 4 * 16 * 16 + 1 + 2 * 7 * 2 * WIDTH + 2 * WIDTH + 2 * 6) + 2 * pool.apart
    eager, compiled = unets(CompilationConfig(enable_hoisting=True, graph_memory_budget=largest))
    for shape in [(2, 16, 16), (2, 8, 16), (2, 32, 32), (2, 16, 8), (2, 32, 32)]:
        inputs = steps(shape)
        for mine, right in zip(run(compiled, inputs), run(eager, inputs), strict=True):
            assert error(mine, right) < 1e-5
        assert pool.memory() <= largest
    assert {"OverBudget" in line and "2x4x32x32" in line for line in said()} == {True}
    before = pool.captures
    pool.used_by_others = -pool.size  # twice as much is free: that is none of a given budget's business
    run(compiled, inputs)
    assert pool.captures == before


# Borrowed kernels.

CONV = "conv2d 2 2 320 128 128 320 3 3 128 128 1 1 1 1 1 1 1 1 0 0"
LINEAR = "linear 2 8192 640 640 1 0 640 640 1 1 640 0 0 0"


def test_problems_are_numbered_as_in_the_native_library() -> None:
    def half(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float16, device="meta")

    x, weight, bias = half(2, 320, 128, 128), half(320, 320, 3, 3), half(320)
    numbers = nearby.conv2d_problem(x, weight, bias, None, [1, 1], [1, 1], [1, 1], 1, "silu")
    assert " ".join(["conv2d", *map(str, numbers)]) == CONV
    numbers = nearby.conv2d_problem(x, weight, None, x, [2], [0, 0, 1, 1], [1, 1], 1, "relu")
    assert numbers == [2, 2, 320, 128, 128, 320, 3, 3, 64, 64, 2, 2, 0, 0, 1, 1, 1, 0, 1, 1]
    numbers = nearby.linear_problem(half(2, 4096, 640), half(640, 640), bias, half(2, 4096, 640), "none")
    assert " ".join(["linear", *map(str, numbers)]) == LINEAR
    query = half(2, 4096, 1920).bfloat16()[..., :640]
    numbers = nearby.linear_problem(query, half(1280, 640).bfloat16(), None, None, "geglu")
    assert numbers == [14, 8192, 640, 640, 1, 0, 1920, 640, 0, 0, 0, 5, 0, 0]
    tokens = half(2, 4429, 1920)[:, :4096, :640]
    numbers = nearby.linear_problem(tokens, half(1280, 640), None, half(2, 4096, 1280), "none")
    assert numbers == [2, 4096, 1280, 640, 2, 4429 * 1920, 1920, 640, 0, 1, 1280, 0, 0, 0]
    numbers = nearby.linear_problem(query, half(1280, 1920).bfloat16(), None, None, "none", query.repeat(1, 1, 2))
    assert numbers == [14, 8192, 1280, 640, 1, 0, 1920, 1920, 0, 0, 0, 0, 1280, 1280]


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The native library without a GPU: what it has measured, what it was handed, and how long a choice takes."""
    state: dict[str, Any] = {"measured": {}, "recalled": {}, "seconds": 0.0}

    def choices(device: int) -> str:
        return "".join(
            f"{problem} = {recipe}\n" for problem, recipe in {**state["measured"], **state["recalled"]}.items()
        )

    def recall(device: int, text: str) -> int:
        problem, _, recipe = text.strip().partition(" = ")
        state["recalled"].setdefault(problem, recipe)
        return 1

    class Ops:
        pass

    ops: Any = Ops()
    ops.choices, ops.recall = choices, recall
    ops.conv2d = ops.linear = lambda *arguments: time.sleep(state["seconds"])
    monkeypatch.setattr(torch.ops, "sfast_native", ops)
    monkeypatch.setattr(native, "available", lambda: True)
    monkeypatch.setattr(native, "_borrowed", {})
    return state


def test_a_new_size_borrows_from_the_nearest(library: dict[str, Any]) -> None:
    device = torch.device("cuda", 0)
    library["measured"] = {CONV: "cuDNN 41 3 1", CONV.replace("128", "64"): "hopper 128x160", LINEAR: "cublasLt 7"}
    x, weight = torch.empty(2, 320, 100, 152, dtype=torch.float16), torch.empty(320, 320, 3, 3, dtype=torch.float16)
    bias, y = torch.empty(320, dtype=torch.float16), torch.empty(2, 1000, 640, dtype=torch.float16)
    with nearby.borrowing(device):
        for _ in range(2):
            nearby.conv2d(x, weight, bias, None, [1, 1], [1, 1], [1, 1], 1, "none")
            nearby.conv2d(x[:, :, :60, :60], weight, bias, None, [1, 1], [1, 1], [1, 1], 1, "none")
            nearby.conv2d(x, weight, None, None, [1, 1], [1, 1], [1, 1], 1, "none")  # another layer
    assert library["recalled"] == {
        CONV.replace("128 128", "100 152"): "cuDNN 41 3 1",
        CONV.replace("128 128", "60 60"): "hopper 128x160",
    }
    assert native.measured(device) == library["measured"]  # what is borrowed is not kept as if it were measured
    nearby.linear(y, y[0, :640], None, None, "none")
    assert len(library["recalled"]) == 2  # not where nobody asked for it


def test_far_away_as_much_is_measured_as_fits_into_a_slice(
    library: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nearby, "SLICE", 0.02)
    library["seconds"] = 0.015
    layers = range(8, 8 * 7, 8)
    row, far = (torch.empty(n, 640, dtype=torch.float16) for n in (64, 64 * 16))
    weights = [torch.empty(n, 640, dtype=torch.float16) for n in layers]
    for weight in weights:
        numbers = nearby.linear_problem(row, weight, None, None, "none")
        library["measured"][" ".join(["linear", *map(str, numbers)])] = f"cublasLt {len(weight)}"
    with nearby.borrowing(torch.device("cuda", 0)):
        for weight in weights:
            nearby.linear(far, weight, None, None, "none")
    assert sorted(library["recalled"].values()) == [f"cublasLt {n}" for n in list(layers)[2:]]


def test_a_measured_choice_is_borrowed_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SFAST_CACHE_DIR", "")
    asked: list[int] = []
    best = {100: "double", 1000: "add"}

    def measure(question: str, device: torch.device, ways: Any, inputs: tuple[Tensor, ...], under_load: bool) -> str:
        asked.append(inputs[0].numel())
        return best[inputs[0].numel()]

    monkeypatch.setattr(choice, "_measure", measure)
    used: list[str] = []
    ways = {name: lambda x, name=name: used.append(name) or 2 * x for name in ("plain", "double", "add")}

    def fastest(size: int, wanted: bool = True, layer: str | None = "a layer") -> str:
        x = torch.ones(size)
        with nearby.borrowing(torch.device("cpu"), wanted):
            assert torch.equal(choice.fastest(f"twice {size}, {layer}", ways, x, layer=layer), 2 * x)
        return used[-1]

    choice.forget()
    try:
        assert [fastest(100, wanted=False), fastest(1000, wanted=False)] == ["double", "add"]
        assert [fastest(120), fastest(50), fastest(800), fastest(2000)] == ["double", "double", "add", "add"]
        assert asked == [100, 1000]
        best[10], best[110], best[120] = "plain", "plain", "add"
        assert fastest(10) == "plain"  # too far away
        assert fastest(110, wanted=False) == "plain"  # nobody asked for it
        assert fastest(120, layer="another") == "add"
        assert fastest(50) == "double"
    finally:
        choice.forget()


# On a GPU.


@pytest.mark.gpu
def test_on_a_gpu_new_shapes_cost_captures_and_little_else() -> None:
    eager, compiled = (unet.cuda().half() for unet in unets())
    like = next(eager.parameters())
    seconds, memory = [], []
    for shape in SHAPES:
        inputs = steps(shape, like=like)
        right = run(eager, inputs)
        torch.cuda.synchronize()
        started = time.perf_counter()
        mine = run(compiled, inputs)
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
        memory.append(sfast.report(compiled).graph_memory)
        assert max(map(error, mine, right)) < 1e-2
    report = sfast.report(compiled)
    assert (report.traces, report.graphs, report.fallbacks) == (1, 2 * len(SHAPES), [])
    assert max(seconds[1:]) < 2.0 and sorted(seconds[1:])[len(seconds) // 2] < 0.5, seconds  # a kernel may be compiled
    assert memory[-1] - memory[0] < GIB, memory
    before = [plan.loop for plan in compiled.forward.plans.values()]
    for shape in reversed(SHAPES):
        inputs = steps(shape, like=like)
        assert max(map(error, run(compiled, inputs), run(eager, inputs))) < 1e-2
    assert [plan.loop for plan in compiled.forward.plans.values()] == before  # nothing was captured again


@pytest.mark.gpu
def test_on_a_gpu_memory_returns_with_the_graphs_over_budget() -> None:
    budget = 96 * 2**20
    eager, compiled = (unet.cuda().half() for unet in unets(CompilationConfig(graph_memory_budget=budget)))
    like = next(eager.parameters())
    gc.collect()  # a module and what stands in the place of its forward know each other
    assert pool_of(like.device).memory() == 0
    handles, counts = set(), []
    for side in (16, 64, 24, 96, 32, 160, 40, 16):
        inputs = steps((2, side, side), like=like)
        assert max(map(error, run(compiled, inputs), run(eager, inputs))) < 1e-2
        report = sfast.report(compiled)
        assert report.graph_memory <= budget
        counts.append(report.graphs)
        handles.update(tuple(runner.handle) for runner in pool_of(like.device).runners())
    sfast.restore(compiled)
    assert pool_of(like.device).memory() == 0
    torch.cuda.empty_cache()
    left = {tuple(segment["segment_pool_id"]) for segment in torch.cuda.memory_snapshot()}
    assert handles and left.isdisjoint(handles), counts  # all of it is the driver's again


@pytest.mark.gpu
def test_on_a_gpu_sizes_borrow_by_the_librarys_own_numbers() -> None:
    if not native.available():
        pytest.skip(str(native.why_not()))
    device = torch.device("cuda", torch.cuda.current_device())

    def half(*shape: int) -> Tensor:
        return torch.randn(shape, device=device, dtype=torch.float16)

    weight, bias, square = half(64, 40, 3, 3).contiguous(memory_format=torch.channels_last), half(64), half(72, 40)
    for side in (20, 23):
        x = half(2, 40, side, side).contiguous(memory_format=torch.channels_last)
        convolution = x, weight, bias, None, [1, 1], [1, 1], [1, 1], 1, "none"
        product = half(2, side, 40), square, None, None, "none"
        with nearby.borrowing(device, wanted=side == 23):
            results = nearby.conv2d(*convolution), nearby.linear(*product)
        right = torch.nn.functional.conv2d(x, weight, bias, padding=1), product[0] @ square.T
        assert max(map(error, results, right)) < 1e-2
        problems = [
            " ".join(["conv2d", *map(str, nearby.conv2d_problem(*convolution))]),
            " ".join(["linear", *map(str, nearby.linear_problem(*product))]),
        ]
        chosen = native._by_problem(torch.ops.sfast_native.choices(device.index))
        assert set(problems) <= chosen.keys()
        assert [problem in native.measured(device) for problem in problems] == [side == 20] * 2
    assert math.isfinite(float(results[0].sum()))


# The measuring script.


def test_the_script_measures_a_tiny_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "shapes.csv"
    for _ in range(2):  # rows are appended
        options = ["--model", "tiny", "--shapes", "2", "--steps", "2", "--device", "cpu", "--phases", "--out", str(out)]
        assert shapes.main(options) == 0
    rows = list(csv.DictReader(out.open()))
    assert list(rows[0]) == shapes.COLUMNS and len(rows) == 4
    for row in rows:
        first, again, extra = (float(row[name]) for name in ("first_s", "again_s", "extra_s"))
        assert extra == pytest.approx(first - again, abs=2e-4)
        assert float(row["error"]) < 1e-4 and row["traces"] == "1" and row["reserved_gib"] == ""
    assert [(row["width"], row["height"]) for row in rows] == [("64", "64"), ("80", "48")] * 2
    text = capsys.readouterr().out
    assert "UNet2DConditionModel: the eager call took" in text and "WRONG" not in text


def test_the_script_counts_shapes_beyond_the_goal_and_what_grows() -> None:
    rows = [{"extra_s": extra, "graph_gib": graph} for extra, graph in [(3.0, 0.5), (0.25, 1.25), (0.75, 1.0)]]
    lines = shapes.summary([{**row, "allocated_gib": None, "reserved_gib": 6.0, "driver_gib": 9.0} for row in rows], {})
    assert lines[0] == "after the first shape, at most 0.750 s more than its own steps (goal 0.5 s)"
    assert lines[1] == "shapes beyond the goal: 1 of 2"
    assert lines[2] == "graph_gib: grown by 0.750 over 3 shapes (goal 1.5)"
    assert len(lines) == 5


def test_where_a_size_is_one_any_stride_is_the_same_shape() -> None:
    """Caches of video autoencoders come with other strides out of a graph than out of eager."""
    module = nn.Conv2d(2, 2, 1).eval().requires_grad_(False)
    eager, compiled = copy.deepcopy(module), sfast.compile(module)
    x = torch.randn(1, 2, 5, 4)
    other = torch.empty_strided((1, 2, 5, 4), (7, 20, 4, 1)).copy_(x)
    turned = x.to(memory_format=torch.channels_last)
    for each, plans in ((x, 1), (other, 1), (turned, 2)):
        assert torch.equal(compiled(each), eager(each))
        assert len(component_of(compiled).plans) == plans  # type: ignore[union-attr]
