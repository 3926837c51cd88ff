"""What becomes of weights while adapters are merged into them; diffusers' calls are in test_lora.py."""

import logging
import weakref

import pytest
import torch
from peft import LoHaConfig, LoraConfig, inject_adapter_in_model
from peft.tuners.lora.layer import Linear as LoraLinear
from torch import nn

import sfast
from sfast import adapter_weights
from sfast.component import component_of
from sfast.kernels.linear_together import are_adjacent
from tests.tiny import finished


class Attention(nn.Module):
    """Queries, keys and values of one tensor, a convolution, and a bias that not all have."""

    def __init__(self):
        super().__init__()
        self.to_q, self.to_k, self.to_v = (nn.Linear(16, 16, bias=False) for _ in range(3))
        self.out = nn.Linear(16, 16)
        self.conv = nn.Conv2d(4, 8, 3, padding=1)

    def forward(self, image):
        x = self.conv(image).flatten(2).relu()
        q, k, v = self.to_q(x), self.to_k(x), self.to_v(x)
        return self.out(nn.functional.scaled_dot_product_attention(q, k, v))


def inputs():
    return torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(1))


def adapt(module, names, name="one", kind=LoraConfig, **options):
    torch.manual_seed(len(names))
    options = {"r": 3, "target_modules": names} | options
    init = {"init_weights": False} if kind is LoHaConfig else {"init_lora_weights": False, "lora_alpha": 5}
    inject_adapter_in_model(kind(**init | options), module, adapter_name=name)
    return module


def pair():
    """A compiled module, and the same one eager."""
    compiled, eager = finished(Attention()), finished(Attention())
    eager.load_state_dict(compiled.state_dict())
    sfast.compile(compiled)
    return compiled, eager


@torch.no_grad()
def assert_equal(compiled, eager, traces=1):
    torch.testing.assert_close(compiled(inputs()), eager(inputs()), rtol=1e-5, atol=1e-5)
    assert sfast.report(compiled).traces == traces


def unload(module):
    """As diffusers and peft do it."""
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if adapter_weights.is_adapted(child):
                setattr(parent, name, child.get_base_layer())


def test_a_weight_gets_its_memory_back_with_its_values():
    compiled, eager = pair()
    assert_equal(compiled, eager)
    before = {name: (weight.data_ptr(), weight.clone()) for name, weight in compiled.named_parameters()}
    assert are_adjacent([compiled.to_q.weight, compiled.to_k.weight, compiled.to_v.weight])
    for module in (compiled, eager):
        adapt(module, ["to_q", "to_v", "conv"])
    assert_equal(compiled, eager)
    graph_reads = component_of(compiled).state.weights
    assert {weight.data_ptr() for weight in graph_reads} == {place for place, _ in before.values()}
    assert torch.equal(compiled.to_q.get_base_layer().weight, before["to_q.weight"][1])  # the base values, elsewhere
    assert compiled.to_q.get_base_layer().weight.data_ptr() != before["to_q.weight"][0]
    for module in (compiled, eager):
        unload(module)
    assert_equal(compiled, eager)
    for name, weight in compiled.named_parameters():
        assert weight.data_ptr() == before[name][0] and torch.equal(weight, before[name][1])


def test_adapters_of_before_compiling_do_not_keep_weights_apart():
    eager = adapt(finished(Attention()), ["to_q", "to_k"])
    compiled = adapt(finished(Attention()), ["to_q", "to_k"])
    compiled.load_state_dict(eager.state_dict())
    sfast.compile(compiled)
    assert_equal(compiled, eager)
    state = component_of(compiled).state
    place = {id(weight): i for i, weight in enumerate(state.own)}
    projections = (compiled.to_q.base_layer, compiled.to_k.base_layer, compiled.to_v)
    assert are_adjacent([state.weights[place[id(layer.weight)]] for layer in projections])


def test_memory_that_others_look_at_is_not_written_to():
    compiled, eager = pair()
    assert_equal(compiled, eager)
    held = compiled.state_dict()
    before = {name: value.clone() for name, value in held.items()}
    for module in (compiled, eager):
        adapt(module, ["to_q", "out"])
    assert_equal(compiled, eager)
    assert all(torch.equal(held[name], before[name]) for name in held)
    held["to_q.weight"].mul_(2)  # and what its owner writes is still the module's
    eager.to_q.base_layer.weight.data.mul_(2)
    assert_equal(compiled, eager)


def test_other_values_in_a_base_weight():
    compiled, eager = pair()
    for module in (compiled, eager):
        adapt(module, ["to_q"])
    assert_equal(compiled, eager)
    with torch.no_grad():
        for module in (compiled, eager):
            module.to_q.base_layer.weight.mul_(3)
    assert_equal(compiled, eager)


def test_other_kinds_of_adapters_are_merged_by_peft():
    compiled, eager = pair()
    for module in (compiled, eager):
        adapt(module, ["to_q", "conv"], kind=LoHaConfig)
        adapt(module, ["out"], name="two", lora_bias=True)
    assert_equal(compiled, eager)
    for module in (compiled, eager):
        assert module.to_q.merged_adapters == []
        module.to_q.scale_layer(0.5)
        unload_one = module.out
        unload_one.set_scale("two", 0.25)
    assert_equal(compiled, eager)


def test_a_weight_of_two_adapted_layers_runs_eager(caplog):
    compiled, eager = pair()
    for module in (compiled, eager):
        module.to_k.weight = module.to_q.weight
        adapt(module, ["to_q", "to_k"])
    with caplog.at_level(logging.WARNING, "sfast"):
        for _ in range(2):
            torch.testing.assert_close(compiled(inputs()).detach(), eager(inputs()).detach())
            with torch.no_grad():
                assert_equal(compiled, eager, traces=0)
    assert sum("belong to another layer" in line for line in caplog.messages) == 1


def test_what_peft_cannot_merge_runs_eager(caplog, monkeypatch):
    def refuse(*_, **__):
        raise NotImplementedError("this kind cannot be merged")

    compiled, eager = pair()
    for module in (compiled, eager):
        adapt(module, ["to_q"], lora_bias=True)  # its layer has no bias to merge into
    assert_equal(compiled, eager, traces=0)
    assert any("peft cannot merge the adapters of `to_q`" in line for line in caplog.messages)
    for module in (compiled, eager):
        unload(module)
    assert_equal(compiled, eager)


@pytest.mark.parametrize("at", range(3))
def test_interrupted_while_merging(monkeypatch, at):
    compiled, eager = pair()
    assert_equal(compiled, eager)
    for module in (compiled, eager):
        adapt(module, ["to_q", "to_k", "out"])
    whole, calls = adapter_weights._add_products, []

    def interrupted(*arguments):
        calls.append(arguments)
        if len(calls) == at + 1:
            raise KeyboardInterrupt
        whole(*arguments)

    monkeypatch.setattr(adapter_weights, "_add_products", interrupted)
    with torch.no_grad(), pytest.raises(KeyboardInterrupt):
        compiled(inputs())
    assert_equal(compiled, eager)
    for module in (compiled, eager):
        unload(module)
    assert_equal(compiled, eager)


def test_moves_to_another_dtype_and_back():
    compiled, eager = pair()
    for module in (compiled, eager):
        adapt(module, ["to_q", "conv"])
    assert_equal(compiled, eager)
    for module in (compiled, eager):
        module.double()
    with torch.no_grad():
        torch.testing.assert_close(compiled(inputs().double()), eager(inputs().double()))
    for module in (compiled, eager):
        module.float()
    with torch.no_grad():
        torch.testing.assert_close(compiled(inputs()), eager(inputs()), rtol=1e-5, atol=1e-5)


def test_restoring_while_adapters_are_active():
    compiled, eager = pair()
    for module in (compiled, eager):
        adapt(module, ["to_q", "conv"])
    assert_equal(compiled, eager)
    sfast.restore(compiled)
    assert isinstance(compiled.to_q, LoraLinear)
    with torch.no_grad():
        assert torch.equal(compiled(inputs()), eager(inputs()))


def test_half_precision_is_rounded_once():
    """W + s B A in fp32 and then rounded: never further from the exact sum than half a unit in the last place."""
    compiled = finished(Attention()).bfloat16()
    adapt(compiled, ["to_q"], name="one")
    adapt(compiled, ["to_q"], name="two")
    compiled.to_q.set_adapter(["one", "two"])
    compiled.bfloat16()
    sfast.compile(compiled)
    with torch.no_grad():
        compiled(inputs().bfloat16())
    layer = compiled.to_q
    exact = layer.base_layer.weight.double()
    for name in ("one", "two"):
        exact = exact + layer.scaling[name] * layer.lora_B[name].weight.double() @ layer.lora_A[name].weight.double()
    state = component_of(compiled).state
    place = next(i for i, weight in enumerate(state.own) if weight is layer.base_layer.weight)
    assert (
        torch.equal(state.weights[place], exact.bfloat16())
        or ((state.weights[place].double() - exact).abs() <= exact.abs() * 2**-8 * 1.001).all()
    )


def test_another_of_the_weights_that_lie_together_is_adapted() -> None:
    """What graphs read until now looks at the same memory; it is nobody else's."""
    compiled, eager = pair()
    for module in (compiled, eager):
        adapt(module, ["to_q", "to_k"])
    assert_equal(compiled, eager)
    places = component_of(compiled).state.pointers
    for module in (compiled, eager):
        unload(module)
        adapt(module, ["to_k", "to_v"], name="two")
    assert_equal(compiled, eager)
    assert component_of(compiled).state.pointers == places


@pytest.mark.parametrize("move", [lambda m: m.double(), lambda m: m.to(torch.bfloat16)], ids=["double", "to"])
def test_memory_that_the_weights_have_left_is_not_kept_until_the_next_call(move):
    compiled, eager = pair()
    for module in (compiled, eager):
        adapt(module, ["to_q", "out"])
    assert_equal(compiled, eager)
    state = component_of(compiled).state
    own = set(map(id, state.own))
    sums = [weakref.ref(tensor) for tensor in state.weights if id(tensor) not in own]
    assert len(sums) == 2
    compiled.float()  # moves nothing
    assert all(ref() is not None for ref in sums)
    for module in (compiled, eager):
        move(module)
    assert all(ref() is None for ref in sums)
    x = inputs().to(compiled.out.base_layer.weight.dtype)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), eager(x), rtol=2e-2, atol=2e-2)
    for module in (compiled, eager):
        module.float()
    with torch.no_grad():
        torch.testing.assert_close(compiled(inputs()), eager(inputs()), rtol=1e-5, atol=1e-5)
    assert not component_of(compiled).fallbacks


@pytest.mark.gpu
def test_a_pipeline_that_leaves_the_gpu_leaves_no_sums_there():
    compiled = sfast.compile(adapt(finished(Large()), ["a"]).cuda(), sfast.CompilationConfig(enable_cuda_graph=False))
    x = torch.randn(8, 1024, device="cuda")
    before = torch.cuda.memory_allocated()
    with torch.no_grad():
        compiled(x)
    assert torch.cuda.memory_allocated() >= before + 4 * 1024 * 1024  # the sum
    compiled.to("cpu")
    assert torch.cuda.memory_allocated() < before


class Large(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(1024, 1024)

    def forward(self, x):
        return self.a(x)


def test_what_an_adapter_scales_of_another_ones_bias_runs_eager(caplog):
    """peft's forward lets DoRA scale what earlier adapters have added, its `merge` does not scale their biases."""
    compiled, eager = pair()
    assert_equal(compiled, eager)
    for module in (compiled, eager):
        adapt(module, ["out"], name="bias", lora_bias=True)
        torch.nn.init.normal_(module.out.lora_B["bias"].bias, generator=torch.Generator().manual_seed(0))
        adapt(module, ["out"], name="dora", use_dora=True)
        module.out.lora_magnitude_vector["dora"].weight.data.mul_(1.5)
        module.out.set_adapter(["bias", "dora"])
    for _ in range(2):
        with torch.no_grad():
            torch.testing.assert_close(compiled(inputs()), eager(inputs()), rtol=1e-5, atol=1e-5)
    assert sum("`out` scales the bias of another one" in line for line in caplog.messages) == 1
    for names in (["dora", "bias"], ["bias"], ["dora"]):
        for module in (compiled, eager):
            module.out.set_adapter(names)
        assert_equal(compiled, eager)
    assert len(component_of(compiled).fallbacks) == 1


@torch.no_grad()
def test_a_merge_that_failed_is_remembered_until_something_changes(monkeypatch):
    compiled, eager = pair()
    assert_equal(compiled, eager)
    tried = []

    def fail(*arguments):
        tried.append(arguments)
        raise RuntimeError("no kernel for that")

    for module in (compiled, eager):
        adapt(module, ["to_q", "out"])
    before = {name: (weight.data_ptr(), weight.clone()) for name, weight in compiled.named_parameters()}
    with monkeypatch.context() as patch:
        patch.setattr(adapter_weights, "_add_products", fail)
        for _ in range(3):
            assert_equal(compiled, eager)
        assert len(tried) == 1
        assert all(
            weight.data_ptr() == before[name][0] and torch.equal(weight, before[name][1])
            for name, weight in compiled.named_parameters()
        )
        for count, change in enumerate((lambda layer: layer.set_scale("one", 0.3), lambda layer: layer.scale_layer(2))):
            for module in (compiled, eager):
                change(module.to_q)
            for _ in range(2):
                assert_equal(compiled, eager)
            assert len(tried) == 2 + count
        for module in (compiled, eager):
            with torch.no_grad():
                module.to_q.base_layer.weight.mul_(2)
        assert_equal(compiled, eager)
        assert len(tried) == 4
    assert component_of(compiled).state.why_eager([]) is not None
    for module in (compiled, eager):
        module.to_q.set_scale("one", 0.5)
    assert_equal(compiled, eager)
    assert component_of(compiled).state.why_eager([]) is None


@torch.no_grad()
def test_a_merge_that_lacked_memory_is_tried_again(monkeypatch):
    compiled, eager = pair()
    for module in (compiled, eager):
        adapt(module, ["to_q", "out"])
    add, tried = adapter_weights._add_products, []

    def short(*arguments):
        tried.append(arguments)
        if len(tried) < 3:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        add(*arguments)

    monkeypatch.setattr(adapter_weights, "_add_products", short)
    for _ in range(20):
        with torch.no_grad():
            torch.testing.assert_close(compiled(inputs()), eager(inputs()), rtol=1e-5, atol=1e-5)
    assert len(tried) == 4  # twice in vain, then both layers
    assert component_of(compiled).state.why_eager([]) is None
    assert [note for note in component_of(compiled).fallbacks if "no memory for merging" in note]
