#include <torch/csrc/stable/accelerator.h>

#include "check.h"
#include "matmul.h"
#include "ops.h"
#include "plan_cache.h"
#include "runtime.h"

namespace sfast {
namespace {

constexpr const char* kOp = "sfast_native::linear";
constexpr int kMostAlgorithms = 12;

using Cache = PlanCache<MatmulProblem::kFields, MatmulPointers>;
Cache& cache() {
  static Cache* const made = new Cache("linear");  // never destroyed: libraries that it holds may be gone at exit
  return *made;
}

Epilogue parse_epilogue(const std::string& activation) {
  if (activation == "none") return Epilogue::kNone;
  if (activation == "relu") return Epilogue::kRelu;
  if (activation == "gelu_tanh") return Epilogue::kGeluTanh;
  fail(kOp, ": activation must be none, relu or gelu_tanh, got ", activation);
}

// Elements from one row of the last dimension to the next, when all rows are evenly spaced.
int64_t row_stride(const Tensor& tensor, const char* name) {
  const int64_t dims = tensor.dim();
  const int64_t columns = tensor.size(dims - 1);
  SFAST_CHECK(tensor.stride(dims - 1) == 1 || columns == 1, kOp, ": ", name,
              " must be contiguous in its last dimension, got strides ", to_string(tensor.strides()));
  int64_t rows = 1, spacing = columns;
  for (int64_t d = dims - 2; d >= 0; --d) {
    if (tensor.size(d) == 1) continue;
    if (rows == 1) spacing = tensor.stride(d);
    SFAST_CHECK(tensor.stride(d) == rows * spacing && spacing >= columns, kOp, ": ", name,
                " must have evenly spaced rows, got sizes ", to_string(tensor.sizes()), " strides ",
                to_string(tensor.strides()));
    rows *= tensor.size(d);
  }
  SFAST_CHECK(spacing % 8 == 0 || rows == 1, kOp, ": rows of ", name,
              " must start at multiples of 16 bytes, got a spacing of ", spacing, " elements");
  return spacing;
}

}  // namespace

Tensor linear(Tensor x, Tensor weight, std::optional<Tensor> bias, std::optional<Tensor> residual,
              std::string activation) {
  const auto dtype = half_dtype(x, kOp);
  SFAST_CHECK(x.dim() >= 1 && x.numel() > 0 && weight.dim() == 2 && weight.size(1) == x.size(x.dim() - 1), kOp,
              ": weight [N, K] must fit x [..., K], got ", to_string(weight.sizes()), " and ", to_string(x.sizes()));
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const int64_t k = weight.size(1), n = weight.size(0), m = x.numel() / k;
  SFAST_CHECK(n > 0 && n % 8 == 0 && k % 8 == 0, kOp, ": N and K must be multiples of 8, got ",
              to_string(weight.sizes()));
  std::vector<int64_t> sizes(x.sizes().begin(), x.sizes().end());
  sizes.back() = n;

  check_operand(x, "x", x, kOp);
  check_operand(weight, "weight", x, kOp);
  if (bias) {
    check_operand(*bias, "bias", x, kOp);
    SFAST_CHECK(bias->dim() == 1 && bias->size(0) == n && bias->is_contiguous(), kOp, ": bias must be contiguous [", n,
                "], got ", to_string(bias->sizes()));
  }
  if (residual) {
    check_operand(*residual, "residual", x, kOp);
    SFAST_CHECK(std::vector<int64_t>(residual->sizes().begin(), residual->sizes().end()) == sizes, kOp,
                ": residual must have the result's shape, got ", to_string(residual->sizes()), " for x ",
                to_string(x.sizes()), " and weight ", to_string(weight.sizes()));
  }

  MatmulProblem problem{};
  problem.device = x.get_device_index();
  problem.dtype = dtype == torch::headeronly::ScalarType::Half ? CUDA_R_16F : CUDA_R_16BF;
  problem.m = m, problem.n = n, problem.k = k;
  problem.ld_x = row_stride(x, "x");
  problem.ld_weight = row_stride(weight, "weight");
  problem.ld_residual = residual ? row_stride(*residual, "residual") : 0;
  problem.has_bias = bias.has_value();
  problem.has_residual = residual.has_value();
  problem.epilogue = parse_epilogue(activation);

  std::vector<int64_t> strides(sizes.size(), 1);
  for (size_t d = sizes.size() - 1; d > 0; --d) strides[d - 1] = strides[d] * sizes[d];
  Tensor out = empty_strided(sizes, strides, x);

  const cudaStream_t stream = current_stream(problem.device);
  const cublasLtHandle_t handle = cublaslt_handle(problem.device);
  const MatmulPointers pointers{x.const_data_ptr(), weight.const_data_ptr(), bias ? bias->const_data_ptr() : nullptr,
                                residual ? residual->const_data_ptr() : nullptr, out.mutable_data_ptr()};
  cache().run(problem.key(), "linear " + problem.describe(), problem.device, stream, pointers, [&](const Ask& ask) {
    Cache::Ways ways;
    for (const MatmulAlgorithm& algorithm :
         ask.recipe.empty() ? matmul_algorithms(handle, problem, ask.first_only ? 1 : kMostAlgorithms)
                            : recalled_algorithm(handle, problem, ask.recipe)) {
      ways.push_back({"cublasLt " + std::to_string(ways.size()), algorithm.workspace,
                      [=](const MatmulPointers& at, void* workspace, cudaStream_t on) {
                        launch(handle, problem, algorithm, at, workspace, on);
                      },
                      [=, recipe = ask.recipe] { return recipe.empty() ? recipe_of(algorithm) : recipe; }});
    }
    return ways;
  });
  return out;
}

std::string linear_plans() {
  return cache().describe();
}

std::string linear_choices(int64_t device) {
  return cache().choices(device);
}

int64_t recall_linear_choices(int64_t device, const std::string& choices) {
  return cache().recall(device, choices);
}

}  // namespace sfast
