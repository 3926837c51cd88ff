"""Python that a plain trace loses, stumbles over or bakes in, mended for as long as a call is traced."""

from __future__ import annotations

import functools
import sys
import threading
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch._ops import HigherOrderOperator
from torch.overrides import TorchFunctionMode

from sfast.decisions import Untraceable
from sfast.reads import Reads, asks, is_traced_by, where
from sfast.sizes import ARITHMETIC, CONSTRUCTORS, LIMITED, Sizes


class TracingMode(TorchFunctionMode):
    """Mends what a plain trace loses, and watches what it bakes in.

    - `tensor.data` stays an alias that the trace knows, so writes through it are kept.
    - What Python makes of sizes are sizes: see `sizes.py`.
    - `repeat_interleave` by a size stays a shape operation: by a tensor it would be an index on the tensor's device.
    - `x[i:j] = y` spreads `y` by itself: the tracer would note the sizes of both as numbers.
    - Dropout that drops nothing gives what it is given at once, as it does in eager.
    - True and False as numbers to fill with or compare to are 1 and 0: TorchScript knows no operators for them.
    - A module without hooks calls its forward at once: for every operator the tracer looks at all Python frames below it,
      which takes as long as everything else about tracing, and most of these frames are `Module.__call__`'s.
    - What Python reads out of tensors is noted: see `reads.py`. What it asks of the memory that they lie in, no trace can
      repeat (`timesteps[i]` lies elsewhere at each step), nor whether inference mode is on.
    """

    def __init__(self, keep_sizes: bool = True, checked: bool = False) -> None:
        super().__init__()
        self._checked = checked
        self._data = torch.Tensor.data.__get__
        self._call = torch.nn.Module.__call__
        self.reads = Reads()
        self._sizes = Sizes(self.reads, keep_sizes, checked)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        plain = not hasattr(func, "__code__") and _is_plain(func) and not self._sizes.fractions
        if plain and torch._C._functorch.maybe_current_level() is None:
            # As `reads.call` does it, without another frame.
            reads = self.reads
            before, reads.given = reads.given, []
            try:
                result = func(*args, **(kwargs or {}))
                if reads.given:
                    reads.note_given()
                return result
            finally:
                reads.given = before
        if func in _DROPOUT and not _drops(*args, **(kwargs or {})):
            return args[0]
        if func == self._data:
            return args[0].detach()
        asks = func in _ABOUT_MEMORY or (func is torch.Tensor.is_contiguous and not self._checked)
        if asks and _is_models(sys._getframe(1)):
            raise Untraceable(f"it asks what a tensor is a view of, or where it lies in memory: {where()}")
        if isinstance(func, HigherOrderOperator) or torch._C._functorch.maybe_current_level() is not None:
            raise Untraceable(f"it calls Python functions of elements (flex_attention, vmap): {where()}")
        if func in _REPEAT and _is_size(*args[1:2], **(kwargs or {})):
            return _repeat_each(*args, **(kwargs or {}))
        if func in _TAKE_A_NUMBER or (func is torch.full and "dtype" in (kwargs or {})):
            args = tuple([int(arg) if isinstance(arg, bool) else arg for arg in args])
            names = ("value", "fill_value", "other")
            kwargs = {k: int(v) if k in names and isinstance(v, bool) else v for k, v in (kwargs or {}).items()}
        kwargs = kwargs or {}
        if getattr(func, "__name__", "") == "__setitem__" and isinstance(args[2], torch.Tensor) and _is_basic(args[1]):
            return self._write(*args)
        number = self._sizes.tensor(func, args, kwargs)
        if number is None and not kwargs:
            number = self._sizes.arithmetic(func, args)
        if number is not None:
            return number
        kwargs = {name: self._sizes.for_tensors(value) for name, value in kwargs.items()}
        return self.reads.call(func, self._sizes.for_tensors(tuple(args)), kwargs)

    def _write(self, x: torch.Tensor, index: Any, value: torch.Tensor) -> None:
        part = self.reads.call(torch.Tensor.__getitem__, (x, index), {})
        while value.dim() > part.dim():  # by dimensions of one in front
            value = value[0]
        part.copy_(value)

    def is_number(self, x: torch.Tensor) -> bool:
        """Whether a tensor stands, or may stand, for a number that Python has made of sizes."""
        return x.dim() == 0 and x.is_cpu and self.reads.of_sizes(x)

    def _is_inference_mode_enabled(self) -> bool:
        if is_traced_by(self._thread) and _is_models(sys._getframe(1)):
            raise Untraceable(f"it asks whether inference mode is on: {where()}")
        return torch._C.is_inference_mode_enabled()

    def _is_exporting(self) -> bool:
        """diffusers asks before it looks for a result by its sizes: in a cache of numbers, which would have to be known."""
        asks = sys._getframe(1).f_globals.get("__name__")
        return (asks == _CACHES and is_traced_by(self._thread)) or _IS_EXPORTING()

    def __enter__(self) -> TracingMode:
        self._thread = threading.get_ident()
        torch.is_inference_mode_enabled = self._is_inference_mode_enabled
        torch.compiler.is_exporting = self._is_exporting
        if self._call is torch.nn.Module._wrapped_call_impl:  # or else it is somebody else's
            torch.nn.Module.__call__ = _ShortCall(self._call, self._thread)
        self.reads.start()
        self._sizes.start()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        self._sizes.stop()
        self.reads.stop()
        torch.nn.Module.__call__ = self._call
        torch.is_inference_mode_enabled = torch._C.is_inference_mode_enabled
        torch.compiler.is_exporting = _IS_EXPORTING
        super().__exit__(*error)


_CACHES = "diffusers.utils.torch_utils"  # where its `lru_cache_unless_export` is
_IS_EXPORTING = torch.compiler.is_exporting
_T = torch.Tensor
_ABOUT_MEMORY = frozenset(
    [
        *(_T.storage_offset, _T.data_ptr, _T.untyped_storage, _T.storage, _T._is_view, _T.is_inference, _T.is_pinned),
        *(_T.is_conj, _T.is_neg, torch.is_conj, torch.is_neg, torch.is_inference),
        *[getattr(_T, name).__get__ for name in ("_base", "_version", "is_leaf", "grad_fn", "grad")],
    ]
)
_DROPOUT = frozenset((F.dropout, torch.dropout))
_REPEAT = frozenset((torch.repeat_interleave, torch.Tensor.repeat_interleave))
# Whose own affair it is.
_OF_OPERATORS = ("torch.", "triton.", "sfast.", "xformers.", "flash_attn.")


def _is_models(frame: Any) -> bool:
    """Whether a model's own code is at work."""
    return not f"{frame.f_globals.get('__name__', '')}.".startswith(_OF_OPERATORS)


_HOOKS = ("_backward_hooks", "_backward_pre_hooks", "_forward_hooks", "_forward_pre_hooks", "_compiled_call_impl")
_GLOBAL_HOOKS = [
    hooks
    for name, hooks in vars(torch.nn.modules.module).items()
    if name.startswith("_global_") and name.endswith("_hooks")
]


class _ShortCall:
    """`Module.__call__` without a frame, for one thread and for modules where it would do nothing but call `forward`."""

    def __init__(self, call: Callable[..., Any], thread: int) -> None:
        self._call = call
        self._thread = thread

    def __get__(self, module: Any, kind: Any = None) -> Any:
        if module is None:
            return self
        if (
            threading.get_ident() == self._thread
            and not any(map(module.__dict__.get, _HOOKS))
            and not any(_GLOBAL_HOOKS)
        ):
            return module.forward
        return functools.partial(self._call, module)

    def __call__(self, module: Any, *args: Any, **kwargs: Any) -> Any:
        return self.__get__(module)(*args, **kwargs)


def _is_basic(index: Any) -> bool:
    """Whether an index gives a view."""
    parts = index if isinstance(index, tuple) else (index,)
    return all(type(part) is int or part is None or part is Ellipsis or isinstance(part, slice) for part in parts)


def _drops(x: torch.Tensor, p: float = 0.5, training: bool = True, inplace: bool = False, train: bool = True) -> bool:
    return training and train


def _is_size(repeats: Any = None, **_: Any) -> bool:
    return isinstance(repeats, torch.Tensor) and repeats.dim() == 0


def _repeat_each(
    x: torch.Tensor, repeats: torch.Tensor, dim: int | None = None, output_size: Any = None
) -> torch.Tensor:
    """`x.repeat_interleave(repeats, dim)` for one number of repeats, out of views and one copy."""
    x, dim = (x.flatten(), 0) if dim is None else (x, dim % x.dim())
    before, after = x.shape[:dim], x.shape[dim + 1 :]
    wide = x.unsqueeze(dim + 1).expand(*before, x.shape[dim], repeats, *after)
    return wide.reshape(*before, x.shape[dim] * repeats, *after)


@functools.cache
def _is_plain(func: Any) -> bool:
    """Whether one of PyTorch's functions is neither mended nor asks for anything but sizes that it is given."""
    mended = (
        _ABOUT_MEMORY
        | _TAKE_A_NUMBER
        | {torch.Tensor.data.__get__, torch.Tensor.is_contiguous, torch.full}
        | {*_REPEAT, *_DROPOUT, *CONSTRUCTORS, *ARITHMETIC, *LIMITED}
    )
    known = func in mended or asks(func) or getattr(func, "__name__", "") == "__setitem__"
    return not known and not isinstance(func, HigherOrderOperator)


# The dtype of their results does not depend on their number's.
_TAKE_A_NUMBER = frozenset(
    (
        *(torch.full_like, torch.masked_fill, torch.index_fill, torch.scatter, torch.eq, torch.ne),
        *(torch.Tensor.new_full, torch.Tensor.fill_, torch.Tensor.masked_fill, torch.Tensor.masked_fill_),
        *(torch.Tensor.index_fill, torch.Tensor.index_fill_, torch.Tensor.scatter, torch.Tensor.scatter_),
        *(torch.Tensor.eq, torch.Tensor.ne, torch.Tensor.__eq__, torch.Tensor.__ne__),
    )
)
