"""The fusions, in the order in which they look for their pattern.

One file for each family: the pattern is the kernel's own plain PyTorch reference, the examples are what it is traced with.
Order matters where one pattern contains another; the line says so.
"""

from __future__ import annotations

from sfast.config import CompilationConfig
from sfast.fusions.attention import XFORMERS_ATTENTION
from sfast.fusions.conv2d import (
    CONV2D_ADD,
    CONV2D_ADD_RELU,
    CONV2D_ADD_SILU,
    CONV2D_BIAS,
    CONV2D_RELU,
    CONV2D_SILU,
)
from sfast.fusions.group_norm import ADD_GROUP_NORM_SILU, GROUP_NORM, GROUP_NORM_SILU
from sfast.fusions.layer_norm import ADD_LAYER_NORM, LAYER_NORM
from sfast.fusions.linear import LINEAR_GEGLU, LINEAR_GELU, LINEAR_SILU
from sfast.rewrite import Fusion

FUSIONS: list[Fusion] = [
    LINEAR_GEGLU,  # before LINEAR_GELU and LINEAR_SILU by habit only: their linears are read by the activation alone
    LINEAR_GELU,
    LINEAR_SILU,
    ADD_GROUP_NORM_SILU,  # before GROUP_NORM_SILU, which would leave the addition; and before CONV2D_ADD, which would
    #                       take the time embedding's [N, C, 1, 1] for a residual
    GROUP_NORM_SILU,  # before GROUP_NORM, which would leave the SiLU
    GROUP_NORM,
    ADD_LAYER_NORM,  # before LAYER_NORM, which would leave the addition
    LAYER_NORM,
    CONV2D_ADD_SILU,  # the longest first: each of these contains a later one
    CONV2D_ADD_RELU,
    CONV2D_SILU,
    CONV2D_RELU,
    CONV2D_ADD,
    CONV2D_BIAS,
    XFORMERS_ATTENTION,
]


def chosen_fusions(config: CompilationConfig) -> list[Fusion]:
    """The fusions that the configuration asks for, in order."""
    return [fusion for fusion in FUSIONS if all(getattr(config, field) for field in fusion.needs)]
