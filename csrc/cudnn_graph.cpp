#include "cudnn_graph.h"

#include <algorithm>
#include <limits>
#include <optional>
#include <sstream>

#include "check.h"

namespace sfast {
namespace {

constexpr int64_t kX = 1, kWeight = 2, kBias = 3, kResidual = 4, kOut = 5, kFirstVirtual = 10;
constexpr int64_t kAlignment = 16;  // bytes; checked by the caller
constexpr const char* kRecipe = "cuDNN";

using Dims = std::array<int64_t, 4>;

Dims channels_last_strides(const Dims& d) {
  return {d[1] * d[2] * d[3], 1, d[3] * d[1], d[1]};
}

Descriptor tensor(int64_t uid, cudnnDataType_t dtype, const Dims& dims, bool is_virtual) {
  const Dims strides = channels_last_strides(dims);
  Descriptor t(CUDNN_BACKEND_TENSOR_DESCRIPTOR);
  t.set(CUDNN_ATTR_TENSOR_UNIQUE_ID, uid)
      .set(CUDNN_ATTR_TENSOR_DATA_TYPE, CUDNN_TYPE_DATA_TYPE, 1, &dtype)
      .set(CUDNN_ATTR_TENSOR_DIMENSIONS, CUDNN_TYPE_INT64, 4, dims.data())
      .set(CUDNN_ATTR_TENSOR_STRIDES, CUDNN_TYPE_INT64, 4, strides.data())
      .set(CUDNN_ATTR_TENSOR_BYTE_ALIGNMENT, kAlignment)
      .set(CUDNN_ATTR_TENSOR_IS_VIRTUAL, CUDNN_TYPE_BOOLEAN, 1, &is_virtual)
      .finalize();
  return t;
}

Descriptor convolution(const ConvProblem& problem, const Descriptor& x, const Descriptor& weight, const Descriptor& y) {
  const cudnnDataType_t compute = CUDNN_DATA_FLOAT;
  const cudnnConvolutionMode_t mode = CUDNN_CROSS_CORRELATION;
  const float alpha = 1.0f, beta = 0.0f;
  // Behind the last pixel there is as much padding as before the first, unless that gives another size.
  int64_t padding_behind[2];
  const int64_t in[] = {problem.h, problem.w}, filter[] = {problem.r, problem.s}, out[] = {problem.p, problem.q};
  for (int d = 0; d < 2; ++d) {
    const int64_t spread = problem.dilation[d] * (filter[d] - 1) + 1;
    const bool same = (in[d] + 2 * problem.padding[d] - spread) / problem.stride[d] + 1 == out[d];
    padding_behind[d] =
        same ? problem.padding[d]
             : std::max<int64_t>(0, (out[d] - 1) * problem.stride[d] + spread - in[d] - problem.padding[d]);
  }
  Descriptor conv(CUDNN_BACKEND_CONVOLUTION_DESCRIPTOR);
  conv.set(CUDNN_ATTR_CONVOLUTION_COMP_TYPE, CUDNN_TYPE_DATA_TYPE, 1, &compute)
      .set(CUDNN_ATTR_CONVOLUTION_CONV_MODE, CUDNN_TYPE_CONVOLUTION_MODE, 1, &mode)
      .set(CUDNN_ATTR_CONVOLUTION_SPATIAL_DIMS, 2)
      .set(CUDNN_ATTR_CONVOLUTION_FILTER_STRIDES, CUDNN_TYPE_INT64, 2, problem.stride)
      .set(CUDNN_ATTR_CONVOLUTION_PRE_PADDINGS, CUDNN_TYPE_INT64, 2, problem.padding)
      .set(CUDNN_ATTR_CONVOLUTION_POST_PADDINGS, CUDNN_TYPE_INT64, 2, padding_behind)
      .set(CUDNN_ATTR_CONVOLUTION_DILATIONS, CUDNN_TYPE_INT64, 2, problem.dilation)
      .finalize();
  Descriptor op(CUDNN_BACKEND_OPERATION_CONVOLUTION_FORWARD_DESCRIPTOR);
  op.set(CUDNN_ATTR_OPERATION_CONVOLUTION_FORWARD_X, x)
      .set(CUDNN_ATTR_OPERATION_CONVOLUTION_FORWARD_W, weight)
      .set(CUDNN_ATTR_OPERATION_CONVOLUTION_FORWARD_Y, y)
      .set(CUDNN_ATTR_OPERATION_CONVOLUTION_FORWARD_CONV_DESC, conv)
      .set(CUDNN_ATTR_OPERATION_CONVOLUTION_FORWARD_ALPHA, CUDNN_TYPE_FLOAT, 1, &alpha)
      .set(CUDNN_ATTR_OPERATION_CONVOLUTION_FORWARD_BETA, CUDNN_TYPE_FLOAT, 1, &beta)
      .finalize();
  return op;
}

Descriptor pointwise(cudnnPointwiseMode_t mode, const Descriptor& x, const Descriptor* b, const Descriptor& y) {
  const cudnnDataType_t compute = CUDNN_DATA_FLOAT;
  Descriptor kind(CUDNN_BACKEND_POINTWISE_DESCRIPTOR);
  kind.set(CUDNN_ATTR_POINTWISE_MODE, CUDNN_TYPE_POINTWISE_MODE, 1, &mode)
      .set(CUDNN_ATTR_POINTWISE_MATH_PREC, CUDNN_TYPE_DATA_TYPE, 1, &compute)
      .finalize();
  Descriptor op(CUDNN_BACKEND_OPERATION_POINTWISE_DESCRIPTOR);
  op.set(CUDNN_ATTR_OPERATION_POINTWISE_PW_DESCRIPTOR, kind).set(CUDNN_ATTR_OPERATION_POINTWISE_XDESC, x);
  if (b != nullptr) op.set(CUDNN_ATTR_OPERATION_POINTWISE_BDESC, *b);
  op.set(CUDNN_ATTR_OPERATION_POINTWISE_YDESC, y).finalize();
  return op;
}

}  // namespace

std::array<int64_t, ConvProblem::kFields> ConvProblem::key() const {
  return {device,
          dtype,
          n,
          c,
          h,
          w,
          k,
          r,
          s,
          p,
          q,
          stride[0],
          stride[1],
          padding[0],
          padding[1],
          dilation[0],
          dilation[1],
          groups,
          has_bias,
          has_residual,
          static_cast<int64_t>(activation)};
}

std::string ConvProblem::describe() const {
  static const char* const kActivations[] = {"", " relu"};
  std::ostringstream text;
  text << (dtype == CUDNN_DATA_HALF ? "float16" : "bfloat16") << " x [" << n << "," << c << "," << h << "," << w
       << "] weight [" << k << "," << c / groups << "," << r << "," << s << "] stride " << stride[0] << "," << stride[1]
       << " padding " << padding[0] << "," << padding[1] << " dilation " << dilation[0] << "," << dilation[1]
       << " groups " << groups << (has_bias ? " bias" : "") << (has_residual ? " residual" : "")
       << kActivations[static_cast<int64_t>(activation)];
  return text.str();
}

Descriptor::Descriptor(cudnnBackendDescriptorType_t type) {
  CUDNN_CHECK(cudnnBackendCreateDescriptor(type, &raw_));
}

Descriptor::~Descriptor() {
  if (raw_ != nullptr) cudnnBackendDestroyDescriptor(raw_);
}

Descriptor& Descriptor::set(cudnnBackendAttributeName_t name, cudnnBackendAttributeType_t type, int64_t count,
                            const void* values) {
  CUDNN_CHECK(cudnnBackendSetAttribute(raw_, name, type, count, values));
  return *this;
}

Descriptor& Descriptor::set(cudnnBackendAttributeName_t name, const Descriptor& value) {
  return set(name, CUDNN_TYPE_BACKEND_DESCRIPTOR, 1, &value.raw_);
}

Descriptor& Descriptor::set(cudnnBackendAttributeName_t name, int64_t value) {
  return set(name, CUDNN_TYPE_INT64, 1, &value);
}

Descriptor& Descriptor::finalize() {
  CUDNN_CHECK(cudnnBackendFinalize(raw_));
  return *this;
}

template <typename T>
std::vector<T> Descriptor::list(cudnnBackendAttributeName_t name, cudnnBackendAttributeType_t type,
                                int64_t most) const {
  std::vector<T> values(most);
  int64_t count = 0;
  CUDNN_CHECK(cudnnBackendGetAttribute(raw_, name, type, most, &count, values.data()));
  values.resize(std::min(count, most));
  return values;
}

Descriptor operation_graph(cudnnHandle_t handle, const ConvProblem& problem) {
  const auto dtype = static_cast<cudnnDataType_t>(problem.dtype);
  const Dims out_dims = {problem.n, problem.k, problem.p, problem.q};
  const Descriptor x = tensor(kX, dtype, {problem.n, problem.c, problem.h, problem.w}, false);
  const Descriptor weight =
      tensor(kWeight, dtype, {problem.k, problem.c / problem.groups, problem.r, problem.s}, false);
  const Descriptor out = tensor(kOut, dtype, out_dims, false);

  struct Step {
    cudnnPointwiseMode_t mode;
    std::optional<Descriptor> operand;
  };
  std::vector<Step> steps;
  if (problem.has_residual) steps.push_back({CUDNN_POINTWISE_ADD, tensor(kResidual, dtype, out_dims, false)});
  if (problem.has_bias) steps.push_back({CUDNN_POINTWISE_ADD, tensor(kBias, dtype, {1, problem.k, 1, 1}, false)});
  if (problem.activation == Activation::kRelu) steps.push_back({CUDNN_POINTWISE_RELU_FWD, std::nullopt});

  // What flows between two steps is virtual: fp32 in registers, never in memory.
  std::vector<Descriptor> between, operations;
  for (size_t i = 0; i < steps.size(); ++i) {
    between.push_back(tensor(kFirstVirtual + static_cast<int64_t>(i), CUDNN_DATA_FLOAT, out_dims, true));
  }
  operations.push_back(convolution(problem, x, weight, steps.empty() ? out : between[0]));
  for (size_t i = 0; i < steps.size(); ++i) {
    operations.push_back(pointwise(steps[i].mode, between[i], steps[i].operand ? &*steps[i].operand : nullptr,
                                   i + 1 < steps.size() ? between[i + 1] : out));
  }

  std::vector<cudnnBackendDescriptor_t> raw;
  for (const Descriptor& operation : operations) raw.push_back(operation.get());
  Descriptor graph(CUDNN_BACKEND_OPERATIONGRAPH_DESCRIPTOR);
  graph.set(CUDNN_ATTR_OPERATIONGRAPH_HANDLE, CUDNN_TYPE_HANDLE, 1, &handle)
      .set(CUDNN_ATTR_OPERATIONGRAPH_OPS, CUDNN_TYPE_BACKEND_DESCRIPTOR, static_cast<int64_t>(raw.size()), raw.data())
      .finalize();
  return graph;
}

namespace {

// What an engine says about itself.
void read_notes(const Descriptor& engine, EngineConfig* choice) {
  int64_t one = 0;
  CUDNN_CHECK(cudnnBackendGetAttribute(engine.get(), CUDNN_ATTR_ENGINE_GLOBAL_INDEX, CUDNN_TYPE_INT64, 1, &one,
                                       &choice->engine));
  for (auto note : engine.list<cudnnBackendBehaviorNote_t>(CUDNN_ATTR_ENGINE_BEHAVIOR_NOTE, CUDNN_TYPE_BEHAVIOR_NOTE,
                                                           CUDNN_BEHAVIOR_NOTE_TYPE_COUNT)) {
    choice->runtime_compiled |= note == CUDNN_BEHAVIOR_NOTE_RUNTIME_COMPILATION;
  }
  for (auto note : engine.list<cudnnBackendNumericalNote_t>(CUDNN_ATTR_ENGINE_NUMERICAL_NOTE, CUDNN_TYPE_NUMERICAL_NOTE,
                                                            CUDNN_NUMERICAL_NOTE_TYPE_COUNT)) {
    choice->exact &= note == CUDNN_NUMERICAL_NOTE_TENSOR_CORE || note == CUDNN_NUMERICAL_NOTE_STRICT_NAN_PROP;
  }
}

}  // namespace

std::vector<EngineConfig> engine_configs(const Descriptor& graph, cudnnBackendHeurMode_t mode, int64_t most) {
  Descriptor heuristics(CUDNN_BACKEND_ENGINEHEUR_DESCRIPTOR);
  heuristics.set(CUDNN_ATTR_ENGINEHEUR_OPERATION_GRAPH, graph)
      .set(CUDNN_ATTR_ENGINEHEUR_MODE, CUDNN_TYPE_HEUR_MODE, 1, &mode);
  if (cudnnBackendFinalize(heuristics.get()) != CUDNN_STATUS_SUCCESS) return {};  // no engine for this graph

  std::vector<EngineConfig> found;
  std::vector<cudnnBackendDescriptor_t> raw;
  for (int64_t i = 0; i < most; ++i) {
    found.push_back({Descriptor(CUDNN_BACKEND_ENGINECFG_DESCRIPTOR)});
    raw.push_back(found.back().config.get());
  }
  int64_t count = 0;
  const cudnnStatus_t status = cudnnBackendGetAttribute(heuristics.get(), CUDNN_ATTR_ENGINEHEUR_RESULTS,
                                                        CUDNN_TYPE_BACKEND_DESCRIPTOR, most, &count, raw.data());
  if (status != CUDNN_STATUS_SUCCESS) return {};
  found.erase(found.begin() + std::min(count, most), found.end());

  for (size_t i = 0; i < found.size(); ++i) {
    found[i].rank = static_cast<int>(i);
    const Descriptor engine(CUDNN_BACKEND_ENGINE_DESCRIPTOR);
    cudnnBackendDescriptor_t raw_engine = engine.get();
    int64_t one = 0;
    CUDNN_CHECK(cudnnBackendGetAttribute(found[i].config.get(), CUDNN_ATTR_ENGINECFG_ENGINE,
                                         CUDNN_TYPE_BACKEND_DESCRIPTOR, 1, &one, &raw_engine));
    read_notes(engine, &found[i]);
  }
  return found;
}

std::string recipe_of(const EngineConfig& config) {
  std::vector<Descriptor> choices;
  std::vector<cudnnBackendDescriptor_t> raw;
  for (int i = 0; i < CUDNN_KNOB_TYPE_COUNTS; ++i) {
    choices.emplace_back(CUDNN_BACKEND_KNOB_CHOICE_DESCRIPTOR);
    raw.push_back(choices.back().get());
  }
  int64_t count = 0, one = 0;
  CUDNN_CHECK(cudnnBackendGetAttribute(config.config.get(), CUDNN_ATTR_ENGINECFG_KNOB_CHOICES,
                                       CUDNN_TYPE_BACKEND_DESCRIPTOR, CUDNN_KNOB_TYPE_COUNTS, &count, raw.data()));
  std::ostringstream text;
  text << kRecipe << " " << config.engine;
  for (int64_t i = 0; i < count; ++i) {
    cudnnBackendKnobType_t knob{};
    int64_t value = 0;
    CUDNN_CHECK(
        cudnnBackendGetAttribute(raw[i], CUDNN_ATTR_KNOB_CHOICE_KNOB_TYPE, CUDNN_TYPE_KNOB_TYPE, 1, &one, &knob));
    CUDNN_CHECK(cudnnBackendGetAttribute(raw[i], CUDNN_ATTR_KNOB_CHOICE_KNOB_VALUE, CUDNN_TYPE_INT64, 1, &one, &value));
    text << " " << static_cast<int>(knob) << " " << value;
  }
  return text.str();
}

EngineConfig recalled_config(const Descriptor& graph, const std::string& recipe) {
  std::istringstream text(recipe);
  std::string kind;
  EngineConfig made{Descriptor(CUDNN_BACKEND_ENGINECFG_DESCRIPTOR)};
  text >> kind >> made.engine;
  SFAST_CHECK(kind == kRecipe && text, "sfast_native: no cuDNN engine: ", recipe);
  Descriptor engine(CUDNN_BACKEND_ENGINE_DESCRIPTOR);
  engine.set(CUDNN_ATTR_ENGINE_OPERATION_GRAPH, graph).set(CUDNN_ATTR_ENGINE_GLOBAL_INDEX, made.engine).finalize();
  std::vector<Descriptor> choices;
  std::vector<cudnnBackendDescriptor_t> raw;
  for (int64_t number = 0, value = 0; text >> number >> value;) {
    const auto knob = static_cast<cudnnBackendKnobType_t>(number);
    choices.emplace_back(CUDNN_BACKEND_KNOB_CHOICE_DESCRIPTOR);
    choices.back()
        .set(CUDNN_ATTR_KNOB_CHOICE_KNOB_TYPE, CUDNN_TYPE_KNOB_TYPE, 1, &knob)
        .set(CUDNN_ATTR_KNOB_CHOICE_KNOB_VALUE, value)
        .finalize();
    raw.push_back(choices.back().get());
  }
  made.config.set(CUDNN_ATTR_ENGINECFG_ENGINE, engine);
  if (!raw.empty()) {
    made.config.set(CUDNN_ATTR_ENGINECFG_KNOB_CHOICES, CUDNN_TYPE_BACKEND_DESCRIPTOR, static_cast<int64_t>(raw.size()),
                    raw.data());
  }
  made.config.finalize();
  read_notes(engine, &made);
  return made;
}

Plan make_plan(cudnnHandle_t handle, const EngineConfig& config) {
  Plan made{Descriptor(CUDNN_BACKEND_EXECUTION_PLAN_DESCRIPTOR)};
  made.plan.set(CUDNN_ATTR_EXECUTION_PLAN_HANDLE, CUDNN_TYPE_HANDLE, 1, &handle)
      .set(CUDNN_ATTR_EXECUTION_PLAN_ENGINE_CONFIG, config.config)
      .finalize();
  made.workspace = made.plan.list<int64_t>(CUDNN_ATTR_EXECUTION_PLAN_WORKSPACE_SIZE, CUDNN_TYPE_INT64, 1).at(0);
  return made;
}

void launch(cudnnHandle_t handle, const Plan& plan, const ConvPointers& pointers, void* workspace) {
  std::array<int64_t, 5> uids;
  std::array<void*, 5> addresses;
  int64_t count = 0;
  const auto pass = [&](int64_t uid, const void* address) {
    if (address == nullptr) return;
    uids[count] = uid;
    addresses[count++] = const_cast<void*>(address);
  };
  pass(kX, pointers.x);
  pass(kWeight, pointers.weight);
  pass(kBias, pointers.bias);
  pass(kResidual, pointers.residual);
  pass(kOut, pointers.out);
  Descriptor pack(CUDNN_BACKEND_VARIANT_PACK_DESCRIPTOR);
  pack.set(CUDNN_ATTR_VARIANT_PACK_UNIQUE_IDS, CUDNN_TYPE_INT64, count, uids.data())
      .set(CUDNN_ATTR_VARIANT_PACK_DATA_POINTERS, CUDNN_TYPE_VOID_PTR, count, addresses.data())
      .set(CUDNN_ATTR_VARIANT_PACK_WORKSPACE, CUDNN_TYPE_VOID_PTR, 1, &workspace)
      .finalize();
  CUDNN_CHECK(cudnnBackendExecute(handle, plan.plan.get(), pack.get()));
}

}  // namespace sfast
