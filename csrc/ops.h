// The ops' C++ faces; their meaning is written beside the schemas in ops.cpp.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

namespace sfast {

using torch::stable::Tensor;

Tensor conv2d(Tensor x, Tensor weight, std::optional<Tensor> bias, std::optional<Tensor> residual,
              std::vector<int64_t> stride, std::vector<int64_t> padding, std::vector<int64_t> dilation, int64_t groups,
              std::string activation);
Tensor linear(Tensor x, Tensor weight, std::optional<Tensor> bias, std::optional<Tensor> residual,
              std::string activation);
Tensor linear_cat(Tensor a, Tensor b, Tensor weight, std::optional<Tensor> bias);
Tensor linear_swiglu(Tensor x, Tensor weight, std::optional<Tensor> bias, Tensor gate_weight,
                     std::optional<Tensor> gate_bias);
Tensor group_norm(Tensor x, std::optional<Tensor> shift, int64_t num_groups, std::optional<Tensor> weight,
                  std::optional<Tensor> bias, double eps, bool silu);
bool group_norm_takes(Tensor x, int64_t num_groups);
Tensor attention(Tensor query, Tensor key, Tensor value, double scale, std::optional<Tensor> mask);

bool own_kernels(int64_t device);

// One line for each problem seen so far: what was chosen, how fast it ran, how long the choice took.
std::string conv2d_plans();
std::string linear_plans();

// What was measured on one device, as text for another process; and its way back, which returns how many lines it took.
std::string conv2d_choices(int64_t device);
std::string linear_choices(int64_t device);
int64_t recall_conv2d_choices(int64_t device, const std::string& choices);
int64_t recall_linear_choices(int64_t device, const std::string& choices);

}  // namespace sfast
