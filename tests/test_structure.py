"""Arguments come out of `flatten` and `unflatten` as they went in."""

import collections
import dataclasses
from typing import Any

import pytest
import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput

from sfast.structure import UnsupportedStructure, describe_shapes, flatten, flatten_call, unflatten

Pair = collections.namedtuple("Pair", "a b")


@dataclasses.dataclass
class Box:
    value: Any
    label: str = "x"


def _roundtrip(value: Any) -> tuple[Any, list[torch.Tensor]]:
    tensors: list[torch.Tensor] = []
    description = flatten(value, tensors)
    hash(description)
    return unflatten(description, tensors), tensors


def test_nested_values_come_back() -> None:
    a, b, c = torch.ones(2), torch.zeros(3), torch.full((1,), 5.0)
    value = {"x": [a, (b, None)], "y": Box(c, "label"), "z": Pair(1, 2.5), "flag": True, "dtype": torch.float16}
    back, tensors = _roundtrip(value)
    assert [id(t) for t in tensors] == [id(a), id(b), id(c)]
    assert back["x"][0] is a and back["x"][1][0] is b and back["x"][1][1] is None
    assert back["y"].value is c and back["y"].label == "label" and isinstance(back["z"], Pair) and back["z"] == (1, 2.5)
    assert type(back["x"]) is list and type(back["x"][1]) is tuple and back["flag"] is True


def test_model_output_comes_back_as_itself() -> None:
    sample = torch.ones(2)
    back, _ = _roundtrip(UNet2DConditionOutput(sample=sample))
    assert isinstance(back, UNet2DConditionOutput) and back.sample is sample and back[0] is sample


def test_numbers_of_different_kind_are_different_structures() -> None:
    descriptions = [flatten(value, []) for value in (1, 1.0, True)]
    assert len(set(descriptions)) == 3
    assert flatten([1], []) != flatten((1,), [])
    assert flatten({"a": None}, []) != flatten({"b": None}, [])


def test_unknown_object_is_refused_by_name() -> None:
    with pytest.raises(UnsupportedStructure, match="random generator of the caller's"):
        flatten({"generator": torch.Generator()}, [])
    with pytest.raises(UnsupportedStructure, match=r"a value of type builtins\.object cannot be traced"):
        flatten({"anything": object()}, [])


def test_integers_of_a_call_are_sizes() -> None:
    call = {
        "size": (8, [(0, 3)]),
        "counted": [4],
        "flag": True,
        "negative": -1,
        "huge": 2**40,
        "scale": 2.0,
        "x": torch.ones(2),
    }
    tensors: list[torch.Tensor] = []
    description = flatten(call, tensors, sizes_on=torch.device("cpu"))
    assert [tuple(tensor.shape) for tensor in tensors] == [(8, 0), (0, 0), (3, 0), (2,)]
    assert {**unflatten(description, tensors), "x": 0} == {**call, "x": 0}
    again: list[torch.Tensor] = []
    assert flatten({**call, "size": (5, [(7, 3)])}, again, sizes_on=torch.device("cpu")) == description
    assert again[2] is tensors[2]  # so that it is seen to stay the same
    assert unflatten(description, again)["size"] == (5, [(7, 3)])
    assert unflatten(description, again, str)["size"] == ("5", [("7", "3")])
    assert describe_shapes(tensors) == "8, 0, 3, 2"
    plain: list[torch.Tensor] = []
    assert flatten(call, plain) != description and len(plain) == 1


def test_what_is_shared_is_shared_again() -> None:
    x, inner = torch.ones(2), [1.5]
    value = {"a": [inner] * 2, "b": (x, Box(x)), "c": inner, "d": (1.5,)}
    tensors: list[torch.Tensor] = []
    back = unflatten(flatten_call(value, tensors), tensors)
    assert tensors == [x] and back["a"][0] is back["a"][1] is back["c"] and back["b"][1].value is back["b"][0] is x
    assert back == value and flatten_call(value, []) != flatten_call({**value, "c": [1.5]}, [])


def test_shapes_for_a_log_line() -> None:
    assert describe_shapes([torch.ones(2, 4), torch.tensor(1)]) == "2x4, scalar"


def test_results_of_a_neighbour_that_torch_compiles_are_tensors_like_others() -> None:
    """It tells the next one about sizes that change, in attributes."""
    neighbour = torch.compile(torch.nn.Linear(6, 6).eval(), dynamic=True, backend="aot_eager")
    with torch.no_grad():
        result = neighbour(torch.ones(3, 6))
    result._dynamo_weak_dynamic_indices = {0}  # as older versions of PyTorch name it
    assert flatten(result, []) == flatten(torch.ones(3, 6), [])
    result.scale = 1.0
    with pytest.raises(UnsupportedStructure, match="attributes of somebody's own"):
        flatten(result, [])
