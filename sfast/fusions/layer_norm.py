"""Layer normalization, with the residual addition before it where there is one; the sum stays available to others."""

import torch

from sfast.kernels.layer_norm import add_layer_norm_reference, layer_norm_reference
from sfast.rewrite import Fusion

_X = torch.randn(2, 3, 14)
_NORM = ([14], torch.randn(14), torch.randn(14), 1.25e-3)  # normalized_shape, weight, bias, eps

LAYER_NORM = Fusion("layer_norm", layer_norm_reference, (_X, *_NORM), needs=("enable_triton",))
ADD_LAYER_NORM = Fusion("add_layer_norm", add_layer_norm_reference, (_X, _X + 1, *_NORM), needs=("enable_triton",))
