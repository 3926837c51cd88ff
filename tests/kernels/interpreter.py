"""What Triton's interpreter does not do as a GPU does."""

from __future__ import annotations

from typing import Any

import pytest


def multiply_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter holds bf16 as integers, and multiplies matrices of them as integers: let it widen them first."""
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle, _convert_float, tl

    create_dot = InterpreterBuilder.create_dot

    def widened(handle: Any) -> Any:
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        data = _convert_float(handle.data, tl.bfloat16, tl.float32, None).view("float32")
        return TensorHandle(data, tl.float32)

    def create(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        return create_dot(self, widened(a), widened(b), *rest)

    monkeypatch.setattr(InterpreterBuilder, "create_dot", create)
