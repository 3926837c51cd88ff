"""What is loaded quickly is, object by object, what diffusers and peft would have loaded; and what is not plain, is theirs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft.tuners.lora.layer import LoraLayer
from peft.utils.other import get_pattern_key
from torch import Tensor, nn

from sfast import inject
from sfast.inject import quick_loading
from tests import lora_files
from tests.lora_files import ATTENTION, CONVOLUTIONS, EVERYTHING, FEED_FORWARD, TEXT
from tests.tiny import TINY, Pipeline


def facts(model: nn.Module) -> dict[str, Any]:
    """Everything about a module tree that could differ, in words and tensors."""
    found: dict[str, Any] = {}
    for path, module in model.named_modules():
        found[path] = type(module)
        for name, value in vars(module).items():
            if name == "_weight_conversions" or name.endswith("_hooks"):  # transformers' own
                continue
            if name in ("_parameters", "_buffers"):
                found |= {f"{path}.{name}.{key}": tensor for key, tensor in value.items()}
            elif name == "_modules":
                found[f"{path}.{name}"] = list(value)
            elif name == "peft_config":
                found |= {f"{name}.{key}": {**vars(config), "target_modules": None} for key, config in value.items()}
            elif name == "lora_variant":
                found[f"{path}.{name}"] = {key: type(variant) for key, variant in value.items()}
            elif isinstance(value, (bool, int, float, str, tuple, list, dict, type(None))):
                found[f"{path}.{name}"] = value
    return found


def assert_same(mine: dict[str, Any], right: dict[str, Any]) -> None:
    assert mine.keys() == right.keys()
    for name, value in right.items():
        if isinstance(value, Tensor):
            assert isinstance(mine[name], nn.Parameter) == isinstance(value, nn.Parameter), name
            assert (mine[name].dtype, mine[name].requires_grad) == (value.dtype, value.requires_grad), name
            assert torch.equal(mine[name], value), name
        else:
            assert mine[name] == value, name


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of adapters that were loaded quickly."""
    names: list[str] = []
    carry_out = inject._Plan.carry_out

    def noted(plan: inject._Plan) -> None:
        names.append(plan.name)
        carry_out(plan)

    monkeypatch.setattr(inject._Plan, "carry_out", noted)
    return names


def load(pipe: Pipeline, path: Path, name: str) -> None:
    pipe.load_lora_weights(str(path), adapter_name=name)


def quickly(pipe: Pipeline, path: Path, name: str) -> None:
    with quick_loading(list(pipe.components.values())):
        load(pipe, path, name)


def files(folder: Path, tiny: str, *specs: dict[str, Any]) -> list[Path]:
    """LoRA files for a tiny pipeline; a `ranks` of several is for one layer after the other."""
    paths = []
    for number, spec in enumerate(specs):
        spec = dict(spec)
        kind, pattern, dtype = (
            spec.pop("kind", "peft"),
            spec.pop("pattern", ATTENTION),
            spec.pop("dtype", torch.float32),
        )
        mixed = spec.pop("mixed", False)
        wanted = {TINY[tiny].denoiser: pattern, **dict.fromkeys(spec.pop("texts", ()), TEXT)}
        changes = lora_files.draw(TINY[tiny].build(), wanted, seed=number, **spec)
        if mixed:  # every layer has another rank and another alpha than its neighbours
            others = lora_files.draw(TINY[tiny].build(), wanted, rank=7, alpha=2.0, seed=number + 50)
            changes = [b if i % 3 else a for i, (a, b) in enumerate(zip(changes, others, strict=True))]
        paths.append(lora_files.write(folder / f"{number}.safetensors", changes, kind, dtype))
    return paths


TEXTS = ("text_encoder", "text_encoder_2")


@pytest.mark.parametrize(
    ("tiny", "first", "second"),
    [
        ("text-to-image", {"kind": "kohya", "alpha": 1.5}, {"kind": "kohya", "rank": 9, "alpha": 3.0}),
        ("text-to-image", {"kind": "kohya", "mixed": True, "texts": TEXTS[:1]}, {"kind": "bare", "rank": 2}),
        ("text-to-image", {"alpha": 8.0}, {"pattern": FEED_FORWARD, "rank": 3, "dtype": torch.float16}),
        ("text-to-image", {"kind": "processors"}, {"kind": "diffusers", "pattern": EVERYTHING, "rank": 5}),
        ("text-to-image", {"kind": "kohya", "pattern": CONVOLUTIONS, "mixed": True}, {"pattern": CONVOLUTIONS}),
        ("sdxl", {"kind": "kohya", "alpha": 2.0, "texts": TEXTS}, {"pattern": EVERYTHING, "texts": TEXTS}),
        ("sd3", {"texts": TEXTS[1:], "rank": 3}, {"pattern": EVERYTHING, "rank": 2, "alpha": 5.0}),
        ("flux", {"kind": "bare", "texts": TEXTS[:1]}, {"pattern": FEED_FORWARD, "rank": 2}),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_quick_is_the_same(tiny: str, first: dict, second: dict, quick: list[str], tmp_path: Path) -> None:
    """Also on top of each other, and after the layers have lost all their adapters."""
    paths = files(tmp_path, tiny, first, second)
    mine, right = TINY[tiny].build(), TINY[tiny].build()
    parts = [name for name in (TINY[tiny].denoiser, *TEXTS) if getattr(mine, name, None) is not None]

    def assert_equal() -> None:
        for part in parts:
            assert_same(facts(getattr(mine, part)), facts(getattr(right, part)))
            modules = list(getattr(mine, part).modules())
            assert len({id(module._forward_hooks) for module in modules}) == len(modules)  # nothing is shared

    for pipe, way in ((mine, quickly), (right, load)):
        way(pipe, paths[0], "first")
        way(pipe, paths[1], "second")
        pipe.set_adapters(["first", "second"], [0.7, 0.4])
    texts = [len(spec.get("texts", ())) for spec in (first, second, second)]
    assert quick == ["first"] * (1 + texts[0]) + ["second"] * (1 + texts[1])
    assert_equal()
    assert torch.equal(TINY[tiny].draw(mine, steps=1), TINY[tiny].draw(right, steps=1))
    for pipe, way in ((mine, quickly), (right, load)):
        pipe.delete_adapters(["first", "second"])
        way(pipe, paths[1], "third")
        pipe.set_adapters("third", 0.5)
    assert quick.count("third") == 1 + texts[2]
    assert_equal()
    targets = {c.layer for c in lora_files.draw(TINY[tiny].build(), {parts[0]: second.get("pattern", ATTENTION)})}
    assert set(getattr(mine, parts[0]).peft_config["third"].target_modules) >= targets


@pytest.mark.filterwarnings("ignore")
def test_peft_makes_few_layers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """One of each kind, however many there are; the time that a swap takes is theirs."""
    pipe = TINY["sdxl"].build()
    path, other = files(tmp_path, "sdxl", {"kind": "kohya", "alpha": 2.0}, {"rank": 9})
    made = []
    update = LoraLayer.update_layer
    monkeypatch.setattr(LoraLayer, "update_layer", lambda *args, **kwargs: made.append(1) or update(*args, **kwargs))
    quickly(pipe, path, "first")
    layers = [module for module in pipe.unet.modules() if isinstance(module, LoraLayer)]
    kinds = {(module.base_layer.weight.shape, module.base_layer.bias is None) for module in layers}
    assert len(layers) > 2 * len(kinds)
    assert len(made) == len(kinds)
    quickly(pipe, other, "second")
    assert len(made) == 2 * len(kinds)


@pytest.mark.parametrize("spec", [{"dora": True}, {"bias": True, "pattern": FEED_FORWARD}])
@pytest.mark.filterwarnings("ignore")
def test_what_is_not_plain_is_loaded_by_diffusers(spec: dict, quick: list[str], tmp_path: Path) -> None:
    (path,) = files(tmp_path, "text-to-image", spec)
    mine, right = TINY["text-to-image"].build(), TINY["text-to-image"].build()
    quickly(mine, path, "first")
    load(right, path, "first")
    assert quick == []
    assert_same(facts(mine.unet), facts(right.unet))
    assert_same(facts(mine.text_encoder), facts(right.text_encoder))


@pytest.mark.filterwarnings("ignore")
def test_another_peft_is_left_alone(monkeypatch: pytest.MonkeyPatch, quick: list[str], tmp_path: Path) -> None:
    """Where peft makes something else of the sketch than we would, it makes the layers, too."""
    path, other = files(tmp_path, "text-to-image", {"alpha": 2.0}, {"rank": 5})
    monkeypatch.setattr(inject, "_lookup", lambda pattern, default: lambda path: default + 1)
    pipe, right = TINY["text-to-image"].build(), TINY["text-to-image"].build()
    quickly(pipe, path, "first")
    load(right, path, "first")
    assert_same(facts(pipe.unet), facts(right.unet))
    monkeypatch.setattr(inject, "_check_places", lambda *args: pytest.fail("not reached"))
    monkeypatch.setattr(inject, "get_pattern_key", None)
    monkeypatch.setattr(inject, "_Sketch", None)
    quickly(pipe, other, "second")
    load(right, other, "second")
    assert quick == []
    assert_same(facts(pipe.unet), facts(right.unet))
    assert all("load_lora_adapter" not in vars(part) for part in (pipe.unet, pipe.text_encoder))


@pytest.mark.parametrize(
    "patterns",
    [
        {"^a.b.to_q": 1, "to_q": 2, "b.to_k": 3},
        {"b.to_q": 1, "a.b.to_q": 2, "^b.to_q": 3},
        {r"a\.\w+\.to_q": 1, "to_k": 2},
        {"q": 1, "a": 2},
    ],
)
def test_patterns_mean_what_they_mean_to_peft(patterns: dict[str, int]) -> None:
    value = inject._lookup(patterns, 0)
    for path in ("a.b.to_q", "b.to_q", "to_q", "a.b.to_k", "c.b.to_k", "to_k", "a.b.to_v", "a", "b.a", "xto_q", "a.bq"):
        assert value(path) == patterns.get(get_pattern_key(patterns.keys(), path), 0), path
