"""A number for each of many hundred tensors that says whether their values are still the same: one launch for all of them.

The kernel gets a table of addresses. So what it costs is reading the memory once, a few tenths of a millisecond for the
attention of SDXL, where operators that take lists of tensors need tens of milliseconds to prepare their launches.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from sfast.fallback import let_through, note
from sfast.kernels import precompile
from sfast.kernels.op import first_line
from sfast.kernels.triton_or_none import tl, triton, triton_takes

WORD = 4  # bytes
PARTS = 32  # programs for each tensor
MOST = 2**31 * WORD  # bytes of a tensor

_disabled: set[torch.device] = set()  # the kernel has failed there in this process


def takes(tensor: Tensor) -> bool:
    """Whether a tensor lies in one piece of whole words, in whatever order."""
    if tensor.data_ptr() % WORD or tensor.nbytes % WORD or not 0 < tensor.nbytes < MOST:
        return False
    if tensor.is_contiguous():
        return True
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1 and stride != expected:
            return False
        expected *= size
    return True


def runs_on(device: torch.device) -> bool:
    """Whether the kernel can run there."""
    return device not in _disabled and _can_run(device)


@functools.cache
def _can_run(device: torch.device) -> bool:
    return triton_takes(torch.empty(0, device=device))


def table(tensors: list[Tensor]) -> Tensor:
    """Where these tensors of one device are, and how long, for `checksums`: int64 [2, N] there."""
    sizes = [tensor.nbytes // WORD for tensor in tensors]
    return torch.tensor([[*map(torch.Tensor.data_ptr, tensors)], sizes], dtype=torch.int64, device=tensors[0].device)


def checksums(spans: Tensor) -> Tensor | None:
    """int64 [N]: for each tensor in a `table`, the sum of its 32-bit words, each times an odd number of its place, mod 2**64.

    One word that changes always changes the sum; None if the kernel fails.
    """
    device, number = spans.device, spans.shape[1]
    try:
        with torch.cuda.device_of(spans):
            sums = torch.zeros(number, dtype=torch.int64, device=device)
            _checksums[number, PARTS](spans, sums, number, PARTS=PARTS, BLOCK=1024, num_warps=4)
            return sums
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        let_through(error)
        _disabled.add(device)
        note(f"kernel checksums on {device}", f"runs as plain PyTorch: {first_line(error)}")
        return None


@triton.jit(do_not_specialize=["N"])
def _checksums(spans: tl.tensor, sums: tl.tensor, N: tl.tensor, PARTS: tl.constexpr, BLOCK: tl.constexpr) -> None:
    """Every PARTS-th block of a tensor's words. Products of two 32-bit numbers are exact, their sums wrap."""
    i, part = tl.program_id(0), tl.program_id(1)
    words = tl.load(spans + i).to(tl.pointer_type(tl.uint32))
    length = tl.load(spans + N + i)
    total = tl.zeros((BLOCK,), tl.int64)
    for start in range(part * BLOCK, length, PARTS * BLOCK):
        place = start + tl.arange(0, BLOCK).to(tl.int64)
        word = tl.load(words + place, mask=place < length, other=0)
        factor = place.to(tl.uint32) * 0x2C1B3C6D  # mixed well: neighbours that change places must not cancel out
        factor = (factor ^ (factor >> 15)) * 0x297A2D39
        factor = (factor ^ (factor >> 13)) | 1
        total += word.to(tl.int64) * factor.to(tl.int64)
    if part * BLOCK < length:
        tl.atomic_add(sums + i, tl.sum(total))


def reference(tensor: Tensor) -> int:
    """The checksum of one contiguous tensor, by plain PyTorch."""
    words = tensor.flatten().view(torch.uint8).view(torch.int32).to(torch.int64) & 0xFFFFFFFF
    factor = (torch.arange(len(words), device=tensor.device) * 0x2C1B3C6D) & 0xFFFFFFFF
    factor = ((factor ^ (factor >> 15)) * 0x297A2D39) & 0xFFFFFFFF
    factor = (factor ^ (factor >> 13)) | 1
    return int((words * factor).sum())


def _compile(device: torch.device) -> None:
    """Compiled beside the kernels of a first call: the first adapter should not wait for it."""
    if runs_on(device):
        checksums(table([torch.zeros(1, device=device)]))


precompile.ALONGSIDE.append(_compile)
