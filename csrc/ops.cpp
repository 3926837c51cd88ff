// The native ops: PyTorch operators over cuDNN and cuBLASLt, on PyTorch's stable ABI, so that one binary serves many
// versions of PyTorch. They raise on what they do not support, with a message that begins with sfast_native; the caller
// then runs plain PyTorch.
#include "ops.h"

#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(sfast_native, m) {
  // act(conv2d(x, weight) + bias + residual), rounded once, float16 or bfloat16. x [N, C, H, W] and the result
  // [N, K, P, Q] are dense channels-last; weight [K, C/groups, R, S] and residual [N, K, P, Q] are copied where they
  // are not. activation: none, relu or silu.
  m.def(
      "conv2d(Tensor x, Tensor weight, Tensor? bias, Tensor? residual, int[] stride, int[] padding, int[] dilation, "
      "int groups, str activation) -> Tensor");

  // act(x weight^T + bias + residual), rounded once. x [..., K], weight [N, K], residual [..., N], float16 or bfloat16,
  // rows evenly spaced, last dimension contiguous; activation: none, relu or gelu_tanh.
  m.def("linear(Tensor x, Tensor weight, Tensor? bias, Tensor? residual, str activation) -> Tensor");

  // One line for each problem met so far: what runs it, its milliseconds, how long the choice took.
  m.def("plans() -> str");

  // The choices measured on a device, one line each, for another process with the same versions of everything: there
  // `recall` takes them over (returning how many it knows), and what they are for need not be measured again.
  m.def("choices(int device) -> str");
  m.def("recall(int device, str choices) -> int");
}

namespace {

std::string plans() {
  return sfast::conv2d_plans() + sfast::linear_plans();
}

std::string choices(int64_t device) {
  return sfast::conv2d_choices(device) + sfast::linear_choices(device);
}

int64_t recall(int64_t device, std::string choices) {
  return sfast::recall_conv2d_choices(device, choices) + sfast::recall_linear_choices(device, choices);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sfast_native, CUDA, m) {
  m.impl("conv2d", TORCH_BOX(&sfast::conv2d));
  m.impl("linear", TORCH_BOX(&sfast::linear));
}

STABLE_TORCH_LIBRARY_IMPL(sfast_native, CompositeExplicitAutograd, m) {
  m.impl("plans", TORCH_BOX(&plans));
  m.impl("choices", TORCH_BOX(&choices));
  m.impl("recall", TORCH_BOX(&recall));
}
