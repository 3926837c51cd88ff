// A thin C++ face on cuDNN's backend API, with just what one fused convolution needs:
//   act(conv(x, w) + bias + residual) -> operation graph -> engine configurations -> execution plan -> launch.
// The backend API is plain C in libcudnn itself, so nothing else has to be installed, and this compiles in seconds.
#pragma once

#include <cudnn.h>

#include <array>
#include <cstdint>
#include <string>
#include <utility>
#include <vector>

namespace sfast {

enum class Activation : int64_t { kNone, kRelu };

// A convolution over channels-last tensors: x [n,c,h,w], weight [k,c/groups,r,s], output and residual [n,k,p,q].
// `padding` is what stands before the first pixel; what stands behind the last one follows from the output's size.
// Trivially comparable as a row of integers: it is the key of the plan cache.
struct ConvProblem {
  int64_t device, dtype;  // dtype: a cudnnDataType_t
  int64_t n, c, h, w, k, r, s, p, q;
  int64_t stride[2], padding[2], dilation[2];
  int64_t groups;
  int64_t has_bias, has_residual;
  Activation activation;

  static constexpr size_t kFields = 2 + 9 + 6 + 3 + 1;
  std::array<int64_t, kFields> key() const;
  std::string describe() const;
  double flops() const { return 2.0 * n * k * p * q * (c / groups) * r * s; }
};

// Owns one backend descriptor.
class Descriptor {
 public:
  explicit Descriptor(cudnnBackendDescriptorType_t type);
  Descriptor(Descriptor&& other) noexcept : raw_(std::exchange(other.raw_, nullptr)) {}
  Descriptor& operator=(Descriptor&& other) noexcept {
    std::swap(raw_, other.raw_);
    return *this;
  }
  ~Descriptor();

  cudnnBackendDescriptor_t get() const { return raw_; }
  Descriptor& set(cudnnBackendAttributeName_t name, cudnnBackendAttributeType_t type, int64_t count,
                  const void* values);
  Descriptor& set(cudnnBackendAttributeName_t name, const Descriptor& value);
  Descriptor& set(cudnnBackendAttributeName_t name, int64_t value);
  Descriptor& finalize();
  template <typename T>
  std::vector<T> list(cudnnBackendAttributeName_t name, cudnnBackendAttributeType_t type, int64_t most) const;

 private:
  cudnnBackendDescriptor_t raw_ = nullptr;
};

// The addresses that one launch reads and writes; bias and residual are null where the problem has none.
struct ConvPointers {
  const void* x;
  const void* weight;
  const void* bias;
  const void* residual;
  void* out;
};

struct EngineConfig {
  Descriptor config;
  int64_t engine = -1;
  int rank = 0;                   // its place in the heuristics' list
  bool runtime_compiled = false;  // its kernel is compiled when the plan is made, which can take seconds
  bool exact = true;              // accumulates in fp32, the same bits each run, no Winograd
};

struct Plan {
  Descriptor plan;
  int64_t workspace = 0;  // bytes
};

// The steps stand in the order that cuDNN's precompiled kernels know: residual, bias, relu. They have no other order,
// no residual or relu without a bias, and no silu; for all of those cuDNN compiles a kernel at run time.
Descriptor operation_graph(cudnnHandle_t handle, const ConvProblem& problem);

// What the heuristics propose for the graph, best first; empty where cuDNN has nothing for it.
std::vector<EngineConfig> engine_configs(const Descriptor& graph, cudnnBackendHeurMode_t mode, int64_t most);

// A configuration as text, for this version of cuDNN: its engine and the settings of its knobs; and the way back, which
// raises for a text that does not fit.
std::string recipe_of(const EngineConfig& config);
EngineConfig recalled_config(const Descriptor& graph, const std::string& recipe);

Plan make_plan(cudnnHandle_t handle, const EngineConfig& config);

// Enqueues the plan on the handle's stream.
void launch(cudnnHandle_t handle, const Plan& plan, const ConvPointers& pointers, void* workspace);

}  // namespace sfast
