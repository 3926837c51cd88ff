// What is added to the scores of keys, the same for all queries of a head: numbers, or minus infinity where a key does
// not count. A kernel of its own makes fp32 of it, up to whole blocks of keys, for all that read it then.
#pragma once

#include "attention_launch.cuh"
#include "attention_softmax.cuh"
#include "hopper.cuh"

namespace sfast::attention {

constexpr float kLeast = -1e35f;  // what can be added without leaving fp32, whatever it is multiplied by then

// Rows of terms, in units of scores that are not scaled yet: [batch, heads, keys], or [batch, 1, keys] if all heads
// share one.
struct MaskTerms {
  const float* address;
  int heads, padded;

  __device__ inline const float* row(int batch, int head) const {
    return address + static_cast<int64_t>(batch * heads + (heads > 1 ? head : 0)) * padded;
  }
};

struct MaskArguments {
  AttentionMask mask;
  float* terms;
  int heads, keys, padded;
  float scale;
};

template <typename T>
__global__ void make_mask_terms(const __grid_constant__ MaskArguments arguments) {
  hopper::wait_for_previous_kernel();
  hopper::launch_dependents();
  const AttentionMask& mask = arguments.mask;
  const int64_t row = blockIdx.x / arguments.heads * mask.batch + blockIdx.x % arguments.heads * mask.head;
  for (int key = threadIdx.x; key < arguments.padded; key += blockDim.x) {
    float term = kMinusInfinity;
    if (key < arguments.keys) {
      if (mask.boolean) {
        if (static_cast<const bool*>(mask.address)[row + key]) term = 0;
      } else {
        term = static_cast<float>(static_cast<const T*>(mask.address)[row + key]);
        if (term != kMinusInfinity) term = fmaxf(term * arguments.scale, kLeast);
      }
    }
    arguments.terms[static_cast<int64_t>(blockIdx.x) * arguments.padded + key] = term;
  }
}

template <typename T>
MaskTerms launch_mask_terms(const AttentionProblem& problem, cudaStream_t stream) {
  constexpr int kThreads = 256;
  const int heads = problem.mask.head == 0 ? 1 : problem.heads;
  const int padded = divide_up(problem.keys, kMaskUnit) * kMaskUnit;
  launch(make_mask_terms<T>, dim3(problem.batch * heads), kThreads, 0, stream,
         MaskArguments{problem.mask, problem.terms, heads, problem.keys, padded, 1 / problem.scale});
  return {problem.terms, heads, padded};
}

// Of the keys from `row` on, as the scores lie: 8 j + 2 (t % 4) + {0, 1}.
template <int N>
__device__ inline void load_terms(float2 (&terms)[N / 8], const float* row) {
#pragma unroll
  for (int j = 0; j < N / 8; ++j) terms[j] = reinterpret_cast<const float2*>(row)[4 * j + threadIdx.x % 4];
}

template <int N>
__device__ inline void add_terms(float (&scores)[N / 2], const float2 (&terms)[N / 8]) {
#pragma unroll
  for (int i = 0; i < N / 2; ++i) scores[i] += i % 2 == 0 ? terms[i / 4].x : terms[i / 4].y;
}

}  // namespace sfast::attention
