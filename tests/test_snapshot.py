"""Whatever is exchanged in one of many dictionaries is noticed, and nothing else is."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
from torch import nn

from sfast import tree
from sfast.snapshot import Snapshot


def exchange(place: dict[Any, Any], name: Any, value: Any) -> None:
    place[name] = value


def test_what_stands_in_dictionaries_and_lists() -> None:
    one, two = object(), object()
    places: list[dict[Any, Any]] = [{"a": one}, {"a": one, "b": two}, {}]
    lists = [[one], []]
    snapshot = Snapshot()
    for place in places:
        snapshot.add(place, place)
        snapshot.add_size(place)
    for items in (*lists, lists[0]):
        snapshot.add_list(items)
    assert snapshot.same()
    changes: list[tuple[Callable[[], None], Callable[[], None]]] = [
        (lambda: exchange(places[0], "a", two), lambda: exchange(places[0], "a", one)),
        (lambda: exchange(places[1], "b", [one]), lambda: exchange(places[1], "b", two)),
        (lambda: exchange(places[2], "a", one), places[2].clear),
        (lambda: exchange(places[0], "c", places[0].pop("a")), lambda: exchange(places[0], "a", places[0].pop("c"))),
        (lambda: lists[1].append(one), lists[1].clear),
        (lists[0].clear, lambda: lists[0].append(one)),
    ]
    for change, back in changes:
        change()
        assert not snapshot.same()
        back()
        assert snapshot.same()


def test_equal_is_not_the_same() -> None:
    values = torch.ones(1), 1, {"x": 1}, "a b"
    place = dict(enumerate(values))
    snapshot = Snapshot()
    snapshot.add(place, place)
    for name, value in enumerate((torch.ones(1), True, {"x": 1}, "".join(["a", " b"]))):
        place[name] = value
        assert not snapshot.same()
        place[name] = values[name]
    assert snapshot.same()


class Layers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Conv2d(4, 4, 1)


def parameter(module: Any) -> None:
    module.weight = nn.Parameter(torch.zeros_like(module.weight))


EDITS: dict[str, Callable[[Any], Any]] = {
    "a scaling": lambda layer: exchange(layer.scaling, "one", 0.3),
    "scalings": lambda layer: setattr(layer, "scaling", dict(layer.scaling)),
    "set_scale": lambda layer: layer.set_scale("one", 0.3),
    "scale_layer": lambda layer: layer.scale_layer(0.3),
    "another adapter": lambda layer: layer.update_layer("two", r=2, lora_alpha=2, config=peft.LoraConfig(r=2)),
    "deleted": lambda layer: layer.delete_adapter("one"),
    "active": lambda layer: layer.set_adapter([]),
    "active by hand": lambda layer: layer._active_adapter.clear(),
    "disabled": lambda layer: layer.enable_adapters(False),
    "merged": lambda layer: layer.merge(),
    "a factor": lambda layer: parameter(layer.lora_A["one"]),
    "the other": lambda layer: parameter(layer.lora_B["one"]),
    "a module": lambda layer: exchange(layer.lora_A, "one", copy.deepcopy(layer.lora_A["one"])),
    "modules": lambda layer: setattr(layer, "lora_B", copy.deepcopy(layer.lora_B)),
    "dropout": lambda layer: exchange(layer.lora_dropout, "one", nn.Dropout(0.5)),
    "the layer inside": lambda layer: setattr(layer, "base_layer", copy.deepcopy(layer.base_layer)),
    "its weight": lambda layer: parameter(layer.base_layer),
}


@pytest.mark.parametrize("edit", EDITS.values(), ids=EDITS)
@pytest.mark.parametrize("name", ["a", "b"])
def test_every_edit_of_a_layer_with_adapters_is_seen(edit: Callable[[Any], Any], name: str) -> None:
    module = Layers()
    config = peft.LoraConfig(r=2, target_modules=["a", "b"], init_lora_weights=False)
    peft.inject_adapter_in_model(config, module, adapter_name="one")
    seen = tree.read(module)
    assert seen.same()
    edit(getattr(module, name))
    assert not seen.same()
