"""The fusions, in the order in which they look for their pattern.

One file for each family: the pattern is the kernel's own plain PyTorch reference, the examples are what it is traced with.
Order matters where one pattern contains another; the line says so.
"""

from __future__ import annotations

from sfast.config import CompilationConfig
from sfast.fusions.attention import ATTENTION, CROSS_ATTENTION, MASKED_ATTENTION, XFORMERS_ATTENTION
from sfast.fusions.cat_channels import CAT_CHANNELS
from sfast.fusions.conv2d import (
    CONV2D_ADD,
    CONV2D_ADD_RELU,
    CONV2D_ADD_SILU,
    CONV2D_BIAS,
    CONV2D_RELU,
    CONV2D_SILU,
    CONV2D_SILU_GATE,
    PAD_CONV2D,
)
from sfast.fusions.group_norm import ADD_GROUP_NORM_SILU, GROUP_NORM, GROUP_NORM_SILU
from sfast.fusions.layer_norm import ADD_LAYER_NORM, LAYER_NORM
from sfast.fusions.linear import (
    LINEAR,
    LINEAR_ADD,
    LINEAR_CAT,
    LINEAR_GEGLU,
    LINEAR_GELU,
    LINEAR_IMAGE_ADD,
    LINEAR_ROUNDED,
    LINEAR_SILU,
    LINEAR_SWIGLU,
    SILU_GATE,
)
from sfast.fusions.linear_attention import LINEAR_ATTENTION
from sfast.fusions.modulate import (
    ADD_LAYER_NORM_MODULATE,
    GATE_ADD,
    GATE_ADD_LAYER_NORM_MODULATE,
    GATE_ADD_TWICE_LAYER_NORM_MODULATE,
    GATE_RMS_NORM_ADD,
    GATE_RMS_NORM_ADD_RMS_NORM_MODULATE,
    GATE_RMS_NORM_ADD_RMS_NORM_SCALE,
    LAYER_NORM_MODULATE,
    LAYER_NORM_WIDE,
    RMS_NORM_MODULATE,
    RMS_NORM_SCALE,
)
from sfast.fusions.modulate_sums import MODULATE_SUMS
from sfast.fusions.rotary import (
    CAT_RMS_NORM,
    CAT_RMS_NORM_ROTARY,
    CAT_RMS_NORM_ROTARY_COMPLEX,
    CAT_TOKENS,
    RMS_NORM,
    RMS_NORM_HEADS_ROTARY_PAIRS,
    RMS_NORM_ROTARY,
    RMS_NORM_ROTARY_COMPLEX,
    ROTARY,
)
from sfast.fusions.upsample import UPSAMPLE_NEAREST2D
from sfast.fusions.video import (
    ADD_SHIFT_TRANSPOSE_LAYER_NORM,
    BLEND,
    BLEND_ADD,
    BLEND_TRANSPOSED,
    BLEND_TRANSPOSED_ADD,
    CONV3D_ADD,
    CONV3D_BIAS,
    SHIFT_TRANSPOSE_LAYER_NORM,
)
from sfast.rewrite import Fusion

FUSIONS: list[Fusion] = [
    *RMS_NORM,  # before all that are made of its operator
    *ROTARY,
    CAT_RMS_NORM_ROTARY,  # the longest first: each of these contains a later one; and before CAT_CHANNELS
    CAT_RMS_NORM_ROTARY_COMPLEX,
    RMS_NORM_ROTARY,
    RMS_NORM_ROTARY_COMPLEX,
    *RMS_NORM_HEADS_ROTARY_PAIRS,
    CAT_RMS_NORM,
    *LAYER_NORM_WIDE,  # before the others, which would leave the conversions; the longest first
    *MODULATE_SUMS,  # made of the operators before
    GATE_ADD_TWICE_LAYER_NORM_MODULATE,  # the longest first
    GATE_ADD_LAYER_NORM_MODULATE,  # before ADD_LAYER_NORM and LAYER_NORM, which would take the norm
    ADD_LAYER_NORM_MODULATE,
    LAYER_NORM_MODULATE,
    GATE_RMS_NORM_ADD_RMS_NORM_MODULATE,  # the longest first
    GATE_RMS_NORM_ADD_RMS_NORM_SCALE,
    GATE_RMS_NORM_ADD,
    RMS_NORM_MODULATE,
    RMS_NORM_SCALE,
    GATE_ADD,  # before ADD_LAYER_NORM, which would leave the product
    LINEAR_GEGLU,  # before LINEAR_GELU and LINEAR_SILU by habit only: their linears are read by the activation alone
    LINEAR_GELU,
    LINEAR_SWIGLU,  # before LINEAR_SILU, which would leave the gate
    LINEAR_SILU,
    CONV2D_SILU_GATE,  # before SILU_GATE, which would leave the convolution
    SILU_GATE,
    ADD_GROUP_NORM_SILU,  # before GROUP_NORM_SILU, which would leave the addition
    GROUP_NORM_SILU,  # before GROUP_NORM, which would leave the SiLU
    GROUP_NORM,
    ADD_SHIFT_TRANSPOSE_LAYER_NORM,  # the longest first; and before LAYER_NORM, which would leave everything before it
    SHIFT_TRANSPOSE_LAYER_NORM,
    ADD_LAYER_NORM,  # before LAYER_NORM, which would leave the addition
    LAYER_NORM,
    BLEND_TRANSPOSED_ADD,  # the longest first: each of these contains a later one
    BLEND_TRANSPOSED,
    BLEND_ADD,  # before CONV3D_ADD, which would take the addition inside it and have x read twice
    BLEND,
    CONV3D_ADD,  # before CONV3D_BIAS, which would leave the addition
    CONV3D_BIAS,
    CONV2D_ADD_SILU,  # the longest first: each of these contains a later one
    CONV2D_ADD_RELU,
    CONV2D_SILU,
    CONV2D_RELU,
    CONV2D_ADD,
    PAD_CONV2D,  # before CONV2D_BIAS, which would leave the padding
    CONV2D_BIAS,
    XFORMERS_ATTENTION,  # before CROSS_ATTENTION and ATTENTION, which have its pattern: who asks for xformers gets it
    CROSS_ATTENTION,  # before LINEAR and ATTENTION, which it contains
    LINEAR_CAT,  # before LINEAR_ADD and LINEAR, which would leave the concatenation
    LINEAR_IMAGE_ADD,
    LINEAR_ROUNDED,  # before LINEAR, which would leave the conversion
    LINEAR_ADD,  # after ADD_LAYER_NORM, which adds at less cost than an epilogue where it can
    LINEAR,  # after all that contain it
    UPSAMPLE_NEAREST2D,
    CAT_CHANNELS,
    CAT_TOKENS,  # after CAT_CHANNELS, which knows images
    ATTENTION,
    MASKED_ATTENTION,
    *LINEAR_ATTENTION,
]


def chosen_fusions(config: CompilationConfig) -> list[Fusion]:
    """The fusions that the configuration asks for, in order."""
    return [fusion for fusion in FUSIONS if all(getattr(config, field) for field in fusion.needs)]
