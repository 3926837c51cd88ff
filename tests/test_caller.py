"""Adapters' tensors are looked at once for each loop of diffusers; everywhere else, and all the rest, at every call."""

from __future__ import annotations

import copy
import types
import weakref
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sfast
from sfast.adapter_weights import is_adapted
from sfast.adapters import Adapters
from sfast.caller import PIPELINES, Caller
from tests import lora_files
from tests.tiny import TINY, Pipeline

STEPS = 4
Change = Callable[[Pipeline], Any]


@pytest.fixture(scope="module")
def pipes(tmp_path_factory: pytest.TempPathFactory) -> tuple[Pipeline, Pipeline]:
    """A compiled pipeline, and the same one eager; both have an adapter."""
    eager = TINY["text-to-image"].build()
    path = tmp_path_factory.mktemp("loras") / "lora.safetensors"
    lora_files.write(path, lora_files.draw(eager, {"unet": r"attn\d\.to_[qk]$"}))
    eager.load_lora_weights(str(path), adapter_name="one")
    compiled = sfast.compile(copy.deepcopy(eager))
    draw(compiled)
    return compiled, eager


@pytest.fixture
def looks(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """For each call of the UNet so far, whether it looked at the adapters' tensors."""
    found: list[bool] = []
    changed = Adapters.changed

    def noted(self: Adapters, scale: float, picture: int, quick: bool = False) -> bool:
        if self._layers:
            found.append(not quick)
        return changed(self, scale, picture, quick)

    monkeypatch.setattr(Adapters, "changed", noted)
    return found


def draw(pipe: Pipeline, **call: Any) -> Tensor:
    return TINY["text-to-image"].draw(pipe, **{"steps": STEPS, "output_type": "latent", **call})


def layers(pipe: Pipeline) -> list[Any]:
    return [module for module in pipe.unet.modules() if is_adapted(module)]


def restored(pipes: tuple[Pipeline, Pipeline]) -> None:
    for pipe in pipes:
        pipe.set_adapters("one", 1.0)
        pipe.enable_lora()


def test_one_look_in_each_loop(pipes: tuple[Pipeline, Pipeline], looks: list[bool]) -> None:
    compiled, eager = pipes
    for _ in range(2):
        torch.testing.assert_close(draw(compiled), draw(eager), rtol=1e-3, atol=1e-4)
    assert looks == [True, *[False] * (STEPS - 1)] * 2
    embeds = compiled.encode_prompt("a small red circle", "cpu", 1, True)
    given = dict(zip(("prompt_embeds", "negative_prompt_embeds"), embeds, strict=True))
    looks.clear()
    for factor in (1.0, 1.5):  # no encoder and no decoder say that it is another picture
        for pipe in pipes:
            with torch.no_grad():
                layers(pipe)[1].lora_A["one"].weight.mul_(factor)
        torch.testing.assert_close(
            draw(compiled, prompt=None, **given), draw(eager, prompt=None, **given), rtol=1e-3, atol=1e-4
        )
    assert looks == [True, *[False] * (STEPS - 1)] * 2


CHANGES: dict[str, Change] = {
    "strength": lambda pipe: pipe.set_adapters("one", 0.3),
    "off": lambda pipe: pipe.disable_lora(),
    "by hand": lambda pipe: [layer.scaling.update(one=3.0) for layer in layers(pipe)],
    "scaled": lambda pipe: [layer.scale_layer(2.0) for layer in layers(pipe)],
    "fused": lambda pipe: (pipe.fuse_lora(), pipe.unfuse_lora(), pipe.set_adapters("one", 0.5)),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_what_peft_changes_within_a_loop_is_seen_at_once(
    pipes: tuple[Pipeline, Pipeline], looks: list[bool], monkeypatch: pytest.MonkeyPatch, change: Change
) -> None:
    """Here by a scheduler, of which nobody knows that it does."""
    drawn = []
    before = draw(pipes[0])
    for pipe in pipes:
        step, calls = pipe.scheduler.step, []

        def stepping(*args: Any, pipe: Any = pipe, step: Any = step, calls: Any = calls, **kwargs: Any) -> Any:
            calls.append(True)
            if len(calls) == 2:
                change(pipe)
            return step(*args, **kwargs)

        monkeypatch.setattr(pipe.scheduler, "step", stepping)
        looks.clear()
        drawn.append(draw(pipe))
    torch.testing.assert_close(*drawn, rtol=1e-3, atol=1e-4)
    assert not torch.allclose(drawn[0], before, rtol=1e-2, atol=1e-2)
    restored(pipes)


def test_a_callback_may_write_to_factors(pipes: tuple[Pipeline, Pipeline], looks: list[bool]) -> None:
    def callback(pipe: Pipeline, step: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        layers(pipe)[0].lora_B["one"].weight.mul_(-1 if step == 1 else 1)
        return values

    before = draw(pipes[0])
    looks.clear()
    drawn = [draw(pipe, callback_on_step_end=callback) for pipe in pipes]
    torch.testing.assert_close(*drawn, rtol=1e-3, atol=1e-4)
    assert not torch.equal(drawn[0], before)
    assert looks == [True] * STEPS


@torch.no_grad()
def test_a_loop_of_ones_own_is_looked_at_in_every_step(pipes: tuple[Pipeline, Pipeline], looks: list[bool]) -> None:
    compiled, eager = (pipe.unet for pipe in pipes)
    torch.manual_seed(0)
    size = eager.config.sample_size
    x, prompt = (
        torch.randn(1, eager.config.in_channels, size, size),
        torch.randn(1, 5, eager.config.cross_attention_dim),
    )
    outputs = []
    progress_bar = iter(range(4))  # the name alone does not make it diffusers'
    for step in progress_bar:
        for module in (compiled, eager):
            parameter = next(layer for layer in module.modules() if is_adapted(layer)).lora_A["one"].weight
            parameter.mul_(1.5)
        both = [module(x, torch.tensor(float(step)), prompt).sample for module in (compiled, eager)]
        torch.testing.assert_close(*both, rtol=1e-3, atol=1e-4)
        outputs.append(both[0])
    assert looks[-4:] == [True] * 4
    assert isinstance(compiled, nn.Module)


def test_a_look_keeps_nothing_of_the_loop_alive(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before Python 3.13 a frame keeps the copy of its variables that was asked for."""
    code = """
def loop(self, caller, kept):
    progress_bar, latents, found = Bar(), torch.ones(3), []
    mine = locals() if kept else None
    for _ in range(3):
        last = weakref.ref(latents)
        found.append(caller.again())
        latents = latents + 1
        found.append(last() is None)
    return found, mine
"""
    names: dict[str, Any] = {"__name__": f"{PIPELINES[0]}invented", "torch": torch, "weakref": weakref, "Bar": Counter}
    exec(code, names)
    pipe = types.SimpleNamespace(scheduler=types.SimpleNamespace())
    monkeypatch.setattr("sfast.caller._has_others", lambda names: names["self"] is not pipe)
    assert names["loop"](pipe, Caller(), False) == ([False, True, True, True, True, True], None)
    found, mine = names["loop"](pipe, Caller(), True)
    assert found[::2] == [False, True, True] and mine["self"] is pipe  # somebody's own copy stays as it is


@pytest.mark.parametrize(("bar", "expected"), [(Counter(), True), ([], False), (None, False)])
def test_a_model_may_lie_deep_in_others_and_a_bar_may_be_anything(
    bar: Any, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ControlNets in a list, under hooks of accelerate: each brings some calls of its own."""
    monkeypatch.setattr("sfast.caller._has_others", lambda names: False)
    names: dict[str, Any] = {"__name__": f"{PIPELINES[0]}invented", "ask": _deeper}
    exec("def loop(progress_bar, caller): return ask(caller, 24), ask(caller, 24), ask(caller, 24)", names)
    assert names["loop"](bar, Caller()) == (False, expected, expected)


def _deeper(caller: Caller, levels: int) -> bool:
    return _deeper(caller, levels - 1) if levels else caller.again()
