"""Videos: convolutions over frames with their bias and residual, blending, and the way between orders of tokens."""

import torch

from sfast.kernels import blend, conv3d, transpose_layer_norm
from sfast.rewrite import Fusion

_X, _WEIGHT, _BIAS = torch.randn(1, 6, 12, 13, 14), torch.randn(4, 3, 1, 1, 1), torch.randn(4)
_PLACE = ([2, 3, 1], [4, 5, 6], [7, 8, 9], 2)  # stride, padding, dilation, groups
_RESIDUAL = torch.randn(1, 4, 10, 8, 26)
_CNN = ("enable_cnn_optimization", "enable_native")

CONV3D_BIAS = Fusion("conv3d_bias", conv3d.conv3d_bias_reference, (_X, _WEIGHT, _BIAS, *_PLACE), needs=_CNN)
CONV3D_ADD = Fusion("conv3d_add", conv3d.conv3d_add_reference, (_X, _WEIGHT, _BIAS, _RESIDUAL, *_PLACE), needs=_CNN)

_ALPHA, _TOKENS = torch.rand(6, 1, 1), torch.randn(6, 5, 14)  # two videos of three frames of five places
_TURNED, _PLACES, _FRAMES = torch.randn(10, 3, 14), [2, 5, 3, 14], [6, 5, 14]
_TRITON = ("enable_triton",)

BLEND = Fusion("blend", blend.blend_reference, (_TOKENS, _TOKENS + 1, _ALPHA), needs=_TRITON)
BLEND_ADD = Fusion("blend_add", blend.blend_add_reference, (_TOKENS, _TOKENS + 1, _ALPHA), needs=_TRITON)
BLEND_TRANSPOSED = Fusion(
    "blend_transposed",
    blend.blend_transposed_reference,
    (_TOKENS, _TURNED, _ALPHA, _PLACES, _FRAMES),
    needs=_TRITON,
)
BLEND_TRANSPOSED_ADD = Fusion(
    "blend_transposed_add",
    blend.blend_transposed_add_reference,
    (_TOKENS, _TURNED, _TURNED + 1, _ALPHA, _PLACES, _FRAMES),
    needs=_TRITON,
)

_SHIFT, _GRID, _SHAPE = torch.randn(6, 1, 14), [2, 3, 5, 14], [10, 3, 14]
_NORM = ([14], torch.randn(14), torch.randn(14), 1.25e-3)  # normalized_shape, weight, bias, eps

SHIFT_TRANSPOSE_LAYER_NORM = Fusion(
    "shift_transpose_layer_norm",
    transpose_layer_norm.shift_transpose_layer_norm_reference,
    (_TOKENS, _SHIFT, _GRID, _SHAPE, *_NORM),
    needs=_TRITON,
)
ADD_SHIFT_TRANSPOSE_LAYER_NORM = Fusion(
    "add_shift_transpose_layer_norm",
    transpose_layer_norm.add_shift_transpose_layer_norm_reference,
    (_TOKENS, _TOKENS + 1, _SHIFT, _GRID, _SHAPE, *_NORM),
    needs=_TRITON,
)
