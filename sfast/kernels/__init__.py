"""Importing this package registers every operator of `torch.ops.sfast`, on any machine: nothing here needs a GPU or Triton."""

from sfast.kernels import attention, conv2d, geglu, group_norm, layer_norm, linear_activation, linear_together

__all__ = ["attention", "conv2d", "geglu", "group_norm", "layer_norm", "linear_activation", "linear_together"]
