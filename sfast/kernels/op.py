"""How a kernel becomes an operator that cannot fail: `torch.ops.sfast.<name>` is the kernel, or its plain PyTorch reference.

An operator has three parts. The *reference* is plain PyTorch: it defines the result, it is the pattern that fusions look
for, and it runs wherever the kernel cannot. `supports` says, from the inputs alone and without touching the GPU, whether
the kernel can take them. `launch` runs the kernel. If a launch raises (a broken compiler, a corrupt kernel cache, a GPU
that the kernel does not fit), that is noted once, it is disabled for that dtype and device, and the reference answers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from sfast.fallback import is_out_of_memory, let_through, note
from sfast.kernels.precompile import left_out

LIBRARY = torch.library.Library("sfast", "FRAGMENT")

# (operator, dtype, device) whose kernel has failed in this process
_disabled: set[tuple[str, torch.dtype, torch.device]] = set()


def define(
    schema: str,
    reference: Callable[..., Any],
    supports: Callable[..., bool],
    launch: Callable[..., Any],
    fake: Callable[..., Any],
) -> None:
    """Register `torch.ops.sfast.<name>` for a schema such as `"linear_silu(Tensor x, Tensor weight) -> Tensor"`.

    All four callables take the schema's arguments, in its order; the first is a tensor. `fake` gives the result's shape,
    dtype and layout for tensors that have no data.
    """
    name = schema.partition("(")[0]

    def run(*args: Any) -> Any:
        if not supports(*args):
            return reference(*args)
        key = (name, args[0].dtype, args[0].device)
        if key in _disabled:
            return reference(*args)
        try:
            before = left_out()
            with torch.cuda.device_of(args[0]):
                result = launch(*args)
            if left_out() == before:
                return result
            layouts = _layouts(result)
            del result  # there need not be memory for both
            return _lay_out(reference(*args), layouts)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            let_through(error)
            # A native op that says no means this shape alone, and memory may be there again at the next call.
            if not str(error).startswith("sfast_native") and not is_out_of_memory(error):
                _disabled.add(key)
            what = f"kernel {name} for {args[0].dtype} on {args[0].device}"
            note(what, f"runs as plain PyTorch: {first_line(error)}")
            return reference(*args)

    LIBRARY.define(schema)
    LIBRARY.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"sfast::{name}", fake, lib=LIBRARY)


Layout = tuple[torch.Size, tuple[int, ...]]


def _layouts(result: Any) -> list[Layout]:
    """Sizes and strides of a result's tensors."""
    return [(tensor.shape, tensor.stride()) for tensor in (result if isinstance(result, (tuple, list)) else [result])]


def _lay_out(result: Any, layouts: list[Layout]) -> Any:
    """In a rehearsal (see precompile.py): the reference's result in the kernel's layout, which what follows goes by."""
    tensors = list(result) if isinstance(result, (tuple, list)) else [result]
    for place, (tensor, (size, strides)) in enumerate(zip(tensors, layouts, strict=True)):
        if tensor.stride() != strides and 0 not in strides:  # what is expanded cannot be written to
            tensors[place] = tensor.new_empty_strided(size, strides).copy_(tensor)
    return type(result)(tensors) if isinstance(result, (tuple, list)) else tensors[0]


def first_line(error: Exception) -> str:
    """`RuntimeError: what it said`, cut to one line of a log."""
    text = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {text[:200]}" if text else type(error).__name__


def enable_again() -> None:
    """Let every kernel that has failed try again."""
    _disabled.clear()
