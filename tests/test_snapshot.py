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
from sfast.state import ModuleState


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


def test_other_strengths_are_taken_up() -> None:
    shared = ["one"]
    layers: list[dict[str, Any]] = [{"active": shared, "off": False, "scaling": {"one": 1.0}} for _ in range(3)]
    snapshot = Snapshot()
    for layer in layers:
        snapshot.add(layer, layer)
        snapshot.add(layer["scaling"], layer["scaling"])
        snapshot.add_size(layer["scaling"])
        snapshot.add_list(layer["active"])
    layers[1]["scaling"]["one"] = 0.5
    layers[2].update(active=["two"], off=True)
    assert not snapshot.same()
    assert snapshot.renew()
    assert snapshot.same()
    layers[2]["active"].append("one")
    assert not snapshot.same(), "a list that came later is watched, too"
    assert snapshot.renew()
    for change, back in (
        (
            lambda: exchange(layers[0]["scaling"], "one", torch.ones(())),
            lambda: exchange(layers[0]["scaling"], "one", 1.0),
        ),
        (lambda: exchange(layers[0]["scaling"], "two", 1.0), lambda: layers[0]["scaling"].pop("two")),
        (lambda: layers[0].pop("off"), lambda: exchange(layers[0], "off", False)),
        (lambda: exchange(layers[0], "active", "one"), lambda: exchange(layers[0], "active", shared)),
        (lambda: exchange(layers[0], "scaling", {"one": 1.0}), None),
    ):
        change()
        assert not snapshot.renew()
        assert not snapshot.same()
        if back is not None:
            back()
            assert snapshot.renew()


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


def test_a_tree_is_not_read_again_for_another_strength(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(*[nn.Linear(4, 4) for _ in range(3)])
    peft.inject_adapter_in_model(peft.LoraConfig(target_modules=["0", "1"]), model)
    wide = nn.Linear(4, 8, bias=False)
    state = ModuleState(model)
    state.refresh()
    state.merge_adapters()
    reads: list[None] = []
    monkeypatch.setattr("sfast.state.read", lambda root: (reads.append(None), tree.read(root))[1])
    layer: Any = model[0]
    changes: list[tuple[Callable[[], Any], bool, bool]] = [  # whether it is read again, and is another computation
        (lambda: layer.scaling.update(default=0.25), False, False),
        (lambda: layer.set_adapter([]), False, False),
        (lambda: layer.enable_adapters(False), False, False),
        (lambda: (layer.enable_adapters(True), layer.set_adapter(["default"])), False, False),
        (lambda: (layer.scaling.update(default=0.5), model.half()), False, True),  # where weights have moved, too
        (lambda: (layer.scaling.update(default=1.0), exchange(layer.lora_A._modules, "default", wide)), True, False),
        (lambda: (layer.scaling.update(default=0.5), exchange(model._modules, "2", nn.ReLU())), True, True),
        (lambda: layer.scaling.update(other=1.0), True, False),
    ]
    for change, is_read, is_another in changes:
        generation, version = state.generation, state.version
        change()
        reads.clear()
        state.refresh()
        assert (bool(reads), state.version > version) == (is_read, is_another)
        assert state.generation > generation
        assert state.adapters.dirty
        state.merge_adapters()
        assert state.pointers == tuple(tensor.data_ptr() for tensor in state.weights)
