"""Weights with adapters on them that somebody edits, shares or looks at; and what cannot be merged."""

from __future__ import annotations

import copy
import sys
import threading
from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

import sfast
from sfast import checksums
from sfast.adapter_weights import is_adapted
from sfast.compiler import restore
from sfast.component import component_of
from sfast.verify import relative_error
from tests.tiny import TINY

EDITS = {
    "scaled": lambda weight: weight.mul_(1.5),
    "negated": lambda weight: weight.neg_(),
    "reversed": lambda weight: weight.copy_(weight.flip(0)),
    "two exchanged": lambda weight: weight[:2].copy_(weight[:2].flip(0)),
}


@pytest.mark.parametrize("shape", [(8, 4), (6, 4, 3, 3), (5,)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("edit", EDITS.values(), ids=EDITS)
def test_other_values_are_told_from_those_before(shape: tuple[int, ...], dtype: torch.dtype, edit) -> None:
    weight = torch.randn(shape).mul(0.05).to(dtype)
    if len(shape) == 4:
        weight = weight.contiguous(memory_format=torch.channels_last)
    before = checksums.norms([weight])
    assert checksums.norms([weight]) == before == checksums.norms([weight.clone()])
    edit(weight)
    assert checksums.norms([weight]) != before


def test_large_and_odd_tensors_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checksums, "NOISE", 16)
    monkeypatch.setattr(checksums, "AT_ONCE", 40)
    tensors = [torch.randn(7, 11), torch.randn(50).half(), torch.randn(4, 6).t(), torch.arange(3), torch.empty(0)]
    before = checksums.norms(tensors)
    assert [len(one) for one in before] == [5, 4, 2, 0, 1]
    for place, tensor in enumerate(tensors[:3]):
        tensor.data[-1] *= -1
        assert [a != b for a, b in zip(checksums.norms(tensors), before, strict=True)] == [
            i <= place for i in range(len(tensors))
        ]


@pytest.mark.parametrize("edit", EDITS.values(), ids=EDITS)
def test_uncounted_edits_of_a_weight_with_an_adapter_are_seen_by_the_next_picture(edit) -> None:
    tiny = TINY["text-to-image"]
    eager = tiny.build()
    name = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    weight = eager.unet.get_submodule(name).weight
    lora = {f"unet.{name}.lora_A.weight": torch.randn(2, weight.shape[1]) * 0.3}
    lora[f"unet.{name}.lora_B.weight"] = torch.randn(weight.shape[0], 2)
    eager.load_lora_weights(dict(lora))
    pipe = sfast.compile(copy.deepcopy(eager))

    def draw(pipe) -> Tensor:
        return tiny.draw(pipe, steps=2, output_type="latent")

    first = draw(eager)
    torch.testing.assert_close(draw(pipe), first, rtol=1e-3, atol=1e-4)
    for each in (eager, pipe):
        with torch.no_grad():
            edit(each.unet.get_submodule(name).base_layer.weight.data)
    expected = draw(eager)
    assert not torch.allclose(expected, first, rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(draw(pipe), expected, rtol=1e-3, atol=1e-4)


class Three(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(torch.relu(self.b(torch.relu(self.a(x)))))


class Convolution(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(1, 1, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x[None, None])[0, 0]


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.MultiheadAttention(16, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x[None], x[None], x[None], need_weights=False)[0]


class Float8(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight.to(x.dtype), self.bias)


def tied() -> nn.Module:
    module = Three()
    module.b.weight = module.a.weight
    return module


def standing_twice() -> nn.Module:
    module = Three()
    module.b = module.a  # peft wraps the first only
    return module


def normalized() -> nn.Module:
    module = Three()
    nn.utils.weight_norm(module.a)
    return module


def circular() -> nn.Module:
    module = Convolution()
    module.a.padding_mode = "circular"  # and that of an adapter is "zeros"
    return module


@pytest.mark.parametrize("kind", [peft.LoraConfig, peft.LoHaConfig])
@pytest.mark.parametrize("size", [1, 3])
@torch.no_grad()
def test_an_adapter_pads_with_zeros_whatever_its_layer_does(kind: Any, size: int) -> None:
    def wrapped() -> nn.Module:
        torch.manual_seed(0)
        module = Convolution()
        module.a = nn.Conv2d(1, 1, size, padding=size // 2, padding_mode="circular")
        options = {"init_lora_weights": False} if kind is peft.LoraConfig else {"init_weights": False}
        peft.inject_adapter_in_model(kind(r=2, target_modules=["a"], **options), module)
        return module.eval().requires_grad_(False)

    eager, compiled, x = wrapped(), sfast.compile(wrapped()), torch.randn(16, 16)
    switch(compiled, False)
    compiled(x)
    switch(compiled, True)
    torch.testing.assert_close(compiled(x), eager(x), rtol=1e-4, atol=1e-4)
    assert bool(component_of(compiled).fallbacks) == (size > 1)


def float8() -> nn.Module:
    module = Three()
    module.a = Float8(16, 16)
    module.a.weight.data = module.a.weight.data.to(torch.float8_e4m3fn)
    return module


def adapted(module: nn.Module, *targets: str) -> nn.Module:
    torch.manual_seed(0)
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=list(targets), init_lora_weights=False)
    peft.inject_adapter_in_model(config, module)
    for layer in filter(is_adapted, module.modules()):
        layer.lora_A.float(), layer.lora_B.float()
    return module.eval().requires_grad_(False)


def switch(module: nn.Module, on: bool) -> None:
    for layer in filter(is_adapted, module.modules()):
        layer.enable_adapters(on)
    module.requires_grad_(False)


@pytest.mark.filterwarnings("ignore:.*weight_norm.*")
@pytest.mark.parametrize(
    ("make", "why"),
    [
        (tied, "`a` belong to another layer"),
        (standing_twice, "`a` belong to another layer"),
        (normalized, "`a` is computed from others"),
        (circular, "the adapters of `a` pad"),
        (Attention, "adapters inside of `a`"),
        (float8, "Float8"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
@torch.no_grad()
def test_what_cannot_be_merged_runs_eager_and_says_so(make: Callable[[], nn.Module], why: str) -> None:
    torch.manual_seed(1)
    eager, x = make().eval(), torch.randn(16, 16)
    compiled = sfast.compile(copy.deepcopy(eager))
    before = compiled(x)
    adapted(eager, "a")
    adapted(compiled, "a")
    expected = eager(x)
    assert not torch.allclose(expected, before, atol=1e-2)
    for _ in range(2):
        torch.testing.assert_close(compiled(x), expected)
    assert any(why in note for note in component_of(compiled).fallbacks)
    switch(compiled, False)
    torch.testing.assert_close(compiled(x), before)


@torch.no_grad()
def test_a_state_dict_taken_while_adapters_are_merged_is_the_modules() -> None:
    eager = adapted(Three(), "a", "c")
    compiled, x = sfast.compile(copy.deepcopy(eager)), torch.randn(4, 16)
    compiled(x)
    states = eager.state_dict(), compiled.state_dict()
    for module, state in zip((eager, compiled), states, strict=True):
        switch(module, False)
        module(x)
        state["a.base_layer.weight"].mul_(2)
    torch.testing.assert_close(compiled.a.base_layer.weight, eager.a.base_layer.weight)
    torch.testing.assert_close(compiled(x), eager(x))


class CrossAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(16, 16) for _ in range(4))

    def forward(self, x: Tensor, prompt: Tensor) -> Tensor:
        return self.o(self.q(x) @ self.k(prompt).T @ self.v(prompt))


@torch.no_grad()
def test_weights_return_to_their_memory_although_other_shapes_have_read_the_merged_ones() -> None:
    eager = adapted(CrossAttention(), "q", "k", "v")
    compiled = sfast.compile(copy.deepcopy(eager), sfast.CompilationConfig(enable_hoisting=True))
    prompt, state = torch.randn(6, 16), component_of(compiled).state

    def check(size: int) -> None:
        for _ in range(4):
            x = torch.randn(size, 16)
            torch.testing.assert_close(compiled(x, prompt), eager(x, prompt), rtol=1e-4, atol=1e-4)

    check(4)
    check(8)
    assert all(plan.loop is not None for plan in component_of(compiled).plans.values())
    pointers = state.pointers
    for on in (False, True, False, True):  # the second size's hoisted values are of merged weights all the while
        for module in (eager, compiled):
            switch(module, on)
        check(4)
        assert state.pointers == pointers  # else graphs would be captured anew
    check(8)
    assert state.pointers == pointers


class SharedInput(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.i, self.q, self.k, self.v = (nn.Linear(16, 16) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        x = self.i(x)
        return self.q(x) * self.k(x) + self.v(x)


@torch.no_grad()
def test_restoring_takes_neighbours_apart_although_adapters_were_merged() -> None:
    compiled, x = sfast.compile(adapted(SharedInput(), "q", "k", "v")), torch.randn(4, 16)
    compiled(x)
    restore(compiled)
    bases = [layer.base_layer.weight for layer in (compiled.q, compiled.k, compiled.v)]
    assert len({weight.untyped_storage().data_ptr() for weight in bases}) == 3


@torch.no_grad()
def test_what_graphs_read_stays_where_it_is_at_new_shapes_although_somebody_looks_at_the_weights() -> None:
    compiled = adapted(SharedInput(), "q", "k", "v")
    held = compiled.state_dict()
    sfast.compile(compiled)
    seen = set()
    for size in (4, 8, 12, 16):
        compiled(torch.randn(size, 16))
        seen.add(component_of(compiled).state.pointers)
    assert len(seen) == 1
    assert held


def test_threads_that_ask_for_different_strengths_get_theirs() -> None:
    eager = TINY["text-to-image"].build().unet
    adapted(eager, "to_q", "to_k", "to_v")
    compiled = sfast.compile(copy.deepcopy(eager))
    size = eager.config.sample_size
    prompt = torch.randn(1, 5, eager.config.cross_attention_dim)
    inputs = torch.randn(1, eager.config.in_channels, size, size), torch.tensor(3), prompt

    @torch.no_grad()
    def call(unet: nn.Module, scale: float) -> Tensor:
        return unet(*inputs, cross_attention_kwargs={"scale": scale}).sample

    expected = {scale: call(eager, scale) for scale in (0.5, 4.0)}
    assert not torch.allclose(expected[0.5], expected[4.0], atol=1e-2)
    call(compiled, 0.5)
    errors: list[float] = []

    def work(scale: float) -> None:
        errors.extend(relative_error(call(compiled, scale), expected[scale]) for _ in range(20))

    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        threads = [threading.Thread(target=work, args=(scale,)) for scale in expected]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(before)
    assert len(errors) == 40
    assert max(errors) < 1e-3


def test_fused_adapters_that_are_disabled_come_out_at_the_strength_of_the_call() -> None:
    """As in eager, where the layers are scaled when their forward takes out what was fused at another strength."""
    tiny = TINY["text-to-image"]
    eager = tiny.build()
    name = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    weight = eager.unet.get_submodule(name).weight.clone()
    lora = {f"unet.{name}.lora_A.weight": torch.randn(2, weight.shape[1]) * 0.3}
    lora[f"unet.{name}.lora_B.weight"] = torch.randn(weight.shape[0], 2)
    eager.load_lora_weights(lora)
    pipe = sfast.compile(copy.deepcopy(eager))
    drawn = []
    for each in (eager, pipe):
        each.fuse_lora()
        each.disable_lora()
        drawn.append(tiny.draw(each, steps=2, output_type="latent", cross_attention_kwargs={"scale": 0.5}))
        assert each.unet.get_submodule(name).scaling == {"default_0": 1.0}
    torch.testing.assert_close(drawn[1], drawn[0], rtol=1e-3, atol=1e-4)
    weights = [each.unet.get_submodule(name).base_layer.weight for each in (eager, pipe)]
    torch.testing.assert_close(weights[1], weights[0])
    assert not torch.allclose(weights[0], weight, rtol=1e-2, atol=1e-2)
