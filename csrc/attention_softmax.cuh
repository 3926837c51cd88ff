// The softmax between attention's two matrix products, on scores that lie in registers as the first product left them:
// thread t holds of row t / 4 % 8 + 8 r (within its warp's 16 rows) the columns 8 j + 2 (t % 4) + {0, 1} in
// scores[4 j + 2 r + {0, 1}].
//
// Exponentials to base 2, of scores * scale - shift, where `scale` holds log2(e). The shift follows the maximum of the
// row only when that has grown by more than kSlack: what was summed before is scaled rarely, and exponentials stay
// below 2^kSlack.
//
// Nor need the maximum be known: it makes numbers neither more nor less precise, as long as none overflows. So only the
// first block looks for it. Of the others the exponentials are taken at once (`exponentiate_boldly`), and their sums,
// which are needed anyway, tell whether any was too large: then, rarely, a warp repairs its rows. Finding the maxima
// was a quarter of the softmax's instructions, and the tensor cores waited for them. (Making an eighth to three eighths
// of them of multiplications and additions, beside the special function unit, was measured at head sizes 40 to 128: no
// gain, and up to a tenth slower.)
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace sfast::attention {

constexpr float kSlack = 8;
constexpr float kMinusInfinity = -__builtin_huge_valf();
constexpr float kBelowAll = -1e36f;  // a shift that is finite, and below every score that is

__device__ inline float exp2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Of each row, over the four threads that share it.
__device__ inline float row_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(~0u, x, 1));
  return fmaxf(x, __shfl_xor_sync(~0u, x, 2));
}

__device__ inline float row_sum(float x) {
  x += __shfl_xor_sync(~0u, x, 1);
  return x + __shfl_xor_sync(~0u, x, 2);
}

__device__ inline uint32_t pack(float low, float high, __half) {
  uint32_t packed;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  return packed;
}

__device__ inline uint32_t pack(float low, float high, __nv_bfloat16) {
  uint32_t packed;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  return packed;
}

// Scores of keys from `valid` on become minus infinity.
template <int N>
__device__ inline void mask_keys(float (&scores)[N / 2], int valid) {
  const int first = 2 * (threadIdx.x % 4);
#pragma unroll
  for (int i = 0; i < N / 2; ++i) {
    if (8 * (i / 4) + first + i % 2 >= valid) scores[i] = kMinusInfinity;
  }
}

// The two rows of a thread: what their exponentials are shifted by (a maximum as it stood at some time, in units of
// unscaled scores), and this thread's part of their sums.
struct RowState {
  float shift[2], sum[2];
};

// Puts the exponentials in place of the scores. Returns whether (for any row of the warp) earlier results must be
// multiplied by `decay`. With a mask all scores may be minus infinity.
template <int N, bool kFirst, bool kMasked = false>
__device__ inline bool exponentiate(float (&scores)[N / 2], RowState& rows, float (&decay)[2], float scale) {
  float top[2][2];
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    top[r][0] = fmaxf(scores[2 * r], scores[2 * r + 1]);
    top[r][1] = fmaxf(scores[4 + 2 * r], scores[4 + 2 * r + 1]);
  }
#pragma unroll
  for (int i = 8; i < N / 2; ++i) top[i / 2 % 2][i / 4 % 2] = fmaxf(top[i / 2 % 2][i / 4 % 2], scores[i]);
  float most[2];
#pragma unroll
  for (int r = 0; r < 2; ++r) most[r] = row_max(fmaxf(top[r][0], top[r][1]));

  bool decays = false;
  if constexpr (kFirst) {
#pragma unroll
    for (int r = 0; r < 2; ++r) rows.shift[r] = kMasked ? fmaxf(most[r], kBelowAll) : most[r], rows.sum[r] = 0;
  } else {
    const bool grown = (most[0] - rows.shift[0]) * scale > kSlack || (most[1] - rows.shift[1]) * scale > kSlack;
    decays = __any_sync(~0u, grown);
    if (decays) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const float shift = fmaxf(most[r], rows.shift[r]);
        decay[r] = exp2((rows.shift[r] - shift) * scale);
        rows.shift[r] = shift, rows.sum[r] *= decay[r];
      }
    }
  }

  const float offset[2] = {-rows.shift[0] * scale, -rows.shift[1] * scale};
  float sum[2][2] = {{rows.sum[0], 0}, {rows.sum[1], 0}};
#pragma unroll
  for (int i = 0; i < N / 2; ++i) {
    const int r = i / 2 % 2;
    // Huge numbers of a mask must cancel out before anything is rounded.
    scores[i] = exp2(kMasked ? (scores[i] - rows.shift[r]) * scale : fmaf(scores[i], scale, offset[r]));
    sum[r][i % 2] += scores[i];
  }
#pragma unroll
  for (int r = 0; r < 2; ++r) rows.sum[r] = sum[r][0] + sum[r][1];
  return decays;
}

// Of a thread's exponentials of a row: below the first they are left as they are, whatever the row's maximum has
// become; below the second each of them is finite.
constexpr float kMostOfBlock = 0x1p8f;
constexpr float kStillExact = 0x1p120f;

// As `exponentiate` of a block that is not the first, without looking for maxima. `score_again` puts the scores back
// where their exponentials are too large for fp32; all threads of a warp call it together.
template <int N, typename ScoreAgain>
__device__ inline bool exponentiate_boldly(float (&scores)[N / 2], RowState& rows, float (&decay)[2], float scale,
                                           const ScoreAgain& score_again) {
  const float offset[2] = {-rows.shift[0] * scale, -rows.shift[1] * scale};
  float sum[2][2] = {};
#pragma unroll
  for (int i = 0; i < N / 2; ++i) {
    const int r = i / 2 % 2;
    scores[i] = exp2(fmaf(scores[i], scale, offset[r]));
    sum[r][i % 2] += scores[i];
  }
  const float block[2] = {sum[0][0] + sum[0][1], sum[1][0] + sum[1][1]};
  const auto all_below = [&](float most) { return __all_sync(~0u, block[0] < most && block[1] < most); };  // no NaN
  if (all_below(kMostOfBlock)) {
    rows.sum[0] += block[0], rows.sum[1] += block[1];
    return false;
  }
  if (!all_below(kStillExact)) {
    score_again();
    return exponentiate<N, false>(scores, rows, decay, scale);
  }
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    float most = 1;
#pragma unroll
    for (int i = 0; i < N / 2; ++i) {
      if (i / 2 % 2 == r) most = fmaxf(most, scores[i]);
    }
    most = row_max(most);
    decay[r] = __fdividef(1, most);  // so that the largest is 1, which is rounded to itself
    rows.shift[r] += __fdividef(__log2f(most), scale);
    rows.sum[r] = (rows.sum[r] + block[r]) * decay[r];
  }
#pragma unroll
  for (int i = 0; i < N / 2; ++i) scores[i] *= decay[i / 2 % 2];
  return true;
}

// The exponentials as the first operand of the second product, 16 keys at a time.
template <int N, typename T>
__device__ inline void to_operand(const float (&scores)[N / 2], uint32_t (&weights)[N / 16][4]) {
#pragma unroll
  for (int i = 0; i < N / 4; ++i) weights[i / 4][i % 4] = pack(scores[2 * i], scores[2 * i + 1], T());
}

}  // namespace sfast::attention
