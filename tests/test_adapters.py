"""Weights with adapters on them that somebody edits: also through `.data`, which PyTorch does not count."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

import sfast
from sfast import adapters
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
    before = adapters._norms([weight])
    assert adapters._norms([weight]) == before == adapters._norms([weight.clone()])
    edit(weight)
    assert adapters._norms([weight]) != before


def test_large_and_odd_tensors_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adapters, "NOISE", 16)
    monkeypatch.setattr(adapters, "AT_ONCE", 2)
    tensors = [torch.randn(7, 11), torch.randn(50).half(), torch.randn(4, 6).t(), torch.arange(3), torch.empty(0)]
    before = adapters._norms(tensors)
    assert [len(one) for one in before] == [5, 4, 2, 0, 1]
    for place, tensor in enumerate(tensors[:3]):
        tensor.data[-1] *= -1
        assert [a != b for a, b in zip(adapters._norms(tensors), before, strict=True)] == [
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
