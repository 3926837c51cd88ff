"""Importing this package registers every operator of `torch.ops.sfast`, on any machine: nothing here needs a GPU or Triton."""

from sfast.kernels import conv2d, geglu, group_norm, layer_norm, linear_activation

__all__ = ["conv2d", "geglu", "group_norm", "layer_norm", "linear_activation"]
