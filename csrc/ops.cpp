// The native ops: PyTorch operators over cuDNN and cuBLASLt, on PyTorch's stable ABI, so that one binary serves many
// versions of PyTorch. They raise on what they do not support, with a message that begins with sfast_native; the caller
// then runs plain PyTorch.
#include "ops.h"

#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(sfast_native, m) {
  // act(conv2d(x, weight) + bias + residual), rounded once, float16 or bfloat16. x [N, C, H, W] and the result
  // [N, K, P, Q] are dense channels-last; weight [K, C/groups, R, S] and residual [N, K, P, Q] are copied where they
  // are not. padding: one integer, two, or four: top, left, bottom, right. activation: none, relu or silu.
  m.def(
      "conv2d(Tensor x, Tensor weight, Tensor? bias, Tensor? residual, int[] stride, int[] padding, int[] dilation, "
      "int groups, str activation) -> Tensor");

  // act(x weight^T + bias + residual), rounded once. x [..., K], weight [N, K], residual [..., N], float16 or bfloat16,
  // rows evenly spaced, last dimension contiguous; activation: none, relu or gelu_tanh; with own_kernels also gelu,
  // silu, and geglu or geglu_tanh without a residual: value * gelu(gate) for [value, gate] = x weight^T + bias, weight
  // [2 N, K].
  m.def("linear(Tensor x, Tensor weight, Tensor? bias, Tensor? residual, str activation) -> Tensor");

  // cat(a, b) weight^T + bias, where our own kernels run: a [..., A], b [..., B], weight [N, A + B], A a multiple
  // of 64.
  m.def("linear_cat(Tensor a, Tensor b, Tensor weight, Tensor? bias) -> Tensor");

  // value * silu(gate) for value = x weight^T + bias and gate = x gate_weight^T + gate_bias, where our own kernels run.
  m.def("linear_swiglu(Tensor x, Tensor weight, Tensor? bias, Tensor gate_weight, Tensor? gate_bias) -> Tensor");

  // group_norm(x + shift), then SiLU if asked for, in one launch. x [N, S, C] contiguous, shift [N, C], weight and bias
  // [C], float16 or bfloat16. The second says whether the first can: there must be kernels of our own in this build, a
  // GPU with clusters, and an x that its multiprocessors hold.
  m.def(
      "group_norm(Tensor x, Tensor? shift, int num_groups, Tensor? weight, Tensor? bias, float eps, bool silu) -> "
      "Tensor");
  m.def("group_norm_takes(Tensor x, int num_groups) -> bool");

  // Whether a device runs the kernels of our own that this build has, so that `linear` takes all its activations.
  m.def("own_kernels(int device) -> bool");

  // softmax(scale query key^T + mask) value, for Hopper. query [B, H, Tq, D], key and value [B, H, Tk, D], float16 or
  // bfloat16, D a multiple of 8 up to 160, any strides of 16-byte multiples with contiguous D; scale positive. mask
  // [B, H, 1, Tk], contiguous in Tk, is added, or boolean and false where a key does not count: without any a row is 0.
  // The result is a view of contiguous [B, Tq, H, D].
  m.def("attention(Tensor query, Tensor key, Tensor value, float scale, Tensor? mask=None) -> Tensor");

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
  m.impl("linear_cat", TORCH_BOX(&sfast::linear_cat));
  m.impl("linear_swiglu", TORCH_BOX(&sfast::linear_swiglu));
  m.impl("group_norm", TORCH_BOX(&sfast::group_norm));
  m.impl("group_norm_takes", TORCH_BOX(&sfast::group_norm_takes));
  m.impl("attention", TORCH_BOX(&sfast::attention));
}

STABLE_TORCH_LIBRARY_IMPL(sfast_native, CompositeExplicitAutograd, m) {
  m.impl("own_kernels", TORCH_BOX(&sfast::own_kernels));
  m.impl("plans", TORCH_BOX(&plans));
  m.impl("choices", TORCH_BOX(&choices));
  m.impl("recall", TORCH_BOX(&recall));
}
