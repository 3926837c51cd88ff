"""What the operators of `modulate.py` compute, in plain PyTorch: their patterns, references and fallbacks."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sfast.kernels.runs import spread

# x, y [B, T, C] or [T, C]; gate, scale, shift broadcast to x: [B, 1, C] mostly; weight, bias [C]. Of sums: gate, scale, shift
# [1, 1, 1, C], and gate_more, scale_more, shift_more [B, T, 1, C]; of runs, those in the order of `run` [B T].


def add_reference(x: Tensor, y: Tensor) -> Tensor:
    """x + y."""
    return x + y


def gate_add_reference(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    """x + gate * y."""
    return x + gate * y


def gate_add_twice_reference(x: Tensor, y: Tensor, gate: Tensor, z: Tensor, gate_z: Tensor) -> Tensor:
    """x + gate * y + gate_z * z."""
    return x + gate * y + gate_z * z


def gate_add_wide_reference(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    """x + y * gate in fp32, rounded to x's precision."""
    return (_wide(x) + y * gate).type_as(x)


def gate_add_sums_reference(x: Tensor, y: Tensor, gate: Tensor, gate_more: Tensor) -> Tensor:
    """x + y * (gate + gate_more) in fp32, rounded to x's precision."""
    return gate_add_wide_reference(x, y, _sum(gate, gate_more))


def gate_rms_norm_add_reference(x: Tensor, y: Tensor, weight_y: Tensor, eps_y: float, gate: Tensor) -> Tensor:
    """x + gate * rms_norm(y)."""
    return x + gate * F.rms_norm(y, weight_y.shape, weight_y, eps_y)


def rms_norm_scale_reference(x: Tensor, weight: Tensor, eps: float, scale: Tensor) -> Tensor:
    """rms_norm(x) * scale."""
    return F.rms_norm(x, weight.shape, weight, eps) * scale


def rms_norm_modulate_reference(x: Tensor, weight: Tensor, eps: float, scale: Tensor) -> Tensor:
    """rms_norm(x) * (1 + scale)."""
    return rms_norm_scale_reference(x, weight, eps, 1 + scale)


def layer_norm_modulate_reference(
    x: Tensor,
    normalized_shape: list[int],
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    scale: Tensor,
    shift: Tensor,
) -> Tensor:
    """layer_norm(x) * (1 + scale) + shift."""
    return F.layer_norm(x, normalized_shape, weight, bias, eps) * (1 + scale) + shift


def layer_norm_wide_reference(
    x: Tensor, normalized_shape: list[int], weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor:
    """layer_norm(x) in fp32, rounded to x's precision: the parameters may be fp32."""
    return F.layer_norm(_wide(x), normalized_shape, weight, bias, eps).type_as(x)


def layer_norm_modulate_wide_reference(
    x: Tensor,
    normalized_shape: list[int],
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    scale: Tensor,
    shift: Tensor,
) -> Tensor:
    """layer_norm(x) * (1 + scale) + shift in fp32, rounded to x's precision."""
    return layer_norm_modulate_reference(_wide(x), normalized_shape, weight, bias, eps, scale, shift).type_as(x)


def layer_norm_modulate_sums_reference(
    x: Tensor,
    normalized_shape: list[int],
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    scale: Tensor,
    scale_more: Tensor,
    shift: Tensor,
    shift_more: Tensor,
) -> Tensor:
    """layer_norm(x) * (1 + scale + scale_more) + shift + shift_more in fp32, rounded to x's precision."""
    modulation = _sum(scale, scale_more), _sum(shift, shift_more)
    return layer_norm_modulate_wide_reference(x, normalized_shape, weight, bias, eps, *modulation)


def of_runs(reference: Callable[..., Any]) -> Callable[..., Any]:
    """The same where each `.._more` has a row for each run: one argument more, last, tells every token's."""
    arguments = list(inspect.signature(reference).parameters.values())
    places = [place for place, argument in enumerate(arguments) if argument.name.endswith("_more")]

    def spreading(*args: Any) -> Any:
        *given, run = args
        for place in places:
            given[place] = spread(given[place], run)
        return reference(*given)

    run = inspect.Parameter("run", inspect.Parameter.POSITIONAL_OR_KEYWORD)
    spreading.__signature__ = inspect.Signature([*arguments, run])  # type: ignore[attr-defined]
    return spreading


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _sum(table: Tensor, more: Tensor) -> Tensor:
    return (table + _wide(more)).squeeze(2)


def then(first: Callable[..., Any], second: Callable[..., Any]) -> Callable[..., tuple[Any, Any]]:
    """(second(total, ..), total) for total = first(..), as a function of the first's arguments and then the second's."""
    before, (_, *behind) = (list(inspect.signature(each).parameters.values()) for each in (first, second))

    def both(*args: Any) -> tuple[Any, Any]:
        total = first(*args[: len(before)])
        return second(total, *args[len(before) :]), total

    both.__signature__ = inspect.Signature([*before, *behind])  # type: ignore[attr-defined]
    return both


add_layer_norm_modulate_reference = then(add_reference, layer_norm_modulate_reference)
gate_add_layer_norm_modulate_reference = then(gate_add_reference, layer_norm_modulate_reference)
gate_add_twice_layer_norm_modulate_reference = then(gate_add_twice_reference, layer_norm_modulate_reference)
gate_add_layer_norm_wide_reference = then(gate_add_wide_reference, layer_norm_wide_reference)
gate_add_layer_norm_modulate_wide_reference = then(gate_add_wide_reference, layer_norm_modulate_wide_reference)
gate_add_layer_norm_sums_reference = then(gate_add_sums_reference, layer_norm_wide_reference)
gate_add_layer_norm_modulate_sums_reference = then(gate_add_sums_reference, layer_norm_modulate_sums_reference)
gate_rms_norm_add_rms_norm_scale_reference = then(gate_rms_norm_add_reference, rms_norm_scale_reference)
gate_rms_norm_add_rms_norm_modulate_reference = then(gate_rms_norm_add_reference, rms_norm_modulate_reference)
