"""What Python reads out of tensors while a call is traced: all that a trace could bake in without a word.

A trace records operators. A number that leaves a tensor for Python (`int(x.shape[1] ** 0.5)`, `if mask.all()`,
`for i in range(x.shape[2])`) comes back as a constant, or as the way through the model that this number takes. While tracing,
sizes are tensors, too. So it is enough to watch the methods that hand out numbers: as long as a call is traced, each of them
first notes what it is asked for, as one more traced tensor. What becomes of these stands in `decisions.py`.
"""

from __future__ import annotations

import contextlib
import threading
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sfast.decisions import DecidesByValue, depends_on_values

# What a method is asked for, in as few values as say it.
_QUESTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    **dict.fromkeys(("__bool__", "is_nonzero"), lambda x: x != 0),
    **dict.fromkeys(("__int__", "__index__"), lambda x: x.long()),
    # As it is now: it may be written to.
    **dict.fromkeys(("__float__", "__complex__", "item", "tolist", "numpy", "__array__", "__dlpack__"), Tensor.clone),
    "__iter__": lambda x: _tensor(x.shape[0]),
    "stride": lambda x: torch.stack([_tensor(size) for size in x.shape]),
}
_INHERITED = _QUESTIONS.keys() - vars(Tensor).keys()
_ABOUT_SIZES = frozenset(("__iter__", "stride"))
_EQUAL = frozenset((Tensor.equal, torch.equal))
_CLOSE = frozenset((Tensor.allclose, torch.allclose))
_CONSTRUCTORS = frozenset((torch.tensor, torch.as_tensor, torch.asarray, Tensor.new_tensor))
_SQUEEZE = frozenset((Tensor.squeeze, Tensor.squeeze_, torch.squeeze))  # how many dimensions there are is baked in
_SPLIT = frozenset((Tensor.split, torch.split, Tensor.unsafe_split, torch.unsafe_split))
_CHUNK = frozenset((Tensor.chunk, torch.chunk, Tensor.unsafe_chunk, torch.unsafe_chunk))
_UNBIND = frozenset((Tensor.unbind, torch.unbind))
_PIECES = _SPLIT | _CHUNK | _UNBIND  # and how many pieces
# What these ask of sizes decides nothing but whether they raise; a UNet has a hundred of them.
_ONLY_REFUSE = frozenset((F.group_norm, F.instance_norm, F.batch_norm))
_ASK_THEMSELVES = _PIECES | _EQUAL | _CLOSE | _CONSTRUCTORS | _SQUEEZE


class Reads:
    """Notes, between `start` and `stop`, what one thread's Python reads out of tensors."""

    def __init__(self) -> None:
        self.values: list[Tensor] = []  # asked for, and decided by what is in the call's tensors
        self.sizes: list[Tensor] = []  # asked for, and decided by their sizes alone
        self.where = ""  # the model's line that first asked for a value
        self._harmless: set[tuple[int, bool]] = set()  # what `depends_on_values` has been through already
        self._thread = 0
        self._busy = False
        self.given: list[tuple[Tensor, int]] | None = None  # sizes that the operator at work has read

    def start(self) -> None:
        """Watch the methods of tensors."""
        self._thread = threading.get_ident()
        for name in _QUESTIONS:
            method = getattr(Tensor, name)
            # Where an interruption has kept `stop` from its work, ours may still be there.
            setattr(Tensor, name, self._watched(name, getattr(method, "watched", method)))

    def stop(self) -> None:
        """Give tensors their own methods back."""
        for name in _QUESTIONS:
            if name in _INHERITED:
                delattr(Tensor, name)
            else:
                setattr(Tensor, name, getattr(Tensor, name).watched)

    def of_sizes(self, x: Tensor) -> bool:
        """Whether a traced tensor is decided by sizes alone."""
        return depends_on_values(torch._C._get_value_trace(x), self._harmless) is None

    def _watched(self, name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        def read(x: Tensor, *args: Any, **kwargs: Any) -> Any:
            if self._busy or not is_traced_by(self._thread):
                return method(x, *args, **kwargs)
            with self._noting():
                if name == "__index__" and self.given is not None:
                    self.given.append((x, _readers(x)))
                else:
                    self._note([_QUESTIONS[name](x)], [] if name in _ABOUT_SIZES else [x])
                return method(x, *args, **kwargs)

        read.watched = method  # type: ignore[attr-defined]
        return read

    def call(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call PyTorch's function `func`, which may ask, too, without one of the methods."""
        if func in _ONLY_REFUSE:
            with self._noting():
                return func(*args, **kwargs)
        if func in _ASK_THEMSELVES:
            with self._noting():
                self._note(*_asked_by(func, args, kwargs))
        before, self.given = self.given, None if hasattr(func, "__code__") else []
        try:
            result = func(*args, **kwargs)
            self.note_given()
            return result
        finally:
            self.given = before

    def note_given(self) -> None:
        """Note the sizes that the operator at work was given as numbers, and not as what the trace knows."""
        for x, readers in self.given or ():
            if _readers(x) == readers:
                with self._noting():
                    self._note([x.long()], [x])

    @contextlib.contextmanager
    def _noting(self) -> Iterator[None]:
        before, self._busy = self._busy, True
        try:
            with torch._C.DisableTorchFunction():
                yield
        finally:
            self._busy = before

    def _note(self, questions: list[Tensor], read: list[Tensor]) -> None:
        """Note `questions`, which are about what is in the tensors `read`, or about sizes alone."""
        why = [depends_on_values(torch._C._get_value_trace(x), self._harmless) for x in read]
        if any(why):
            reason = next(filter(None, why))
            raise DecidesByValue(f"it decides in Python by the value of a tensor, {reason}: {where()}")
        if "" in why:
            self.values += questions
            self.where = self.where or where()
        else:
            self.sizes += questions


def asks(func: Any) -> bool:
    """Whether a function of PyTorch's asks for something by itself."""
    return func in _ONLY_REFUSE or func in _ASK_THEMSELVES


def is_traced_by(thread: int) -> bool:
    """Whether this is that thread, and it is tracing."""
    return threading.get_ident() == thread and torch._C._get_tracing_state() is not None


def where() -> str:
    """The model's own source line, for a message."""
    for frame in reversed(traceback.extract_stack()):
        path = frame.filename.replace("\\", "/")
        if "/torch/" not in path and not path.startswith(_HERE):
            return f"{Path(path).name}:{frame.lineno}: {frame.line}"
    return "somewhere in its forward"


_HERE = str(Path(__file__).parent).replace("\\", "/") + "/"


def _readers(x: Tensor) -> int:
    """How many operators the trace gives a size to."""
    users = [use.user for use in torch._C._get_value_trace(x).uses()]
    return sum([len(user.output().uses()) for user in users if user.kind() == "aten::Int"])


def _asked_by(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[list[Tensor], list[Tensor]]:
    """What a call of `func` asks for, and the tensors whose values it reads for that."""
    if func in _SQUEEZE:
        x, dims = args[0], (kwargs["dim"] if "dim" in kwargs else args[1] if len(args) > 1 else range(args[0].dim()))
        return [_tensor(x.shape[dim]) == 1 for dim in (dims if isinstance(dims, (tuple, range)) else [dims])], []
    if func in _PIECES:
        return _pieces(func, *args, **kwargs), []
    if func in _CONSTRUCTORS:
        data = kwargs["data"] if "data" in kwargs else args[-1]
        copied = isinstance(data, Tensor) and func in (torch.as_tensor, torch.asarray)  # the trace sees that
        read = [] if copied else [item for item in listed(data) if isinstance(item, Tensor)]
        return [x.clone() for x in read], read
    x, y = args[0], args[1] if len(args) > 1 else kwargs["other"]
    if func in _CLOSE:
        return [torch.isclose(*args, **kwargs).all()], [x, y]
    if x.dim() != y.dim():
        return [], []
    alike = torch.stack(
        [_tensor(a) == _tensor(b) for a, b in zip(x.shape, y.shape, strict=True)] or [torch.tensor(True)]
    )
    # Their sizes are asked for beside their values, so that one function computes all there is to ask.
    return [alike, torch.eq(x, y).all()] if x.shape == y.shape else [alike], [x, y]


def _pieces(func: Any, x: Tensor, *args: Any, dim: int | None = None, **kwargs: Any) -> list[Tensor]:
    """How many pieces a tensor is cut into."""
    by = None if func in _UNBIND else args[0] if args else next(iter(kwargs.values()))
    rest = args if func in _UNBIND else args[1:]
    size = _tensor(x.shape[rest[0] if rest else dim or 0])
    if isinstance(by, (list, tuple)):
        return []
    if by is not None and func in _CHUNK:
        by = ((size + by - 1) // by).clamp(min=1)  # there may be nothing to cut
    return [size if by is None else (size + by - 1) // by]


def _tensor(size: Any) -> Tensor:
    return size if isinstance(size, Tensor) else torch.tensor(size)


def listed(data: Any) -> list[Any]:
    """The elements of nested lists: `torch.tensor([x.sum(), 1])` reads them."""
    return [item for part in data for item in listed(part)] if isinstance(data, (list, tuple)) else [data]
