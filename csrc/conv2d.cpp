#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/ops.h>

#include <memory>

#include "check.h"
#include "cudnn_graph.h"
#include "hopper_ways.h"
#include "matmul.h"
#include "ops.h"
#include "plan_cache.h"
#include "runtime.h"

namespace sfast {
namespace {

constexpr const char* kOp = "sfast_native::conv2d";
constexpr int64_t kMostWorkspace = 256ll << 20;  // bytes
constexpr int kMostAlgorithms = 12, kMostPlans = 24;

using Cache = PlanCache<ConvProblem::kFields, ConvPointers>;
Cache& cache() {
  static Cache* const made = new Cache("conv2d");  // never destroyed: libraries that it holds may be gone at exit
  return *made;
}

std::vector<int64_t> channels_last_strides(const std::vector<int64_t>& sizes) {
  return {sizes[1] * sizes[2] * sizes[3], 1, sizes[3] * sizes[1], sizes[1]};
}

bool is_channels_last(const Tensor& tensor) {
  const std::vector<int64_t> sizes(tensor.sizes().begin(), tensor.sizes().end());
  const std::vector<int64_t> strides = channels_last_strides(sizes);
  for (size_t d = 0; d < 4; ++d) {
    if (sizes[d] != 1 && tensor.stride(d) != strides[d]) return false;
  }
  return true;
}

// The tensor itself, or a copy in the layout that the kernels read.
Tensor to_channels_last(const Tensor& tensor) {
  if (is_channels_last(tensor)) return tensor;
  return torch::stable::contiguous(tensor, torch::headeronly::MemoryFormat::ChannelsLast);
}

// One integer stands for both dimensions, as in torch.nn.functional.conv2d.
void read_pair(const std::vector<int64_t>& values, const char* name, int64_t least, int64_t pair[2]) {
  SFAST_CHECK(values.size() == 1 || values.size() == 2, kOp, ": ", name, " must be one or two integers, got ",
              values.size());
  pair[0] = values.front(), pair[1] = values.back();
  SFAST_CHECK(pair[0] >= least && pair[1] >= least, kOp, ": ", name, " must be at least ", least, ", got ", pair[0],
              ", ", pair[1]);
}

// `padding` on both sides together.
int64_t out_size(int64_t in, int64_t filter, int64_t stride, int64_t padding, int64_t dilation) {
  return (in + padding - dilation * (filter - 1) - 1) / stride + 1;
}

bool is_matmul(const ConvProblem& p) {
  return p.r == 1 && p.s == 1 && p.stride[0] == 1 && p.stride[1] == 1 && p.p == p.h && p.q == p.w && p.groups == 1 &&
         p.c % 8 == 0 && p.padding[0] == 0 && p.padding[1] == 0;
}

// A 1x1 convolution over channels-last memory is a matrix product over the pixels.
void propose_matmuls(const ConvProblem& p, int most, const std::string& recipe, Cache::Ways* ways) {
  MatmulProblem problem{};
  problem.device = p.device;
  problem.dtype = p.dtype == CUDNN_DATA_HALF ? CUDA_R_16F : CUDA_R_16BF;
  problem.m = p.n * p.h * p.w, problem.n = p.k, problem.k = p.c;
  problem.ld_x = p.c, problem.ld_weight = p.c, problem.ld_residual = p.k;
  problem.has_bias = p.has_bias, problem.has_residual = p.has_residual;
  problem.epilogue = p.activation == Activation::kRelu ? Epilogue::kRelu : Epilogue::kNone;
  const cublasLtHandle_t handle = cublaslt_handle(p.device);
  int index = 0;
  for (const MatmulAlgorithm& algorithm :
       recipe.empty() ? matmul_algorithms(handle, problem, most) : recalled_algorithm(handle, problem, recipe)) {
    ways->push_back({"cublasLt " + std::to_string(index++), algorithm.workspace,
                     [=](const ConvPointers& at, void* workspace, cudaStream_t stream) {
                       launch(handle, problem, algorithm, {at.x, at.weight, at.bias, at.residual, at.out}, workspace,
                              stream);
                     },
                     [=] { return recipe.empty() ? recipe_of(algorithm) : recipe; }});
  }
}

// cuDNN's precompiled kernels, which cost nothing to set up. Those that it would compile now take half a second each,
// and the functional fallbacks of its heuristics are slower than PyTorch's own convolution: neither is proposed.
void propose_plans(ConvProblem p, cudnnHandle_t handle, int most, const std::string& recipe, Cache::Ways* ways) {
  const void* no_bias = nullptr;
  if (!p.has_bias && (p.has_residual || p.activation != Activation::kNone)) {
    p.has_bias = 1;  // there is no kernel without one: add zeros
    no_bias = zeros(2 * p.k, p.device);
  }
  const Descriptor graph = operation_graph(handle, p);
  std::vector<EngineConfig> configs;
  if (recipe.empty()) {
    configs = engine_configs(graph, CUDNN_HEUR_MODE_A, kMostPlans);
  } else {
    configs.push_back(recalled_config(graph, recipe));
  }
  for (EngineConfig& proposed : configs) {
    if (most == 0) break;
    if (proposed.runtime_compiled || !proposed.exact) continue;
    try {
      const auto config = std::make_shared<const EngineConfig>(std::move(proposed));
      const auto plan = std::make_shared<const Plan>(make_plan(handle, *config));
      if (plan->workspace > kMostWorkspace) continue;
      const int64_t device = p.device;
      ways->push_back({"cuDNN engine " + std::to_string(config->engine) + " config " + std::to_string(config->rank),
                       plan->workspace,
                       [=](ConvPointers at, void* workspace, cudaStream_t stream) {
                         if (no_bias != nullptr) at.bias = no_bias;
                         launch(cudnn_handle(device, stream), *plan, at, workspace);
                       },
                       [=] { return recipe.empty() ? recipe_of(*config) : recipe; }});
      --most;
    } catch (const std::runtime_error&) {
      continue;  // the heuristics may name an engine that then refuses this shape: the next one is tried
    }
  }
}

#ifdef SFAST_HOPPER
HopperProblem hopper_problem(const ConvProblem& p) {
  HopperProblem made;
  made.bfloat16 = p.dtype == CUDNN_DATA_BFLOAT16;
  made.images = p.n, made.height = p.h, made.width = p.w, made.channels = made.ld_x = p.c;
  made.out_height = p.p, made.out_width = p.q, made.out_channels = made.ld_residual = p.k;
  made.filter[0] = p.r, made.filter[1] = p.s;
  for (int d = 0; d < 2; ++d) {
    made.stride[d] = p.stride[d], made.padding[d] = p.padding[d], made.dilation[d] = p.dilation[d];
  }
  made.ld_weight = p.r * p.s * p.c;
  made.activation = p.activation == Activation::kRelu ? HopperActivation::kRelu : HopperActivation::kNone;
  if (is_matmul(p)) {  // the rows of all images are rows of one matrix
    made.width = made.out_width = p.n * p.h * p.w;
    made.images = made.height = made.out_height = 1;
  }
  return made;
}
#endif

Cache::Ways propose(const ConvProblem& p, cudaStream_t stream, const Ask& ask) {
  Cache::Ways ways;
  const bool one = ask.first_only || !ask.recipe.empty();
  if (!is_hopper_recipe(ask.recipe)) {
    if (is_matmul(p)) propose_matmuls(p, ask.first_only ? 1 : kMostAlgorithms, ask.recipe, &ways);
    if (one && !ways.empty()) return ways;
    propose_plans(p, cudnn_handle(p.device, stream), ask.first_only ? 1 : kMostPlans, ask.recipe, &ways);
    if (one && !ways.empty()) return ways;
  }
#ifdef SFAST_HOPPER
  if (p.groups == 1) propose_hopper(hopper_problem(p), p.device, ask, &ways);
#endif
  return ways;
}

// In place, by PyTorch: cuDNN has no precompiled kernel with a SiLU in it, and compiling one takes half a second.
Tensor silu_(const Tensor& x) {
  StableIValue stack[] = {torch::stable::detail::from(x)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::silu_", "", stack, TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

}  // namespace

Tensor conv2d(Tensor x, Tensor weight, std::optional<Tensor> bias, std::optional<Tensor> residual,
              std::vector<int64_t> stride, std::vector<int64_t> padding, std::vector<int64_t> dilation, int64_t groups,
              std::string activation) {
  SFAST_CHECK(activation == "none" || activation == "relu" || activation == "silu", kOp,
              ": activation must be none, relu or silu, got ", activation);
  const auto dtype = half_dtype(x, kOp);
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  SFAST_CHECK(x.dim() == 4 && weight.dim() == 4, kOp, ": x and weight must have 4 dimensions, got ",
              to_string(x.sizes()), " and ", to_string(weight.sizes()));

  ConvProblem p{};
  p.device = x.get_device_index();
  p.dtype = dtype == torch::headeronly::ScalarType::Half ? CUDNN_DATA_HALF : CUDNN_DATA_BFLOAT16;
  p.n = x.size(0), p.c = x.size(1), p.h = x.size(2), p.w = x.size(3);
  p.k = weight.size(0), p.r = weight.size(2), p.s = weight.size(3);
  read_pair(stride, "stride", 1, p.stride);
  // Four integers of padding: before the first row and column, behind the last row and column.
  int64_t padding_behind[2];
  const bool lopsided = padding.size() == 4;
  read_pair(lopsided ? std::vector<int64_t>{padding[2], padding[3]} : padding, "padding", 0, padding_behind);
  read_pair(lopsided ? std::vector<int64_t>{padding[0], padding[1]} : padding, "padding", 0, p.padding);
  read_pair(dilation, "dilation", 1, p.dilation);
  p.groups = groups;
  p.activation = activation == "relu" ? Activation::kRelu : Activation::kNone;
  SFAST_CHECK(groups >= 1 && p.c == weight.size(1) * groups && p.k % groups == 0, kOp,
              ": weight [K, C/groups, R, S] must fit x [N, C, H, W], got ", to_string(weight.sizes()), " and ",
              to_string(x.sizes()), " with groups ", groups);
  p.p = out_size(p.h, p.r, p.stride[0], p.padding[0] + padding_behind[0], p.dilation[0]);
  p.q = out_size(p.w, p.s, p.stride[1], p.padding[1] + padding_behind[1], p.dilation[1]);
  SFAST_CHECK(x.numel() > 0 && weight.numel() > 0 && p.p > 0 && p.q > 0, kOp, ": nothing to compute for x ",
              to_string(x.sizes()), " and weight ", to_string(weight.sizes()));

  SFAST_CHECK(p.k % 8 == 0, kOp, ": output channels must be a multiple of 8, got ", p.k,
              " (cuDNN pads others with a kernel for each operand, slower than the plain convolution)");
  check_operand(x, "x", x, kOp);
  SFAST_CHECK(is_channels_last(x), kOp, ": x must be dense channels-last, got sizes ", to_string(x.sizes()),
              " strides ", to_string(x.strides()));
  weight = to_channels_last(weight);
  check_operand(weight, "weight", x, kOp);
  const std::vector<int64_t> sizes = {p.n, p.k, p.p, p.q};
  if (bias) {
    check_operand(*bias, "bias", x, kOp);
    SFAST_CHECK(bias->dim() == 1 && bias->size(0) == p.k && bias->is_contiguous(), kOp, ": bias must be contiguous [",
                p.k, "], got ", to_string(bias->sizes()));
  }
  if (residual) {
    SFAST_CHECK(std::vector<int64_t>(residual->sizes().begin(), residual->sizes().end()) == sizes, kOp,
                ": residual must have the result's shape, got ", to_string(residual->sizes()), " for x ",
                to_string(x.sizes()), " and weight ", to_string(weight.sizes()));
    residual = to_channels_last(*residual);
    check_operand(*residual, "residual", x, kOp);
  }
  p.has_bias = bias.has_value();
  p.has_residual = residual.has_value();

  Tensor out = empty_strided(sizes, channels_last_strides(sizes), x);
  const cudaStream_t stream = current_stream(p.device);
  const ConvPointers pointers{x.const_data_ptr(), weight.const_data_ptr(), bias ? bias->const_data_ptr() : nullptr,
                              residual ? residual->const_data_ptr() : nullptr, out.mutable_data_ptr()};
  cache().run(p.key(), "conv2d " + p.describe(), p.device, stream, pointers,
              [&](const Ask& ask) { return propose(p, stream, ask); });
  return activation == "silu" ? silu_(out) : out;
}

std::string conv2d_plans() {
  return cache().describe();
}

std::string conv2d_choices(int64_t device) {
  return cache().choices(device);
}

int64_t recall_conv2d_choices(int64_t device, const std::string& choices) {
  return cache().recall(device, choices);
}

}  // namespace sfast
