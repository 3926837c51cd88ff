"""`swap_lora`: exactly that set of files, and after any mishap everything as it was; what it draws is in test_lora.py."""

from __future__ import annotations

import functools
import gc
import os
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import get_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor, nn

import sfast
from sfast import inject, launch, locks
from sfast.lora import _loaded, _name_of
from sfast.plan import Plan
from tests import lora_files
from tests.lora_files import ATTENTION, EVERYTHING, FEED_FORWARD, PROMPT, TEXT
from tests.test_inject import assert_same, facts
from tests.tiny import TINY, Pipeline

NAME = "text-to-image"
BOTH = {"unet": ATTENTION, "text_encoder": TEXT}

pytestmark = pytest.mark.filterwarnings("ignore")


class User:
    """A pipeline, and files for it."""

    def __init__(self, folder: Path) -> None:
        self.pipe = TINY[NAME].build()
        self.folder = folder

    def file(self, wanted: dict[str, str], name: str = "one", of: str = NAME, kind: str = "peft", **spec: Any) -> str:
        path = self.folder / f"{name}.safetensors"
        return str(lora_files.write(path, lora_files.draw(TINY[of].build(), wanted, **spec), kind))

    def swap(self, adapters: dict[Any, Any], **options: Any) -> None:
        sfast.swap_lora(self.pipe, adapters, **options)

    def load(self, path: str, name: str) -> None:
        self.pipe.load_lora_weights(path, adapter_name=name)

    def fresh(self, adapters: dict[str, float]) -> Pipeline:
        """What diffusers alone makes of these files."""
        pipe = TINY[NAME].build()
        for number, path in enumerate(adapters):
            pipe.load_lora_weights(path, adapter_name=f"lora-{number}")
        if adapters:
            pipe.set_adapters([f"lora-{number}" for number in range(len(adapters))], list(adapters.values()))
        return pipe

    def names(self) -> list[str]:
        """Loaded adapters."""
        return sorted({name for names in self.pipe.get_list_adapters().values() for name in names})

    def memory(self) -> int:
        """Bytes of all adapters."""
        parts = (self.pipe.unet, self.pipe.text_encoder)
        return sum(p.nbytes for part in parts for name, p in part.named_parameters() if ".lora_" in name)

    def check(self, adapters: dict[str, float]) -> None:
        """It draws, bit for bit, as diffusers alone with these files and no others."""
        draw = TINY[NAME].draw
        assert torch.equal(draw(self.pipe, steps=1), draw(self.fresh(adapters), steps=1))


@pytest.fixture
def user(tmp_path: Path) -> User:
    return User(tmp_path)


def everything(pipe: Pipeline) -> dict[str, Any]:
    """What there is, which objects these are, and copies of their values."""
    found: dict[str, Any] = {"pipe": {name: id(value) for name, value in vars(pipe).items()}}
    for part, model in pipe.components.items():
        if isinstance(model, nn.Module):
            found |= {f"{part}.{name}": value for name, value in facts(model).items()}
            found |= {f"{part}.{name} is": id(module) for name, module in model.named_modules()}
            found[f"{part}.config"] = vars(model.config)
    tensors = {name: value for name, value in found.items() if isinstance(value, Tensor)}
    found |= {f"{name} is": (id(value), value.data_ptr()) for name, value in tensors.items()}
    return found | {name: _copy(value) for name, value in found.items()}


def _copy(value: Any) -> Any:
    if isinstance(value, Tensor):
        copy = value.detach().clone()
        return nn.Parameter(copy, value.requires_grad) if isinstance(value, nn.Parameter) else copy
    return value.copy() if isinstance(value, (dict, list)) else value


# Exactly that set.


def test_sets_of_files(user: User) -> None:
    one, two = user.file(BOTH, "one"), user.file({"unet": FEED_FORWARD}, "two", seed=1, rank=7, alpha=3.0)
    three = user.file({"unet": PROMPT, "text_encoder": TEXT}, "three", seed=2, kind="kohya", rank=3, alpha=1.0)
    sets: list[dict[str, float]] = [
        {one: 1.0},
        {two: 0.5},
        {two: 0.5, three: 0.7},
        {three: -0.2, one: 0.4, two: 1.5},
        {three: 1.0},
        {},
        {one: 0.3, two: 0.6},
    ]
    memory: dict[frozenset[str], int] = {}
    for adapters in [*sets, *sets]:
        user.swap(adapters)
        user.check(adapters)
        assert len(user.names()) == len(adapters)
        assert sorted(user.pipe.get_active_adapters()) == user.names()
        assert memory.setdefault(frozenset(adapters), user.memory()) == user.memory()
    assert memory[frozenset()] == 0


def test_a_swap_wastes_no_step(user: User, monkeypatch: pytest.MonkeyPatch) -> None:
    path = user.file(BOTH)
    sfast.compile(user.pipe)
    user.swap({path: 1.0})
    draw = functools.partial(TINY[NAME].draw, user.pipe, steps=2, output_type="latent")
    draw()
    runs: list[Any] = []
    monkeypatch.setattr(Plan, "ready", lambda plan, pointers: True)  # as if there were graphs
    run = launch.run
    monkeypatch.setattr(launch, "run", lambda component, *rest: (runs.append(component.name), run(component, *rest))[1])
    draw()
    steps = len(runs)
    for swap, wasted in (
        (lambda: None, 0),
        (lambda: user.pipe.set_adapters(_loaded(user.pipe), [0.25]), 2),  # one of each part that has some
        (lambda: user.swap({path: 0.5}), 0),
        (lambda: user.swap({}), 0),
    ):
        swap()
        runs.clear()
        draw()
        assert len(runs) == steps + wasted


def test_what_a_user_has_loaded_stays(user: User) -> None:
    mine, file = user.file(BOTH, "mine"), user.file({"unet": EVERYTHING}, "file", seed=1)
    user.load(mine, "mine")
    parameters = [p for name, p in user.pipe.unet.named_parameters() if ".mine." in name]
    values = [p.clone() for p in parameters]
    for adapters, expected in (
        ({file: 1.0}, {file: 1.0}),
        ({"mine": 0.5, file: 0.5}, {mine: 0.5, file: 0.5}),
        ({}, {}),
        ({"mine": 0.7}, {mine: 0.7}),
    ):
        user.swap(adapters)
        user.check(expected)
        assert "mine" in user.names()
        assert len(user.names()) == 1 + (file in adapters)
    now = [p for name, p in user.pipe.unet.named_parameters() if ".mine." in name]
    assert all(a is b and torch.equal(a, value) for a, b, value in zip(now, parameters, values, strict=True))


def test_calls_of_diffusers_afterwards(user: User, tmp_path: Path) -> None:
    one, two = user.file(BOTH, "one"), user.file({"unet": FEED_FORWARD}, "two", seed=1)
    user.swap({one: 0.5})
    (name,) = user.names()
    assert user.pipe.get_list_adapters() == {"unet": [name], "text_encoder": [name]}
    user.load(two, "two")
    user.pipe.set_adapters([name, "two"], [0.3, 0.8])
    user.check({one: 0.3, two: 0.8})
    user.pipe.disable_lora()
    user.check({})
    user.pipe.enable_lora()
    user.check({one: 0.3, two: 0.8})
    layers = [get_peft_model_state_dict(part, adapter_name=name) for part in (user.pipe.unet, user.pipe.text_encoder)]
    user.pipe.save_lora_weights(tmp_path / "saved", *layers)
    user.pipe.unet.save_lora_adapter(tmp_path / "adapter", adapter_name=name)
    again = str(tmp_path / "saved" / "pytorch_lora_weights.safetensors")
    assert torch.equal(
        TINY[NAME].draw(user.fresh({again: 0.5}), steps=1), TINY[NAME].draw(user.fresh({one: 0.5}), steps=1)
    )
    loaded = TINY[NAME].build().unet
    loaded.load_lora_adapter(tmp_path / "adapter", prefix=None, weight_name="pytorch_lora_weights.safetensors")
    right = user.fresh({one: 1.0}).unet
    mine = get_peft_model_state_dict(loaded, adapter_name="default_0")
    theirs = get_peft_model_state_dict(right, adapter_name="lora-0")
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[key], theirs[key]) for key in theirs)
    user.pipe.delete_adapters("two")
    assert user.names() == [name]
    user.swap({two: 1.0})
    user.pipe.unload_lora_weights()
    assert user.names() == []
    user.swap({one: 1.0})
    user.check({one: 1.0})


def test_fused_adapters_are_in_the_way(user: User) -> None:
    """Deleted, they could never be taken out of the weights again; and others have no effect beside them."""
    one, two = user.file({"unet": ATTENTION}, "one"), user.file({"unet": ATTENTION}, "two", seed=1)
    user.swap({one: 1.0})
    (name,) = user.names()
    user.pipe.fuse_lora()
    before = everything(user.pipe)
    with pytest.raises(ValueError, match=rf"fused into the weights: {name}; call `pipe.unfuse_lora\(\)` first"):
        user.swap({two: 1.0})
    assert_same(everything(user.pipe), before)
    user.pipe.unfuse_lora()
    user.swap({two: 1.0})
    draw = TINY[NAME].draw
    torch.testing.assert_close(draw(user.pipe, steps=1), draw(user.fresh({two: 1.0}), steps=1), rtol=1e-4, atol=1e-4)


def test_a_disabled_pipeline_is_enabled(user: User) -> None:
    one, two = user.file(BOTH, "one"), user.file({"unet": FEED_FORWARD}, "two", seed=1)
    user.swap({one: 1.0})
    user.pipe.disable_lora()
    user.swap({two: 1.0})
    user.check({two: 1.0})


def test_a_file_that_was_replaced_by_one_of_the_same_size_and_time(tmp_path: Path) -> None:
    path, other = tmp_path / "lora.safetensors", tmp_path / "other.safetensors"
    path.write_bytes(b"one")
    other.write_bytes(b"two")
    before = _name_of(path, [], {})
    assert _name_of(path, [], {}) == before
    times = path.stat()
    os.utime(other, ns=(times.st_atime_ns, times.st_mtime_ns))
    other.replace(path)
    assert _name_of(path, [], {}) != before


def test_a_file_that_changes(user: User) -> None:
    """What is loaded does not change with it; the next swap reads it."""
    path = user.file(BOTH, "one")
    user.swap({path: 1.0})
    before = everything(user.pipe)
    new = Path(user.file(BOTH, "new", seed=1)).read_bytes()
    with open(path, "r+b") as file:  # as a copy over it does: who has mapped it sees that
        file.write(new)
    assert_same(everything(user.pipe), before)
    user.swap({path: 1.0})
    user.check({path: 1.0})
    assert len(user.names()) == 1


def test_folders_and_options(user: User, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    first = user.file(BOTH, "folder/pytorch_lora_weights")
    second = user.file({"unet": FEED_FORWARD}, "folder/second", seed=1)
    user.swap({folder: 0.5}, weight_name="second.safetensors")
    user.check({second: 0.5})
    user.swap({str(folder): 0.5}, weight_name="pytorch_lora_weights.safetensors")
    user.check({first: 0.5})
    user.file({"unet": FEED_FORWARD}, "folder/pytorch_lora_weights", seed=2)
    user.swap({folder: 0.5}, weight_name="pytorch_lora_weights.safetensors")
    user.check({first: 0.5})
    assert len(user.names()) == 1


# Mishaps.


def broken(user: User, how: str) -> str:
    path = user.folder / "broken.safetensors"
    changes = lora_files.draw(TINY[NAME].build(), BOTH)
    if how == "cut off":
        path.write_bytes(Path(user.file(BOTH)).read_bytes()[:-100])
    elif how == "another architecture":
        user.file({"unet": ATTENTION}, "broken", of="sdxl")
    elif how == "one shape":
        lora_files.write(path, [*changes[:9], replace(changes[9], up=torch.randn(5, 4)), *changes[10:]])
    elif how == "smaller":  # what diffusers' hot swapping pads with zeros
        lora_files.write(path, [replace(change, down=change.down[:, 1:]) for change in changes])
    elif how == "text encoder":  # the UNet's part is in place already
        wrong = [replace(c, down=torch.randn(4, 9)) if c.part == "text_encoder" else c for c in changes]
        lora_files.write(path, wrong)
    elif how == "elsewhere":
        lora_files.write(path, [replace(change, layer=f"elsewhere.{change.layer}") for change in changes])
    return str(path)


@pytest.mark.parametrize(
    "how", ["cut off", "another architecture", "one shape", "smaller", "text encoder", "elsewhere"]
)
def test_a_bad_file_changes_nothing(user: User, how: str) -> None:
    good, other, bad = user.file(BOTH, "good"), user.file({"unet": EVERYTHING}, "other", seed=1), broken(user, how)
    for prepare in (lambda: user.load(good, "mine"), lambda: user.swap({good: 0.3})):
        prepare()
        before = everything(user.pipe)
        for adapters in ({bad: 1.0}, {other: 1.0, bad: 0.5}):
            with pytest.raises(
                ValueError, match=r"broken\.safetensors` cannot be loaded, nothing has changed: \w+: \w"
            ):
                user.swap(adapters)
            assert_same(everything(user.pipe), before)
    user.swap({other: 0.6})
    user.check({other: 0.6})


def test_what_a_file_for_flux_overwrites(tmp_path: Path) -> None:
    """It may have norms, which are written in place, and need a wider input layer; then its last part does not fit."""
    pipe = TINY["flux"].build()
    wanted = {"transformer": ATTENTION, "text_encoder": TEXT}
    changes = lora_files.draw(TINY["flux"].build(), wanted)
    tensors = {f"{change.path}.lora_A.weight": change.down for change in changes}
    tensors |= {f"{change.path}.lora_B.weight": change.up for change in changes}
    wide, norm = pipe.transformer.x_embedder, pipe.transformer.transformer_blocks[0].attn.norm_q.weight
    tensors["transformer.x_embedder.lora_A.weight"] = torch.randn(4, 2 * wide.in_features)
    tensors["transformer.x_embedder.lora_B.weight"] = torch.randn(wide.out_features, 4)
    tensors["transformer.transformer_blocks.0.attn.norm_q.weight"] = norm + 1
    good, bad = tmp_path / "good.safetensors", tmp_path / "bad.safetensors"
    save_file(tensors, good)
    last = next(key for key in tensors if key.startswith("text_encoder") and "lora_A" in key)
    save_file({**tensors, last: torch.randn(4, 7)}, bad)
    before = everything(pipe)
    with pytest.raises(ValueError, match=r"bad\.safetensors` cannot be loaded, nothing has changed"):
        sfast.swap_lora(pipe, {bad: 1.0})
    assert_same(everything(pipe), before)
    sfast.swap_lora(pipe, {good: 1.0})
    assert pipe.transformer.config.in_channels == 2 * wide.in_features
    assert torch.equal(norm, before["transformer.transformer_blocks.0.attn.norm_q._parameters.weight"] + 1)


class Interrupt:
    """A function that works some times, and is then cut short by Ctrl-C."""

    def __init__(self, function: Callable[..., Any], times: int) -> None:
        self.function, self.times = function, times

    def __get__(self, instance: Any, owner: Any = None) -> Callable[..., Any]:
        return self if instance is None else lambda *args, **kwargs: self(instance, *args, **kwargs)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.times -= 1
        if self.times < 0:
            raise KeyboardInterrupt
        return self.function(*args, **kwargs)


LAYER = peft.tuners.lora.layer.LoraLayer


@pytest.mark.parametrize(
    ("before", "place", "name", "times"),
    [
        ("nothing", inject, "_set", 0),
        ("a file", inject, "_set", 31),
        ("a user's", inject._Plan, "carry_out", 1),  # the text encoder's
        ("a file", LAYER, "reset_lora_parameters", 2),  # the second file is for peft
        ("nothing", LAYER, "reset_lora_parameters", 2),
        ("a user's", LAYER, "set_adapter", 90),
        ("a file", LAYER, "delete_adapter", 3),
    ],
)
def test_ctrl_c(user: User, before: str, place: Any, name: str, times: int) -> None:
    good, one = user.file(BOTH, "good"), user.file({"unet": ATTENTION, "text_encoder": TEXT}, "one", seed=1)
    dora = user.file({"unet": FEED_FORWARD}, "dora", seed=2, dora=True)
    if before == "a file":
        user.swap({good: 0.4})
    elif before == "a user's":
        user.load(good, "mine")
    kept = everything(user.pipe)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(place, name, Interrupt(getattr(place, name), times))
        with pytest.raises(KeyboardInterrupt):
            user.swap({one: 1.0, dora: 0.5})
    assert_same(everything(user.pipe), kept)
    assert gc.isenabled()
    user.swap({one: 1.0, dora: 0.5})
    user.check({one: 1.0, dora: 0.5})


def test_two_threads_ask_for_the_same_file(user: User, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locks, "COURTESY", 0.05)
    sfast.compile(user.pipe)
    one, errors = user.file(BOTH, "one"), []

    def swap() -> None:
        try:
            user.swap({one: 0.5})
        except ValueError as error:
            errors.append(error)

    thread = threading.Thread(target=swap)
    with locks.lock_of(user.pipe.unet):
        thread.start()
        while not locks._queue:  # until it waits
            time.sleep(0.001)
        user.swap({one: 1.0})
    thread.join()
    assert errors == [] and len(user.names()) == 1
    sfast.restore(user.pipe)
    user.check({one: 0.5})


def test_what_is_asked_for_must_be_there(user: User, tmp_path: Path) -> None:
    one = user.file(BOTH, "one")
    user.swap({one: 0.5})
    before = everything(user.pipe)
    for adapters, message in (
        ({"nobody": 1.0}, r"`nobody` is neither a file nor a loaded adapter; loaded are: file_one_\w+"),
        ({tmp_path / "none.safetensors": 1.0}, "neither a file nor a loaded adapter"),
        ({"some/body": 1.0}, "`some/body` cannot be loaded, nothing has changed"),
        ({one: 1.0, Path(one): 0.5}, "names the same adapter twice"),
        ({one: float("nan")}, "must be finite"),
        ({one: {"unet": {"up": [float("nan")]}}}, "must be finite"),
    ):
        with pytest.raises(ValueError, match=message):
            user.swap(adapters)
        assert_same(everything(user.pipe), before)
    with pytest.raises(TypeError, match="must map names or files to strengths, got 3 for a name or file"):
        user.swap({3: 1.0})  # type: ignore[dict-item]
    another = user.folder / "another.safetensors"
    lora_files.write(another, lora_files.draw(TINY["sdxl"].build(), {"unet": r"attn2\.to_k$"}), "peft")
    with pytest.raises(
        ValueError, match=r"another\.safetensors` cannot be loaded.*: size mismatch for down_blocks\.0\."
    ):
        user.swap({another: 1.0})
    assert_same(everything(user.pipe), before)
    nothing = user.folder / "nothing.safetensors"
    save_file({"transformer.block.to_q.lora_A.weight": torch.zeros(2, 3)}, nothing)
    with pytest.raises(
        ValueError, match=r"nothing\.safetensors` has nothing for any part of this StableDiffusionPipeline"
    ):
        user.swap({nothing: 1.0})
    assert_same(everything(user.pipe), before)
