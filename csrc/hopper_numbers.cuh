// Pairs of fp16 or bf16 as one word, and activations in fp32 with the fast instructions, near fp32's own accuracy.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "hopper.cuh"
#include "hopper_gemm.h"

namespace sfast::hopper {

template <typename T>
struct Pair;
template <>
struct Pair<__half> {
  __device__ static float2 unpack(uint32_t word) { return __half22float2(reinterpret_cast<const __half2&>(word)); }
  __device__ static uint32_t pack(float a, float b) {
    const __half2 made = __floats2half2_rn(a, b);
    return reinterpret_cast<const uint32_t&>(made);
  }
};
template <>
struct Pair<__nv_bfloat16> {
  __device__ static float2 unpack(uint32_t word) {
    return __bfloat1622float2(reinterpret_cast<const __nv_bfloat162&>(word));
  }
  __device__ static uint32_t pack(float a, float b) {
    const __nv_bfloat162 made = __floats2bfloat162_rn(a, b);
    return reinterpret_cast<const uint32_t&>(made);
  }
};

// Exact GELU by Abramowitz and Stegun 7.1.26 for erfc, absolute error below 2e-7, and no cancellation below zero.
__device__ inline float gelu(float x) {
  const float u = fabsf(x) * 0.70710678f;
  const float t = __fdividef(1.0f, 1.0f + 0.3275911f * u);
  float tail = 1.061405429f;
  tail = tail * t - 1.453152027f;
  tail = tail * t + 1.421413741f;
  tail = tail * t - 0.284496736f;
  tail = tail * t + 0.254829592f;
  tail = 0.5f * tail * t * __expf(-u * u);
  return x * (x >= 0 ? 1.0f - tail : tail);
}

__device__ inline float silu(float x) {
  return __fdividef(x, 1.0f + __expf(-x));
}

// 0.5 (1 + tanh(u)) = sigmoid(2u), u = sqrt(2/pi) (x + 0.044715 x^3)
__device__ inline float gelu_tanh(float x) {
  return __fdividef(x, 1.0f + __expf(-1.5957691216f * (x + 0.044715f * x * x * x)));
}

template <HopperActivation kActivation>
__device__ inline float activate(float x) {
  if constexpr (kActivation == HopperActivation::kRelu) return fmaxf(x, 0.0f);
  if constexpr (kActivation == HopperActivation::kGeluTanh) return gelu_tanh(x);
  if constexpr (kActivation == HopperActivation::kGelu) return gelu(x);
  if constexpr (kActivation == HopperActivation::kSilu) return silu(x);
  return x;
}

}  // namespace sfast::hopper
