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

// How the rows of a tensor [..., columns] lie: `batches` matrices of evenly spaced rows, evenly spaced themselves.
struct Rows {
  int64_t spacing, batches = 1, batch_spacing = 0;  // elements
};

Rows rows_of(const char* op, const Tensor& tensor, const char* name, bool may_be_several) {
  const int64_t dims = tensor.dim();
  const int64_t columns = tensor.size(dims - 1);
  SFAST_CHECK(tensor.stride(dims - 1) == 1 || columns == 1, op, ": ", name,
              " must be contiguous in its last dimension, got strides ", to_string(tensor.strides()));
  Rows made{columns};
  int64_t rows = 1;  // of one matrix
  for (int64_t d = dims - 2; d >= 0; --d) {
    const int64_t size = tensor.size(d), stride = tensor.stride(d);
    if (size == 1) continue;
    if (rows == 1) made.spacing = stride;
    const int64_t even = made.batches > 1 ? made.batches * made.batch_spacing : rows * made.spacing;
    const bool next_matrix = may_be_several && made.batches == 1 && stride > even;
    SFAST_CHECK((stride == even || next_matrix) && made.spacing >= columns, op, ": ", name,
                " must have evenly spaced rows, got sizes ", to_string(tensor.sizes()), " strides ",
                to_string(tensor.strides()));
    if (next_matrix) made.batch_spacing = stride;
    (next_matrix || made.batches > 1 ? made.batches : rows) *= size;
  }
  SFAST_CHECK((made.spacing % 8 == 0 || rows == 1) && made.batch_spacing % 8 == 0, op, ": rows of ", name,
              " must start at multiples of 16 bytes, got strides ", to_string(tensor.strides()));
  return made;
}

int64_t row_stride(const char* op, const Tensor& tensor, const char* name) {
  return rows_of(op, tensor, name, false).spacing;
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
    case Epilogue::kSwiglu:
      return HopperActivation::kSilu;
    default:
      return HopperActivation::kNone;
  }
}

// After the product: in place, or from the workspace where that is gated and wider than the result.
void add_activation(const MatmulProblem& problem, Way<MatmulPointers>* way) {
  constexpr int64_t kAlign = 256;                                      // bytes
  const int64_t matrix = 2 * problem.m * problem.batches * problem.n;  // bytes of the result
  const int64_t offset = (way->workspace + kAlign - 1) / kAlign * kAlign;
  way->name += " and activation";
  if (problem.is_gated()) way->workspace = offset + (problem.has_two_weights() ? matrix : 2 * matrix);
  way->run = [=, product = std::move(way->run)](const MatmulPointers& at, void* workspace, cudaStream_t stream) {
    const auto activation = hopper_activation(problem.epilogue);
    const bool bfloat16 = problem.dtype == CUDA_R_16BF;
    const int64_t m = problem.m * problem.batches, n = problem.n;
    char* const behind = static_cast<char*>(workspace) + offset;
    if (problem.has_two_weights()) {  // the value takes the result's place
      MatmulPointers of_gate = at;
      of_gate.weight = at.gate_weight, of_gate.bias = at.gate_bias, of_gate.out = behind;
      product(of_gate, workspace, stream);
      product(at, workspace, stream);
      CUDA_CHECK(gate(bfloat16, at.out, behind, at.out, m, n, n, activation, stream));
    } else if (problem.is_gated()) {
      MatmulPointers both = at;
      both.out = behind;
      product(both, workspace, stream);
      CUDA_CHECK(gate(bfloat16, behind, behind + 2 * n, at.out, m, n, 2 * n, activation, stream));
    } else {
      product(at, workspace, stream);
      CUDA_CHECK(activate(bfloat16, at.out, at.out, m, n, activation, stream));
    }
  };
}

HopperProblem hopper_problem(const MatmulProblem& p) {
  HopperProblem made;
  made.bfloat16 = p.dtype == CUDA_R_16BF;
  made.width = made.out_width = p.m, made.channels = p.k, made.out_channels = p.n;
  made.ld_x = p.ld_x, made.ld_weight = p.ld_weight, made.ld_residual = p.ld_residual;
  made.channels2 = p.k2, made.ld_x2 = p.ld_x2;
  made.gated = p.is_gated(), made.two_weights = p.has_two_weights();
  made.activation = hopper_activation(p.epilogue);
  return made;
}

HopperPointers hopper_pointers(const MatmulPointers& at) {
  return {at.x, at.x2, at.weight, at.gate_weight, at.bias, at.gate_bias, at.residual, at.out};
}
#endif

// cuBLASLt's product, and a second pass where it has no epilogue for the activation.
void propose_cublaslt(const MatmulProblem& problem, const Ask& ask, Cache::Ways* ways) {
  MatmulProblem product = problem;
  if (!problem.is_one_call()) {
#ifdef SFAST_HOPPER
    if (!has_hopper(problem.device)) return;
    product.epilogue = Epilogue::kNone;
    if (problem.is_gated() && !problem.has_two_weights()) product.n = 2 * problem.n;
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
  const bool one = ask.first_only || !ask.recipe.empty();
  if (!is_hopper_recipe(ask.recipe) && problem.k2 == 0) {
    propose_cublaslt(problem, ask, &ways);
    if (one && !ways.empty()) return ways;
  }
#ifdef SFAST_HOPPER
  if (problem.batches > 1) return ways;
  propose_hopper(hopper_problem(problem), problem.device, ask, &ways, &hopper_pointers);
#endif
  return ways;
}

// What the ops give: x [..., k], x2 [..., k2], weight [n, k + k2] (gated: [2 n, k], or gate_weight alike), and so on.
struct Operands {
  Tensor x, weight;
  std::optional<Tensor> bias, residual, x2, gate_weight, gate_bias;
};

Tensor multiply(const char* op, const Operands& of, Epilogue epilogue) {
  const auto dtype = half_dtype(of.x, op);
  const Tensor &x = of.x, &weight = of.weight;
  const int64_t k = x.dim() >= 1 ? x.size(x.dim() - 1) : 0, k2 = of.x2 ? of.x2->size(of.x2->dim() - 1) : 0;
  SFAST_CHECK(x.dim() >= 1 && x.numel() > 0 && weight.dim() == 2 && weight.size(1) == k + k2, op,
              ": weight [N, K] must fit x [..., K], got ", to_string(weight.sizes()), " and ", to_string(x.sizes()));
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  MatmulProblem problem{};
  problem.epilogue = epilogue;
  const bool doubled = problem.is_gated() && !problem.has_two_weights();
  const int64_t rows = weight.size(0), m = x.numel() / k, n = doubled ? rows / 2 : rows;
  SFAST_CHECK(n > 0 && n % 8 == 0 && k % 8 == 0 && k2 % 8 == 0 && (!doubled || rows == 2 * n), op,
              ": N and K must be multiples of 8, got ", to_string(weight.sizes()), doubled ? " gated" : "");
  SFAST_CHECK(!of.residual || !problem.is_gated(), op, ": a gated product takes no residual");
  std::vector<int64_t> sizes(x.sizes().begin(), x.sizes().end());
  sizes.back() = n;

  const auto check_bias = [&](const std::optional<Tensor>& bias, const char* name) {
    if (!bias) return;
    check_operand(*bias, name, x, op);
    SFAST_CHECK(bias->dim() == 1 && bias->size(0) == rows && bias->is_contiguous(), op, ": ", name,
                " must be contiguous [", rows, "], got ", to_string(bias->sizes()));
  };
  const auto check_alike = [&](const Tensor& tensor, const char* name, const std::vector<int64_t>& wanted) {
    check_operand(tensor, name, x, op);
    SFAST_CHECK(std::vector<int64_t>(tensor.sizes().begin(), tensor.sizes().end()) == wanted, op, ": ", name,
                " must have sizes ", to_string({wanted.data(), wanted.size()}), ", got ", to_string(tensor.sizes()),
                " for x ", to_string(x.sizes()), " and weight ", to_string(weight.sizes()));
  };
  check_operand(x, "x", x, op);
  check_operand(weight, "weight", x, op);
  check_bias(of.bias, "bias");
  check_bias(of.gate_bias, "gate_bias");
  if (of.residual) check_alike(*of.residual, "residual", sizes);
  if (of.gate_weight) {
    check_alike(*of.gate_weight, "gate_weight", {rows, k});
    SFAST_CHECK(of.gate_bias.has_value() == of.bias.has_value(), op, ": both products have a bias, or none");
    SFAST_CHECK(row_stride(op, *of.gate_weight, "gate_weight") == row_stride(op, weight, "weight"), op,
                ": rows of both weights must be equally far apart");
  }
  if (of.x2) {
    std::vector<int64_t> beside = sizes;
    beside.back() = k2;
    check_alike(*of.x2, "b", beside);
  }

  problem.device = x.get_device_index();
  problem.dtype = dtype == torch::headeronly::ScalarType::Half ? CUDA_R_16F : CUDA_R_16BF;
  const Rows rows_of_x = rows_of(op, x, "x", k2 == 0);
  problem.m = m / rows_of_x.batches, problem.n = n, problem.k = k, problem.k2 = k2;
  problem.batches = rows_of_x.batches, problem.batch_x = rows_of_x.batch_spacing;
  problem.ld_x = rows_of_x.spacing;
  problem.ld_x2 = of.x2 ? row_stride(op, *of.x2, "b") : 0;
  problem.ld_weight = row_stride(op, weight, "weight");
  problem.ld_residual = of.residual ? row_stride(op, *of.residual, "residual") : 0;
  problem.has_bias = of.bias.has_value();
  problem.has_residual = of.residual.has_value();

  std::vector<int64_t> strides(sizes.size(), 1);
  for (size_t d = sizes.size() - 1; d > 0; --d) strides[d - 1] = strides[d] * sizes[d];
  Tensor out = empty_strided(sizes, strides, x);

  const auto address = [](const std::optional<Tensor>& tensor) { return tensor ? tensor->const_data_ptr() : nullptr; };
  const MatmulPointers pointers{x.const_data_ptr(),      weight.const_data_ptr(), address(of.bias),
                                address(of.residual),    out.mutable_data_ptr(),  address(of.x2),
                                address(of.gate_weight), address(of.gate_bias)};
  cache().run(problem.key(), "linear " + problem.describe(), problem.device, current_stream(problem.device), pointers,
              [&](const Ask& ask) { return propose(problem, ask); });
  return out;
}

}  // namespace

Tensor linear(Tensor x, Tensor weight, std::optional<Tensor> bias, std::optional<Tensor> residual,
              std::string activation) {
  return multiply(kOp, {x, weight, bias, residual, {}, {}, {}}, parse_epilogue(activation));
}

Tensor linear_cat(Tensor a, Tensor b, Tensor weight, std::optional<Tensor> bias) {
  constexpr const char* kCat = "sfast_native::linear_cat";
  SFAST_CHECK(a.dim() >= 1 && b.dim() == a.dim() && b.numel() > 0, kCat,
              ": b [..., B] must lie beside a [..., A], got ", to_string(a.sizes()), " and ", to_string(b.sizes()));
  return multiply(kCat, {a, weight, bias, {}, b, {}, {}}, Epilogue::kNone);
}

Tensor linear_swiglu(Tensor x, Tensor weight, std::optional<Tensor> bias, Tensor gate_weight,
                     std::optional<Tensor> gate_bias) {
  return multiply("sfast_native::linear_swiglu", {x, weight, bias, {}, {}, gate_weight, gate_bias}, Epilogue::kSwiglu);
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
