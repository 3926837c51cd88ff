"""Importing this package registers every operator of `torch.ops.sfast`, on any machine: nothing here needs a GPU or Triton."""

from sfast.kernels import (
    attention,
    blend,
    cat_channels,
    conv2d,
    conv3d,
    cross_attention,
    geglu,
    group_norm,
    layer_norm,
    linear,
    linear_activation,
    linear_together,
    pad_conv2d,
    transpose_layer_norm,
    upsample,
    xformers_attention,
)

__all__ = [
    "attention",
    "blend",
    "cat_channels",
    "conv2d",
    "conv3d",
    "cross_attention",
    "geglu",
    "group_norm",
    "layer_norm",
    "linear",
    "linear_activation",
    "linear_together",
    "pad_conv2d",
    "transpose_layer_norm",
    "upsample",
    "xformers_attention",
]
