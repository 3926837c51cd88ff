#include <torch/csrc/stable/accelerator.h>

#include <map>
#include <string>
#include <utility>

#include "check.h"
#include "hopper_ways.h"
#include "matmul.h"
#include "ops.h"
#include "plan_cache.h"
#include "runtime.h"

#ifdef SFAST_HOPPER
#include "activation.h"
#endif

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
  static const std::map<std::string, Epilogue> kKnown = {
      {"none", Epilogue::kNone},           {"relu", Epilogue::kRelu}, {"gelu_tanh", Epilogue::kGeluTanh},
      {"gelu", Epilogue::kGelu},           {"silu", Epilogue::kSilu}, {"geglu", Epilogue::kGeglu},
      {"geglu_tanh", Epilogue::kGegluTanh}};
  const auto found = kKnown.find(activation);
  SFAST_CHECK(found != kKnown.end(), kOp,
              ": activation must be none, relu, gelu_tanh, gelu, silu, geglu or geglu_tanh, got ", activation);
  return found->second;
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

#ifdef SFAST_HOPPER
HopperActivation hopper_activation(Epilogue epilogue) {
  switch (epilogue) {
    case Epilogue::kRelu:
      return HopperActivation::kRelu;
    case Epilogue::kGeluTanh:
    case Epilogue::kGegluTanh:
      return HopperActivation::kGeluTanh;
    case Epilogue::kGelu:
    case Epilogue::kGeglu:
      return HopperActivation::kGelu;
    case Epilogue::kSilu:
      return HopperActivation::kSilu;
    default:
      return HopperActivation::kNone;
  }
}

// After the product, from the workspace where it is gated (and wider than the result), else in place.
void add_activation(const MatmulProblem& problem, Way<MatmulPointers>* way) {
  constexpr int64_t kAlign = 256;                                           // bytes
  const int64_t wide = problem.is_gated() ? 4 * problem.m * problem.n : 0;  // bytes
  const int64_t offset = (way->workspace + kAlign - 1) / kAlign * kAlign;
  way->name += " and activation";
  if (wide > 0) way->workspace = offset + wide;
  way->run = [=, product = std::move(way->run)](const MatmulPointers& at, void* workspace, cudaStream_t stream) {
    MatmulPointers to = at;
    if (wide > 0) to.out = static_cast<char*>(workspace) + offset;
    product(to, workspace, stream);
    const auto activation = hopper_activation(problem.epilogue);
    CUDA_CHECK((wide > 0 ? gate : activate)(problem.dtype == CUDA_R_16BF, to.out, at.out, problem.m, problem.n,
                                            activation, stream));
  };
}

HopperProblem hopper_problem(const MatmulProblem& p) {
  HopperProblem made;
  made.bfloat16 = p.dtype == CUDA_R_16BF;
  made.width = made.out_width = p.m, made.channels = p.k, made.out_channels = p.n;
  made.ld_x = p.ld_x, made.ld_weight = p.ld_weight, made.ld_residual = p.ld_residual;
  made.gated = p.is_gated();
  made.activation = hopper_activation(p.epilogue);
  return made;
}
#endif

// cuBLASLt's product, and a second pass where it has no epilogue for the activation.
void propose_cublaslt(const MatmulProblem& problem, const Ask& ask, Cache::Ways* ways) {
  MatmulProblem product = problem;
  if (!problem.is_one_call()) {
#ifdef SFAST_HOPPER
    if (!has_hopper(problem.device)) return;
    product.epilogue = Epilogue::kNone;
    if (problem.is_gated()) product.n = 2 * problem.n;
#else
    return;
#endif
  }
  const cublasLtHandle_t handle = cublaslt_handle(problem.device);
  int index = 0;
  for (const MatmulAlgorithm& algorithm : ask.recipe.empty()
                                              ? matmul_algorithms(handle, product, ask.first_only ? 1 : kMostAlgorithms)
                                              : recalled_algorithm(handle, product, ask.recipe)) {
    Way<MatmulPointers> way{"cublasLt " + std::to_string(index++), algorithm.workspace,
                            [=](const MatmulPointers& at, void* workspace, cudaStream_t on) {
                              launch(handle, product, algorithm, at, workspace, on);
                            },
                            [=, recipe = ask.recipe] { return recipe.empty() ? recipe_of(algorithm) : recipe; }};
#ifdef SFAST_HOPPER
    if (!problem.is_one_call()) add_activation(problem, &way);
#endif
    ways->push_back(std::move(way));
  }
}

Cache::Ways propose(const MatmulProblem& problem, const Ask& ask) {
  Cache::Ways ways;
  if (!is_hopper_recipe(ask.recipe)) propose_cublaslt(problem, ask, &ways);
#ifdef SFAST_HOPPER
  const bool decided = !ways.empty() && (ask.first_only || !ask.recipe.empty());
  if (!decided) propose_hopper(hopper_problem(problem), problem.device, ask, &ways);
#endif
  return ways;
}

}  // namespace

Tensor linear(Tensor x, Tensor weight, std::optional<Tensor> bias, std::optional<Tensor> residual,
              std::string activation) {
  const auto dtype = half_dtype(x, kOp);
  SFAST_CHECK(x.dim() >= 1 && x.numel() > 0 && weight.dim() == 2 && weight.size(1) == x.size(x.dim() - 1), kOp,
              ": weight [N, K] must fit x [..., K], got ", to_string(weight.sizes()), " and ", to_string(x.sizes()));
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  MatmulProblem problem{};
  problem.epilogue = parse_epilogue(activation);
  const int64_t k = weight.size(1), rows = weight.size(0), m = x.numel() / k;
  const int64_t n = problem.is_gated() ? rows / 2 : rows;
  SFAST_CHECK(n > 0 && n % 8 == 0 && k % 8 == 0 && (!problem.is_gated() || rows == 2 * n), kOp,
              ": N and K must be multiples of 8, got ", to_string(weight.sizes()), problem.is_gated() ? " gated" : "");
  SFAST_CHECK(!residual || !problem.is_gated(), kOp, ": a gated product takes no residual");
  std::vector<int64_t> sizes(x.sizes().begin(), x.sizes().end());
  sizes.back() = n;

  check_operand(x, "x", x, kOp);
  check_operand(weight, "weight", x, kOp);
  if (bias) {
    check_operand(*bias, "bias", x, kOp);
    SFAST_CHECK(bias->dim() == 1 && bias->size(0) == rows && bias->is_contiguous(), kOp, ": bias must be contiguous [",
                rows, "], got ", to_string(bias->sizes()));
  }
  if (residual) {
    check_operand(*residual, "residual", x, kOp);
    SFAST_CHECK(std::vector<int64_t>(residual->sizes().begin(), residual->sizes().end()) == sizes, kOp,
                ": residual must have the result's shape, got ", to_string(residual->sizes()), " for x ",
                to_string(x.sizes()), " and weight ", to_string(weight.sizes()));
  }

  problem.device = x.get_device_index();
  problem.dtype = dtype == torch::headeronly::ScalarType::Half ? CUDA_R_16F : CUDA_R_16BF;
  problem.m = m, problem.n = n, problem.k = k;
  problem.ld_x = row_stride(x, "x");
  problem.ld_weight = row_stride(weight, "weight");
  problem.ld_residual = residual ? row_stride(*residual, "residual") : 0;
  problem.has_bias = bias.has_value();
  problem.has_residual = residual.has_value();

  std::vector<int64_t> strides(sizes.size(), 1);
  for (size_t d = sizes.size() - 1; d > 0; --d) strides[d - 1] = strides[d] * sizes[d];
  Tensor out = empty_strided(sizes, strides, x);

  const cudaStream_t stream = current_stream(problem.device);
  const MatmulPointers pointers{x.const_data_ptr(), weight.const_data_ptr(), bias ? bias->const_data_ptr() : nullptr,
                                residual ? residual->const_data_ptr() : nullptr, out.mutable_data_ptr()};
  cache().run(problem.key(), "linear " + problem.describe(), problem.device, stream, pointers,
              [&](const Ask& ask) { return propose(problem, ask); });
  return out;
}

bool own_kernels([[maybe_unused]] int64_t device) {
#ifdef SFAST_HOPPER
  return has_hopper(device);
#else
  return false;
#endif
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
