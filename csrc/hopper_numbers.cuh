// Pairs of fp16 or bf16 as one word, and activations in fp32 with the fast instructions, near fp32's own accuracy.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

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

// One instruction each, relative error about 2^-22, and 2^-11 for tanh; numbers below 2^-126 count as zero.
__device__ inline float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ inline float reciprocal_fast(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ inline float tanh_fast(float x) {
  float y;
  asm("tanh.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

constexpr float kLog2e = 1.4426950409f;

// For results of 8 bits, half of x plus half of x times a tanh costs one instruction that is not a multiplication: its
// error is a fraction of what rounding the result adds. For results of 11 bits that would be too much.
template <typename T>
constexpr bool kCoarse = std::is_same_v<T, __nv_bfloat16>;

template <typename T>
__device__ inline float silu(float x) {
  if constexpr (kCoarse<T>) {
    const float half = 0.5f * x;
    return half * tanh_fast(half) + half;
  }
  return x * reciprocal_fast(1.0f + exp2_fast(-kLog2e * x));
}

// 0.5 (1 + tanh(u)) = sigmoid(2u), u = sqrt(2/pi) (x + 0.044715 x^3)
template <typename T>
__device__ inline float gelu_tanh(float x) {
  const float square = x * x;
  if constexpr (kCoarse<T>) {
    const float half = 0.5f * x;
    return half * tanh_fast(x * (0.0356774081f * square + 0.7978845608f)) + half;
  }
  constexpr float kScale = -2 * 0.7978845608f * kLog2e;
  return x * reciprocal_fast(1.0f + exp2_fast(x * (0.044715f * kScale * square + kScale)));
}

// Exact GELU by Abramowitz and Stegun 7.1.26 for erfc, absolute error below 2e-7, and no cancellation below zero. For
// coarse results erf(x / sqrt(2)) = tanh(x p(x^2)), p of degree 2: absolute error of the result below 3e-5.
template <typename T>
__device__ inline float gelu(float x) {
  if constexpr (kCoarse<T>) {
    const float square = fminf(x * x, 20.0f), half = 0.5f * x;
    const float p = (-0.00035162018f * square + 0.0370089045f) * square + 0.7975010358f;
    return half * tanh_fast(x * p) + half;
  }
  const float u = fabsf(x) * 0.70710678f;
  const float t = reciprocal_fast(1.0f + 0.3275911f * u);
  float tail = 0.5f * 1.061405429f;
  tail = tail * t - 0.5f * 1.453152027f;
  tail = tail * t + 0.5f * 1.421413741f;
  tail = tail * t - 0.5f * 0.284496736f;
  tail = tail * t + 0.5f * 0.254829592f;
  tail = tail * t * exp2_fast(-kLog2e * u * u);
  return x * (x >= 0 ? 1.0f - tail : tail);
}

template <typename T, HopperActivation kActivation>
__device__ inline float activate(float x) {
  if constexpr (kActivation == HopperActivation::kRelu) return fmaxf(x, 0.0f);
  if constexpr (kActivation == HopperActivation::kGeluTanh) return gelu_tanh<T>(x);
  if constexpr (kActivation == HopperActivation::kGelu) return gelu<T>(x);
  if constexpr (kActivation == HopperActivation::kSilu) return silu<T>(x);
  return x;
}

}  // namespace sfast::hopper
