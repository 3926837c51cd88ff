"""A compiled module gives eager's results in every situation, traces no more than it must, and says where it fell back."""

import copy
import dataclasses
import inspect
import logging
import pickle
import random
import re
import threading
import types
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput
from torch import Tensor, nn

import sfast
from sfast import CompilationConfig
from sfast.prepare import MAX_TRACES
from sfast.trace import Trace


class Net(nn.Module):
    """Small, with a size-dependent branch, keyword arguments and a dictionary result."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(6, 12)
        self.outer = nn.Linear(12, 6)
        self.scale = torch.ones(6)  # a tensor that is neither parameter nor buffer

    def forward(
        self, x: Tensor, extra: dict[str, Any] | None = None, gain: float = 1.0, flip: bool = False
    ) -> dict[str, Tensor]:
        y = self.outer(F.silu(self.inner(x))) * self.scale * gain
        if extra is not None:
            y = y + extra["bias"]
        if x.shape[0] > 4:
            y = y * 3
        return {"y": y.flip(-1) if flip else y}


@pytest.fixture
def net() -> Net:
    return Net().eval().requires_grad_(False)


def pair(net: nn.Module) -> tuple[nn.Module, nn.Module]:
    """An eager copy, which follows no change, and the compiled module."""
    return copy.deepcopy(net), sfast.compile(net)


def agree(a: Any, b: Any) -> None:
    torch.testing.assert_close(a["y"], b["y"], rtol=1e-5, atol=1e-6)


def test_same_result_for_new_shapes_without_a_new_trace(net: Net) -> None:
    eager, compiled = pair(net)
    for shape in [(2, 6), (3, 6), (1, 6), (2, 6)]:
        x = torch.randn(shape)
        agree(compiled(x), eager(x))
    report = sfast.report(net)
    assert (report.traces, report.fallbacks) == (1, [])
    assert report.fusions == {"linear_silu": 1, "linear": 1}
    assert report.components == ["Net"]


def test_another_structure_is_another_trace(net: Net) -> None:
    eager, compiled = pair(net)
    x, bias = torch.randn(2, 6), torch.randn(6)
    calls = [
        dict(x=x),
        dict(x=x, extra={"bias": bias}),
        dict(x=x, gain=2.0),
        dict(x=x, flip=True),
        dict(x=x.double().float()),
    ]
    for kwargs in calls * 2:
        agree(compiled(**kwargs), eager(**kwargs))
    assert sfast.report(net).traces == 4


def test_a_decision_by_size_specialises_once(net: Net) -> None:
    eager, compiled = pair(net)
    for batch in (2, 3, 5, 6, 7, 4, 1):
        x = torch.randn(batch, 6)
        agree(compiled(x), eager(x))
    report = sfast.report(net)
    assert report.traces == 2 and report.fallbacks == []


def test_without_verify_a_decision_by_size_is_known_all_the_same(net: Net) -> None:
    eager = copy.deepcopy(net)
    sfast.compile(net, CompilationConfig(verify=False))
    for batch in (2, 5, 3, 6, 2):
        x = torch.randn(batch, 6)
        agree(net(x), eager(x))
    assert sfast.report(net).traces == 2


@pytest.mark.parametrize("verify", [True, False])
def test_integers_of_the_caller_are_sizes(net: Net, verify: bool) -> None:
    eager, compiled = copy.deepcopy(net), sfast.compile(net, CompilationConfig(verify=verify))
    x = torch.randn(2, 6)
    for gain in (2, 3, 0, 2):
        agree(compiled(x, gain=gain), eager(x, gain=gain))
    assert sfast.report(net).traces == 1
    agree(compiled(x, gain=True), eager(x, gain=True))  # type: ignore[arg-type]  # a flag is none
    assert sfast.report(net).traces == 2


def test_weights_edited_moved_and_replaced(net: Net) -> None:
    _, compiled = pair(net)
    x = torch.randn(2, 6)
    compiled(x)
    net.inner.weight.mul_(2)
    agree(compiled(x), type(net).forward(net, x))
    net.inner.weight.data = torch.randn(12, 6)
    agree(compiled(x), type(net).forward(net, x))
    net.inner.weight = nn.Parameter(torch.randn(12, 6), requires_grad=False)
    net.scale = torch.full((6,), 0.5)
    agree(compiled(x), type(net).forward(net, x))
    assert sfast.report(net).traces == 1
    net.outer = nn.Linear(12, 6).requires_grad_(False).eval()
    agree(compiled(x), type(net).forward(net, x))
    assert sfast.report(net).traces == 2
    net.double()
    net.scale = net.scale.double()
    assert compiled(x.double())["y"].dtype is torch.float64
    agree(compiled(x.double()), type(net).forward(net, x.double()))


def test_an_attribute_set_later_is_obeyed(net: Net) -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.scales, self.cached = net, [1.0], 0

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            self.cached = 6  # its own doing makes no new trace
            return {"y": self.net(x)["y"] * self.scales[0]}

    compiled = sfast.compile(Scaled().eval())
    x = torch.randn(2, 6)
    for scale in (1.0, 0.5, 1.0, 0.25):
        compiled.scales[0] = scale
        agree(compiled(x), {"y": net(x)["y"] * scale})
    assert sfast.report(compiled).traces == 3
    assert sfast.report(compiled).fallbacks == []


def test_offloaded_piece_by_piece_stays_eager(net: Net) -> None:
    from accelerate import cpu_offload

    eager = copy.deepcopy(net)
    sfast.compile(cpu_offload(net, execution_device=torch.device("cpu")))
    x = torch.randn(2, 6)
    agree(net(x), eager(x))
    assert "wrapped by hooks" in sfast.report(net).fallbacks[0][1]


def test_gradients_wanted_run_eager_with_one_line(net: Net, caplog: pytest.LogCaptureFixture) -> None:
    net.requires_grad_(True)
    sfast.compile(net)
    x = torch.randn(2, 6)
    with caplog.at_level(logging.WARNING, "sfast"):
        for _ in range(3):
            net(x)["y"].sum().backward()
    assert net.inner.weight.grad is not None
    assert [r.message for r in caplog.records] == [
        "Net: runs eager: gradients are enabled; call it under torch.no_grad() or torch.inference_mode()"
    ]
    with torch.no_grad():
        assert not net(x)["y"].requires_grad
    assert sfast.report(net).traces == 1


@pytest.mark.parametrize("layer", [nn.Dropout(0.1), nn.BatchNorm1d(6)], ids=["dropout", "batch norm"])
def test_what_is_random_or_learns_runs_eager(layer: nn.Module) -> None:
    net = sfast.compile(nn.Sequential(nn.Linear(6, 6), layer).requires_grad_(False).train())
    net(torch.randn(2, 6))
    report = sfast.report(net)
    assert report.traces == 0 and "training" in report.fallbacks[0][1]
    x = torch.ones(2, 6)
    torch.testing.assert_close(net.eval()(x), nn.Sequential.forward(net, x))
    assert sfast.report(net).traces == 1


class ByMode(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6)
        self.dropout = nn.Dropout(0.0)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.dropout(self.linear(x))
        return -y if self.training else y


def test_training_mode_without_a_consequence_is_compiled() -> None:
    net = sfast.compile(ByMode().requires_grad_(False))
    for training in (True, False, True, False):
        for x in torch.randn(3, 2, 6):
            torch.testing.assert_close(net.train(training)(x), ByMode.forward(net, x))
    report = sfast.report(net)
    assert (report.traces, report.fallbacks) == (2, [])
    net.dropout.p = 0.5
    net.train()(x)
    assert "training" in sfast.report(net).fallbacks[0][1]


def test_inference_mode_and_autocast(net: Net) -> None:
    eager, compiled = pair(net)
    x = torch.randn(2, 6)
    with torch.inference_mode():
        agree(compiled(x), eager(x))
        inference = torch.randn(3, 6)
    agree(compiled(inference), eager(inference))
    with torch.autocast("cpu", torch.bfloat16):
        got, expected = compiled(x), eager(x)
    assert got["y"].dtype is expected["y"].dtype
    torch.testing.assert_close(got["y"], expected["y"], rtol=2e-2, atol=2e-2)
    agree(compiled(x), eager(x))


def test_submodule_hooks_run_eager_and_are_called(net: Net) -> None:
    seen = []
    handle = net.inner.register_forward_hook(lambda *_: seen.append(1))
    eager, compiled = pair(net)
    x = torch.randn(2, 6)
    agree(compiled(x), eager(x))
    assert seen and "hooks" in sfast.report(net).fallbacks[0][1]
    handle.remove()
    compiled(x)
    assert sfast.report(net).traces == 1


def test_idempotent_and_reconfigured(net: Net) -> None:
    sfast.compile(net)
    installed = net.forward
    assert sfast.compile(net) is net and net.forward is installed
    net(torch.randn(2, 6))
    sfast.compile(net, CompilationConfig(enable_fused_linear_geglu=False))
    assert net.forward is not installed
    net(torch.randn(2, 6))
    assert sfast.report(net).fusions == {"linear": 2}


def test_restore_bit_for_bit(net: Net) -> None:
    before = {name: (t.data_ptr(), t.clone(), t.stride()) for name, t in net.state_dict().items()}
    keys = list(net.__dict__)
    sfast.compile(net)
    net(torch.randn(2, 6))
    assert sfast.restore(net) is net
    assert list(net.__dict__) == keys
    for name, tensor in net.state_dict().items():
        pointer, values, stride = before[name]
        assert tensor.data_ptr() == pointer and torch.equal(tensor, values) and tensor.stride() == stride
    assert sfast.report(net).components == []
    sfast.restore(net)  # again, and on something never compiled: nothing happens


def test_a_forward_that_was_replaced_before_is_put_back(net: Net) -> None:
    def mine(x: Tensor) -> Tensor:
        return x + 1

    net.forward = mine  # type: ignore[method-assign, assignment]
    sfast.compile(net)
    assert torch.equal(net(torch.ones(3)), torch.full((3,), 2.0))
    sfast.restore(net)
    assert net.forward is mine


def test_wrapped_by_another_library_after_compile(net: Net) -> None:
    from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module

    eager, compiled = pair(net)
    add_hook_to_module(net, ModelHook())
    x = torch.randn(2, 6)
    agree(compiled(x), eager(x))
    assert sfast.report(net).traces == 1
    sfast.restore(net)
    agree(net(x), eager(x))
    remove_hook_from_module(net)
    agree(net(x), eager(x))


def test_compiled_again_under_a_wrapper_after_restore(net: Net) -> None:
    from accelerate.hooks import ModelHook, add_hook_to_module

    eager, compiled = pair(net)
    add_hook_to_module(net, ModelHook())
    sfast.restore(net)
    assert sfast.report(net).components == []
    sfast.compile(net)
    x = torch.randn(2, 6)
    agree(compiled(x), eager(x))
    assert sfast.report(net).traces == 1


def test_one_module_under_two_names(net: Net) -> None:
    pipeline = types.SimpleNamespace(components={"unet": net, "refiner": net})
    sfast.compile(pipeline)
    net(torch.randn(2, 6))
    report = sfast.report(pipeline)
    assert (report.components, report.traces) == (["unet"], 1)


def test_threads_prepare_once_and_do_not_mix_their_prompts(net: Net) -> None:
    eager, compiled = pair(net)
    inputs = [(torch.randn(2, 6), {"bias": torch.randn(6)}) for _ in range(2)]
    expected = [eager(*args)["y"] for args in inputs]
    wrong: list[int] = []
    start = threading.Barrier(len(inputs))

    def work(i: int) -> None:
        start.wait()
        with torch.no_grad():
            wrong.extend(i for _ in range(50) if not torch.allclose(compiled(*inputs[i])["y"], expected[i], atol=1e-5))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(inputs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    report = sfast.report(net)
    assert (report.traces, report.fallbacks) == (1, [])


def test_wrapped_by_another_library_before_compile(net: Net) -> None:
    from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module

    class Doubles(ModelHook):
        def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            return (args[0] * 2, *args[1:]), kwargs

    eager = copy.deepcopy(net)
    add_hook_to_module(net, Doubles())
    wrapper = net.forward
    sfast.compile(net)
    assert net.forward is wrapper  # we stand below it: what it moves is there when a call reaches us
    x = torch.randn(2, 6)
    for _ in range(2):
        agree(net(x), eager(x * 2))
    assert (sfast.report(net).traces, sfast.report(net).fallbacks) == (1, [])
    assert sfast.compile(net).forward is wrapper
    sfast.restore(net)
    agree(net(x), eager(x * 2))
    assert sfast.report(net).components == []
    sfast.compile(net)
    remove_hook_from_module(net)
    agree(net(x), eager(x))
    assert sfast.report(net).components == ["Net"]
    sfast.restore(net)
    agree(net(x), eager(x))


def test_copies_and_pickles_are_ordinary_modules(net: Net) -> None:
    sfast.compile(net)
    x = torch.randn(2, 6)
    expected = net(x)
    for other in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        agree(other(x), expected)
        other.inner.weight.zero_()
        assert not torch.allclose(other(x)["y"], expected["y"])
        assert sfast.report(other).components == []
    agree(net(x), expected)


def test_copies_under_a_wrapper_of_later(net: Net) -> None:
    from accelerate.hooks import ModelHook, add_hook_to_module

    sfast.compile(net)
    x = torch.randn(2, 6)
    expected = net(x)
    add_hook_to_module(net, ModelHook())
    other = copy.deepcopy(net)
    other.inner.weight.zero_()
    agree(net(x), expected)
    assert not torch.allclose(other(x)["y"], expected["y"])


def test_signature_stays_readable(net: Net) -> None:
    before = inspect.signature(net.forward)
    assert inspect.signature(sfast.compile(net).forward) == before


def test_the_random_numbers_go_on_as_in_eager() -> None:
    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(4), requires_grad=False)

        def forward(self, x: Tensor) -> Tensor:
            return x * self.weight + torch.randn_like(x)

    x = torch.zeros(2, 4)
    torch.manual_seed(3)
    eager = Noisy().eval()
    expected = [*[eager(x) for _ in range(4)], torch.randn(2)]
    compiled = sfast.compile(Noisy().eval())
    torch.manual_seed(3)
    got = [*[compiled(x) for _ in range(4)], torch.randn(2)]
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a, b)
    assert sfast.report(compiled).fallbacks == []


@dataclasses.dataclass
class Boxed:
    y: Tensor
    parts: tuple[Tensor, ...] = ()


def test_dataclasses_and_model_outputs_in_and_out() -> None:
    class Nested(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(3), requires_grad=False)

        def forward(self, box: Boxed, *, options: dict[str, Any], as_output: bool = False) -> Any:
            y = box.y * self.weight + sum(box.parts) + options["deep"]["shift"]
            return UNet2DConditionOutput(sample=y) if as_output else Boxed(y, (y + 1, y + 2))

    compiled = sfast.compile(Nested().eval())
    for n in (3, 5, 3):
        box, options = Boxed(torch.randn(n, 3), (torch.randn(3),)), {"deep": {"shift": torch.randn(n, 1)}, "none": None}
        got, expected = compiled(box, options=options), Nested.forward(compiled, box, options=options)
        assert isinstance(got, Boxed)
        assert torch.equal(got.y, expected.y)
        assert torch.equal(got.parts[1], expected.parts[1])
        output = compiled(box, options=options, as_output=True)
        assert isinstance(output, UNet2DConditionOutput)
        assert torch.equal(output.sample, expected.y)
    assert sfast.report(compiled).traces == 2
    assert sfast.report(compiled).fallbacks == []


class Odd(nn.Module):
    """One of several things that no trace can do."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self.what, self.weight = what, nn.Parameter(torch.ones(3), requires_grad=False)
        self.calls = 0
        self.last: Tensor | None = None

    def forward(self, x: Tensor, cache: list[Tensor] | None = None) -> Any:
        y = x * self.weight
        if self.what == "value":
            return y + 1 if (x @ self.weight).sum() > 0 else y - 1
        if self.what == "counter":
            self.calls += 1
            return y * self.calls
        if self.what == "kept result":
            y = y if self.last is None else y + self.last
            self.last = y
            return y
        if self.what == "random":
            return y + 1 if random.random() < 2 else y
        if self.what == "torch random":
            return y + 1 if torch.rand(()) < 2 else y
        if self.what == "mask":
            return y * int(y[y * (x @ self.weight) > 0].shape[0])
        if self.what == "listed":
            return y + torch.tensor([x @ self.weight, 1.0, 2.0])
        if self.what == "list":
            assert cache is not None
            cache.append(object())
            return y
        if self.what == "argument":
            x.add_(1)
            return x * self.weight
        if self.what == "generator":
            return y, torch.Generator()
        raise AssertionError(self.what)


@pytest.mark.parametrize(
    ("what", "reason"),
    [
        ("counter", "it changes its own attributes at every call"),
        ("kept result", "it changes its own attributes at every call"),
        ("random", "it draws random numbers in Python"),
        ("torch random", r"it decides in Python by the value of a tensor, which is random: test_component\.py:\d+"),
        (
            "mask",
            r"it decides in Python by the value of a tensor, which it has computed itself: test_component\.py:\d+",
        ),
        (
            "listed",
            r"it decides in Python by the value of a tensor, which it has computed itself: test_component\.py:\d+",
        ),
        (
            "value",
            r"it decides in Python by the value of a tensor, which it has computed itself: test_component\.py:\d+",
        ),
        ("list", "it changes the containers it is called with"),
        ("argument", "it writes to its arguments or weights"),
        ("generator", "its result cannot be rebuilt: it draws from a random generator"),
    ],
)
def test_what_cannot_be_traced_runs_eager_with_the_reason(what: str, reason: str) -> None:
    eager, compiled = Odd(what).eval(), sfast.compile(Odd(what).eval())
    for sign in (1, -1, 1):
        mine, theirs = [torch.full((3,), float(sign)) for _ in range(2)]
        extra = ([], []) if what == "list" else (None, None)
        got, expected = compiled(mine, extra[0]), eager(theirs, extra[1])
        got, expected = (got[0], expected[0]) if what == "generator" else (got, expected)
        assert torch.equal(got, expected) and torch.equal(mine, theirs)
        assert what != "list" or len(extra[0]) == len(extra[1]) == 1
    fallbacks = sfast.report(compiled).fallbacks
    assert len([f for f in fallbacks if f[0] == "Odd"]) == 1
    assert re.search(reason, fallbacks[0][1])


def test_an_operator_that_computes_wrong_is_caught(
    net: Net, caplog: pytest.LogCaptureFixture, monkeypatch: Any
) -> None:
    eager = copy.deepcopy(net)
    sfast.compile(net)
    original = Trace.run

    def corrupted(self: Any, weights: Any, tensors: Any) -> Any:
        outputs = original(self, weights, tensors)
        return [output * 1.5 for output in outputs] if self.fusions else outputs

    monkeypatch.setattr(Trace, "run", corrupted)
    x = torch.randn(2, 6)
    with caplog.at_level(logging.WARNING, "sfast"):
        agree(net(x), eager(x))
    assert not sfast.report(net).fusions
    assert "runs without fusions at 2x6: with them, relative error 0.5 against eager" in caplog.text


def test_a_rewritten_graph_that_fails_leaves_the_traced_one() -> None:
    class Strided(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(1), requires_grad=False)

        def forward(self, x: Tensor) -> Tensor:
            return F.silu(x.t().contiguous()).view(-1) * self.weight  # needs the copy that silu alone does not

    compiled = sfast.compile(Strided().eval())
    x = torch.randn(3, 4)
    for _ in range(2):
        assert torch.equal(compiled(x), Strided.forward(compiled, x))
    assert sfast.report(compiled).traces == 1


def test_a_graph_that_fails_later_runs_eager(net: Net, monkeypatch: pytest.MonkeyPatch) -> None:
    eager, compiled = pair(net)
    x = torch.randn(2, 6)
    agree(compiled(x), eager(x))

    def fails(self: Trace, weights: list[Tensor], tensors: list[Tensor]) -> list[Tensor]:
        raise RuntimeError("an operator gave up")

    with monkeypatch.context() as broken:
        broken.setattr(Trace, "run", fails)
        agree(compiled(x), eager(x))
    assert sfast.report(net).fallbacks == [("Net", "ran eager at 2x6: RuntimeError: an operator gave up")]
    agree(compiled(x), eager(x))


def test_out_of_memory_is_tried_again(net: Net, monkeypatch: pytest.MonkeyPatch) -> None:
    eager, compiled = pair(net)
    run, fails = Trace.run, [True]

    def sometimes(self: Trace, weights: list[Tensor], tensors: list[Tensor]) -> list[Tensor]:
        if fails:
            fails.pop()
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return run(self, weights, tensors)

    monkeypatch.setattr(Trace, "run", sometimes)
    x = torch.randn(2, 6)
    agree(compiled(x), eager(x))
    assert sfast.report(net).traces == 0
    assert "ran eager at 2x6, until there is more memory: OutOfMemoryError" in sfast.report(net).fallbacks[0][1]
    agree(compiled(x), eager(x))
    assert sfast.report(net).traces == 1


def test_a_graph_that_is_always_wrong_falls_back_with_shape_and_error(
    net: Net, caplog: pytest.LogCaptureFixture, monkeypatch: Any
) -> None:
    original = Trace.run
    monkeypatch.setattr(Trace, "run", lambda self, w, t: [o * 1.5 for o in original(self, w, t)])
    eager, compiled = pair(net)
    x = torch.randn(2, 6)
    with caplog.at_level(logging.WARNING, "sfast"):
        for _ in range(3):
            agree(compiled(x), eager(x))
    lines = [r.message for r in caplog.records]
    assert lines[-1] == "Net: runs eager at 2x6: relative error 0.5 against eager, allowed 0.0001"
    assert len(lines) == len(set(lines))


def test_a_reason_is_said_once_for_all_shapes(caplog: pytest.LogCaptureFixture) -> None:
    eager, compiled = Odd("value").eval(), sfast.compile(Odd("value").eval())
    with caplog.at_level(logging.WARNING, "sfast"):
        for n in range(1, 40):
            x = torch.randn(n, 3)
            assert torch.equal(compiled(x), eager(x))
    assert len(caplog.records) == 1


def test_the_same_shape_in_another_layout_is_verified_again() -> None:
    class Layout(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(3), requires_grad=False)

        def forward(self, x: Tensor) -> Tensor:
            return x * self.weight if x.is_contiguous() else x - self.weight

    eager, compiled = Layout().eval(), sfast.compile(Layout().eval())
    for _ in range(2):
        for x in (torch.randn(3, 3), torch.randn(3, 3).t()):
            assert torch.equal(compiled(x), eager(x))


def test_an_argument_written_under_inference_mode() -> None:
    with torch.inference_mode():
        mine, theirs = torch.ones(3), torch.ones(3)
        compiled = sfast.compile(Odd("argument").eval())
        for _ in range(3):
            assert torch.equal(compiled(mine), Odd("argument").eval()(theirs))
            assert torch.equal(mine, theirs)


def test_global_hooks_are_called(net: Net) -> None:
    sfast.compile(net)
    seen: list[int] = []
    handle = torch.nn.modules.module.register_module_forward_hook(lambda *_: seen.append(1))
    try:
        net(torch.randn(2, 6))
    finally:
        handle.remove()
    assert len(seen) == 3  # both layers and the net


def test_a_copy_keeps_a_forward_that_was_replaced_before(net: Net) -> None:
    net.forward = _plus_one  # type: ignore[method-assign, assignment]
    sfast.compile(net)
    for other in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert torch.equal(other(torch.ones(3)), torch.full((3,), 2.0))


def _plus_one(x: Tensor) -> Tensor:
    return x + 1


def test_structures_that_never_repeat_stop_being_traced(net: Net) -> None:
    eager, compiled = pair(net)
    x = torch.randn(2, 6)
    for i in range(MAX_TRACES + 3):
        agree(compiled(x, gain=-i - 1), eager(x, gain=-i - 1))
    report = sfast.report(net)
    assert report.traces == MAX_TRACES
    assert f"more than {MAX_TRACES}" in report.fallbacks[0][1]


def test_settings_that_are_used_are_traced_however_many_there_were(net: Net) -> None:
    eager, compiled = pair(net)
    for i in range(MAX_TRACES + 5):
        for n in (2, 3, 2, 3):
            x = torch.randn(n, 6)
            agree(compiled(x, gain=-i - 1), eager(x, gain=-i - 1))
    report = sfast.report(net)
    assert (report.traces, report.fallbacks) == (MAX_TRACES + 5, [])
    assert len(net.forward.traces) == MAX_TRACES and len(net.forward.plans) == 2 * MAX_TRACES
    agree(compiled(x, gain=-1), eager(x, gain=-1))
    assert sfast.report(net).traces == MAX_TRACES + 6


def test_without_jit_the_eager_module_runs(net: Net) -> None:
    eager = copy.deepcopy(net)
    sfast.compile(net, CompilationConfig(enable_jit=False))
    x = torch.randn(2, 6)
    agree(net(x), eager(x))
    agree(net(x), eager(x))
    assert sfast.report(net).fallbacks == []


def test_inside_a_users_own_trace(net: Net) -> None:
    sfast.compile(net)
    x = torch.randn(2, 6)
    expected = net(x)["y"]
    traced = torch.jit.trace(lambda x: net(x)["y"], (x,), check_trace=False)
    assert torch.equal(traced(x), expected)


def test_report_prints_a_table(net: Net) -> None:
    sfast.compile(net)
    net(torch.randn(2, 6))
    text = str(sfast.report(net))
    assert "Net" in text and "linear_silu" in text and "fallbacks: none" in text
