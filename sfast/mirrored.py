"""Numbers that the host knows although they lie on the GPU: timesteps, and whatever is computed from them alone.

Pipelines keep timesteps on the GPU and decide by them in Python (`if t >= boundary`, `1 - t.item() / steps`): each such
question waits until the GPU has computed everything before, and then the GPU waits until the next step has been launched.
A `Mirrored` tensor is what it was, on the GPU, with its values in the host's memory beside it. Where it meets nothing but
its like and Python numbers, the result is computed in both places and is `Mirrored`, too; whoever reads a value reads the
host's. For everything else it is an ordinary tensor, and so is the result.
"""

from __future__ import annotations

from typing import Any

import torch

_T = torch.Tensor
_READ = frozenset(
    (_T.__bool__, _T.__int__, _T.__float__, _T.__index__, _T.item, _T.tolist, _T.is_nonzero, torch.is_nonzero)
)
# What both sides compute alike: comparisons, IEEE arithmetic, shapes and dtypes.
_OPERATORS = ("eq", "ne", "lt", "le", "gt", "ge", "add", "sub", "mul", "neg")
_COMPUTED = frozenset(
    [getattr(owner, name) for owner in (torch, _T) for name in (*_OPERATORS, "div")]
    + [getattr(_T, f"__{name}__") for name in (*_OPERATORS, "truediv", "radd", "rsub", "rmul", "rtruediv", "getitem")]
    + [_T.expand, _T.repeat, _T.view, _T.reshape, _T.flatten, _T.unsqueeze, _T.squeeze, _T.unbind]
    + [_T.float, _T.half, _T.bfloat16, _T.double, _T.long, _T.int]
)


class Mirrored(torch.Tensor):
    """A tensor whose values the host knows, too: `mirror` makes it."""

    plain: torch.Tensor  # the tensor itself, as others know it
    host: torch.Tensor
    version: int  # of `plain` when both were the same

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        hosts = None if kwargs else _on_host(func, args)
        if hosts is not None and (func in _READ or (func is _T.__getitem__ and not isinstance(args[0], Mirrored))):
            return func(*hosts)  # the second reads a table on the host
        result = func(*_plain(args), **_plain(kwargs))
        if func is _T.unbind and hosts is not None:  # also when it is iterated over
            return tuple([mirror(*pair) for pair in zip(result, func(*hosts), strict=True)])
        if result is _plain(args[0]):
            return args[0]
        return result if hosts is None else mirror(result, func(*hosts))

    def fresh(self) -> bool:
        """Whether nobody has written to it since."""
        return self.plain._version == self.version


def mirror(plain: torch.Tensor, host: torch.Tensor) -> torch.Tensor:
    """A tensor, with its values on the host; the tensor itself where nobody would notice that it is written to."""
    if plain.is_inference():
        return plain
    made = plain.as_subclass(Mirrored)
    made.plain, made.host, made.version = plain, host, plain._version
    return made


def plain(value: Any) -> Any:
    """Without what the host knows of it."""
    return value.plain if isinstance(value, Mirrored) else value


def on_host(value: Any) -> Any:
    """The host's copy of a tensor that it knows; everything else as it is."""
    return value.host if isinstance(value, Mirrored) and value.fresh() else plain(value)


def _on_host(func: Any, args: tuple[Any, ...]) -> list[Any] | None:
    """The arguments of a function as the host knows them, if it knows all of them and can compute it."""
    reads_table = func is _T.__getitem__ and not isinstance(args[0], Mirrored)
    if not (
        func in _READ or func in _COMPUTED or (func is _T.to and all(isinstance(a, torch.dtype) for a in args[1:]))
    ):
        return None
    hosts = []
    for place, arg in enumerate(args):
        host = on_host(arg)
        if isinstance(arg, Mirrored) and not arg.fresh():
            return None
        if isinstance(host, torch.Tensor):
            table = reads_table and place == 0
            if not host.is_cpu or (host.dim() and not isinstance(arg, Mirrored) and not table):
                return None
        elif isinstance(host, (list, tuple)) and any(isinstance(each, torch.Tensor) for each in host):
            return None
        hosts.append(host)
    return hosts


def _plain(value: Any) -> Any:
    if isinstance(value, (list, tuple)) and any(isinstance(each, (Mirrored, list, tuple)) for each in value):
        items = [_plain(each) for each in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return plain(value)
