"""Checksums equal the reference's, and tell every change of values from those before."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sfast.kernels import checksum


def sums(tensors: list[Tensor]) -> list[int]:
    result = checksum.checksums(checksum.table(tensors))
    assert result is not None
    return result.tolist()


@pytest.fixture
def device(device: torch.device, runs_kernel: bool, monkeypatch: pytest.MonkeyPatch) -> torch.device:
    if not runs_kernel:
        pytest.skip("needs Triton: the interpreted tests run it")
    if device.type == "cpu":
        monkeypatch.setattr(checksum, "PARTS", 2)  # the interpreter is slow
    return device


def draw(device: torch.device) -> list[Tensor]:
    torch.manual_seed(0)
    shapes = [((1,), torch.float32), ((2, 7), torch.float16), ((64, 320), torch.bfloat16), ((1029,), torch.float32)]
    tensors = [torch.randn(shape).to(device, dtype) for shape, dtype in shapes]
    tensors.append(torch.randn(4, 8, 3, 3, device=device).contiguous(memory_format=torch.channels_last))
    tensors.append(torch.randn(6, 5, device=device).t())
    tensors.append(torch.randn(9, 6, device=device)[3:])  # somewhere in a storage
    tensors.append(torch.randn(1600, device=device).double())
    return tensors


def in_memory(tensor: Tensor) -> Tensor:
    """The elements in the order in which they lie."""
    return tensor.as_strided((tensor.numel(),), (1,))


def test_equal_to_the_reference(device: torch.device) -> None:
    tensors = draw(device)
    assert all(map(checksum.takes, tensors))
    assert sums(tensors) == [checksum.reference(in_memory(tensor)) for tensor in tensors]


def test_every_change_of_one_tensor_is_seen_in_its_sum_alone(device: torch.device) -> None:
    tensors = draw(device)
    before = sums(tensors)
    for place, tensor in enumerate(tensors):
        flat = in_memory(tensor)
        kept = flat.clone()
        bits = flat.view(torch.uint8)
        for edit in ("negated", "reversed", "exchanged", "lowest bit", "highest bit"):
            if edit == "negated":
                flat.neg_()
            elif edit == "reversed":
                flat.copy_(kept.flip(0))
            elif edit == "exchanged":
                flat[: len(flat) // 2 * 2].copy_(kept[: len(flat) // 2 * 2].view(-1, 2).flip(1).flatten())
            else:
                bits[-1 if edit == "highest bit" else 0] ^= 128 if edit == "highest bit" else 1
            if torch.equal(flat.view(torch.uint8), kept.view(torch.uint8)):
                assert len(flat) == 1
                continue
            now = sums(tensors)
            assert [a != b for a, b in zip(now, before, strict=True)] == [i == place for i in range(len(tensors))]
            flat.copy_(kept)
    assert sums(tensors) == before


def test_what_the_kernel_does_not_take(device: torch.device) -> None:
    whole = torch.zeros(8, 8, device=device, dtype=torch.float16)
    for tensor in (whole[:, :4], whole[0, :3], whole.flatten()[1:3], whole[:0], whole.expand(2, 8, 8)):
        assert not checksum.takes(tensor)
    assert checksum.takes(whole.flatten()[2:6])
    assert checksum.takes(whole[:, :1].t()[:, :2]) is False


def test_a_kernel_that_fails_rests(device: torch.device, falls_back: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checksum, "_checksums", None)
    monkeypatch.setattr(checksum, "_disabled", set())
    assert checksum.runs_on(device)
    assert checksum.checksums(checksum.table([torch.zeros(4, device=device)])) is None
    assert not checksum.runs_on(device)
