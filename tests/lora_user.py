"""Somebody with a compiled pipeline and LoRA files, held against fresh eager pipelines that got the same calls."""

from __future__ import annotations

import copy
import ctypes
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sfast
import sfast.cuda_graph
from sfast.component import component_of
from sfast.components import find_components
from sfast.trace import Split, Trace
from tests import graphs, lora_files
from tests.tiny import Pipeline
from tests.twins import KNOWN, Change, Twin, relative_error

UNET = {"unet": r"attn\d\.to_[qk]$"}
SOME_TEXT = r"[qv]_proj$"
STEPS = 5  # of a picture: with fewer, hoisting does not pay where every picture has other weights, and is given up
Weights = dict[str, tuple[Tensor, tuple[int, ...]]]


# Qwen2.5-VL puts pictures' positions together on the host in the middle of its forward: compiled, and with one line.
WITHOUT_GRAPH = re.compile(r"text_encoder runs without a CUDA graph at .*: Cannot copy between CPU and CUDA")


class User:
    """A compiled pipeline, and everything that was done to it since its adapters were last taken out."""

    def __init__(self, name: str, folder: Path, device: str = "cpu") -> None:
        self.name, self.folder = name, folder
        self.denoiser = KNOWN[name].denoiser
        self._pristine = KNOWN[name].build()
        self.twin = Twin(name, device, self.pristine, torch.float32)  # fp16 would hide a weak LoRA behind its rounding
        self.tolerance = self.twin.tolerance
        self.pipe = self.twin.pipe
        self.done: list[Change] = []
        self.whole = True  # nobody has left it in another state
        first = self.twin.draws_as(tolerance=self.tolerance, steps=STEPS)
        self.base = self.draw()  # now with a prologue and a body
        self.twin.remember(self.base, like=first)
        self.weights = weights(self.pipe)
        self.look()
        assert unexpected_fallbacks(self.pipe) == []
        without = {what for what, _ in self.notes}
        assert all(graphs > 0 for what, (_, graphs) in self.counts.items() if what not in without)

    def look(self) -> None:
        """From now on nothing may be traced or captured, and nothing fall back; weights lie where they should."""
        now = weights(self.pipe)
        self.weights = {name: (value, now[name][1]) for name, (value, _) in self.weights.items()}
        self.counts, self.notes = counts(self.pipe), own_fallbacks(self.pipe)
        self.graphs = captured(self.pipe)

    def pristine(self) -> Pipeline:
        return copy.deepcopy(self._pristine)

    def file(self, wanted: dict[str, str], kind: str = "peft", dtype: torch.dtype = torch.float32, **of: Any) -> str:
        """The path of a LoRA for this pipeline."""
        options = "_".join(f"{key}{value}" for key, value in of.items())
        layers = abs(hash(frozenset(wanted.items())))
        path = self.folder / f"{self.name}_{kind}_{layers}_{options}_{dtype}.safetensors".replace("torch.", "")
        if not path.exists():
            lora_files.write(path, lora_files.draw(self._pristine, wanted, **of), kind, dtype)
        return str(path)

    def do(self, *changes: Change) -> None:
        """Change the pipeline; `unload` undoes what was before it, but for what is fused."""
        for change in changes:
            change(self.pipe)
            self.done.append(change)

    def unload(self) -> None:
        """Take all adapters out, and forget what was done."""
        unload(self.pipe)
        self.done.clear()
        vars(self.pipe).pop("_lora_scale", None)  # of the last call: diffusers loads text encoders' adapters with it

    def check(self, **call: Any) -> Tensor:
        """Draw, compare with a fresh eager pipeline, and return the picture: no trace, capture or fallback is new."""
        drawn = self.twin.draws_as(*self.done, tolerance=self.tolerance, **{"steps": STEPS, **call})
        self.nothing_is_new()
        return drawn

    def nothing_is_new(self) -> None:
        """No trace, no capture, no fallback since the first pictures."""
        now = counts(self.pipe)
        assert now == self.counts, f"traces and graphs were {self.counts} and are {now}"
        before, after = self.graphs, captured(self.pipe)
        assert len(before) == len(after) and all(a is b for a, b in zip(before, after, strict=True)), "captured again"
        notes = own_fallbacks(self.pipe)
        assert notes == self.notes, f"fallbacks were {self.notes} and are {notes}"

    def draw(self) -> Tensor:
        return self.twin.draw(self.pipe, steps=STEPS)

    def tells(self, a: Tensor, b: Tensor) -> bool:
        """Whether two pictures differ, and then in the same way as eager's."""
        return self.twin.tells(a, b)

    def put_back(self) -> None:
        """Without adapters and with the base values of the beginning: peft subtracts what it has fused, and rounds."""
        self.unload()
        for name, part in self.pipe.components.items():
            if isinstance(part, nn.Module):
                path = f"{name}."
                values = {k.removeprefix(path): v for k, (v, _) in self.weights.items() if k.startswith(path)}
                part.load_state_dict(values)

    def finish(self) -> None:
        """Without adapters everything is as it was before the first."""
        self.unload()
        assert_same(weights(self.pipe), self.weights)
        again = self.draw()  # what was captured again on a GPU may sum in another order
        assert relative_error(again, self.base) <= (0.0 if self.pipe.device.type == "cpu" else self.tolerance)
        self.nothing_is_new()
        self.whole = True


def weights(pipe: Pipeline) -> Weights:
    """What the parts' own parameters and buffers hold, and how they lie in memory; adapters aside."""
    parts = {name: part for name, part in pipe.components.items() if isinstance(part, nn.Module)}
    return {
        f"{name}.{key.replace('.base_layer', '')}": (value.clone(), value.stride())
        for name, part in parts.items()
        for key, value in part.state_dict().items()
        if ".lora_" not in key
    }


def assert_same(now: Weights, before: Weights) -> None:
    """Bit for bit, and in the same layout."""
    assert now.keys() == before.keys()
    for name, (value, stride) in before.items():
        assert torch.equal(now[name][0], value), name
        assert now[name][1] == stride, name


def counts(pipe: Pipeline) -> dict[str, tuple[int, int]]:
    """Traces and graphs of everything that was called."""
    return {name: (traces, graphs) for name, traces, graphs, _ in sfast.report(pipe).rows if traces}


def captured(pipe: Pipeline) -> list[Any]:
    """The captured graphs themselves."""
    found = []
    for module in find_components(pipe).values():
        for plan in component_of(module).plans.values():  # type: ignore[union-attr]
            runners = [plan.runner] if plan.loop is None else [plan.loop._prologue, plan.loop._body]
            found += [runner.graph for runner in runners if runner is not None]
    return found


def own_fallbacks(pipe: Pipeline) -> list[tuple[str, str]]:
    report = sfast.report(pipe)
    return [(what, why) for what, why in report.fallbacks if what in report.components]


def unexpected_fallbacks(pipe: Pipeline) -> list[tuple[str, str]]:
    return [(what, why) for what, why in own_fallbacks(pipe) if not WITHOUT_GRAPH.match(f"{what} {why}")]


# The calls of diffusers, as something to do to any pipeline.


def load(path: str, name: str = "first", **options: Any) -> Change:
    return lambda pipe: pipe.load_lora_weights(path, adapter_name=name, **options)


def set_adapters(names: str | list[str], strengths: Any = None) -> Change:
    return lambda pipe: pipe.set_adapters(names, adapter_weights=strengths)


def fuse(pipe: Pipeline, **options: Any) -> None:
    pipe.fuse_lora(**{"components": _loadable(pipe), **options})


def unfuse(pipe: Pipeline) -> None:
    pipe.unfuse_lora(components=_loadable(pipe))


def _loadable(pipe: Pipeline) -> list[str]:
    return [part for part in pipe._lora_loadable_modules if getattr(pipe, part, None) is not None]


def disable(pipe: Pipeline) -> None:
    pipe.disable_lora()


def enable(pipe: Pipeline) -> None:
    pipe.enable_lora()


def delete(*names: str) -> Change:
    return lambda pipe: pipe.delete_adapters(list(names))


def unload(pipe: Pipeline) -> None:
    pipe.unload_lora_weights()


def swap(adapters: dict[str, Any]) -> Change:
    return lambda pipe: sfast.swap_lora(pipe, adapters)


def use_two(user: User, one: str, two: str, scale: dict[str, Any] | None = None, **options: Any) -> None:
    """Whatever is done with two LoRAs shows, and is what eager draws; in the end everything is as it was.

    `scale`: arguments of a call that weaken its adapters; `options`: with which the second file is loaded.
    """
    user.look()
    pictures = [user.base]

    def look(**call: Any) -> None:
        pictures.append(user.check(**call))
        assert user.tells(*pictures[-2:])

    user.do(load(one, "one"))
    look()
    user.do(set_adapters("one", 0.5))
    look()
    if scale is not None:
        look(**scale)
    user.do(load(two, "two", **options), set_adapters(["one", "two"], [0.7, -0.4]))
    look()
    user.do(delete("one"))
    look()
    sfast.swap_lora(user.pipe, {two: 0.9}, **options)
    user.done[:] = [load(two, "two", **options), set_adapters("two", 0.9)]
    look()
    sfast.swap_lora(user.pipe, {})
    user.unload()
    look()
    assert torch.equal(pictures[-1], user.base)


# Users that many tests share: each test leaves them as they were, or the next one gets another.

Users = Callable[[str], User]


@pytest.fixture(scope="module")
def owners(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str, str], User]]:
    """On the CPU, too, calls are captured (`tests.graphs`): graphs are counted there, and read the memory they captured."""
    folder = tmp_path_factory.mktemp("loras")
    known: dict[tuple[str, str], User] = {}

    def owner(name: str, device: str) -> User:
        if (name, device) not in known or not known[name, device].whole:
            known[name, device] = User(name, folder, device)
        known[name, device].whole = False
        return known[name, device]

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sfast.cuda_graph._pools, graphs.CPU, Pool())
        patch.setattr("sfast.prepare.can_capture", lambda device: True)
        for kind, name in ((Trace, "run"), (Split, "prologue"), (Split, "body")):
            patch.setattr(kind, name, _at_addresses(getattr(kind, name)))
        yield owner


class Pool(graphs.Pool):
    """Its graphs read a weight where it was when they were captured, wherever its Parameter has gone since."""

    captured: dict[int, list[Tensor]] | None = None  # of the graph that runs now: a list of weights -> their memory

    def _capture(self, function: Any, inputs: list[Tensor], *more: Any, **options: Any) -> Any:
        memory: dict[int, list[Tensor]] = {}

        def at_addresses(inputs: list[Tensor]) -> list[Tensor]:
            before, Pool.captured = Pool.captured, memory
            try:
                return function(inputs)  # type: ignore[no-any-return]
            finally:
                Pool.captured = before

        return super()._capture(at_addresses, inputs, *more, **options)


def _at_addresses(run: Callable[..., Any]) -> Callable[..., Any]:
    def running(self: Any, weights: list[Tensor], *rest: Any) -> Any:
        if Pool.captured is not None:
            weights = Pool.captured.setdefault(id(weights), [_memory_of(weight) for weight in weights])
        return run(self, weights, *rest)

    return running


def _memory_of(weight: Tensor) -> Tensor:
    """The memory in which a tensor is now, which nobody keeps for that."""
    last = sum((size - 1) * stride for size, stride in zip(weight.shape, weight.stride(), strict=True))
    memory = (ctypes.c_char * ((last + 1) * weight.element_size())).from_address(weight.data_ptr())
    return torch.frombuffer(memory, dtype=weight.dtype).as_strided(weight.shape, weight.stride())


@pytest.fixture
def of(owners: Callable[[str, str], User], device: str) -> Iterator[Users]:
    """The user of a pipeline, by its name."""
    used: dict[str, User] = {}

    def user(name: str) -> User:
        if name not in used:
            used[name] = owners(name, device)
        return used[name]

    yield user
    for each in used.values():
        each.finish()


@pytest.fixture(params=["text-to-image", "sdxl", "sd3"])
def user(request: pytest.FixtureRequest, of: Users) -> User:
    return of(request.param)
