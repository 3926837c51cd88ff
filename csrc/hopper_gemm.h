// out = act(x weight^T + bias + residual) for x that is a matrix or the pixels under a convolution's filter: our own
// kernel for Hopper, beside cuBLASLt's and cuDNN's. GEGLU gates inside: the product of twice the width stays on chip.
#pragma once

#include <cuda.h>
#include <cuda_runtime_api.h>

#include <cstdint>
#include <string>
#include <vector>

namespace sfast {

enum class HopperActivation : int { kNone, kRelu, kGeluTanh, kGelu, kSilu };

// A matrix product is a convolution by 1x1 over an image of one row. Sizes and strides count elements.
struct HopperProblem {
  bool bfloat16 = false;
  int64_t images = 1, height = 1, width = 1, channels = 1;  // of x, channels-last
  int64_t ld_x = 1;                                         // from pixel to pixel
  int64_t out_height = 1, out_width = 1, out_channels = 1;
  int64_t filter[2] = {1, 1}, stride[2] = {1, 1}, padding[2] = {0, 0}, dilation[2] = {1, 1};
  int64_t ld_weight = 1, ld_residual = 0;  // weight [out_channels, filter, channels]
  int64_t channels2 = 0, ld_x2 = 0;        // of a matrix x2 at x's side, met by the weight's last columns
  // out = value * act(gate), weight [2 out_channels, channels] = value rows, then gate rows, or one for each.
  bool gated = false, two_weights = false;
  HopperActivation activation = HopperActivation::kNone;
};

struct HopperPointers {
  const void* x = nullptr;
  const void* x2 = nullptr;  // where there are channels2
  const void* weight = nullptr;
  const void* gate_weight = nullptr;  // where there are two_weights
  const void* bias = nullptr;         // or none, as the next two
  const void* gate_bias = nullptr;
  const void* residual = nullptr;
  void* out = nullptr;
};

// One way to cut the problem: a kernel of the table, and how the blocks of a cluster work together.
struct HopperPlan {
  int kernel = 0;
  int pair = 1;     // blocks that lie side by side and load the weights' tile together: 1 or 2
  int splits = 1;   // blocks that share the sum over k of one tile: 1 to 8
  double cost = 0;  // estimated clock cycles
  std::string name() const;
};

// Whether this GPU runs the kernels of this build.
bool has_hopper(int64_t device);

// Every plan for the problem, by an estimate the best first; empty where this GPU cannot run the kernel.
std::vector<HopperPlan> hopper_plans(const HopperProblem& problem, int64_t device);

// Loads the plan's kernel, so that its first launch takes no longer than others.
void prepare(const HopperProblem& problem, const HopperPlan& plan);

void launch(const HopperProblem& problem, const HopperPlan& plan, const HopperPointers& pointers, cudaStream_t stream);

// ---- Between hopper_gemm.cpp and the kernels ----

struct HopperArguments {
  CUtensorMap x, x2, weight, weight2, out_map;
  const void* bias;
  const void* bias2;  // of the second half of a tile
  const void* residual;
  void* out;
  int64_t ld_residual;
  int out_channels;
  int second_half;                         // rows of weight2 to the second half of the first tile
  int images, out_height, out_width;       // of the result
  int log_tile_width, log_tile_height;     // a tile's pixels: width times height times images
  int tiles_x, tiles_y, tiles_m, tiles_n;  // tiles_m: over all pixels
  int stride_h, stride_w, padding_h, padding_w, dilation_h, dilation_w;
  int filter_w, taps, chunks, channels;  // k is cut into taps of the filter, and those into chunks of 64 channels
  int chunks_before;                     // of them lie in x, the others in x2
  int pair, splits;
  HopperActivation activation;
};

struct HopperKernel {
  int rows, columns;  // of a tile, columns counting value and gate
  bool gated;
  bool staged;     // results leave through shared memory: for matrices alone
  bool activates;  // and is for nothing else
  int in_flight;   // tiles that a block works on at the same time
  int threads, shared_bytes;
  const void* function;
};

const std::vector<HopperKernel>& hopper_kernels_float16();
const std::vector<HopperKernel>& hopper_kernels_bfloat16();

}  // namespace sfast
