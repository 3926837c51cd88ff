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
  // out = value * gelu(gate), weight [2 out_channels, channels] = value rows, then gate rows; kGelu or kGeluTanh.
  bool gated = false;
  HopperActivation activation = HopperActivation::kNone;
};

struct HopperPointers {
  const void* x;
  const void* weight;
  const void* bias;      // or null
  const void* residual;  // or null
  void* out;
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
  CUtensorMap x, weight;
  const void* bias;
  const void* residual;
  void* out;
  int64_t ld_residual;
  int out_channels;
  int second_half;                         // rows of weight from the first half of a tile to its second half
  int images, out_height, out_width;       // of the result
  int log_tile_width, log_tile_height;     // a tile's pixels: width times height times images
  int tiles_x, tiles_y, tiles_m, tiles_n;  // tiles_m: over all pixels
  int stride_h, stride_w, padding_h, padding_w, dilation_h, dilation_w;
  int filter_w, taps, chunks, channels;  // k is cut into taps of the filter, and those into chunks of 64 channels
  int pair, splits;
  HopperActivation activation;
};

struct HopperKernel {
  int rows, columns;  // of a tile, columns counting value and gate
  bool gated;
  bool activates;  // and is for nothing else
  int in_flight;   // tiles that a block works on at the same time
  int threads, shared_bytes;
  const void* function;
};

const std::vector<HopperKernel>& hopper_kernels_float16();
const std::vector<HopperKernel>& hopper_kernels_bfloat16();

}  // namespace sfast
